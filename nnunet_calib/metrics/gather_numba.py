"""Counting compiled by numba: the same sums as in numpy, at the speed of memory. Import it only where it is wanted.

What is compiled is kept on disk until this file changes: constants of other files are arguments here.
"""

from __future__ import annotations

import numpy as np

from nnunet_calib.metrics.compiled import compiled
from nnunet_calib.metrics.gather import HIGHEST, LOWEST, Limits, Tally, check_probabilities
from nnunet_calib.metrics.ranked import CELL_OFFSET, CELL_SHIFT

_TINY = 1e-100  # its cube is still a normal float64
_CLOSE = 1e-4  # to 0; a run's product of what is farther away is a normal float64
_RUN = 64  # voxels that are looked at together: long enough for vector instructions, short enough to be alike


_compiled = compiled("reassoc", "nsz", "contract")


class NumbaCounting:
    """Counting in compiled loops; see ``gather.Counting``."""

    def add_class(
        self, tally: Tally, c: int, p: np.ndarray, truth: tuple[np.ndarray, int], code: np.ndarray, limits: Limits
    ) -> None:
        """Count the binary problem of class ``c``."""
        self._add(tally, c, p, truth, code, limits, binary=False)

    def add_region(
        self, tally: Tally, r: int, p: np.ndarray, truth: tuple[np.ndarray, int], code: np.ndarray, limits: Limits
    ) -> None:
        """Count region ``r``."""
        self._add(tally, r, p, truth, code, limits, binary=True)
        ranked = tally.ranked
        sums = (ranked.n[r], ranked.confidence[r], ranked.correct[r])
        _rank_region(p, *truth, code, *sums, CELL_SHIFT, CELL_OFFSET)

    def update_top(self, c: int, p: np.ndarray, largest: np.ndarray, top: np.ndarray) -> None:
        """Where class ``c`` exceeds the largest so far, it becomes the top label."""
        _update_top(c, p, largest, top)

    def add_top(
        self, tally: Tally, p: np.ndarray, top: np.ndarray, truth: np.ndarray, code: np.ndarray, limits: Limits
    ) -> None:
        """Count the top label."""
        bins, ranked = tally.top, tally.ranked
        sums = (bins.n, bins.confidence, bins.correct, ranked.n, ranked.confidence, ranked.correct)
        _add_top(p, top, truth, code, *sums, CELL_SHIFT, CELL_OFFSET)

    def _add(
        self,
        tally: Tally,
        c: int,
        p: np.ndarray,
        truth: tuple[np.ndarray, int],
        code: np.ndarray,
        limits: Limits,
        *,
        binary: bool,
    ) -> None:
        every, small = tally.classes, tally.negligible
        cuts = (limits.edges.astype(p.dtype), p.dtype.type(limits.threshold), limits.smallest, limits.spacing)
        belongs, value = truth[0], truth[0].dtype.type(truth[1])
        fit = _add_class(
            *(p, belongs, value, code, *cuts, binary, every.n[c], every.confidence[c], every.correct[c]),
            *(small.n[c], small.confidence[c], small.correct[c], tally.squared_error[c], tally.log_loss[c]),
            *(LOWEST, HIGHEST),
        )
        if not fit:
            check_probabilities(p[code != 0])


