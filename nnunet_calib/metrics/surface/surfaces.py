"""Surfaces of all structures of a label map, found in one pass over it.

Two definitions. ``voxel``: the voxels of the structure with a face neighbour outside, each counting one. ``area``: the
cells between 2 x 2 x 2 neighbouring voxel centres that are partly inside, each counting its area (``surfels``).
Beyond the image edge is outside.

The pass goes over a flattened copy with a layer of zeros around it, in which neighbours lie at fixed strides and need
no test for the edge. An axis that the image has not (the first of a 2D image) has stride zero: nothing differs there.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_calib.metrics.surface.surfels import corner_offsets, surfel_areas

_CHUNK = 1 << 17  # voxels handled at once: what is made of them stays in the processor's cache


@dataclass(frozen=True)
class Surface:
    """One structure's surface.

    Attributes:
        points: int32 (3, n), indices of its voxels, or cells, in the order of the raster.
        areas: float64 (n,), mm2 (2D: mm); None where every voxel counts one.
    """

    points: np.ndarray
    areas: np.ndarray | None


def surfaces(
    labels: np.ndarray,
    axes: int,
    wanted: Sequence[int],
    spacing: np.ndarray,
    surface: str = "voxel",
    *,
    backend: str = "numpy",
    device: str = "cpu",
) -> list[Surface]:
    """Find the surface of every wanted label.

    Args:
        labels: 3D label map, uint8 or uint16.
        axes: how many of its axes, counted from the last, the image has; the others have length one.
        wanted: labels, none of them 0.
        spacing: mm per axis, float64 (3,).
        surface: ``voxel`` or ``area``.
        backend: ``numpy``, ``numba`` or ``torch``; the same result.
        device: of torch.

    Returns:
        One per wanted label, in their order.
    """
    labels = _padded(labels, axes)
    flat = labels.reshape(-1)
    positions = np.int32 if flat.size < 1 << 31 else np.int64
    strides: np.ndarray = np.array([labels.shape[1] * labels.shape[2], labels.shape[2], 1], dtype=positions)
    strides[: 3 - axes] = 0
    corners = np.array(corner_offsets(axes), dtype=positions) @ strides[-axes:]
    codes = None
    if backend == "numba":
        from nnunet_calib.metrics.surface import surface_kernels

        place = np.full(1 << 8 * labels.itemsize, len(wanted))
        place[wanted] = np.arange(len(wanted))
        if surface == "area":
            points, starts, codes = surface_kernels.surface_cells(labels, corners, place, len(wanted))
        else:
            points, starts = surface_kernels.surface_voxels(labels, strides, place, len(wanted))
        parts = [slice(start, end) for start, end in itertools.pairwise(starts[:-1])]
    else:
        on_device = device if backend == "torch" else None
        if surface == "area":
            found, values, codes = _surface_cells(flat, corners, on_device)
        else:
            found = _surface_voxels(flat, strides, on_device)
            values = flat[found]
        order = np.argsort(values, kind="stable")
        values = values[order]
        points = _indices(found[order], labels.shape)
        codes = None if codes is None else codes[order]
        ends = (np.searchsorted(values, np.array(wanted, values.dtype), side) for side in ("left", "right"))
        parts = [slice(start, end) for start, end in zip(*ends, strict=True)]
    areas = None if codes is None else surfel_areas(spacing[-axes:].tolist())[codes]
    return [Surface(points[:, part], None if areas is None else areas[part]) for part in parts]


def _indices(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Indices, int32 (3, n), of positions in a flattened array (``np.unravel_index``, at half the cost)."""
    indices = np.empty((3, positions.size), dtype=np.int32)
    if np.prod(shape) < 1 << 31:
        positions = positions.astype(np.int32)
    indices[0], rest = np.divmod(positions, shape[1] * shape[2])
    indices[1], indices[2] = np.divmod(rest, shape[2])
    return indices


def _padded(labels: np.ndarray, axes: int) -> np.ndarray:
    """Copy a label map into zeros that surround it along the axes of the image."""
    margins = [int(axis >= 3 - axes) for axis in range(3)]
    out = np.zeros([length + 2 * margin for length, margin in zip(labels.shape, margins, strict=True)], labels.dtype)
    out[tuple(slice(margin, margin + length) for length, margin in zip(labels.shape, margins, strict=True))] = labels
    return out


def _surface_voxels(flat: np.ndarray, strides: np.ndarray, device: str | None) -> np.ndarray:
    """Positions of the labelled voxels with another value beside them."""
    if device is not None:
        from nnunet_calib.metrics.surface import distances_torch

        return distances_torch.surface_voxels(flat, strides, device)
    margin = int(strides.max())
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for start in range(margin, flat.size - margin, _CHUNK):
        stop = min(start + _CHUNK, flat.size - margin)
        here = flat[start:stop]
        if not here.any():
            continue
        different = np.zeros(here.size, dtype=bool)
        for stride in (stride for step in strides if step for stride in (step, -step)):
            different |= flat[start + stride : stop + stride] != here
        different &= here != 0
        found.append(np.flatnonzero(different) + start)
    return np.concatenate(found)


def _surface_cells(
    flat: np.ndarray, corners: np.ndarray, device: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every label at the corners of every mixed cell: the cell's first corner, the label, the code of its corners."""
    cells = _mixed_cells(flat, corners, device)
    around = np.stack([flat[cells + corner] for corner in corners])
    found, values, codes = [], [], []
    for k, label in enumerate(around):
        first = (label != 0) & (around[:k] != label).all(axis=0)
        inside = around[:, first] == label[first]
        found.append(cells[first])
        values.append(label[first])
        codes.append(np.packbits(inside, axis=0, bitorder="little")[0])
    joined = np.concatenate(found)
    order = np.argsort(joined, kind="stable")
    return joined[order], np.concatenate(values)[order], np.concatenate(codes)[order]


def _mixed_cells(flat: np.ndarray, corners: np.ndarray, device: str | None) -> np.ndarray:
    """Positions of the cells whose corners do not all hold the same value."""
    if device is not None:
        from nnunet_calib.metrics.surface import distances_torch

        return distances_torch.mixed_cells(flat, corners, device)
    last = int(corners[-1])
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for start in range(0, flat.size - last, _CHUNK):
        stop = min(start + _CHUNK, flat.size - last)
        here = flat[start:stop]
        mixed = np.zeros(here.size, dtype=bool)
        for corner in corners[1:]:
            mixed |= flat[start + corner : stop + corner] != here
        found.append(np.flatnonzero(mixed) + start)
    return np.concatenate(found)
