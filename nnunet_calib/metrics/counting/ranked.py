"""Scores that need voxels in the order of their confidence, from a histogram that adds up over cases and machines.

Sorting needs every voxel at once. Instead voxels are counted in fine cells of u = 1 - confidence: 32 cells an octave
over the 24 octaves of u that float32 has below 1, the highest bits of its bit pattern, and one cell for u = 0. Two
voxels of a cell differ by less than 1/32 of u. Within a cell, and so among equal confidences, the order of voxels is
not known: each number is the one expected over all orders of a cell's voxels. It does not depend on the order of the
voxels, and is within 1e-4 of the sorted computation on realistic confidences (on 6e4 voxels; closer on more).
"""

from __future__ import annotations

import numpy as np
from scipy.special import digamma

from nnunet_calib.metrics.counting.bins import BINS, Bins


def adaptive_calibration_error(cells: Bins, bins: int = BINS) -> np.ndarray:
    """Adaptive ECE: |accuracy - confidence| over bins that hold equally many voxels, in the order of confidence.

    Nixon et al., Measuring calibration in deep learning, 2019, for the top label. A bin's border inside a cell splits
    the cell's voxels, their confidence and how many of them are correct in proportion.

    Args:
        cells: ``Bins`` (..., CELLS), by ``confidence_cell``.
        bins: number of equal-mass bins.

    Returns:
        float64 of the leading axes' shape, in [0, 1]; NaN without voxels.
    """
    return _each(cells, lambda one: _adaptive(one, bins))


def area_under_risk_coverage(cells: Bins) -> np.ndarray:
    """AURC: mean over k = 1..n of the error rate among the k most confident voxels.

    Geifman, Uziel, El-Yaniv, Bias-reduced uncertainty estimation for deep neural classifiers, ICLR 2019. After N voxels
    with E errors, the j-th of a cell of m voxels with e errors adds the expected (E + j e/m) / (N + j); the sum over j
    is e + (E - N e/m) (H(N+m) - H(N)) with the harmonic numbers H.

    Args:
        cells: ``Bins`` (..., CELLS), by ``confidence_cell``.

    Returns:
        float64 of the leading axes' shape, in [0, 1]; 0 is best; NaN without voxels.
    """
    return _each(cells, _aurc)


def _each(cells: Bins, score) -> np.ndarray:
    """``score`` of every binary problem that has voxels."""
    values = np.full(cells.n.shape[:-1], np.nan)
    for index in np.ndindex(values.shape):
        one = Bins(cells.n[index], cells.confidence[index], cells.correct[index])
        if one.n.any():
            values[index] = score(one)
    return values


def _adaptive(cells: Bins, bins: int) -> float:
    before = np.concatenate([[0], np.cumsum(cells.n)])
    borders = before[-1] * np.arange(bins + 1) / bins
    surplus = np.concatenate([[0], np.cumsum(cells.correct - cells.confidence)])
    filled = np.concatenate([[True], cells.n > 0])  # interpolation needs increasing positions
    return float(np.abs(np.diff(np.interp(borders, before[filled], surplus[filled]))).sum() / before[-1])


def _aurc(cells: Bins) -> float:
    filled = cells.n > 0
    n = cells.n[filled].astype(np.float64)
    errors = n - cells.correct[filled]
    n_before, errors_before = np.cumsum(n) - n, np.cumsum(errors) - errors
    harmonic = digamma(n_before + n + 1) - digamma(n_before + 1)
    return float((errors + (errors_before - n_before * errors / n) * harmonic).sum() / n.sum())
