"""Distances between the surfaces of two structures, in millimetres.

``structure_distances`` (label maps) and ``surface_distances`` (masks) measure once; the Hausdorff distance and its
percentiles, the average distances and the surface Dice read the result. Axes of length one are dropped first, so a
single slice is treated as the 2D image it is. What lies beyond the image edge is outside.

Two definitions of a surface:
    ``voxel``: the voxels of the structure with a face neighbour outside, each counting one (MONAI, medpy).
    ``area``: the cells between 2 x 2 x 2 neighbouring voxels that are partly inside, each counting the area of the
        surface in it (DeepMind's ``surface-distance``; in 2D the length of the contour).

Empty structures, for every reader: both empty NaN (nothing to score); one empty the worst value, never a good one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_calib.metrics.backends import available
from nnunet_calib.metrics.overlap import Structure, label_map, labels_of
from nnunet_calib.metrics.surface.boundary import extended_axes
from nnunet_calib.metrics.surface.layers import disjoint, relabelled
from nnunet_calib.metrics.surface.nearest import nearest
from nnunet_calib.metrics.surface.surfaces import surfaces

SURFACES = ("voxel", "area")
RULES = ("directed", "pooled")

_ROUNDING = 1e-6  # mm; file headers keep the spacing in float32, which must not decide who is within a tolerance


@dataclass(frozen=True)
class SurfaceDistances:
    """Distance of every piece of a surface to the nearest piece of the other structure's surface.

    Attributes:
        from_reference: float64 (n,), mm; infinite where the prediction is empty.
        from_prediction: float64 (m,), mm; infinite where the reference is empty.
        reference_area: float64 (n,), what each piece counts: mm2, in 2D mm. None: every piece counts one.
        prediction_area: float64 (m,), the same.
    """

    from_reference: np.ndarray
    from_prediction: np.ndarray
    reference_area: np.ndarray | None = None
    prediction_area: np.ndarray | None = None

    @property
    def both_empty(self) -> bool:
        """Neither structure has a voxel."""
        return not self.from_reference.size and not self.from_prediction.size

    @property
    def one_empty(self) -> bool:
        """Exactly one of the structures has no voxel: it was missed, or made up."""
        return bool(self.from_reference.size) != bool(self.from_prediction.size)

    @property
    def directed(self) -> tuple[tuple[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray | None]]:
        """Distances and what they count, from the reference and from the prediction."""
        return (self.from_reference, self.reference_area), (self.from_prediction, self.prediction_area)

    @property
    def pooled(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Distances of both directions together, and what they count."""
        distances = np.concatenate([self.from_reference, self.from_prediction])
        if self.reference_area is None or self.prediction_area is None:
            return distances, None
        return distances, np.concatenate([self.reference_area, self.prediction_area])


def structure_distances(
    reference: np.ndarray,
    prediction: np.ndarray,
    structures: Sequence[Structure],
    spacing: Sequence[float],
    *,
    surface: str = "voxel",
    backend: str = "auto",
    device: str = "cpu",
    axes: np.ndarray | None = None,
) -> list[SurfaceDistances]:
    """Measure the surface distances of all structures of two label maps, exactly.

    Structures that share no label are measured in one pass over the two maps; a region that overlaps another takes a
    pass of its own. The passes go over the box around all labels; the search for neighbours sees surfaces only.

    Args:
        reference: label map, non-negative integers, 2D or 3D.
        prediction: label map of the same shape.
        structures: labels, or tuples of labels that form a region.
        spacing: mm per axis, in the order of the array's axes.
        surface: ``voxel`` or ``area``, see the module.
        backend: ``numpy``, ``numba`` (extra ``fast``), ``torch``, or ``auto``: numba if it is installed, else numpy.
            They agree to rounding.
        device: where torch computes, such as ``cuda``; the other backends are the processor's.
        axes: (3, n), mm, where the array's axes are not at right angles: its columns are their steps. Of voxel surfaces
            only, and searched in a tree whatever the backend.

    Returns:
        One ``SurfaceDistances`` per structure, in their order.

    Raises:
        ValueError: shapes differ, labels (of maps or structures) are not integers or negative, the spacing does not fit
            the axes or is not positive, or an option has an unknown value.
        ImportError: numba is asked for and not installed.
    """
    _check(reference, prediction, spacing)
    _one_of("surface", surface, SURFACES)
    backend = available(backend)
    if axes is not None and surface != "voxel":
        raise ValueError(f"a surface {surface!r} needs axes at right angles")
    number, shape, step = _as_3d(reference.shape, spacing)
    oblique = None if axes is None else np.zeros((3, 3))
    if axes is not None and oblique is not None:
        oblique[:, 3 - number :] = np.asarray(axes, dtype=np.float64)[:, extended_axes(reference.shape)]
    reference, prediction = (label_map(labels).reshape(shape) for labels in (reference, prediction))
    measured: dict[int, SurfaceDistances] = {}
    for layer in disjoint(structures):
        maps, wanted = relabelled(reference, prediction, {k: labels_of(structures[k]) for k in layer})
        found = [surfaces(labels, number, wanted, step, surface, backend=backend, device=device) for labels in maps]
        for k, ours, theirs in zip(layer, *found, strict=True):
            measured[k] = SurfaceDistances(
                nearest(ours.points, theirs.points, step, backend=backend, device=device, axes=oblique),
                nearest(theirs.points, ours.points, step, backend=backend, device=device, axes=oblique),
                ours.areas,
                theirs.areas,
            )
    return [measured[k] for k in range(len(structures))]


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], *, surface: str = "voxel"
) -> SurfaceDistances:
    """Measure the surface distances of one structure, exactly.

    Args:
        reference: bool mask, 2D or 3D.
        prediction: bool mask of the same shape.
        spacing: mm per axis, in the order of the array's axes.
        surface: ``voxel`` or ``area``, see the module.

    Raises:
        ValueError: shapes differ, the spacing does not fit the axes or is not positive, or the surface is unknown.
    """
    ours, theirs = np.asarray(reference, dtype=bool), np.asarray(prediction, dtype=bool)
    return structure_distances(ours, theirs, [1], spacing, surface=surface)[0]


