"""Overlap of two label maps: true and false positives and negatives, Dice and IoU of labels or overlapping regions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_calib.metrics.backends import available

Structure = int | tuple[int, ...]
"""What is scored: one label, or the labels whose union is a region (nnU-Net's notation)."""

_SLAB = 1 << 20  # voxels handled at once, so that index arrays stay small beside the label maps


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of one structure; every other number of this module follows from them."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def in_reference(self) -> int:
        """Voxels of the structure in the reference."""
        return self.true_positives + self.false_negatives

    @property
    def in_prediction(self) -> int:
        """Voxels of the structure in the prediction."""
        return self.true_positives + self.false_positives

    @property
    def relative_volume_error(self) -> float:
        """(prediction - reference) / reference, of the volumes; NaN when both are empty, inf when the reference is."""
        if not self.in_reference:
            return float("inf") if self.in_prediction else float("nan")
        return (self.in_prediction - self.in_reference) / self.in_reference

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN), in [0, 1]; NaN when reference and prediction are both empty (as nnU-Net)."""
        return _ratio(2 * self.true_positives, self.in_reference + self.in_prediction)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN), in [0, 1]; NaN when reference and prediction are both empty (as nnU-Net)."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)


def overlaps(
    reference: np.ndarray,
    prediction: np.ndarray,
    structures: Sequence[Structure],
    valid: np.ndarray | None = None,
    *,
    backend: str = "auto",
) -> list[Overlap]:
    """Count the overlap of every structure in one pass over the two label maps.

    The pass fills the joint histogram of labels; a region's counts are sums of its entries, so overlapping regions cost
    nothing extra and no mask of the volume's size is made.

    Args:
        reference: label map, non-negative integers, any shape.
        prediction: label map of the same shape.
        structures: labels, or tuples of labels that form a region.
        valid: bool, same shape: the voxels that count. None: all.
        backend: ``numpy``, ``numba`` (extra ``fast``), or ``auto``: numba if it is installed, else numpy. ``torch``
            is numpy here.

    Returns:
        One ``Overlap`` per structure, in their order, with the definitions of nnU-Net's own evaluation.

    Raises:
        ValueError: the shapes differ, labels (of maps or structures) are negative or no integers, or the backend is
            unknown.
        ImportError: numba is asked for and not installed.
    """
    reference, prediction = label_map(reference), label_map(prediction)
    if reference.shape != prediction.shape or (valid is not None and valid.shape != reference.shape):
        raise ValueError(f"shapes differ: reference {reference.shape}, prediction {prediction.shape}")
    members = [set(labels_of(structure)) for structure in structures]
    values = sorted(set().union(*members))
    joint = _joint_histogram(reference, prediction, values, valid, available(backend))
    total = int(joint.sum())
    counted = []
    for member in members:
        inside = np.array([value in member for value in values] + [False])
        tp, in_reference = int(joint[inside][:, inside].sum()), int(joint[inside].sum())
        in_prediction = int(joint[:, inside].sum())
        counted.append(
            Overlap(tp, in_prediction - tp, in_reference - tp, total - in_reference - in_prediction + tp),
        )
    return counted


def _joint_histogram(
    reference: np.ndarray, prediction: np.ndarray, values: list[int], valid: np.ndarray | None, backend: str
) -> np.ndarray:
    """Voxels by (reference, prediction) index into ``values``; all other labels share the last row and column."""
    size = len(values) + 1
    index = np.full(max([_highest(reference), _highest(prediction), *values]) + 1, len(values), dtype=np.intp)
    index[values] = np.arange(len(values))
    if backend == "numba":
        from nnunet_calib.metrics import overlap_kernels

        every = np.empty(0, dtype=bool) if valid is None else valid.astype(bool, copy=False).reshape(-1)
        return overlap_kernels.joint_counts(reference.reshape(-1), prediction.reshape(-1), every, index, size).reshape(
            size, size
        )
    joint = np.zeros(size * size, dtype=np.int64)
    flat_reference, flat_prediction = reference.reshape(-1), prediction.reshape(-1)
    flat_valid = None if valid is None else valid.reshape(-1)
    for part in _slabs(reference.size):
        ours, theirs = flat_prediction[part], flat_reference[part]
        counts = (ours != 0) | (theirs != 0)  # most voxels are background in both: the rest of the slab
        if flat_valid is not None:
            counts &= flat_valid[part]
        looked_at = np.flatnonzero(counts)
        pairs = index[theirs[looked_at]] * size + index[ours[looked_at]]
        joint += np.bincount(pairs, minlength=size * size)
    joint[index[0] * (size + 1)] += (reference.size if valid is None else np.count_nonzero(valid)) - joint.sum()
    return joint.reshape(size, size)


def _highest(labels: np.ndarray) -> int:
    """The highest label there may be; of types whose every value fits into a table, without a look at the labels."""
    if labels.dtype in (np.uint8, np.uint16):
        return int(np.iinfo(labels.dtype).max)
    return int(labels.max(initial=0))


def _slabs(voxels: int) -> Iterator[slice]:
    return (slice(start, min(start + _SLAB, voxels)) for start in range(0, voxels, _SLAB))


def label_map(labels: np.ndarray) -> np.ndarray:
    """Labels that can be counted and used as indices; a bool mask is label 1, for as an index it would select.

    Raises:
        ValueError: labels are negative or no integers.
    """
    if labels.dtype == bool:
        return labels.view(np.uint8)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"label maps hold integers, not {labels.dtype}")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError("labels must not be negative")
    return labels


def labels_of(structure: Structure) -> tuple[int, ...]:
    """The labels a structure is made of.

    Raises:
        ValueError: one is negative; as an index it would count from the end.
    """
    labels = structure if isinstance(structure, tuple) else (structure,)
    if any(label < 0 for label in labels):
        raise ValueError(f"labels must not be negative; a structure is {structure}")
    return labels


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")
