"""Counting compiled by numba: the same sums as in numpy, at the speed of memory. Import it only where it is wanted.

A slab is counted stretch by stretch: voxels that follow each other and have the same label and code. Most of them lie
in one bin or a few, and are added bin by bin with vector instructions; the others one by one. What is compiled is kept
on disk until this file changes: constants of other files are arguments here.
"""

from __future__ import annotations

import numba
import numpy as np

from nnunet_calib.metrics.compiled import compiled
from nnunet_calib.metrics.counting.gather import Slab, Tally
from nnunet_calib.metrics.counting.rules import CELL_OFFSET, CELL_SHIFT, HIGHEST, LOWEST, Rules, check_probabilities

_TINY = 1e-100  # its cube is still a normal float64
_LONGEST = 256  # voxels of a stretch: more are seldom within one bin
_SHORTEST = 16  # voxels that vector instructions pay for
_PART = 32  # voxels looked at together where a stretch is in many bins
_BINS = 8  # are many: to look at them bin by bin takes longer than voxel by voxel
_FAR = 0.1  # from 0: the product of a whole stretch of such p is still a normal float64
_BLOCK = 64  # voxels compared at once


_compiled = compiled("reassoc", "nsz", "contract")


class NumbaCounting:
    """Counting in compiled loops; see ``gather.Counting``."""

    voxels = 1 << 18  # few calls; little is made of them

    def look(self, labels: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where stretches start, with the end of the last; what the largest p so far is at least in each, as bits."""
        starts = _stretches(labels, code)
        return starts, np.full(starts.size - 1, -1, np.int64)

    def add_class(self, tally: Tally, c: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        """Count the binary problem of class ``c``; it becomes the top label where it is the largest."""
        self._add(tally, c, p, slab, rules, slab.notes[1])

    def add_region(self, tally: Tally, r: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        """Count region ``r``."""
        self._add(tally, r, p, slab, rules, np.empty(0, np.int64))
        ranked = tally.ranked
        sums = (ranked.n[r], ranked.confidence[r], ranked.correct[r])
        _rank_region(p, *slab.truth(r), slab.code, slab.notes[0], *sums, CELL_SHIFT, CELL_OFFSET)

    def add_top(self, tally: Tally, slab: Slab, rules: Rules) -> None:
        """Count the top label."""
        bins, ranked = tally.top, tally.ranked
        sums = (bins.n, bins.confidence, bins.correct, ranked.n, ranked.confidence, ranked.correct)
        bits = _bits(slab.largest)
        voxels = (slab.largest, bits, slab.top, slab.truth(0)[0], slab.code, slab.notes[0])
        edges = rules.edges.astype(slab.largest.dtype).view(bits.dtype)
        _add_top(*voxels, edges, *sums, CELL_SHIFT, CELL_OFFSET)

    def _add(self, tally: Tally, c: int, p: np.ndarray, slab: Slab, rules: Rules, floor: np.ndarray) -> None:
        every, small = tally.classes, tally.negligible
        bits = _bits(p)
        edges = rules.edges.astype(p.dtype).view(bits.dtype)
        threshold, far, below = _bits(np.array([rules.threshold, _FAR, 1 - _FAR], p.dtype))
        cuts = (edges, threshold, rules.smallest, rules.spacing, LOWEST, HIGHEST, far, below)
        truth, value = slab.truth(c)
        fit = _add_class(
            *(p, bits, truth, truth.dtype.type(value), slab.code, slab.notes[0]),
            *(floor, slab.largest, slab.top, c, cuts),
            *(every.n[c], every.confidence[c], every.correct[c], small.n[c], small.confidence[c], small.correct[c]),
            *(tally.squared_error[c], tally.log_loss[c]),
        )
        if not fit:
            check_probabilities(p[slab.code != 0])


def _bits(p: np.ndarray) -> np.ndarray:
    """Bit patterns as integers: floats that are not negative are in the order of theirs."""
    return p.view(np.int32 if p.dtype == np.float32 else np.int64)


@numba.njit(inline="always")
def _bin(x, bins):
    """``rules.bin_index`` of one float64."""
    return min(int(x * bins), bins - 1)


@_compiled
def _stretches(labels, code):
    """Starts of the stretches of equal label and code, int32, with the end of the last."""
    starts = np.empty(labels.size + 1, np.int32)
    count = 0
    begin = 0
    for block in range(0, labels.size, _BLOCK):
        label, at = labels[begin], code[begin]
        some, others = labels[block : block + _BLOCK], code[block : block + _BLOCK]
        differ = False
        for i in range(some.size):
            differ |= (some[i] != label) | (others[i] != at)
        if not differ and block - begin + some.size <= _LONGEST:
            continue
        for i in range(some.size):
            if some[i] != label or others[i] != at or block + i - begin == _LONGEST:
                starts[count] = begin
                count += 1
                begin, label, at = block + i, some[i], others[i]
    starts[count] = begin
    starts[count + 1] = labels.size
    return starts[: count + 2].copy()


@_compiled
def _range(one, least, most, edges):
    """The lowest and the highest bin of some p, one of which is given; (0, -1) if any is outside of [0, 1]."""
    bins = edges.size - 1
    if least < edges[0] or most >= edges[bins]:
        return 0, -1
    low = _bin(np.float64(one), bins)
    high = low
    while least < edges[low]:
        low -= 1
    while most >= edges[high + 1]:
        high += 1
    return low, high


@_compiled
def _add_class(
    p,
    bits,
    truth,
    value,
    code,
    starts,
    floor,
    largest,
    top,
    c,
    cuts,
    n,
    confidence,
    correct,
    small_n,
    small_confidence,
    small_correct,
    squared_error,
    log_loss,
):
    """False, and the sums are worth nothing, if a p that counts is none: its bin would be in foreign memory.

    Classes have a ``floor``; without one it is a region, which is a binary problem with two logarithms.
    """
    region = floor.size == 0
    edges, threshold, smallest, spacing, lowest, highest, far, below = cuts
    bins, negligible = n.shape[1], small_n.shape[1]
    zero = p.dtype.type(0)
    # sums of one slab before they join the volume's: less rounding
    own_confidence, own_small = np.zeros(confidence.shape, np.float64), np.zeros(small_confidence.shape, np.float64)
    own_squared, own_log = np.zeros(n.shape[0], np.float64), np.zeros(n.shape[0], np.float64)
    for stretch in range(starts.size - 1):
        start, stop = np.uint64(starts[stretch]), np.uint64(starts[stretch + 1])  # no index counts from the end
        at, hit = code[start], truth[start] == value
        begin, end = start, stop  # the whole stretch; part after part of it if it is in many bins
        while begin < stop:
            # 1. Sums, and the bins from low to high that these voxels are in; none if a p is outside of [0, 1].
            size = np.int32(end - begin)
            low, high, least, most = 0, -1, bits[begin], bits[begin]
            total = 0.0
            square = 0.0
            if size >= _SHORTEST:
                if hit:
                    for i in range(begin, end):
                        least = min(least, bits[i])
                        most = max(most, bits[i])
                        x = np.float64(p[i])
                        total += x
                        square += (1 - x) * (1 - x)
                else:
                    for i in range(begin, end):
                        least = min(least, bits[i])
                        most = max(most, bits[i])
                        x = np.float64(p[i])
                        total += x
                        square += x * x
                low, high = _range(p[begin], least, most, edges)

            # 2. The top label; most classes are nowhere above it.
            if begin == start and end == stop and not region:
                if c == 0:
                    for i in range(begin, end):
                        largest[i] = p[i]
                    for i in range(begin, end):
                        top[i] = 0
                elif low > high or most > floor[stretch]:
                    for i in range(begin, end):
                        top[i] = c if p[i] > largest[i] else top[i]
                    for i in range(begin, end):
                        largest[i] = p[i] if p[i] > largest[i] else largest[i]
                if low <= high:
                    floor[stretch] = max(floor[stretch], np.int64(least))
            if at == 0:
                break

            # 3. All together, unless the bins are many or a product could end at 0.
            together = low <= high and high - low < _BINS
            if hit:
                together &= least >= far
            elif region:
                together &= most <= below
            if together:
                own_squared[at] += square
                whole = 1.0
                if hit:
                    for i in range(begin, end):
                        whole *= np.float64(p[i])
                elif region:
                    for i in range(begin, end):
                        whole *= 1 - np.float64(p[i])
                if hit or region:
                    own_log[at] -= np.log(whole)
                left, rest = float(size), total  # in this bin and those above it
                for k in range(low, high + 1):
                    above = 0.0
                    beyond = 0.0
                    if k < high:
                        edge = edges[k + 1]
                        for i in range(begin, end):
                            above += 1.0 if bits[i] >= edge else 0.0
                            beyond += np.float64(p[i] if bits[i] >= edge else zero)
                    n[at, k] += int(left - above)
                    own_confidence[at, k] += rest - beyond
                    correct[at, k] += hit * int(left - above)
                    left, rest = above, beyond
                if least <= threshold:
                    left, rest = float(size), total  # negligible, and in this bin or above it
                    if most > threshold:
                        left = 0.0
                        rest = 0.0
                        for i in range(begin, end):
                            left += 1.0 if bits[i] <= threshold else 0.0
                            rest += np.float64(p[i] if bits[i] <= threshold else zero)
                    for k in range(low, min(high + 1, negligible)):
                        above = 0.0
                        beyond = 0.0
                        if k < high and k + 1 < negligible:
                            edge = edges[k + 1]
                            for i in range(begin, end):
                                above += 1.0 if edge <= bits[i] <= threshold else 0.0
                                beyond += np.float64(p[i] if edge <= bits[i] <= threshold else zero)
                        small_n[at, k] += int(left - above)
                        own_small[at, k] += rest - beyond
                        small_correct[at, k] += hit * int(left - above)
                        left, rest = above, beyond
                begin, end = end, min(end + np.uint64(_PART), stop)
                continue

            # 4. One by one.
            if size > _PART:
                end = begin + np.uint64(_PART)
                continue
            product = 1.0
            for i in range(begin, end):
                x = np.float64(p[i])
                if not lowest <= x <= highest:
                    return False
                k = _bin(x, bins)
                n[at, k] += 1
                own_confidence[at, k] += x
                if bits[i] <= threshold:
                    small_n[at, k] += 1
                    own_small[at, k] += x
                    small_correct[at, k] += hit
                if hit:
                    correct[at, k] += 1
                    own_squared[at] += (1 - x) * (1 - x)
                    x = max(x, smallest)
                    if x < _TINY:
                        own_log[at] -= np.log(x)
                    else:  # one logarithm for many voxels
                        product *= x
                        if product < _TINY * _TINY:
                            own_log[at] -= np.log(product)
                            product = 1.0
                else:
                    own_squared[at] += x * x
                    if region:
                        own_log[at] -= np.log(max(1 - x, spacing))
            if hit:
                own_log[at] -= np.log(product)
            begin, end = end, min(end + np.uint64(_PART), stop)
    confidence += own_confidence
    small_confidence += own_small
    squared_error += own_squared
    log_loss += own_log
    return True


@_compiled
def _cells(doubts, cells, shift, offset, first, index):
    """The cell of each doubt, as ``rules.confidence_cell``, plus ``first``; all arrays have one length."""
    bits = doubts.view(np.int32)
    for i in range(bits.size):
        inside = min(max((bits[i] >> shift) - offset, 1), cells - 1)
        index[i] = first + (inside if bits[i] > 0 else 0)


@_compiled
def _scatter(index, values, counts, sums):
    """Count each value and add it at its index: in four rows by turns, so that none waits for the one before."""
    quads = index.size // 4 * 4
    for i in range(0, quads, 4):
        for j in range(4):
            counts[j, index[i + j]] += 1
            sums[j, index[i + j]] += np.float64(values[i + j])
    for i in range(quads, index.size):
        counts[0, index[i]] += 1
        sums[0, index[i]] += np.float64(values[i])


@_compiled
def _join(counts, sums, wrong, n, confidence, correct):
    """Add the rows of ``_scatter``, and how many of them were wrong, to (codes, cells)."""
    for j in range(4):
        confidence += sums[j].reshape(n.shape)
        n += counts[j].reshape(n.shape)
        correct += counts[j].reshape(n.shape)
    correct -= wrong.reshape(n.shape)


@_compiled
def _add_top(
    p,
    bits,
    top,
    truth,
    code,
    starts,
    edges,
    n,
    confidence,
    correct,
    cell_n,
    cell_confidence,
    cell_correct,
    shift,
    offset,
):
    bins, cells = n.shape[1], cell_n.shape[1]
    one, zero = p.dtype.type(1), p.dtype.type(0)
    own, wrong = np.zeros(n.shape, np.float64), np.zeros(cell_n.size, np.int64)
    counts, sums = np.zeros((4, cell_n.size), np.int64), np.zeros((4, cell_n.size), np.float64)
    doubts, index = np.empty(_LONGEST, np.float32), np.empty(_LONGEST, np.int32)
    for stretch in range(starts.size - 1):
        start, stop = starts[stretch], starts[stretch + 1]
        at, label = code[start], truth[start]
        if at == 0:
            continue
        q, b, winners = p[start:stop], bits[start:stop], top[start:stop]
        missed = False
        for i in range(q.size):
            missed |= winners[i] != label
        least, most = b[0], b[0]
        total = 0.0
        for i in range(q.size):
            least = min(least, b[i])
            most = max(most, b[i])
            total += np.float64(q[i])
        low, high = _range(q[0], least, most, edges)
        if low <= high and high - low < _BINS:
            left, rest, missing = float(q.size), total, 0.0
            if missed:
                for i in range(q.size):
                    missing += 1.0 if winners[i] != label else 0.0
            for k in range(low, high + 1):
                above, beyond, failed = 0.0, 0.0, 0.0
                if k < high:
                    edge = edges[k + 1]
                    for i in range(q.size):
                        above += 1.0 if b[i] >= edge else 0.0
                        beyond += np.float64(q[i] if b[i] >= edge else zero)
                    if missed:
                        for i in range(q.size):
                            failed += 1.0 if (b[i] >= edge) & (winners[i] != label) else 0.0
                n[at, k] += int(left - above)
                own[at, k] += rest - beyond
                correct[at, k] += int(left - above - (missing - failed))
                left, rest, missing = above, beyond, failed
        else:
            for i in range(q.size):
                x = np.float64(q[i])
                k = _bin(x, bins)
                n[at, k] += 1
                own[at, k] += x
                correct[at, k] += winners[i] == label
        for i in range(q.size):
            doubts[i] = np.float32(one - q[i])
        _cells(doubts[: q.size], cells, shift, offset, np.int32(at * cells), index[: q.size])
        _scatter(index[: q.size], q, counts, sums)
        if missed:
            for i in range(q.size):
                wrong[index[i]] += winners[i] != label
    confidence += own
    _join(counts, sums, wrong, cell_n, cell_confidence, cell_correct)


@_compiled
def _rank_region(p, truth, value, code, starts, n, confidence, correct, shift, offset):
    cells = n.shape[1]
    counts, sums, wrong = np.zeros((4, n.size), np.int64), np.zeros((4, n.size), np.float64), np.zeros(n.size, np.int64)
    doubts, index, sure = np.empty(_LONGEST, np.float32), np.empty(_LONGEST, np.int32), np.empty(_LONGEST, np.float64)
    for stretch in range(starts.size - 1):
        start, stop = starts[stretch], starts[stretch + 1]
        at, hit = code[start], truth[start] == value
        if at == 0:
            continue
        q = p[start:stop]
        missed = False
        for i in range(q.size):
            missed |= (q[i] > 0.5) != hit
        for i in range(q.size):
            x = np.float64(q[i])
            doubts[i] = np.float32(min(x, 1 - x))
            sure[i] = max(x, 1 - x)
        _cells(doubts[: q.size], cells, shift, offset, np.int32(at * cells), index[: q.size])
        _scatter(index[: q.size], sure[: q.size], counts, sums)
        if missed:
            for i in range(q.size):
                wrong[index[i]] += (q[i] > 0.5) != hit
    _join(counts, sums, wrong, n, confidence, correct)