@_compiled
def _add_class(
    p,
    truth,
    value,
    code,
    edges,
    threshold,
    smallest,
    spacing,
    binary,
    n,
    confidence,
    correct,
    small_n,
    small_confidence,
    small_correct,
    squared_error,
    log_loss,
    lowest,
    highest,
):
    """False, and the sums are worth nothing, if a p that counts is none: its bin would be in foreign memory."""
    bins = n.shape[1]
    own_n = np.zeros(n.shape, np.int64)  # sums of one slab before they join the volume's: less rounding
    own_confidence = np.zeros(n.shape, np.float64)
    own_squared = np.zeros(n.shape[0], np.float64)
    own_log = np.zeros(n.shape[0], np.float64)
    product = np.ones(n.shape[0], np.float64)
    for start in range(0, p.size, _RUN):
        size = min(_RUN, p.size - start)
        begin, end = np.uint64(start), np.uint64(start + size)  # unsigned: no index counts from the end
        at = code[begin]
        hit = truth[begin] == value
        some = False
        every = True
        mixed = False
        for i in range(begin, end):
            some |= truth[i] == value
            every &= truth[i] == value
            mixed |= code[i] != at
        mixed |= some != every
        if not mixed:
            if at == 0:
                continue
            first = np.float64(p[begin])
            k = min(int(first * bins), bins - 1) if 0 <= first <= 1 else 0
            low, high = edges[k], edges[k + 1]
            for i in range(begin, end):
                mixed |= not ((p[i] >= low) & (p[i] < high))  # NaN too
            if hit:
                mixed |= k < small_n.shape[1] or low < _CLOSE  # the product below would end at 0
            elif binary:
                mixed |= high > 1 - _CLOSE
        if not mixed:
            y = 1.0 if hit else 0.0
            total = 0.0
            square = 0.0
            for i in range(begin, end):
                x = np.float64(p[i])
                total += x
                square += (x - y) * (x - y)
            own_n[at, k] += size
            own_confidence[at, k] += total
            own_squared[at] += square
            if k < small_n.shape[1]:
                few = 0
                little = 0.0
                for i in range(begin, end):
                    is_small = p[i] <= threshold
                    few += is_small
                    little += np.float64(p[i]) if is_small else 0.0
                small_n[at, k] += few
                small_confidence[at, k] += little
            if hit:
                correct[at, k] += size
            if hit or binary:
                whole = 1.0
                for i in range(begin, end):
                    whole *= np.float64(p[i]) if hit else 1 - np.float64(p[i])
                own_log[at] -= np.log(whole)
            continue
        for i in range(begin, end):
            at = code[i]
            if at == 0:
                continue
            x = np.float64(p[i])
            if not lowest <= x <= highest:
                return False
            k = min(int(x * bins), bins - 1)
            own_n[at, k] += 1
            own_confidence[at, k] += x
            hit = truth[i] == value
            if p[i] <= threshold:
                small_n[at, k] += 1
                small_confidence[at, k] += x
                small_correct[at, k] += hit
            if hit:
                correct[at, k] += 1
                own_squared[at] += (1 - x) * (1 - x)
                x = max(x, smallest)
                if x < _TINY:
                    own_log[at] -= np.log(x)
                else:  # one logarithm for many voxels
                    product[at] *= x
                    if product[at] < _TINY * _TINY:
                        own_log[at] -= np.log(product[at])
                        product[at] = 1
            else:
                own_squared[at] += x * x
                if binary:
                    own_log[at] -= np.log(max(1 - x, spacing))
    n += own_n
    confidence += own_confidence
    squared_error += own_squared
    log_loss += own_log - np.log(product)
    return True


@_compiled
def _update_top(c, p, largest, top):
    for i in range(p.size):
        larger = p[i] > largest[i]
        largest[i] = p[i] if larger else largest[i]
        top[i] = c if larger else top[i]


@_compiled
def _cell(doubt, cells, shift, offset):
    u = np.float32(doubt)
    if not u > 0:
        return 0
    return min(max((u.view(np.int32) >> shift) - offset, 1), cells - 1)


@_compiled
def _add_top(p, top, truth, code, n, confidence, correct, cell_n, cell_confidence, cell_correct, shift, offset):
    bins = n.shape[1]
    own = np.zeros(n.shape, np.float64)
    own_cell = np.zeros(cell_n.shape, np.float64)
    for i in range(p.size):
        at = code[i]
        if at == 0:
            continue
        x = np.float64(p[i])
        hit = top[i] == truth[i]
        k = min(int(x * bins), bins - 1)
        n[at, k] += 1
        own[at, k] += x
        correct[at, k] += hit
        j = _cell(1 - x, cell_n.shape[1], shift, offset)
        cell_n[at, j] += 1
        own_cell[at, j] += x
        cell_correct[at, j] += hit
    confidence += own
    cell_confidence += own_cell


@_compiled
def _rank_region(p, truth, value, code, n, confidence, correct, shift, offset):
    own = np.zeros(n.shape, np.float64)
    for i in range(p.size):
        at = code[i]
        if at == 0:
            continue
        x = np.float64(p[i])
        j = _cell(min(x, 1 - x), n.shape[1], shift, offset)
        n[at, j] += 1
        own[at, j] += max(x, 1 - x)
        correct[at, j] += (x > 0.5) == (truth[i] == value)
    confidence += own
