"""Is a calibrator used far from where it was fitted? Told from confidences alone, without references.

Compared are shares of the predicted foreground by confidence, the mean over the new cases with that over the cases of
the fit, by the population stability index

    PSI = sum_k (a_k - b_k) log(a_k / b_k)

How large it is without any shift is found by splitting the cases of the fit at random, as many times as it takes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import read_json
from nnunet_calib.posthoc.folders.apply import open_predictions
from nnunet_calib.posthoc.folders.sampling import CONFIDENCE_BINS, confidences_of
from nnunet_calib.posthoc.maps.calibrator import file_of

USUAL_LIMIT = 0.25
"""PSI from which a shift is called large, by a rule of thumb; used where the fit had too few cases to say."""

_FEW = 4  # cases of the fit below which splitting them says nothing
_SPLITS = 1000
_LEVEL = 0.95
_EMPTY = 1e-4  # share given to an empty bin


def population_stability(a: np.ndarray, b: np.ndarray) -> float:
    """PSI of two sets of shares (bins,) that each add up to one; 0 for the same, and symmetric."""
    a, b = (np.maximum(shares, _EMPTY) / np.maximum(shares, _EMPTY).sum() for shares in (a, b))
    return float(((a - b) * np.log(a / b)).sum())


def largest_without_shift(cases: np.ndarray, new: int) -> float:
    """PSI that 95 % of random splits of the fit's cases stay below.

    Args:
        cases: float (cases, bins), shares of each.
        new: how many cases are to be compared with them; a split's part has as many, or half of all.
    """
    if len(cases) < _FEW:
        return USUAL_LIMIT
    part = min(new, len(cases) // 2)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_SPLITS):
        order = rng.permutation(len(cases))
        found.append(population_stability(cases[order[:part]].mean(axis=0), cases[order[part:]].mean(axis=0)))
    return float(np.quantile(found, _LEVEL))


def check_shift(fitted: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compare confidences of new cases with those of the fit.

    Args:
        fitted: shares by confidence, by case.
        new: likewise; cases without any predicted foreground have NaN and are left out.

    Returns:
        ``psi`` and ``limit``, how large it is by chance; ``shifted`` (psi above the limit); ``confidence``, the mean
        of the new cases, and ``fit_confidence``, exact to half a bin; ``cases`` (PSI of each new case) and
        ``case_limit``, how large that of a single case is by chance; ``left_out``.
    """
    cases = np.stack(list(fitted.values()))
    usable = {name: shares for name, shares in new.items() if not np.isnan(shares).any()}
    usual = cases.mean(axis=0)
    found = {
        "psi": float("inf"),
        "limit": USUAL_LIMIT,
        "shifted": True,
        "confidence": float("nan"),
        "fit_confidence": _mean_confidence(usual),
        "cases": {name: population_stability(shares, usual) for name, shares in usable.items()},
        "case_limit": largest_without_shift(cases, 1),
        "left_out": sorted(new.keys() - usable.keys()),
    }
    if usable:
        mean = np.stack(list(usable.values())).mean(axis=0)
        psi, limit = population_stability(mean, usual), largest_without_shift(cases, len(usable))
        found |= {"psi": psi, "limit": limit, "shifted": psi > limit, "confidence": _mean_confidence(mean)}
    return found


def _are_shares(shares: np.ndarray) -> bool:
    """Whether they are shares of bins: not negative, and of sum 1."""
    return shares.shape == (CONFIDENCE_BINS,) and bool((shares >= 0).all()) and abs(shares.sum() - 1) < 1e-6


def _mean_confidence(shares: np.ndarray) -> float:
    return float(shares @ ((np.arange(shares.size) + 0.5) / shares.size))


def check_folder(
    calibrator_file: str | Path,
    predictions: str | Path,
    dataset_json: str | Path | None = None,
    *,
    model: str | Path | None = None,
    any_model: bool = False,
) -> dict[str, Any]:
    """``check_shift`` for a folder of predictions with probabilities; no references are needed.

    Args:
        calibrator_file: from ``fit_folder``.
        predictions: label maps and probabilities.
        dataset_json: found in or near the predictions if None.
        model: as for ``apply_folder``.
        any_model: as for ``apply_folder``.

    Returns:
        As ``check_shift``, and ``without_probabilities``: names of the cases that have none.

    Raises:
        UsageError: there is no such folder.
        InputError: files that cannot be used, a calibrator of another model, or one whose file does not know its cases'
            confidences.
    """
    given = open_predictions(calibrator_file, predictions, dataset_json, model=model, any_model=any_model)
    file = file_of(calibrator_file)
    try:
        known = {name: np.array(v, dtype=float) for name, v in read_json(file)["confidences"]["cases"].items()}
        if not known or not all(_are_shares(shares) for shares in known.values()):
            raise ValueError
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: does not hold the confidences of the cases it was fitted to; fit it again"
        ) from error
    cases = tqdm(given.cases, desc="check", unit="case")
    new = {case.name: confidences_of(case, given.calibration.dataset, given.reader) for case in cases}
    return check_shift(known, new) | {"without_probabilities": given.without_probabilities}
