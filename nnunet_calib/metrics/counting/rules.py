"""The rules by which a probability is counted, written once for arrays of numpy and tensors of torch.

    bin           k = min(floor(p B), B - 1), in float64
    negligible    p <= threshold, the threshold rounded to the type of the probabilities
    log loss      -log max(p, smallest),  of the complement -log max(1 - p, spacing)
    cell          the highest bits of u = 1 - confidence as float32 (``ranked``)
    decision      of a region: p > 1/2, with confidence max(p, 1 - p)

Functions that take ``xp`` work with numpy, or with torch if that is given. Compiled loops can call no function of
another file (``gather_numba``): there every rule stands once more, and the tests hold it against these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_calib.metrics.counting.bins import BINS

LOWEST, HIGHEST = -1e-5, 1 + 1e-5
"""What is taken for a probability: sums of float32, as of an ensemble, may end a little beyond [0, 1]."""

CELLS_PER_OCTAVE = 32
OCTAVES = 24
CELLS = 1 + OCTAVES * CELLS_PER_OCTAVE
"""Cells of the histogram of ``ranked``; cell 0 holds u = 0, the others go from small u (confident) to large."""

CELL_SHIFT = 23 - (CELLS_PER_OCTAVE.bit_length() - 1)  # of the float32 bit pattern: exponent and 5 bits of mantissa
CELL_OFFSET = ((127 - OCTAVES) << 23 >> CELL_SHIFT) - 1  # u = 2^-24 is in cell 1


def bin_index(confidence: Any, bins: int = BINS, xp: Any = np) -> Any:
    """Bin of each confidence.

    Args:
        confidence: float, values in [0, 1], any shape.
        bins: number B of equal-width bins.
        xp: ``numpy``, or ``torch`` for a tensor.

    Returns:
        Integers in [0, B - 1], same shape. Exact for float16 and float32 confidences, whose product with B float64
        holds without rounding.
    """
    index = xp.asarray(xp.asarray(confidence, dtype=xp.float64) * bins, dtype=xp.int64)
    return index.clip(max=bins - 1)


def confidence_cell(doubt: Any, xp: Any = np) -> Any:
    """Cell of each voxel.

    Args:
        doubt: u = 1 - confidence, float in [0, 1], any shape; rounded to float32.
        xp: ``numpy``, or ``torch`` for a tensor.

    Returns:
        Integers in [0, CELLS - 1], same shape, not decreasing in u. Below 2^-24, but not 0, is in cell 1.
    """
    u = xp.asarray(doubt, dtype=xp.float32)
    cell = ((u.view(xp.int32) >> CELL_SHIFT) - CELL_OFFSET).clip(1, CELLS - 1)
    return xp.where(u > 0, cell, 0)


def region_decision(p: Any, inside: Any, xp: Any = np) -> tuple[Any, Any, Any]:
    """The decision p > 1/2 about a region: its cell, its confidence, and whether it is right."""
    return confidence_cell(xp.minimum(p, 1 - p), xp), xp.maximum(p, 1 - p), (p > 0.5) == inside


def smallest_probability(dtype: np.dtype) -> float:
    """Where NLL clips p: the smallest positive number of a float type (float16: 2^-24; float32: 2^-126, normal)."""
    return float(np.finfo(dtype).smallest_subnormal if dtype == np.float16 else np.finfo(dtype).tiny)


def smallest_complement(dtype: np.dtype) -> float:
    """Where NLL clips 1 - p: the spacing of a float type below 1."""
    return float(np.finfo(dtype).epsneg)


def check_probabilities(p: Any) -> None:
    """Refuse values that would be counted in bins that do not exist; p is an array or a tensor.

    Raises:
        ValueError: a value is below 0 or above 1 by more than rounding, or NaN.
    """
    if not bool(((p >= LOWEST) & (p <= HIGHEST)).all()):
        raise ValueError("probabilities are in [0, 1]; there are other values, or NaN, among those that count")


@dataclass(frozen=True)
class Rules:
    """The rules for the probabilities of one float type.

    Attributes:
        bins: number B of equal-width bins.
        edges: float64 (B + 1,): bin k holds the p of the type with edges[k] <= p < edges[k + 1].
        threshold: p up to it are negligible; rounded to the type.
        smallest: where p is clipped in the logarithm.
        spacing: where 1 - p is clipped in the logarithm.
        xp: ``numpy`` or ``torch``.
    """

    bins: int
    edges: np.ndarray
    threshold: float
    smallest: float
    spacing: float
    xp: Any = np

    @classmethod
    def of(cls, dtype: np.dtype, bins: int, threshold: float, xp: Any = np) -> Rules:
        """The rules of a float type."""
        k = np.arange(1, bins)
        edges = (k / bins).astype(dtype)
        edges = np.where(bin_index(edges, bins) < k, np.nextafter(edges, dtype.type(2)), edges)
        below = np.nextafter(edges, dtype.type(0))
        beyond = np.nextafter(dtype.type(1), dtype.type(2))
        edges = np.concatenate([[0], np.where(bin_index(below, bins) < k, edges, below), [beyond]])
        rounded = float(dtype.type(threshold))
        return cls(bins, edges, rounded, smallest_probability(dtype), smallest_complement(dtype), xp)

    def bin(self, p: Any) -> Any:
        """Bin of each p."""
        return bin_index(p, self.bins, self.xp)

    def negligible(self, p: Any) -> Any:
        """Whether each p is negligible."""
        return p <= self.threshold

    def log_loss(self, p: Any) -> Any:
        """-log p where the class is there."""
        return -self.xp.log(p.clip(min=self.smallest))

    def log_loss_outside(self, p: Any) -> Any:
        """-log(1 - p) where a region is not."""
        return -self.xp.log((1 - p).clip(min=self.spacing))


def negligible_bins(threshold: float, bins: int) -> int:
    """How many bins, from the first, can hold a negligible p of any float type."""
    rounded = max(threshold, *(float(kind(threshold)) for kind in (np.float16, np.float32)))
    return int(bin_index(np.array(rounded), bins)) + 1