def hausdorff(distances: SurfaceDistances, percentile: float = 100.0, rule: str = "directed") -> float:
    """Hausdorff distance, or a percentile of the surface distances in its place, in mm.

    A percentile of voxels is interpolated linearly between neighbours; a percentile of areas is the smallest distance
    within which at least that share of the area lies (as DeepMind's ``compute_robust_hausdorff``).

    Args:
        distances: of the two surfaces.
        percentile: in [0, 100]; 100 is the Hausdorff distance itself.
        rule: ``directed``, the larger of the percentiles of the two directions (MONAI, DeepMind), or ``pooled``, the
            percentile of both directions together (medpy, panoptica).

    Returns:
        mm. One empty: inf (MONAI gives NaN below the 100th, which hides missed structures). Both empty: NaN.

    Raises:
        ValueError: the percentile is outside its range or the rule is unknown.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"the percentile must be in [0, 100]; it is {percentile}")
    _one_of("rule", rule, RULES)
    if distances.both_empty or distances.one_empty:
        return _empty(distances)
    if rule == "pooled":
        return _percentile(*distances.pooled, percentile)
    return max(_percentile(*direction, percentile) for direction in distances.directed)


def hausdorff_95(distances: SurfaceDistances, rule: str = "directed") -> float:
    """HD95, in mm: ``hausdorff`` at the 95th percentile. One empty: inf. Both empty: NaN."""
    return hausdorff(distances, 95.0, rule)


def average_surface_distance(distances: SurfaceDistances) -> float:
    """ASSD: the mean over the surface distances of both directions pooled, in mm. One empty: inf. Both empty: NaN."""
    return _empty(distances) if distances.both_empty or distances.one_empty else _mean(*distances.pooled)


def mean_average_surface_distance(distances: SurfaceDistances) -> float:
    """MASD: the mean of the two directions' mean distances, in mm. One empty: inf. Both empty: NaN."""
    if distances.both_empty or distances.one_empty:
        return _empty(distances)
    return sum(_mean(*direction) for direction in distances.directed) / 2


def surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """NSD: the share of the surface, both structures' together, within a tolerance of the other surface.

    Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy, 2018; voxels
    counted as in MONAI's ``SurfaceDiceMetric``, areas as in DeepMind's ``compute_surface_dice_at_tolerance``.

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
    lengths, counts = distances.pooled
    return _mean(lengths <= tolerance + _ROUNDING, counts)


def _check(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> None:
    if reference.shape != prediction.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, prediction {prediction.shape}")
    if len(spacing) != reference.ndim or not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"spacing {tuple(spacing)} does not fit an array of shape {reference.shape}")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} {value!r} is not one of {', '.join(allowed)}")


def _as_3d(shape: tuple[int, ...], spacing: Sequence[float]) -> tuple[int, list[int], np.ndarray]:
    """The axes longer than one: their number; shape and spacing of them, filled up to three in front.

    An axis that is not there gets a spacing that no search looks along.
    """
    axes = extended_axes(shape)
    if len(axes) > 3:
        raise ValueError(f"label maps have 2 or 3 axes; this one has shape {shape}")
    missing = 3 - len(axes)
    steps = [float(spacing[axis]) for axis in axes]
    return len(axes), [1] * missing + [shape[axis] for axis in axes], np.array([10 * max(steps)] * missing + steps)


def _empty(distances: SurfaceDistances) -> float:
    return float("nan") if distances.both_empty else float("inf")


def _mean(values: np.ndarray, counts: np.ndarray | None) -> float:
    return float(values.mean()) if counts is None else float((values * counts).sum() / counts.sum())


def _percentile(values: np.ndarray, counts: np.ndarray | None, percentile: float) -> float:
    if percentile == 100:
        return float(values.max())
    if counts is None:
        return _interpolated(values, percentile)
    order = np.argsort(values, kind="stable")
    share = np.cumsum(counts[order]) / counts.sum()
    return float(values[order[min(int(np.searchsorted(share, percentile / 100)), len(order) - 1)]])


def _interpolated(values: np.ndarray, percentile: float) -> float:
    """``np.percentile`` below the 100th, sooner: by one partition, of the values above the mean where they decide.

    Most surface distances are the same few small numbers, at which a partition takes long.
    """
    position = percentile / 100 * (values.size - 1)
    below = int(position)
    tail = values[values > values.mean()]
    if (before := values.size - tail.size) <= below:
        values, below, position = tail, below - before, position - before
    parted = np.partition(values, below)
    value, share = parted[below], position - below
    return float(value + share * (parted[below + 1 :].min() - value)) if share else float(value)
