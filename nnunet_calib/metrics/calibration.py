"""Calibration and proper scores of a segmentation's probabilities, from statistics gathered in one pass.

``calibration_statistics`` reads the class probabilities one channel at a time, so a volume's probabilities never need
to be in memory together; ``scores`` turns its result, or any sum of results, into numbers:

    label models    p_c over exclusive classes, y_c = [reference = c]
        ECE         of the top label: confidence max_c p_c, correct where argmax_c p_c is the reference label
        ACE, MCE    of the same bins
        CECE        mean over ALL classes, background included, of the binary ECE of (p_c, y_c)
        Brier       mean over voxels of sum_c (p_c - y_c)^2, in [0, 2]
        NLL         mean over voxels of -log p_y, nats
    region models   one binary problem (p_r, y_r) per region, y_r = [reference label in region r]
        ECE, ACE, MCE, CECE, Brier (mean of (p_r - y_r)^2), NLL (binary): the mean over regions

A probability of 0 would make NLL infinite, though it only says that the stored number type ended: p is clipped below at
the smallest positive number of its type (``smallest_probability``), 1 - p at the spacing of the type below 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_calib.metrics.binning import (
    BINS,
    Bins,
    average_calibration_error,
    bin_index,
    expected_calibration_error,
    maximum_calibration_error,
)
from nnunet_calib.metrics.overlap import Structure

_SLAB = 1 << 18  # voxels handled at once: the float64 copies stay in the processor's cache
_MAX_REGIONS = 8  # one bit each of a uint8


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
    """

    voxels: int
    classes: Bins
    squared_error: np.ndarray
    log_loss: np.ndarray
    top: Bins | None

    def __add__(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """The statistics of both sets of voxels together."""
        if (self.top is None) != (other.top is None) or self.classes.n.shape != other.classes.n.shape:
            raise ValueError("statistics of different classes, bins or kinds of model do not add up")
        return CalibrationStatistics(
            self.voxels + other.voxels,
            self.classes + other.classes,
            self.squared_error + other.squared_error,
            self.log_loss + other.log_loss,
            None if self.top is None or other.top is None else self.top + other.top,
        )


def smallest_probability(dtype: np.dtype) -> float:
    """Where NLL clips p: the smallest positive number of a float type (float16: 2^-24; float32: 2^-126, normal)."""
    return float(np.finfo(dtype).smallest_subnormal if dtype == np.float16 else np.finfo(dtype).tiny)


def calibration_statistics(
    channels: Iterable[np.ndarray],
    reference: np.ndarray,
    classes: Sequence[Structure],
    masks: Mapping[str, np.ndarray],
    *,
    bins: int = BINS,
    multilabel: bool = False,
) -> tuple[dict[str, CalibrationStatistics], np.ndarray | None]:
    """Gather the statistics of one volume, for several sets of its voxels at once.

    Args:
        channels: the probabilities of one class each, in the order of ``classes``: float arrays of the reference's
            shape, values in [0, 1]. An array (C, *S), or a generator that reads them from disk.
        reference: label map (*S), non-negative integers.
        classes: the label, or tuple of labels, that each channel predicts.
        masks: by name, bool (*S): the voxels of each set. Voxels in no set (ignored ones) are never looked at.
        bins: number of equal-width bins.
        multilabel: the channels are sigmoid regions, which may overlap, not exclusive classes.

    Returns:
        The statistics by name, and the index of the largest channel per voxel (*S), the first of equals, as
        ``numpy.argmax``; None if ``multilabel``.

    Raises:
        ValueError: shapes that do not fit, too many or too few channels.
    """
    sets = _VoxelSets(masks, reference.shape)
    of_class = _membership(classes, reference)
    gathered = _Gathered(len(classes), sets.codes, bins)
    largest = np.full(reference.size, -1.0, dtype=np.float16)  # takes the channels' type with the first of them
    top = np.zeros(reference.size, dtype=np.min_scalar_type(len(classes)))
    labels = reference.reshape(-1)
    seen = 0
    for channel in channels:
        if seen == len(classes) or channel.shape != reference.shape:
            raise ValueError(f"channel {seen}, {channel.shape}, does not fit {len(classes)} of {reference.shape}")
        probability = channel.reshape(-1)
        for part, voxels in sets.slabs():
            p = probability[part][voxels].astype(np.float64)
            y = of_class[seen][labels[part][voxels]]
            gathered.add_class(seen, sets.code[part][voxels], p, y, channel.dtype, binary=multilabel)
        if not multilabel:
            larger = probability > largest
            top[larger] = seen
            largest = np.maximum(probability, largest)
        seen += 1
    if seen != len(classes):
        raise ValueError(f"{seen} channels for {len(classes)} classes")
    if multilabel:
        return {name: gathered.of(members, None) for name, members in sets.members.items()}, None
    by_code = gathered.empty_bins()
    for part, voxels in sets.slabs():
        chosen = top[part][voxels]
        hit = of_class[chosen, labels[part][voxels]]
        by_code += gathered.count(sets.code[part][voxels], largest[part][voxels].astype(np.float64), hit)
    statistics = {name: gathered.of(members, by_code) for name, members in sets.members.items()}
    return statistics, top.reshape(reference.shape)


def scores(statistics: CalibrationStatistics, classes: Sequence[str]) -> dict[str, Any]:
    """Every number of this module, as the module's docstring defines them.

    Args:
        statistics: of one volume, or the sum over many.
        classes: names of the classes or regions, in the order of the channels.

    Returns:
        ``ECE, CECE, ACE, MCE, Brier, NLL`` (float; NaN without voxels), ``n`` (voxels) and ``classes``: for each name
        the binary ``ECE, ACE, MCE, Brier``, the ``NLL`` (label models: of the voxels whose label it is) and ``n``
        (voxels of the class in the reference).
    """
    per_class = {
        "ECE": expected_calibration_error(statistics.classes),
        "ACE": average_calibration_error(statistics.classes),
        "MCE": maximum_calibration_error(statistics.classes),
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
            "Brier": float(_mean(statistics.squared_error.sum(), statistics.voxels)),
            "NLL": float(_mean(statistics.log_loss.sum(), statistics.voxels)),
        }
    overall["CECE"] = float(per_class["ECE"].mean())
    ordered = {key: overall[key] for key in ("ECE", "CECE", "ACE", "MCE", "Brier", "NLL")}
    return {**ordered, "n": statistics.voxels, "classes": of_class}


class _VoxelSets:
    """Overlapping sets of voxels as one bit pattern per voxel, so that one pass serves all of them."""

    def __init__(self, masks: Mapping[str, np.ndarray], shape: tuple[int, ...]):
        if not 0 < len(masks) <= _MAX_REGIONS:
            raise ValueError(f"between 1 and {_MAX_REGIONS} masks, not {len(masks)}")
        self.code = np.zeros(int(np.prod(shape)), dtype=np.uint8)
        for bit, (name, mask) in enumerate(masks.items()):
            if mask.shape != shape:
                raise ValueError(f"mask {name!r} has shape {mask.shape}, the reference {shape}")
            self.code |= mask.reshape(-1).astype(np.uint8) << np.uint8(bit)
        self.codes = 1 << len(masks)
        patterns = np.arange(self.codes)
        self.members = {name: (patterns >> bit & 1).astype(bool) for bit, name in enumerate(masks)}

    def slabs(self):
        """Slices of the flat volume, each with the index of the voxels that belong to any set."""
        for start in range(0, self.code.size, _SLAB):
            part = slice(start, start + _SLAB)
            inside = self.code[part] != 0
            if inside.any():
                yield part, slice(None) if inside.all() else inside


class _Gathered:
    """Running sums per bit pattern of the voxel sets."""

    def __init__(self, classes: int, codes: int, bins: int):
        self._bins, self._codes = bins, codes
        self._n = np.zeros((classes, codes, bins), dtype=np.int64)
        self._confidence = np.zeros((classes, codes, bins))
        self._correct = np.zeros((classes, codes, bins), dtype=np.int64)
        self._squared_error = np.zeros((classes, codes))
        self._log_loss = np.zeros((classes, codes))

    def add_class(
        self, c: int, code: np.ndarray, p: np.ndarray, y: np.ndarray, dtype: np.dtype, *, binary: bool
    ) -> None:
        """Add voxels of class ``c``: pattern, probability (float64), truth (bool), and the type p was stored in."""
        counted = self.count(code, p, y)
        self._n[c] += counted.n
        self._confidence[c] += counted.confidence
        self._correct[c] += counted.correct
        self._squared_error[c] += np.bincount(code, weights=np.square(p - y), minlength=self._codes)
        surprise = -np.log(np.maximum(p[y], smallest_probability(dtype)))
        self._log_loss[c] += np.bincount(code[y], weights=surprise, minlength=self._codes)
        if binary:
            surprise = -np.log(np.maximum(1 - p[~y], float(np.finfo(dtype).epsneg)))
            self._log_loss[c] += np.bincount(code[~y], weights=surprise, minlength=self._codes)

    def of(self, members: np.ndarray, top: Bins | None) -> CalibrationStatistics:
        """Statistics of the voxels whose pattern is among ``members`` (bool per pattern); ``top`` is by pattern."""
        classes = Bins(*(part[:, members].sum(axis=1) for part in (self._n, self._confidence, self._correct)))
        if top is not None:
            top = Bins(*(part[members].sum(axis=0) for part in (top.n, top.confidence, top.correct)))
        return CalibrationStatistics(
            int(classes.n[0].sum()),
            classes,
            self._squared_error[:, members].sum(axis=1),
            self._log_loss[:, members].sum(axis=1),
            top,
        )

    def empty_bins(self) -> Bins:
        """Nothing counted yet, by pattern."""
        shape = (self._codes, self._bins)
        return Bins(np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape, dtype=np.int64))

    def count(self, code: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> Bins:
        """One binary problem, by pattern: confidence (float64) and outcome (bool) of each voxel."""
        cell = code.astype(np.intp) * self._bins + bin_index(confidence, self._bins)
        size, shape = self._codes * self._bins, (self._codes, self._bins)
        return Bins(
            np.bincount(cell, minlength=size).reshape(shape),
            np.bincount(cell, weights=confidence, minlength=size).reshape(shape),
            np.bincount(cell[correct], minlength=size).reshape(shape),
        )


def _membership(classes: Sequence[Structure], reference: np.ndarray) -> np.ndarray:
    """Bool (C, largest label + 1): whether a label belongs to a class."""
    lowest, highest = (int(reference.min()), int(reference.max())) if reference.size else (0, 0)
    if lowest < 0:
        raise ValueError("labels must not be negative")
    members = [np.atleast_1d(np.array(structure)) for structure in classes]
    table = np.zeros((len(classes), max(highest, *(int(m.max()) for m in members)) + 1), dtype=bool)
    for row, member in zip(table, members, strict=True):
        row[member] = True
    return table


def _mean(total: Any, count: int) -> Any:
    return total / count if count else total * np.nan
