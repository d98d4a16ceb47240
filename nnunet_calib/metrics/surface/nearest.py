"""Distance from every point of one set to the nearest of another, both on the grid of an image; exact."""

import functools
import itertools
from collections.abc import Callable

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

_PROBES = 80  # neighbours, or rows of them, tried one after the other before the search proper
_VOXELS_PER_QUERY = 25  # of a distance transform that cost about as much as one query of a tree


def nearest(
    source: np.ndarray,
    target: np.ndarray,
    spacing: np.ndarray,
    *,
    backend: str = "numpy",
    device: str = "cpu",
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """Measure how far every point is from the nearest point of the other set.

    Args:
        source: int32 (3, n), indices, each once.
        target: int32 (3, m), the same.
        spacing: float64 (3,), mm per axis.
        backend: ``numpy``, ``numba`` or ``torch``; the same result.
        device: of torch.
        axes: float64 (3, 3), steps of the axes in mm, one a column, where they are not at right angles.

    Returns:
        float64 (n,), mm; infinite where ``target`` is empty.
    """
    if not source.size or not target.size:
        return np.full(source.shape[1], np.inf)
    if axes is not None:
        return cKDTree((axes @ target).T).query((axes @ source).T)[0]
    if backend == "numba":
        squared = _nearest_compiled(source, target, spacing)
        return np.sqrt(squared, out=squared)
    offsets, squares = probes(tuple(spacing.tolist()))
    # Positions in a crop around both sets, with room for every probe.
    low, high = _around(source, target)
    reach = np.abs(offsets).max(axis=1)
    low, high = low - reach, high + reach
    shape = high - low
    at, there = (_positions(points - low[:, None], shape) for points in (source, target))
    steps, voxels = _positions(offsets, shape), int(np.prod(shape))
    search: Callable[..., np.ndarray]
    if backend == "torch":
        from nnunet_calib.metrics.surface import distances_torch

        squared = distances_torch.probe(at, there, voxels, steps, squares, device)
        search = functools.partial(distances_torch.search, device=device)
    else:
        squared, search = _probe(at, there, voxels, steps, squares), _search
    far = np.isinf(squared)
    if far.any():
        squared[far] = search(source[:, far], target, spacing)
    return np.sqrt(squared, out=squared)


def _nearest_compiled(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Squared distances by the rows around each point, and a search among all targets for those that are far off."""
    from nnunet_calib.metrics.surface import distance_kernels

    squared = distance_kernels.close(tuple(source), tuple(target), spacing, *rows(tuple(spacing.tolist())))
    far = np.isinf(squared)
    if far.any():
        squared[far] = distance_kernels.search(*map(np.ascontiguousarray, (source[:, far], target)), spacing)
    return squared


def _around(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box around both sets: first index and the one past the last, int64 (3,)."""
    low = np.minimum(source.min(axis=1), target.min(axis=1)).astype(np.int64)
    return low, np.maximum(source.max(axis=1), target.max(axis=1)).astype(np.int64) + 1


def _positions(indices: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Positions of indices (3, n) in a flattened array."""
    return (indices[0] * shape[1] + indices[1]) * shape[2] + indices[2]


@functools.cache
def probes(spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest neighbours of a voxel, itself first: offsets int64 (3, k) and squared distances (k,), ascending."""
    sides = [range(-int(r), int(r) + 1) for r in np.minimum(5 * min(spacing) / np.array(spacing), 5)]
    offsets = np.array(list(itertools.product(*sides))).T
    squares = squared_length(offsets, np.array(spacing))
    order = np.argsort(squares, kind="stable")
    # Only a whole ball tells that a first hit is the nearest: stop before the cube's corners cut it off.
    order = order[squares[order] <= (5 * min(spacing)) ** 2][:_PROBES]
    return np.ascontiguousarray(offsets[:, order]), squares[order]


@functools.cache
def rows(spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows along the last axis, a voxel's own first.

    Steps along the other axes int64 (2, k) and squared distances (k + 1,), ascending, one more than there are steps.
    """
    radius = 10 * min(spacing[:2])
    sides = [range(-int(radius / step), int(radius / step) + 1) for step in spacing[:2]]
    steps = np.array(list(itertools.product(*sides, [0]))).T
    squares = squared_length(steps, np.array(spacing))
    order = np.argsort(squares, kind="stable")
    order = order[squares[order] <= radius**2][: _PROBES + 1]  # as for the probes: whole discs only
    return np.ascontiguousarray(steps[:2, order[:-1]]), squares[order]


def squared_length(steps: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Squared length in mm2 of steps (3, n) between grid points, summed in the order that all backends keep."""
    z, y, x = steps * spacing[:, None]
    return z * z + y * y + x * x


def _probe(at: np.ndarray, there: np.ndarray, voxels: int, steps: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Squared distances of the points with a target within the probes; infinity for the others."""
    is_target = np.zeros(voxels, dtype=bool)
    is_target[there] = True
    squared = np.full(at.size, np.inf)
    left = np.arange(at.size)
    for step, square in zip(steps, squares, strict=True):
        hit = is_target[at + step]
        squared[left[hit]] = square
        left, at = left[~hit], at[~hit]
        if not left.size:
            break
    return squared


def _search(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Squared distances by a tree of the targets or, for many points, by a distance transform of the box around all."""
    low, high = _around(source, target)
    if _VOXELS_PER_QUERY * source.shape[1] < np.prod(high - low):
        tree = cKDTree((target * spacing[:, None]).T, balanced_tree=False, compact_nodes=False)
        found = tree.query((source * spacing[:, None]).T)[1]
        return squared_length(target[:, found] - source, spacing)
    away = np.ones(high - low, dtype=bool)
    away[tuple(target - low[:, None])] = False
    return ndimage.distance_transform_edt(away, sampling=spacing)[tuple(source - low[:, None])] ** 2
