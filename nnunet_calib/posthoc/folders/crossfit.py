"""What calibration is worth on cases it was not fitted on.

Cases are split into folds; each fold is scored with calibrators fitted on the others. Scores are those of
``nnunet_calib.metrics``, estimated from the weighted samples, per case and then the mean over cases; intervals are from
resampled cases. All methods see the same samples, so they are compared like with like.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_calib.metrics import (
    BINS,
    Bins,
    bin_index,
    expected_calibration_error,
    smallest_complement,
    smallest_probability,
)
from nnunet_calib.metrics.intervals import Bootstrap
from nnunet_calib.posthoc.folders.sampling import REGIONS, CaseSample
from nnunet_calib.posthoc.maps import CALIBRATORS
from nnunet_calib.posthoc.maps.calibrator import Calibrator, log_probabilities, probabilities

NONE = "none"
"""Name of the uncalibrated probabilities in tables."""

SCORES = ("NLL", "Brier", "ECE", "CECE")
FOLDS = 5
_CHOSEN_BY = 40_000  # probabilities of a case
_STORED: np.dtype = np.dtype(np.float32)  # what calibrated probabilities become: NLL clips them as ``evaluate`` does


def fit_samples(calibrator: Calibrator, samples: Sequence[CaseSample], region: str) -> Calibrator:
    """Fit a calibrator to a region of several cases, each of which counts the same however many voxels it has.

    So what is minimised is what ``cross_fit`` and ``evaluate`` report: the mean over cases of a case's mean NLL.

    Raises:
        ValueError: the region has no voxel in any of them.
    """
    multilabel = calibrator.multilabel
    if calibrator.margin:
        patches = [sample.patches for sample in samples if sample.patches is not None]
        return calibrator.fit(
            np.concatenate([log_probabilities(part.probabilities, multilabel=multilabel) for part in patches], axis=1),
            np.concatenate([part.target for part in patches], axis=1 if multilabel else 0),
            weights=np.concatenate([_of_equal_cases(part.regions[region]) for part in patches]),
        )
    inside = [(sample, sample.regions[region]) for sample in samples]
    return fit_cases(
        calibrator,
        [
            (log_probabilities(s.probabilities[:, i], multilabel=multilabel), s.target[..., i], s.weights[i])
            for s, i in inside
            if i.any()
        ],
    )


def fit_cases(calibrator: Calibrator, cases: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Calibrator:
    """Fit to the voxels of several cases, each of which counts the same; choose the penalties of a method that has any.

    Of ``calibrator.choices`` it is the one of smallest NLL on cases left out, the mean over cases, by 40,000
    probabilities of each, drawn at random. Left out are neighbours in the order given: images of one patient, whose
    names are alike, mostly leave together.

    Args:
        calibrator: unfitted.
        cases: of each log p (C, n), the reference's class (n,), or bool (C, n), and weights (n,); not empty.

    Returns:
        The fitted one; not always that given.

    Raises:
        ValueError: no case.
    """
    cases = [case for case in cases if case[2].any()]
    if not cases:
        raise ValueError("no voxel to fit on")
    channels = len(cases[0][0])
    choices = calibrator.choices(len(cases), channels)
    chosen = (
        choices[0] if len(choices) == 1 else _best(choices, [_some(case, _CHOSEN_BY // channels) for case in cases])
    )
    z, y, w = _together(cases)
    return chosen.fit(z, y, weights=w)


def _best(choices: Sequence[Calibrator], cases: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Calibrator:
    losses = np.zeros(len(choices))
    for fold in np.array_split(np.arange(len(cases)), min(FOLDS, len(cases))):
        z, y, w = _together([case for i, case in enumerate(cases) if i not in fold])
        for c, choice in enumerate(choices):
            choice.fit(z, y, weights=w)
            for i in fold:
                left_out, truth, counts = cases[i]
                losses[c] += _log_loss(choice.apply(left_out), truth, counts, choice.multilabel)
    return choices[int(losses.argmin())]


def _some(case: tuple[np.ndarray, np.ndarray, np.ndarray], voxels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A case, or so many of its voxels."""
    z, y, w = case
    if w.size <= voxels:
        return case
    index = np.random.default_rng(0).choice(w.size, voxels, replace=False)
    return z[:, index], y[..., index], w[index]


