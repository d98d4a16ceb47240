"""Counting in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunet_calib.metrics.counting.bins import Bins
from nnunet_calib.metrics.counting.gather import Slab, Tally
from nnunet_calib.metrics.counting.rules import (
    HIGHEST,
    LOWEST,
    Rules,
    check_probabilities,
    confidence_cell,
    region_decision,
)


class NumpyCounting:
    """Counting in numpy.

    Most voxels of most channels have a small p, are not of the class and are in the same sets as their neighbours:
    they go to bin 0 together, and only the others are sorted into bins one by one.
    """

    voxels = 1 << 16  # all that is made of them stays in the processor's cache

    def look(self, labels: np.ndarray, code: np.ndarray) -> tuple[int, np.ndarray | None]:
        """The code of most voxels, and which have another one; None if all have it."""
        usual = int(code[0])
        if not (code != usual).any():
            return usual, None
        usual = int(np.bincount(code).argmax())
        return usual, code != usual

    def add_class(self, tally: Tally, c: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        """Count the binary problem of class ``c``; it becomes the top label where it is the largest."""
        least, most = p.min(), p.max()
        self._add(tally, c, p, (least, most), slab, rules)
        if c == 0:
            slab.top[:], slab.largest[:] = 0, p
        elif not most <= slab.largest.min():  # NaN too
            larger = p > slab.largest
            np.copyto(slab.top, c, where=larger, casting="unsafe")
            np.copyto(slab.largest, p, where=larger)

    def add_region(self, tally: Tally, r: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        """Count region ``r``."""
        self._add(tally, r, p, (p.min(), p.max()), slab, rules)
        inside, truth = slab.code != 0, slab.truth(r)
        p, y, code = p[inside].astype(np.float64), truth[0][inside] == truth[1], slab.code[inside]
        _sum(tally.log_loss, r, code[~y], rules.log_loss_outside(p[~y]))
        _count(tally.ranked, r, code, *region_decision(p, y))

    def add_top(self, tally: Tally, slab: Slab, rules: Rules) -> None:
        """Count the top label."""
        (usual, others), p, code = slab.notes, slab.largest, slab.code
        truth, _ = slab.truth(0)
        hit, codes = slab.top == truth, usual if others is None else code
        if others is not None and not code.all():
            inside = code != 0
            p, hit, codes = p[inside], hit[inside], code[inside]
        confidence = p.astype(np.float64)
        _count(tally.top, ..., codes, rules.bin(confidence), confidence, hit)
        _count(tally.ranked, ..., codes, confidence_cell(1 - confidence), confidence, hit)

    def _add(self, tally: Tally, c: int, p: np.ndarray, extremes: tuple, slab: Slab, rules: Rules) -> None:
        (usual, others), (truth, value), (least, most) = slab.notes, slab.truth(c), extremes
        if not (least >= LOWEST and most <= HIGHEST):  # NaN fails too
            check_probabilities(p[slab.code != 0])
        positive = truth == value
        single = positive if most < rules.edges[1] else positive | (p >= p.dtype.type(rules.edges[1]))
        if others is not None:
            single = single | others
        singles: Any = np.flatnonzero(single)
        if 2 * singles.size > p.size:
            singles = slice(None)
        elif usual:
            self._add_rest(tally, c, p, singles, usual, rules)
        codes: Any = usual if others is None else slab.code[singles]
        one, y = p[singles].astype(np.float64), positive[singles]
        if others is not None and not codes.all():
            inside = codes != 0
            one, y, codes = one[inside], y[inside], codes[inside]
        if not one.size:
            return
        index = rules.bin(one)
        _count(tally.classes, c, codes, index, one, y)
        small = rules.negligible(one)
        if small.any():
            _count(tally.negligible, c, _of(codes, small), index[small], one[small], y[small])
        _sum(tally.squared_error, c, codes, np.square(one - y))
        if y.any():
            _sum(tally.log_loss, c, _of(codes, y), rules.log_loss(one[y]))

    def _add_rest(self, tally: Tally, c: int, p: np.ndarray, singles: np.ndarray, usual: int, rules: Rules) -> None:
        """Count all but ``singles``: voxels of code ``usual`` in bin 0, none of the class."""
        rest = p.astype(np.float64)
        rest[singles] = 0
        total = rest.sum()
        small = rules.negligible(p)
        small[singles] = False
        few = np.count_nonzero(small)
        tally.classes.n[c, usual, 0] += p.size - singles.size
        tally.classes.confidence[c, usual, 0] += total
        tally.squared_error[c, usual] += np.einsum("i,i->", rest, rest)
        tally.negligible.n[c, usual, 0] += few
        if 2 * few > p.size - singles.size:
            np.logical_not(small, out=small)
            small[singles] = False
            total -= rest[small].sum()
        else:
            total = rest[small].sum()
        tally.negligible.confidence[c, usual, 0] += total


def _count(
    bins: Bins, problem: Any, code: np.ndarray | int, index: np.ndarray, confidence: np.ndarray, correct: np.ndarray
) -> None:
    """Add voxels to the bins (codes, B) of one binary problem; ``code`` is one number where all have the same."""
    codes, size = bins.n[problem].shape
    row: Any = ...
    if isinstance(code, np.ndarray):
        index = code.astype(np.intp) * size + index
    else:
        codes, row = 1, slice(code, code + 1)
    both = np.bincount(2 * index + correct, minlength=2 * codes * size).reshape(codes, size, 2)
    bins.n[problem][row] += both.sum(axis=-1)
    bins.correct[problem][row] += both[..., 1]
    sums = np.bincount(index, weights=confidence, minlength=codes * size)
    bins.confidence[problem][row] += sums.reshape(codes, size)


def _sum(total: np.ndarray, problem: int, code: np.ndarray | int, values: np.ndarray) -> None:
    """Add values to the sums (codes,) of one binary problem."""
    if isinstance(code, np.ndarray):
        total[problem] += np.bincount(code, weights=values, minlength=total.shape[1])
    else:
        total[problem, code] += values.sum()


def _of(code: np.ndarray | int, chosen: np.ndarray) -> np.ndarray | int:
    return code[chosen] if isinstance(code, np.ndarray) else code
