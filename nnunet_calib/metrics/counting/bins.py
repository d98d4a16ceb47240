"""Counts behind every binned calibration number; they add up over slabs, cases and machines.

Counts are int64 and sums float64: float32 counters stop at 2^24 voxels, less than one CT volume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
"""Number of equal-width bins unless said otherwise (Guo et al., On calibration of modern neural networks, 2017)."""

MAX_BINS = 1000
"""More bins than that hold too few voxels each to say anything."""


@dataclass(frozen=True)
class Bins:
    """Voxels of one or more binary problems, binned by confidence.

    Bin k of B holds confidences in [k/B, (k+1)/B); a confidence of 1 is in the last bin. Leading axes are free.

    Attributes:
        n: int64 (..., B), voxels in the bin.
        confidence: float64 (..., B), sum of their confidences.
        correct: int64 (..., B), how many of them came true.
    """

    n: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    def __add__(self, other: Bins) -> Bins:
        """The bins of both sets of voxels together."""
        return Bins(self.n + other.n, self.confidence + other.confidence, self.correct + other.correct)

    def __getitem__(self, index: int) -> Bins:
        """The binary problem at ``index`` of the first axis."""
        return Bins(self.n[index], self.confidence[index], self.correct[index])

    def __len__(self) -> int:
        """Length of the first axis."""
        return len(self.n)


def empty_bins(*shape: int) -> Bins:
    """Bins of this shape without a voxel."""
    return Bins(np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape, dtype=np.int64))


def expected_calibration_error(bins: Bins) -> np.ndarray:
    """ECE: sum over bins of n_k / n * |accuracy_k - confidence_k| (Guo et al. 2017, eq. 3).

    Returns:
        float64 of the leading axes' shape, in [0, 1]; NaN without voxels.
    """
    return _divide(np.abs(bins.correct - bins.confidence).sum(axis=-1), bins.n.sum(axis=-1))


def average_calibration_error(bins: Bins) -> np.ndarray:
    """ACE: unweighted mean of |accuracy_k - confidence_k| over the bins that hold a voxel.

    Neumann et al., Relaxed softmax, 2018; as netcal and MONAI. Not the equal-mass error that is also called ACE (Nixon
    et al., Measuring calibration in deep learning, 2019).

    Returns:
        float64 of the leading axes' shape, in [0, 1]; NaN without voxels.
    """
    return _divide(np.nansum(_gaps(bins), axis=-1), np.count_nonzero(bins.n, axis=-1))


def maximum_calibration_error(bins: Bins) -> np.ndarray:
    """MCE: the largest |accuracy_k - confidence_k| of the bins that hold a voxel (Guo et al. 2017, eq. 4).

    Returns:
        float64 of the leading axes' shape, in [0, 1]; NaN without voxels.
    """
    gaps = _gaps(bins)
    return np.where(bins.n.any(axis=-1), np.nan_to_num(gaps).max(axis=-1), np.nan)


def overconfidence(bins: Bins) -> np.ndarray:
    """The part of ECE from bins more confident than right: sum of n_k / n * max(confidence_k - accuracy_k, 0).

    ``overconfidence + underconfidence`` is ECE.

    Returns:
        float64 of the leading axes' shape, in [0, 1]; NaN without voxels.
    """
    return _divide(np.maximum(bins.confidence - bins.correct, 0).sum(axis=-1), bins.n.sum(axis=-1))


def underconfidence(bins: Bins) -> np.ndarray:
    """The part of ECE from bins more often right than confident: sum of n_k / n * max(accuracy_k - confidence_k, 0).

    Returns:
        float64 of the leading axes' shape, in [0, 1]; NaN without voxels.
    """
    return _divide(np.maximum(bins.correct - bins.confidence, 0).sum(axis=-1), bins.n.sum(axis=-1))


def _gaps(bins: Bins) -> np.ndarray:
    """|accuracy - confidence| per bin; NaN where the bin is empty."""
    return _divide(np.abs(bins.correct - bins.confidence), bins.n)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient in float64; NaN where the denominator is 0."""
    quotient = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator) != 0)