def _together(cases: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The voxels of all cases, and weights of which every case has the same sum."""
    z, y, w = zip(*cases, strict=True)
    weights = np.concatenate([_of_equal_cases(own) for own in w])
    return np.concatenate(z, axis=1), np.concatenate(y, axis=-1), weights


def _of_equal_cases(weights: np.ndarray) -> np.ndarray:
    """A case's weights with the sum 1; a case without a voxel of the region stays without."""
    total = weights.sum()
    return weights / total if total else weights.astype(np.float64)


def cross_fit(
    samples: Sequence[CaseSample],
    methods: Mapping[str, Callable[[], Calibrator]],
    region: str,
    *,
    multilabel: bool,
    apply_around: Callable[[Calibrator, CaseSample], np.ndarray],
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score every method on cases it did not see, and no calibration on the same.

    Args:
        samples: two cases or more.
        methods: by name, what makes an unfitted calibrator.
        region: voxels to fit on; all regions are scored.
        multilabel: sigmoid regions.
        apply_around: calibrated probabilities (C, n) of a sample by a method that looks at a voxel's surroundings.
        seed: of the folds.
        progress: called after every fit.

    Returns:
        By method and region: ``cases`` (that have the region) and, for each of ``SCORES``, ``mean``, ``low`` and
        ``high``, an interval of 95 %; ``gain`` by name of each other method, likewise for its NLL minus this one's.
    """
    order = np.random.default_rng(seed).permutation(len(samples))
    folds = [fold for fold in np.array_split(order, min(FOLDS, len(samples))) if fold.size]
    found = {name: np.full((len(REGIONS), len(samples), len(SCORES)), np.nan) for name in (NONE, *methods)}
    for fold in folds:
        others = [sample for i, sample in enumerate(samples) if i not in fold]
        fitted: dict[str, Calibrator | None] = {NONE: None}
        for name, make in methods.items():
            fitted[name] = fit_samples(make(), others, region)
            progress()
        for i in fold:
            z = samples[i].log_probabilities(multilabel=multilabel)
            for name, calibrator in fitted.items():
                if calibrator is None:
                    p = probabilities(z, multilabel=multilabel)
                else:
                    p = apply_around(calibrator, samples[i]) if calibrator.margin else calibrator.apply(z)
                for r, part in enumerate(REGIONS):
                    found[name][r, i] = estimates(p, samples[i], part, multilabel)
    return {
        name: {
            part: _summary(values[r], {other: found[other][r, :, 0] for other in found if other != name})
            for r, part in enumerate(REGIONS)
        }
        for name, values in found.items()
    }


def choose(table: Mapping[str, Mapping[str, Mapping[str, Any]]], region: str) -> tuple[str, str]:
    """The method to keep, and why, in a sentence.

    It is the one of smallest cross-fitted NLL in a region, or the first simpler one (in the order of ``CALIBRATORS``)
    than which that one need not be better: with other cases the gain could be none.
    """
    nll = {name: regions[region]["NLL"]["mean"] for name, regions in table.items()}
    raw = nll.pop(NONE)
    best, *others = sorted(nll, key=lambda name: nll[name])
    gain = table[best][region]["gain"]
    order = [name for name in CALIBRATORS if name in nll]
    simpler = next((name for name in order[: order.index(best)] if gain[name]["low"] <= 0), None)
    chosen = simpler or best
    scores = f"NLL ({region}) on cases it was not fitted on: {nll[chosen]:.4f}, {raw:.4f} before"
    if simpler:
        low, high = gain[simpler]["low"], gain[simpler]["high"]
        reason = f"{simpler} is simpler than {best}, of smallest {scores}; {best} {nll[best]:.4f}, a gain that chance "
        reason += f"explains (95 % interval {low:.4f} to {high:.4f})"
    else:
        reason = f"{best} has the smallest {scores}" + (f"; next {others[0]}, {nll[others[0]]:.4f}" if others else "")
    if nll[chosen] >= raw:
        reason += "; that is no gain: do not apply it, the network's own probabilities are as good or better"
    elif table[chosen][region]["gain"][NONE]["low"] <= 0:
        reason += "; with other cases it could be no gain at all"
    return chosen, reason


def estimates(p: np.ndarray, sample: CaseSample, region: str, multilabel: bool) -> list[float]:
    """``SCORES`` of a region of a sample whose probabilities are (C, n); NaN without voxels."""
    inside = sample.regions[region]
    if not inside.any():
        return [np.nan] * len(SCORES)
    p, w, y = p[:, inside], sample.weights[inside], sample.target[..., inside]
    w = w / w.sum()
    truth = y if multilabel else np.arange(len(p))[:, None] == y
    cece = float(np.mean([_binned(*problem, w) for problem in zip(p, truth, strict=True)]))
    squared = np.square(p - truth) @ w
    nll = _log_loss(p, y, w, multilabel)
    if multilabel:
        return [nll, float(squared.mean()), cece, cece]
    return [nll, float(squared.sum()), _binned(p.max(axis=0), p.argmax(axis=0) == y, w), cece]


def _log_loss(p: np.ndarray, y: np.ndarray, w: np.ndarray, multilabel: bool) -> float:
    """NLL of probabilities (C, n) of classes (n,), or the mean over regions of that of bool (C, n); weights (n,)."""
    least, least_other = smallest_probability(_STORED), smallest_complement(_STORED)
    if multilabel:
        of_truth = np.where(y, np.maximum(p, least), np.maximum(1 - p, least_other))
    else:
        of_truth = np.maximum(p[y, np.arange(y.size)], least)
    return -float((np.log(of_truth) @ w).mean() / w.sum())


def _binned(confidence: np.ndarray, correct: np.ndarray, w: np.ndarray) -> float:
    cell = bin_index(confidence)
    counts = (np.bincount(cell, weights=part, minlength=BINS) for part in (w, w * confidence, w * correct))
    return float(expected_calibration_error(Bins(*counts)))


def _summary(values: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means over cases (cases, SCORES), of gains over the NLL of other methods too, and their intervals."""
    columns = np.column_stack([values, *(nll - values[:, 0] for nll in others.values())])
    found = Bootstrap.of_means(columns)
    rows = [
        {"mean": float(mean), "low": low, "high": high}
        for mean, (low, high) in zip(found.estimate, found.intervals(), strict=True)
    ]
    scores = dict(zip(SCORES, rows[: len(SCORES)], strict=True))
    return {"cases": int(found.known[0])} | scores | {"gain": dict(zip(others, rows[len(SCORES) :], strict=True))}
