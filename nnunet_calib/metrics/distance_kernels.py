"""Compiled search for the nearest surface (numba, optional): the same numbers as the numpy functions, sooner.

Imported only where numba is there and asked for.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call and keep the machine code on disk, where any folder can be written to.

    The flags let the compiler take minima several at a time. No number is rounded otherwise, and none is NaN.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"nnan", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder
        return numba.njit(**options)(function)


@_compiled
def probe(at: np.ndarray, there: np.ndarray, voxels: int, steps: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Squared distances of the points with a target within the probes; infinity for the others."""
    is_target = np.zeros(voxels, np.bool_)
    for position in there:
        is_target[position] = True
    squared = np.full(at.size, np.inf)
    for i in range(at.size):
        for k in range(steps.size):
            if is_target[at[i] + steps[k]]:
                squared[i] = squares[k]
                break
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
