"""Distances between the surfaces of two structures, in millimetres.

``surface_distances`` measures once; Hausdorff distance, its 95th percentile, the average distance and the surface Dice
read the result. A structure's surface is its voxels with a face neighbour outside; beyond the image edge is outside.
Axes of length one are dropped first, so a single slice is treated as the 2D image it is.

Empty structures, for every reader: both empty NaN (nothing to score); one empty the worst value, never a good one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

_ROUNDING = 1e-6  # mm; file headers keep the spacing in float32, which must not decide who is within a tolerance


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every surface voxel to the nearest surface voxel of the other structure.

    Attributes:
        from_reference: float64 (n,), mm; infinite where the prediction is empty.
        from_prediction: float64 (m,), mm; infinite where the reference is empty.
    """

    from_reference: np.ndarray
    from_prediction: np.ndarray

    @property
    def both_empty(self) -> bool:
        """Neither structure has a voxel."""
        return not self.from_reference.size and not self.from_prediction.size

    @property
    def one_empty(self) -> bool:
        """Exactly one of the structures has no voxel: it was missed, or made up."""
        return bool(self.from_reference.size) != bool(self.from_prediction.size)


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Measure both directed sets of surface distances, exactly.

    Args:
        reference: bool mask, 2D or 3D.
        prediction: bool mask of the same shape.
        spacing: mm per axis, in the order of the array's axes.

    Raises:
        ValueError: shapes differ, or the spacing does not fit the axes or is not positive.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, prediction {prediction.shape}")
    if len(spacing) != reference.ndim or not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"spacing {tuple(spacing)} does not fit an array of shape {reference.shape}")
    axes = _extended_axes(reference.shape)
    step = np.array([spacing[axis] for axis in axes], dtype=np.float64)
    reference, prediction = (mask.reshape([mask.shape[axis] for axis in axes]) for mask in (reference, prediction))
    box = _bounding_box(reference | prediction)
    of_reference, of_prediction = surface(reference[box]), surface(prediction[box])
    return SurfaceDistances(
        _to_nearest(of_reference, of_prediction, step),
        _to_nearest(of_prediction, of_reference, step),
    )


def hausdorff(distances: SurfaceDistances) -> float:
    """Hausdorff distance: the largest of all surface distances, in mm. One empty: inf. Both empty: NaN."""
    if distances.both_empty:
        return float("nan")
    return float(max(d.max(initial=0.0) for d in (distances.from_reference, distances.from_prediction)))


def hausdorff_95(distances: SurfaceDistances) -> float:
    """HD95: the larger of the two directed 95th percentiles (linear interpolation, as MONAI), in mm.

    One empty: inf (MONAI gives NaN, which hides missed structures from the mean). Both empty: NaN.
    """
    if distances.both_empty:
        return float("nan")
    if distances.one_empty:
        return float("inf")
    return float(max(np.percentile(d, 95) for d in (distances.from_reference, distances.from_prediction)))


def average_surface_distance(distances: SurfaceDistances) -> float:
    """ASSD: the mean over the surface distances of both directions pooled, in mm. One empty: inf. Both empty: NaN."""
    if distances.both_empty:
        return float("nan")
    return float(np.concatenate([distances.from_reference, distances.from_prediction]).mean())


def surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """NSD: the share of surface voxels, both surfaces together, within a tolerance of the other surface.

    Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy, 2018,
    counted in voxels as MONAI's ``SurfaceDiceMetric`` does.

    Args:
        distances: of the two surfaces.
        tolerance: mm, inclusive.

    Returns:
        A value in [0, 1]. One empty: 0. Both empty: NaN.

    Raises:
        ValueError: the tolerance is negative or not finite.
    """
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"the tolerance must be a finite number of mm, not negative; it is {tolerance}")
    if distances.both_empty:
        return float("nan")
    return float(
        (np.concatenate([distances.from_reference, distances.from_prediction]) <= tolerance + _ROUNDING).mean()
    )


def surface(mask: np.ndarray) -> np.ndarray:
    """Surface voxels of a bool mask (same shape): inside, with a face neighbour outside or beyond the image edge."""
    return mask & _has_different_neighbour(mask)


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
    axes = _extended_axes(labels.shape)
    flat = crop.reshape([crop.shape[axis] for axis in axes])
    away = ~((flat != 0) & _has_different_neighbour(flat))
    distance = ndimage.distance_transform_edt(away, sampling=[spacing[axis] for axis in axes])
    near[box] = distance.reshape(crop.shape) <= within + _ROUNDING
    return near


def _has_different_neighbour(labels: np.ndarray) -> np.ndarray:
    """True where a face neighbour holds another value; at the image edge, always."""
    different = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        view, out = np.moveaxis(labels, axis, 0), np.moveaxis(different, axis, 0)
        step = view[1:] != view[:-1]
        out[1:] |= step
        out[:-1] |= step
        out[:1] = out[-1:] = True
    return different


def _to_nearest(source: np.ndarray, target: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance of every True voxel of ``source`` to the nearest True voxel of ``target``; inf where there is none."""
    if not target.any():
        return np.full(np.count_nonzero(source), np.inf)
    distances = np.zeros(np.count_nonzero(source))
    apart = ~target[source]
    if apart.any():  # voxels on both surfaces are 0 apart; the search is for the others
        tree = cKDTree(np.argwhere(target) * spacing, balanced_tree=False)
        distances[apart] = tree.query(np.argwhere(source)[apart] * spacing)[0]
    return distances


def _extended_axes(shape: tuple[int, ...]) -> list[int]:
    """Axes longer than one voxel: along the others a structure has no extent, so no surface either."""
    return [axis for axis, length in enumerate(shape) if length > 1] or [0]


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds every True voxel; an empty box where there is none."""
    sides = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        sides.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return tuple(sides)
