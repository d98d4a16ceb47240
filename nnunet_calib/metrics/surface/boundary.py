"""The surface of a structure as a mask, and what lies near the surfaces of a label map."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

BOUNDARY_MM = 3.0
"""Width of the region ``boundary`` of calibration on either side of the reference surface."""

_ROUNDING = 1e-6  # mm; file headers keep the spacing in float32, which must not decide what is near


def surface(mask: np.ndarray) -> np.ndarray:
    """Surface voxels of a bool mask (same shape): inside, with a face neighbour outside or beyond the image edge."""
    return mask & differs_from_neighbour(mask, edges=range(mask.ndim))


def surface_of_any(labels: np.ndarray) -> np.ndarray:
    """Surface voxels of all structures of a label map (0 is background), bool of its shape.

    Along an axis of one voxel a structure has no extent, so no surface either.
    """
    return (labels != 0) & differs_from_neighbour(labels, edges=extended_axes(labels.shape))


def near_surface(labels: np.ndarray, spacing: Sequence[float], within: float) -> np.ndarray:
    """Voxels near the surface of any structure of a label map.

    Args:
        labels: label map (0 is background) or bool mask, 2D or 3D.
        spacing: mm per axis.
        within: mm, inclusive, measured between voxel centres.

    Returns:
        bool, shape of ``labels``; all False for an empty label map.
    """
    near = np.zeros(labels.shape, dtype=bool)
    foreground = labels != 0
    if not foreground.any():
        return near
    margins = [int(np.ceil(within / step)) for step in spacing]
    box = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side, margin in zip(_bounding_box(foreground), margins, strict=True)
    )
    crop = labels[box]
    axes = extended_axes(labels.shape)
    flat = crop.reshape([crop.shape[axis] for axis in axes])
    away = ~((flat != 0) & differs_from_neighbour(flat, edges=range(flat.ndim)))
    distance = ndimage.distance_transform_edt(away, sampling=[spacing[axis] for axis in axes])
    near[box] = distance.reshape(crop.shape) <= within + _ROUNDING
    return near


def differs_from_neighbour(labels: np.ndarray, edges: Iterable[int] = ()) -> np.ndarray:
    """True where a face neighbour holds another value, and at the image edge of some axes; bool of that shape."""
    different = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        view, out = np.moveaxis(labels, axis, 0), np.moveaxis(different, axis, 0)
        step = view[1:] != view[:-1]
        out[1:] |= step
        out[:-1] |= step
    for axis in edges:
        out = np.moveaxis(different, axis, 0)
        out[:1] = out[-1:] = True
    return different


def extended_axes(shape: tuple[int, ...]) -> list[int]:
    """Axes longer than one voxel: along the others a structure has no extent, so no surface either."""
    return [axis for axis, length in enumerate(shape) if length > 1] or [0]


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds every True voxel; an empty box where there is none."""
    sides = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        sides.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return tuple(sides)
