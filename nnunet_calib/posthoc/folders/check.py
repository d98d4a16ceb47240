"""Is a calibrator used far from where it was fitted? Told from confidences alone, without references.

Compared are shares of the predicted foreground by confidence, of new cases with those of the fit, by the population
stability index

    PSI = sum_k (a_k - b_k) log(a_k / b_k)

How large it is without any shift is not a constant: it depends on how much cases differ from each other, and on how
many there are. So both verdicts are permutation tests, whose level holds for any distribution and number of cases as
long as new cases and those of the fit are exchangeable, which is what "like those of the fit" means:

- one case: how far it lies from the mean of the fit's cases, ranked among how far each of these lies from the mean of
  the others and it (full conformal prediction; Vovk et al., Algorithmic learning in a random world, 2005);
- all new cases: the PSI of the two means, and how far each new case lies from all others, ranked among those of other
  divisions of all cases into as many (Pesarin, Multivariate permutation tests, 2001, for the smaller of two p-values).
"""

import itertools
import math
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

LEVEL = 0.05
"""Share of cases like those of the fit, and of folders of them, that are called unlike them; at most."""

FEWEST = math.ceil(1 / LEVEL) - 1
"""Cases of the fit without which no single case can be told from them at that level."""

_DIVISIONS = 1999  # and the one that is judged
_ROUNDING = 1e-9  # relative: sums in another order are the same number
_EMPTY = 1e-4  # share given to an empty bin


def population_stability(a: np.ndarray, b: np.ndarray) -> Any:
    """PSI of two sets of shares (..., bins) that each add up to one; 0 for the same, and symmetric."""
    a, b = (_filled(shares) for shares in (a, b))
    return ((a - b) * np.log(a / b)).sum(axis=-1)


def case_p_value(fitted: np.ndarray, new: np.ndarray) -> float:
    """Probability that of exchangeable cases one lies as far from the others as the new case does, or farther.

    Args:
        fitted: float (cases, bins), shares of each case of the fit.
        new: float (bins,).

    Returns:
        A multiple of 1 / (cases + 1).
    """
    distances = _from_the_others(np.concatenate([fitted, new[None]]))
    return float((distances >= distances[-1]).mean())


def cases_p_value(fitted: np.ndarray, new: np.ndarray) -> float:
    """Probability of as large a difference between as many exchangeable cases, in their mean or from case to case.

    Args:
        fitted: float (cases, bins), shares of each case of the fit.
        new: float (m, bins).
    """
    every = np.concatenate([new, fitted])
    chosen = _divisions(len(new), len(every))
    shares = chosen / len(new), ~chosen / len(fitted)
    of_means = population_stability(*(part @ every for part in shares))
    of_cases = shares[0] @ _from_the_others(every)
    smallest = np.minimum(_ranked(of_means), _ranked(of_cases))
    return float((smallest <= smallest[0] + _ROUNDING).mean())


def _filled(shares: np.ndarray) -> np.ndarray:
    filled = np.maximum(shares, _EMPTY)
    return filled / filled.sum(axis=-1, keepdims=True)


def _from_the_others(cases: np.ndarray) -> np.ndarray:
    """PSI of each case (cases, bins) and the mean of all others."""
    return population_stability(cases, (cases.sum(axis=0) - cases) / (len(cases) - 1))


def _divisions(new: int, every: int) -> np.ndarray:
    """Bool (divisions, every): which are called new. The first is the true one; all there are, if not too many."""
    if math.comb(every, new) <= _DIVISIONS + 1:
        which = np.array(list(itertools.combinations(range(every), new)))
    else:
        rng = np.random.default_rng(0)
        drawn = rng.random((_DIVISIONS, every)).argpartition(new - 1, axis=1)[:, :new]
        which = np.concatenate([np.arange(new)[None], drawn])
    chosen = np.zeros((len(which), every), dtype=bool)
    np.put_along_axis(chosen, which, True, axis=1)
    return chosen


def _ranked(values: np.ndarray) -> np.ndarray:
    """Of each value, the share of all that are as large or larger, but for rounding."""
    order = np.sort(values)
    return 1 - np.searchsorted(order, values - _ROUNDING * (1 + np.abs(values)), side="left") / len(values)


def check_shift(fitted: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compare confidences of new cases with those of the fit.

    Args:
        fitted: shares by confidence, by case.
        new: likewise; cases without any predicted foreground have NaN and are left out.

    Returns:
        ``shifted``: the new cases, taken together, are unlike those of the fit; ``p``, of `cases_p_value`, and ``psi``,
        of the two means; ``confidence``, the mean of the new cases, and ``fit_confidence``, exact to half a bin;
        ``cases``: of each new case ``psi``, ``p`` (`case_p_value`) and ``unlike``; ``fit_cases``, how many there are;
        ``left_out``. Without a case to compare ``shifted`` is true, ``p`` and ``psi`` are NaN.
    """
    cases = np.stack(list(fitted.values()))
    usable = {name: shares for name, shares in new.items() if not np.isnan(shares).any()}
    usual = cases.mean(axis=0)
    judged = {name: case_p_value(cases, shares) for name, shares in usable.items()}
    found = {
        "shifted": True,
        "p": float("nan"),
        "psi": float("nan"),
        "confidence": float("nan"),
        "fit_confidence": _mean_confidence(usual),
        "cases": {
            name: {
                "psi": float(population_stability(shares, usual)),
                "p": judged[name],
                "unlike": judged[name] <= LEVEL,
            }
            for name, shares in usable.items()
        },
        "fit_cases": len(cases),
        "left_out": sorted(new.keys() - usable.keys()),
    }
    if usable:
        together = np.stack(list(usable.values()))
        mean, p = together.mean(axis=0), cases_p_value(cases, together)
        psi = float(population_stability(mean, usual))
        found |= {"shifted": p <= LEVEL, "p": p, "psi": psi, "confidence": _mean_confidence(mean)}
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
