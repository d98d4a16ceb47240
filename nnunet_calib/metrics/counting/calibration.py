"""Calibration and proper scores of a segmentation's probabilities, from statistics gathered in one pass.

``calibration_statistics`` reads the class probabilities once, an array slab by slab or channels one at a time, so a
volume's probabilities never need to be in memory together; ``scores`` turns its result, or any sum of results, into
numbers:

    label models    p_c over exclusive classes, y_c = [reference = c]
        ECE         of the top label: confidence max_c p_c, correct where argmax_c p_c is the reference label
        ACE, MCE, overconfidence, underconfidence    of the same bins
        AdaptiveECE, AURC    of the same confidences in their order (``ranked``); as many equal-mass bins as equal-width
        CECE        mean over ALL classes, background included, of the binary ECE of (p_c, y_c)
        TCECE       the same without the voxels of each class where p_c <= 1e-3, with weights relative to what is left;
                    a class of which nothing is left adds 0 to the mean (Liu et al., CRaC; its own number is NaN)
        Brier       mean over voxels of sum_c (p_c - y_c)^2, in [0, 2]
        NLL         mean over voxels of -log p_y, nats
    region models   one binary problem (p_r, y_r) per region, y_r = [reference label in region r]
        ECE, ACE, MCE, overconfidence, underconfidence, CECE, TCECE, Brier (mean of (p_r - y_r)^2), NLL (binary): the
        mean over regions; AdaptiveECE, AURC: likewise, of the decision p_r > 1/2 with confidence max(p_r, 1 - p_r)

A probability of 0 would make NLL infinite, though it only says that the stored number type ended: p is clipped below at
the smallest positive number of its type (``smallest_probability``), 1 - p at the spacing of the type below 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_calib.metrics.backends import available
from nnunet_calib.metrics.counting.bins import (
    BINS,
    MAX_BINS,
    Bins,
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    overconfidence,
    underconfidence,
)
from nnunet_calib.metrics.counting.gather import Counting, Tally, Volume, gather
from nnunet_calib.metrics.counting.gather_numpy import NumpyCounting
from nnunet_calib.metrics.counting.ranked import adaptive_calibration_error, area_under_risk_coverage
from nnunet_calib.metrics.overlap import Structure

THRESHOLD = 1e-3
"""Probabilities up to it are left out of TCECE, unless said otherwise."""

_SUM_TOLERANCE = 5e-3  # of the sum over classes; rounding to float16 of many classes takes less


@dataclass(frozen=True)
class CalibrationStatistics:
    """Sufficient statistics of a set of voxels; ``a + b`` are the statistics of both sets together.

    Attributes:
        voxels: how many voxels.
        classes: ``Bins`` of shape (C, B): the binary problem of every class or region.
        squared_error: float64 (C,), sum over voxels of (p_c - y_c)^2.
        log_loss: float64 (C,), nats. Label models: sum of -log p_c over the voxels whose label is c. Region models: sum
            over all voxels of the binary -y log p - (1 - y) log(1 - p).
        top: ``Bins`` of shape (B,) of the top label; None for region models.
        negligible: ``Bins`` of shape (C, K): the voxels of the first K bins of ``classes`` with p <= ``threshold``.
        ranked: ``Bins`` by ``confidence_cell``: of the top label, (cells,); of every region's decision, (C, cells).
        threshold: of ``negligible``.
    """

    voxels: int
    classes: Bins
    squared_error: np.ndarray
    log_loss: np.ndarray
    top: Bins | None
    negligible: Bins
    ranked: Bins
    threshold: float = THRESHOLD

    def __add__(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """The statistics of both sets of voxels together."""
        if (
            (self.top is None) != (other.top is None)
            or self.classes.n.shape != other.classes.n.shape
            or self.threshold != other.threshold
        ):
            raise ValueError("statistics of different classes, bins, thresholds or kinds of model do not add up")
        return CalibrationStatistics(
            self.voxels + other.voxels,
            self.classes + other.classes,
            self.squared_error + other.squared_error,
            self.log_loss + other.log_loss,
            None if self.top is None or other.top is None else self.top + other.top,
            self.negligible + other.negligible,
            self.ranked + other.ranked,
            self.threshold,
        )

    def above_threshold(self) -> Bins:
        """``Bins`` (C, B) of the voxels of each class with p > ``threshold``."""
        kept = Bins(self.classes.n.copy(), self.classes.confidence.copy(), self.classes.correct.copy())
        first = self.negligible.n.shape[-1]
        kept.n[:, :first] -= self.negligible.n
        kept.confidence[:, :first] -= self.negligible.confidence
        kept.correct[:, :first] -= self.negligible.correct
        return kept


def calibration_statistics(
    channels: Iterable[np.ndarray],
    reference: np.ndarray,
    classes: Sequence[Structure],
    masks: Mapping[str, np.ndarray],
    *,
    bins: int = BINS,
    multilabel: bool = False,
    threshold: float = THRESHOLD,
    backend: str = "auto",
    device: str = "cpu",
    threads: int = 1,
) -> tuple[dict[str, CalibrationStatistics], np.ndarray | None]:
    """Gather the statistics of one volume, for several sets of its voxels at once.

    Args:
        channels: the probabilities of one class each, in the order of ``classes``: float arrays of the reference's
            shape, values in [0, 1]. An array (C, *S), or a generator that reads them from disk. With the torch backend
            also tensors.
        reference: label map (*S), non-negative integers.
        classes: the label, or tuple of labels, that each channel predicts.
        masks: by name, bool (*S): the voxels of each set. Voxels in no set (ignored ones) are never looked at.
        bins: number of equal-width bins, 1 to 1000.
        multilabel: the channels are sigmoid regions, which may overlap, not exclusive classes.
        threshold: p up to it, in [0, 1), is left out of TCECE; it is rounded to the probabilities' type.
        backend: "numpy", "numba" (extra ``fast``) or "torch"; "auto" is numba where it is installed, else numpy. All
            give the same numbers up to the order of float64 sums.
        device: where the torch backend counts.
        threads: of the numpy and numba backends, over voxels.

    Returns:
        The statistics by name, and the index of the largest channel per voxel (*S), the first of equals, as
        ``numpy.argmax``; None if ``multilabel``.

    Raises:
        ValueError: shapes that do not fit, too many or too few channels, more than 8 masks, values that are no
            probabilities, labels that are negative or no integers, an option outside its range.
        ImportError: numba is asked for and not installed.
    """
    if not (1 <= bins <= MAX_BINS and 0 <= threshold < 1):
        raise ValueError(f"between 1 and {MAX_BINS} bins and a threshold in [0, 1), not {bins} and {threshold}")
    volume = Volume(reference, classes, masks, multilabel)
    if (backend := available(backend)) == "torch":
        from nnunet_calib.metrics.counting.gather_torch import gather_on

        tally, top = gather_on(device, channels, volume, bins, threshold)
    else:
        tally, top = gather(channels, volume, _counting(backend), bins, threshold, threads)
    return {name: _of(tally, codes, multilabel, threshold) for name, codes in volume.members.items()}, top


def calibration_scores(
    probabilities: np.ndarray,
    reference: np.ndarray,
    classes: Sequence[Structure] | None = None,
    *,
    mask: np.ndarray | None = None,
    bins: int = BINS,
    multilabel: bool = False,
    threshold: float = THRESHOLD,
) -> dict[str, Any]:
    """Every calibration number of one array of probabilities.

    Args:
        probabilities: float (C, *S), values in [0, 1].
        reference: label map (*S), non-negative integers.
        classes: the label, or tuple of labels, that each channel predicts; None: 0 to C - 1.
        mask: bool (*S): the voxels that count. None: all.
        bins: number of equal-width bins.
        multilabel: the channels are sigmoid regions, which may overlap, not exclusive classes.
        threshold: p up to it is left out of TCECE.

    Returns:
        As ``scores``; classes are named by ``str`` of the label or tuple.

    Raises:
        ValueError: as ``calibration_statistics``; or exclusive classes whose probabilities do not add up to 1.
    """
    classes = range(len(probabilities)) if classes is None else classes
    masks = {"it": np.ones(reference.shape, dtype=bool) if mask is None else mask}
    if not multilabel and (sums := np.asarray(np.sum(probabilities, axis=0, dtype=np.float32))[masks["it"]]).size:
        lowest, highest = float(sums.min()), float(sums.max())
        if max(abs(lowest - 1), abs(highest - 1)) > _SUM_TOLERANCE:
            raise ValueError(
                f"the probabilities of a voxel add up to {lowest:.4g} to {highest:.4g}, not to 1, as those of classes "
                "that exclude each other do; sigmoids are multilabel"
            )
    options: dict[str, Any] = {"bins": bins, "multilabel": multilabel, "threshold": threshold}
    statistics, _ = calibration_statistics(probabilities, reference, classes, masks, **options)
    return scores(statistics["it"], [str(structure) for structure in classes])


def scores(statistics: CalibrationStatistics, classes: Sequence[str]) -> dict[str, Any]:
    """Every number of this module, as the module's docstring defines them.

    Args:
        statistics: of one volume, or the sum over many.
        classes: names of the classes or regions, in the order of the channels.

    Returns:
        ``ECE, CECE, TCECE, ACE, AdaptiveECE, MCE, overconfidence, underconfidence, Brier, NLL, AURC`` (float; NaN
        without voxels), ``n`` (voxels) and ``classes``: for each name the binary ``ECE, TECE`` (above the threshold;
        NaN if nothing is), ``ACE, MCE, overconfidence, underconfidence, Brier``, the ``NLL`` (label models: of the
        voxels whose label it is) and ``n`` (voxels of the class in the reference).
    """
    per_class = {
        "ECE": expected_calibration_error(statistics.classes),
        "TECE": expected_calibration_error(statistics.above_threshold()),
        "ACE": average_calibration_error(statistics.classes),
        "MCE": maximum_calibration_error(statistics.classes),
        "overconfidence": overconfidence(statistics.classes),
        "underconfidence": underconfidence(statistics.classes),
        "Brier": _mean(statistics.squared_error, statistics.voxels),
    }
    positives = statistics.classes.correct.sum(axis=-1)
    of_class = {name: {key: float(value[c]) for key, value in per_class.items()} for c, name in enumerate(classes)}
    for c, name in enumerate(classes):
        counted = int(positives[c]) if statistics.top is not None else statistics.voxels
        of_class[name] |= {"NLL": float(_mean(statistics.log_loss[c], counted)), "n": int(positives[c])}
    if statistics.top is None:
        overall = {key: float(value.mean()) for key, value in per_class.items()}
        overall["NLL"] = float(_mean(statistics.log_loss.mean(), statistics.voxels))
    else:
        overall = {
            "ECE": float(expected_calibration_error(statistics.top)),
            "ACE": float(average_calibration_error(statistics.top)),
            "MCE": float(maximum_calibration_error(statistics.top)),
            "overconfidence": float(overconfidence(statistics.top)),
            "underconfidence": float(underconfidence(statistics.top)),
            "Brier": float(_mean(statistics.squared_error.sum(), statistics.voxels)),
            "NLL": float(_mean(statistics.log_loss.sum(), statistics.voxels)),
        }
    overall["CECE"] = float(per_class["ECE"].mean())
    overall["TCECE"] = float(np.nan_to_num(per_class["TECE"]).mean()) if statistics.voxels else float("nan")
    bins = statistics.classes.n.shape[-1]
    overall["AdaptiveECE"] = float(adaptive_calibration_error(statistics.ranked, bins).mean())
    overall["AURC"] = float(area_under_risk_coverage(statistics.ranked).mean())
    return {**{key: overall[key] for key in SCORES}, "n": statistics.voxels, "classes": of_class}


SCORES = (
    *("ECE", "CECE", "TCECE", "ACE", "AdaptiveECE", "MCE", "overconfidence", "underconfidence"),
    *("Brier", "NLL", "AURC"),
)
"""The overall numbers of ``scores``, in its order."""


def _counting(backend: str) -> Counting:
    if backend == "numpy":
        return NumpyCounting()
    from nnunet_calib.metrics.counting.gather_numba import NumbaCounting

    return NumbaCounting()


def _of(tally: Tally, codes: np.ndarray, multilabel: bool, threshold: float) -> CalibrationStatistics:
    """Statistics of the voxels whose code is among ``codes`` (bool by code)."""
    classes, ranked = _merged(tally.classes, codes), _merged(tally.ranked, codes)
    return CalibrationStatistics(
        int(classes.n[0].sum()),
        classes,
        tally.squared_error[:, codes].sum(axis=1),
        tally.log_loss[:, codes].sum(axis=1),
        None if multilabel else _merged(tally.top, codes),
        _merged(tally.negligible, codes),
        ranked,
        threshold,
    )


def _merged(bins: Bins, codes: np.ndarray) -> Bins:
    """Bins (..., codes, B) summed over some codes."""
    return Bins(*(part[..., codes, :].sum(axis=-2) for part in (bins.n, bins.confidence, bins.correct)))


def _mean(total: Any, count: int) -> Any:
    return total / count if count else total * np.nan
