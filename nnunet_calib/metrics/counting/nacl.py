"""ECE and CECE as the code of MarginLoss and NACL measures them, so that published tables can be matched.

Their ``calibrate/evaluation`` (github.com/by-liu/MbLS, github.com/Bala93/MarginLoss) takes one volume at a time and
averages over volumes. Its particulars, all kept here:

* Only voxels whose REFERENCE is foreground count. What is predicted in the background is never looked at; background
  may still be the wrong prediction of a foreground voxel.
* Bins are (lo, hi] with the edges linspace(0, 1, B + 1) of float32, as torch computes them: against [k/B, (k+1)/B) this
  moves the voxels on an edge, and a p of exactly 0 falls into no bin (it still counts in n).
* CECE is the mean over the classes 0 ... L, where L is the largest label IN THIS VOLUME: class 0 is never true and adds
  its mean p_0; classes above L are left out, so that the number of classes changes with the volume.

The authors round each volume's numbers to 4 digits before they average; that is left to the caller. Their float32 means
are float64 here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nnunet_calib.metrics.counting.bins import BINS, Bins, expected_calibration_error
from nnunet_calib.metrics.counting.rules import check_probabilities
from nnunet_calib.metrics.overlap import label_map


def nacl_calibration(
    channels: Iterable[np.ndarray], reference: np.ndarray, *, mask: np.ndarray | None = None, bins: int = BINS
) -> dict[str, float]:
    """ECE and CECE of one volume in the protocol of the MarginLoss and NACL code.

    Args:
        channels: the probabilities of labels 0, 1, ... one after the other, float arrays of the reference's shape with
            values in [0, 1]; an array (C, *S), or a generator that reads them from disk.
        reference: label map (*S), non-negative integers below C where it counts.
        mask: bool (*S): the voxels that count, without ignored ones. None: all.
        bins: number of equal-width bins.

    Returns:
        ``ECE`` and ``CECE``, in [0, 1], and ``n``, the voxels they are measured on. NaN if the reference has no
        foreground (the authors' code stops with an error there).

    Raises:
        ValueError: a channel of another shape, fewer channels than labels, or values that are no probabilities.
    """
    reference = label_map(reference)
    counts = reference != 0 if mask is None else (reference != 0) & mask
    labels = reference[counts]
    highest = int(labels.max()) if labels.size else -1
    largest, top = np.full(labels.size, -1.0), np.zeros(labels.size, dtype=np.intp)
    errors, seen = [], 0
    for c, channel in enumerate(channels):
        if channel.shape != reference.shape:
            raise ValueError(f"channel {c} has shape {channel.shape}, the reference {reference.shape}")
        p = channel[counts].astype(np.float64)
        check_probabilities(p)
        if c <= highest:
            errors.append(_error(p, labels == c, bins))
        larger = p > largest
        top[larger], largest[larger] = c, p[larger]
        seen = c + 1
    if highest >= seen:
        raise ValueError(f"label {highest} in the reference, but {seen} channels")
    if not labels.size:
        return {"ECE": float("nan"), "CECE": float("nan"), "n": 0}
    return {"ECE": _error(largest, top == labels, bins), "CECE": float(np.mean(errors)), "n": labels.size}


def _error(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """ECE of a binary problem; voxels in no bin count in n alone."""
    index = np.searchsorted(_edges(bins), confidence, side="left") - 1  # (lo, hi]
    inside = (index >= 0) & (index < bins)
    binned = Bins(
        np.bincount(index[inside], minlength=bins),
        np.bincount(index[inside], weights=confidence[inside], minlength=bins),
        np.bincount(index[inside & correct], minlength=bins),
    )
    total = int(binned.n.sum())
    return float(expected_calibration_error(binned)) * total / correct.size if total else 0.0


def _edges(bins: int) -> np.ndarray:
    """torch.linspace(0, 1, bins + 1): steps of float32 from both ends to the middle, each edge rounded once."""
    step, k = float(np.float32(1) / np.float32(bins)), np.arange(bins + 1)
    return np.where(k < (bins + 1) // 2, step * k, 1 - step * (bins - k)).astype(np.float32)
