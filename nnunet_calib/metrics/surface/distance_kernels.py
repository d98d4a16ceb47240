"""Compiled search for the nearest surface (numba, optional): the same numbers as the numpy functions, sooner.

Imported only where numba is there and asked for.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from nnunet_calib.metrics.compiled import compiled

_HALF = 32  # voxels that a window of 64 bits sees on either side
_PATIENCE = 16  # most points that are left to the search after one that needs it: its neighbours do, too

# Minima are taken several at a time. No number is rounded otherwise, and none is NaN.
_compiled = compiled("nnan", "nsz")


def _zeros(side: str) -> Any:
    """How many bits of 64 are 0 before the first that is 1: ``cttz`` from the lowest on, ``ctlz`` from the highest."""

    @intrinsic
    def count(typing, bits):
        def instruction(context, builder, signature, arguments):
            return getattr(builder, side)(arguments[0], context.get_constant(types.boolean, False))

        return types.uint64(types.uint64), instruction

    return count


_low_zeros, _high_zeros = _zeros("cttz"), _zeros("ctlz")


@_compiled
def close(source, target, spacing, rows, squares):
    """Squared distance of the points (z, y, x) that are close to one of ``target``; infinity for the others.

    Every row of voxels is a row of bits, set where a target is. The rows around a point are looked at from the nearest
    on: the nearest target in a row is the nearest bit. Exact: a row beyond the best distance so far ends it, and what
    is farther than the last row or the end of a row's window is left as infinity.

    ``rows`` int64 (2, k) are the steps (z, y) to the rows, by their squared distances ``squares`` (k + 1,) in
    ascending order, of which the last belongs to the first row that is not there.
    """
    (z, y, x), (target_z, target_y, target_x) = source, target
    reach_z, reach_y = np.abs(rows[0]).max(), np.abs(rows[1]).max()
    low_z = np.int64(min(z.min(), target_z.min()) - reach_z)
    low_y = np.int64(min(y.min(), target_y.min()) - reach_y)
    low_x = np.int64(min(x.min(), target_x.min()) - 2 * _HALF)
    depth = max(z.max(), target_z.max()) + reach_z + 1 - low_z
    height = max(y.max(), target_y.max()) + reach_y + 1 - low_y
    words = (max(x.max(), target_x.max()) + _HALF - low_x) // 64 + 2
    bits = np.zeros(depth * height * words, np.uint64)
    for k in range(target_z.size):
        column = target_x[k] - low_x
        word = ((target_z[k] - low_z) * height + target_y[k] - low_y) * words + (column >> 6)
        bits[word] |= np.uint64(1) << np.uint64(column & 63)
    steps = (rows[0] * height + rows[1]) * words
    across = np.empty(65)
    for step in range(65):
        across[step] = (step * spacing[2]) * (step * spacing[2])
    limit = min(squares[-1], across[_HALF])
    squared = np.full(z.size, np.inf)
    skipped, patience = 0, 0
    for k in range(z.size):
        if skipped < patience:
            skipped += 1
            continue
        start = x[k] - low_x - _HALF
        home = ((z[k] - low_z) * height + y[k] - low_y) * words + (start >> 6)
        shift = np.uint64(start & 63)
        best = np.inf
        for r in range(steps.size):
            if squares[r] >= best:
                break
            word = home + steps[r]
            window = bits[word] >> shift | bits[word + 1] << np.uint64(1) << (np.uint64(63) - shift)
            right, left = window >> np.uint64(_HALF), window << np.uint64(_HALF)
            step = min(_low_zeros(right), _high_zeros(left) + np.uint64(1), np.uint64(64))  # 64: beyond the limit
            best = min(best, squares[r] + across[step])
        if best <= limit:
            squared[k] = best
            patience = 0
        else:
            patience = min(2 * patience + 1, _PATIENCE)
        skipped = 0
    return squared


@_compiled
def search(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Squared distance of every point (3, n) to the nearest of ``target`` (3, m); neither is empty.

    Points are gathered in small blocks with a bounding box: the boxes alone rule out nearly all blocks of the target
    for a whole block of sources, most of the rest for each source, and the points of what is left are compared one by
    one. Exact: indices are whole numbers, and rounding keeps the order of a box's and its points' distances.
    """
    size = max(16.0, source.shape[1] ** (1 / 3))
    asked, asked_starts, asked_low, asked_high = _blocks(source, size, spacing)
    order, starts, low, high = _blocks(target, size, spacing)
    points = target[:, order].astype(np.float64)
    sz, sy, sx = spacing
    blocks = starts.size - 1
    squared = np.empty(source.shape[1])
    near, candidates = np.empty(blocks), np.empty(blocks, np.int64)
    for a in range(asked_starts.size - 1):
        within = _box_distances(asked_low[:, a], asked_high[:, a], low, high, spacing, near)
        count = 0
        for b in range(blocks):
            candidates[count] = b
            count += near[b] <= within
        last = candidates[0]
        for k in range(asked_starts[a], asked_starts[a + 1]):
            i = asked[k]
            z, y, x = float(source[0, i]), float(source[1, i]), float(source[2, i])
            best, found = np.inf, last
            for j in range(-1, count):  # neighbours tend to have the same nearest block: it bounds the others
                b = last if j < 0 else candidates[j]
                dz = max(low[0, b] - z, z - high[0, b], 0.0) * sz
                dy = max(low[1, b] - y, y - high[1, b], 0.0) * sy
                dx = max(low[2, b] - x, x - high[2, b], 0.0) * sx
                if dz * dz + dy * dy + dx * dx >= best:
                    continue
                nearest = np.inf
                for p in range(starts[b], starts[b + 1]):
                    dz = (points[0, p] - z) * sz
                    dy = (points[1, p] - y) * sy
                    dx = (points[2, p] - x) * sx
                    nearest = min(nearest, dz * dz + dy * dy + dx * dx)
                if nearest < best:
                    best, found = nearest, b
            squared[i] = best
            last = found
    return squared


