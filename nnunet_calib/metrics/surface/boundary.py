"""The surface of a structure as a mask, and what lies near the surfaces of a label map."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

BOUNDARY_MM = 3.0
"""Width of the region ``boundary`` of calibration on either side of the reference surface."""

_ROUNDING = 1e-6  # mm; file headers keep the spacing in float32, which must not decide what is near
_VOXELS = 1 << 21  # looked at together
_LINES = 2000  # in a ball, above which distances are faster


def surface(mask: np.ndarray) -> np.ndarray:
    """Surface voxels of a bool mask (same shape): inside, with a face neighbour outside or beyond the image edge."""
    return mask & differs_from_neighbour(mask, edges=range(mask.ndim))


def surface_of_any(labels: np.ndarray) -> np.ndarray:
    """Surface voxels of all structures of a label map (0 is background), bool of its shape.

    Along an axis of one voxel a structure has no extent, so no surface either.
    """
    return (labels != 0) & differs_from_neighbour(labels, edges=extended_axes(labels.shape))


def near_surface(
    labels: np.ndarray, spacing: Sequence[float], within: float, planes: slice = slice(None)
) -> np.ndarray:
    """Voxels near the surface of any structure of a label map.

    Args:
        labels: label map (0 is background) or bool mask, 2D or 3D.
        spacing: mm per axis.
        within: mm, inclusive, measured between voxel centres.
        planes: of the first axis; the others are only looked at.

    Returns:
        bool, shape of ``labels[planes]``; all False for an empty label map.
    """
    start, stop, _ = planes.indices(len(labels))
    near = np.zeros((max(0, stop - start), *labels.shape[1:]), dtype=bool)
    reach = [int((within + _ROUNDING) / step) for step in spacing]
    thickness = max(4 * reach[0] + 1, _VOXELS // max(1, near[:1].size))
    for first in range(start, stop, thickness):
        last = min(first + thickness, stop)
        low, high = max(0, first - reach[0]), min(len(labels), last + reach[0])
        begin = max(0, low - 1)  # a voxel's neighbours say whether it is of a surface
        found = surface_of_any(labels[begin : high + 1])[low - begin :][: high - low]
        box = tuple(
            slice(max(0, side.start - margin), side.stop + margin)
            for side, margin in zip(_bounding_box(found), reach, strict=True)
        )
        grown = np.zeros(found.shape, dtype=bool)
        grown[box] = _grown(found[box], spacing, within + _ROUNDING, reach)
        near[first - start : last - start] = grown[first - low : last - low]
    return near


def _grown(mask: np.ndarray, spacing: Sequence[float], within: float, reach: Sequence[int]) -> np.ndarray:
    """Voxels within some mm of True ones, bool of that shape.

    The ball is made of lines along the last axis. A mask is widened along them step by step, and shifted to where each
    line is as soon as it is as wide as that; of fine images, with many lines, distances are the faster way.
    """
    lines = np.indices([2 * r + 1 for r in reach[:-1]]).reshape(mask.ndim - 1, -1).T - np.array(reach[:-1], dtype=int)
    if len(lines) > _LINES:
        return ndimage.distance_transform_edt(~mask, sampling=spacing) <= within if mask.any() else mask
    aside = np.square(lines * np.asarray(spacing[:-1])).sum(axis=1)
    along = np.square(np.arange(reach[-1] + 1) * spacing[-1])
    widths = (np.sqrt(aside[:, None] + along) <= within).sum(axis=1) - 1
    grown, wide = np.zeros(mask.shape, dtype=bool), mask.copy()
    for width in range(reach[-1] + 1):
        if width:
            wide[..., width:] |= mask[..., :-width]
            wide[..., :-width] |= mask[..., width:]
        for line in lines[widths == width]:
            grown[tuple(map(_shifted, line))] |= wide[tuple(map(_shifted, -line))]
    return grown


def _shifted(by: int) -> slice:
    return slice(max(0, int(by)), min(0, int(by)) or None)


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