@_compiled
def _box_distances(
    first: np.ndarray, past: np.ndarray, low: np.ndarray, high: np.ndarray, spacing: np.ndarray, near: np.ndarray
) -> float:
    """Fill in every box's smallest squared distance from one box, and return within what a point surely is found."""
    sz, sy, sx = spacing
    within = np.inf
    for b in range(near.size):
        dz = max(low[0, b] - past[0], first[0] - high[0, b], 0.0) * sz
        dy = max(low[1, b] - past[1], first[1] - high[1, b], 0.0) * sy
        dx = max(low[2, b] - past[2], first[2] - high[2, b], 0.0) * sx
        near[b] = dz * dz + dy * dy + dx * dx
        dz = max(high[0, b] - first[0], past[0] - low[0, b]) * sz
        dy = max(high[1, b] - first[1], past[1] - low[1, b]) * sy
        dx = max(high[2, b] - first[2], past[2] - low[2, b]) * sx
        within = min(within, dz * dz + dy * dy + dx * dx)
    return within


@_compiled
def _blocks(points: np.ndarray, size: float, spacing: np.ndarray):
    """Sort points into cubes that hold about ``size`` points of a surface: order, starts, lowest and highest corner."""
    n = points.shape[1]
    first, past = np.empty(3, np.int64), np.empty(3, np.int64)
    for axis in range(3):
        first[axis], past[axis] = points[axis].min(), points[axis].max()
    edge = np.sqrt(size) * np.prod(spacing) ** (1 / 3)  # a surface crosses a cube of m^3 voxels in about m^2
    steps, shape = np.empty(3, np.int64), np.empty(3, np.int64)
    while True:
        for axis in range(3):
            steps[axis] = max(1, int(edge / spacing[axis]))
            shape[axis] = (past[axis] - first[axis]) // steps[axis] + 1
        if shape[0] * shape[1] * shape[2] <= 4 * n + 64:  # few points far apart: larger cubes
            break
        edge *= 1.5
    cube = np.empty(n, np.int64)
    counts = np.zeros(shape[0] * shape[1] * shape[2], np.int64)
    for i in range(n):
        c = (points[0, i] - first[0]) // steps[0]
        c = c * shape[1] + (points[1, i] - first[1]) // steps[1]
        c = c * shape[2] + (points[2, i] - first[2]) // steps[2]
        cube[i] = c
        counts[c] += 1
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts[counts > 0])))
    place = np.cumsum(counts) - counts
    order = np.empty(n, np.int64)
    for i in range(n):
        order[place[cube[i]]] = i
        place[cube[i]] += 1
    low, high = np.empty((3, starts.size - 1)), np.empty((3, starts.size - 1))
    for b in range(starts.size - 1):
        for axis in range(3):
            inside = points[axis][order[starts[b] : starts[b + 1]]]
            low[axis, b], high[axis, b] = inside.min(), inside.max()
    return order, starts, low, high
