"""Two volumes of one anatomy brought to lie on each other, by their images alone.

    y(x) = A (x + u(x)) + t

takes a place x of the fixed volume to that place y of the moving one which shows the same. A and t: affine, the largest
mutual information (Mattes et al., PET-CT image registration in the chest using free-form deformations, TMI 2003), from
the best of several starts, for fields of view may differ. u: diffeomorphic demons on images of matched histograms
(Vercauteren et al., Diffeomorphic demons: efficient non-parametric image registration, NeuroImage 2009). Both are
SimpleITK's, coarse to fine, on a grid of at most half a million voxels. Where the moving volume does not reach, nothing
pulls: there u continues what is around it.

A heart is little of a chest, and intensities may lead away from it. So a step is taken back where it carries the
classes that the base model finds in both volumes worse than what was before it: A and t then are those classes' own
start, u is 0.

The same volumes give the same map, with one thread to the bit; only where the limit of time is reached does it depend
on the machine, and then it says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.frame import align, landmarks

KINDS = ("none", "affine", "deformable")

LIMIT_S = 120.0
"""Seconds that a pair may take by default."""

_BINS = 32
_FEWEST = 8  # voxels along an axis of a coarse level
_THIN = 4  # an axis of fewer voxels is not registered along
_AFFINE_LEVELS = (4.0, 2.0, 1.0)  # voxels of a level, in the smallest spacing of the grid
_AFFINE_STEPS = 200
_SAMPLED = 20_000  # voxels that mutual information is taken of
_SEED = 1  # of where within their cells; ITK's own is the clock
_OVERLAP = 0.25  # of the smaller volume, without which a start is none
_TRIED = 2  # of the starts, as far as the coarsest level
_DEMONS_LEVELS = (4.0, 2.0, 1.0)
_DEMONS_STEPS = (40, 40, 20)
_SMOOTHING = 1.2  # standard deviation of the Gaussian that the field is smoothed with, voxels of the level
_BLOCK = 5  # steps between looks at the clock
_WORSE = 0.1  # of the mean Dice of base classes; less may be the model's own inaccuracy
_FEWEST_OF_CLASS = 30  # voxels in both volumes


@dataclass(frozen=True)
class Registration:
    """How volumes are registered.

    Attributes:
        kind: ``none``, ``affine`` or ``deformable``.
        limit_s: seconds of a pair; what is reached by then is used.
    """

    kind: str = "deformable"
    limit_s: float = LIMIT_S

    def __post_init__(self):
        if self.kind not in KINDS or not self.limit_s > 0:
            raise ValueError(f"a registration is one of {', '.join(KINDS)}, with a limit above 0 seconds")


@dataclass(frozen=True, eq=False)
class Warp:
    """Where the places of a fixed volume lie in a moving one; mm along the axes, from the outer corner of the grid.

    Attributes:
        matrix: float64 (3, 3), A.
        offset: float64 (3,), t.
        displacement: float16 (3, *R) of the fixed volume, u in mm; None: 0.
        seconds: of the processor that it took.
        limited: the limit of time was reached.
        failed: the volumes could not be registered; it is the start.
    """

    matrix: np.ndarray
    offset: np.ndarray
    displacement: np.ndarray | None = None
    seconds: float = 0.0
    limited: bool = False
    failed: bool = False

    def places(self, fixed: Anatomy) -> np.ndarray:
        """Y float64 (3, *R) of every voxel of the fixed volume."""
        x = np.indices(fixed.shape, dtype=np.float64)
        x = (x + 0.5) * np.reshape(fixed.spacing, (3, 1, 1, 1))
        if self.displacement is not None:
            x += self.displacement
        return np.tensordot(self.matrix, x, 1) + self.offset[:, None, None, None]

    def carry(self, fixed: Anatomy, moving: Anatomy, maps: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
        """Maps (*R) of the moving volume in the fixed one.

        Returns:
            Each float32 (*R) of the fixed volume, interpolated linearly; beyond the moving volume as at its edge. And
            how far beyond, float32 (*R), mm; 0 within it.
        """
        places = self.places(fixed)
        spacing = np.reshape(moving.spacing, (3, 1, 1, 1))
        size = moving.size.reshape(3, 1, 1, 1)
        beyond = np.sqrt(np.square(places - np.clip(places, 0, size)).sum(axis=0)).astype(np.float32)
        index = places / spacing - 0.5
        carried = [
            ndimage.map_coordinates(np.asarray(one, dtype=np.float32), index, order=1, mode="nearest") for one in maps
        ]
        return carried, beyond


def register(fixed: Anatomy, moving: Anatomy, how: Registration, threads: int = 1) -> Warp:
    """Bring the moving volume to lie on the fixed one.

    Args:
        fixed: the volume that labels are carried to.
        moving: the volume that they come from; its axes lie as those of the fixed one.
        how: see there; not ``none``.
        threads: of SimpleITK; with more than one, results may differ in the last bits.
    """
    with _threads(threads):
        return _registered(fixed, moving, how, threads)


def _registered(fixed: Anatomy, moving: Anatomy, how: Registration, threads: int) -> Warp:
    clock = _Clock(how.limit_s)
    thin = tuple(a for a in range(3) if min(fixed.shape[a], moving.shape[a]) < _THIN)
    if len(thin) > 1:
        return Warp(np.eye(3), (moving.size - fixed.size) / 2, seconds=clock.spent, failed=True)
    starts, by_classes = _starts(fixed, moving)
    images = [_image(anatomy, thin) for anatomy in (fixed, moving)]
    try:
        transform = _affine(images[0], images[1], [_transform(a, t, thin) for a, t in starts], clock, threads)
    except RuntimeError:  # ITK's: images without any structure, or that do not overlap
        matrix, offset = starts[0]
        return Warp(np.diag(matrix), offset, seconds=clock.spent, failed=True)
    matrix, offset = _of_transform(transform, starts[0], thin)
    if by_classes:
        begun = np.diag(starts[0][0]), starts[0][1]
        if _carried(fixed, moving, Warp(matrix, offset)) < _carried(fixed, moving, Warp(*begun)) - _WORSE:
            (matrix, offset), transform = begun, _transform(*starts[0], thin)
    displacement = None
    if how.kind == "deformable":
        displacement = _deformation(images[0], images[1], transform, clock, threads)
        for axis in thin:
            displacement = np.insert(np.expand_dims(displacement, axis + 1), axis, 0.0, axis=0)
            displacement = np.broadcast_to(displacement, (3, *fixed.shape))
        displacement = displacement.astype(np.float16)
        before = _carried(fixed, moving, Warp(matrix, offset))
        if _carried(fixed, moving, Warp(matrix, offset, displacement)) < before - _WORSE:
            displacement = None
    return Warp(matrix, offset, displacement, clock.spent, clock.reached)


def _carried(fixed: Anatomy, moving: Anatomy, warp: Warp) -> float:
    """Mean Dice of the base classes that both volumes have, those of the moving one carried to the fixed; 0 of none."""
    index = warp.places(fixed) / np.reshape(moving.spacing, (3, 1, 1, 1)) - 0.5
    carried = ndimage.map_coordinates(moving.base, index, order=0, mode="constant", cval=0)
    sizes = [np.bincount(one.ravel(), minlength=2) for one in (fixed.base, moving.base, carried)]
    both = np.bincount(fixed.base[fixed.base == carried], minlength=2)
    classes = range(1, min(map(len, sizes[:2])))
    common = [c for c in classes if min(sizes[0][c], sizes[1][c]) >= _FEWEST_OF_CLASS]

    def of(count: np.ndarray, c: int) -> int:
        return int(count[c]) if c < len(count) else 0

    dice = [2 * of(both, c) / (of(sizes[0], c) + of(sizes[2], c)) for c in common]
    return float(np.mean(dice)) if dice else 0.0


Start = tuple[np.ndarray, np.ndarray]  # scale and shift along each axis: y = scale x + shift, mm


def _starts(fixed: Anatomy, moving: Anatomy) -> tuple[list[Start], bool]:
    """Where a registration may begin: base classes, centres, and the ends of each axis on each other.

    Returns:
        The starts, and whether the first is that of base classes.
    """
    found: list[Start] = []
    places = [
        landmarks(anatomy.base, [int(c) for c in np.unique(anatomy.base) if c > 0], anatomy.spacing)
        for anatomy in (fixed, moving)
    ]
    scale, shift, counts = align(places[0], places[1])
    middle = (moving.size - fixed.size) / 2
    if counts.any():
        found.append((np.where(counts > 0, scale, 1.0), np.where(counts > 0, shift, middle)))
    found.append((np.ones(3), middle))
    found.append((np.ones(3), _centre(moving) - _centre(fixed)))
    for axis in range(3):
        for end in (np.zeros(3), moving.size - fixed.size):
            if abs(end[axis] - middle[axis]) > moving.spacing[axis]:
                shift = middle.copy()
                shift[axis] = end[axis]
                found.append((np.ones(3), shift))
    return found, bool(counts.any())


def _centre(anatomy: Anatomy) -> np.ndarray:
    """Centre of what stands out from the darkest, mm."""
    image = anatomy.image.astype(np.float64)
    low, high = np.percentile(image, [1, 99])
    weight = (image - low).clip(0, max(high - low, 1e-12))
    if not weight.sum():
        return anatomy.size / 2
    return (np.array(ndimage.center_of_mass(weight)) + 0.5) * anatomy.spacing


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """All of ITK with so many threads; mutual information adds up by the process's own number, whatever it is told."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(number)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


class _Clock:
    def __init__(self, limit: float):
        self._end, self._begin, self.reached = time.monotonic() + limit, time.process_time(), False

    @property
    def over(self) -> bool:
        self.reached = self.reached or time.monotonic() > self._end
        return self.reached

    @property
    def spent(self) -> float:
        return time.process_time() - self._begin


def _image(anatomy: Anatomy, thin: Sequence[int]) -> sitk.Image:
    """For SimpleITK, of two axes where one is thin; the outer corner of the grid is at 0."""
    array = anatomy.image
    for axis in thin:
        array = array.take(array.shape[axis] // 2, axis=axis)
    spacing = [float(step) for axis, step in enumerate(anatomy.spacing) if axis not in thin][::-1]
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, dtype=np.float32))
    image.SetSpacing(spacing)
    image.SetOrigin([step / 2 for step in spacing])
    return image


def _level(image: sitk.Image, step: float) -> sitk.Image:
    """Coarser by whole factors, of a spacing of about ``step`` times the smallest."""
    wanted = step * min(image.GetSpacing())
    factors = [
        max(1, min(round(wanted / own), size // _FEWEST))
        for own, size in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    return sitk.BinShrink(image, factors)


def _transform(scale: np.ndarray, shift: np.ndarray, thin: Sequence[int]) -> sitk.AffineTransform:
    axes = [axis for axis in range(3) if axis not in thin][::-1]
    transform = sitk.AffineTransform(len(axes))
    transform.SetMatrix(np.diag(scale[axes]).ravel().tolist())
    transform.SetTranslation(shift[axes].tolist())
    return transform


def _of_transform(transform: sitk.Transform, start: Start, thin: Sequence[int]) -> Start:
    """Matrix (3, 3) and offset of all axes; along a thin one those of the start."""
    affine = sitk.AffineTransform(transform)
    axes = [axis for axis in range(3) if axis not in thin][::-1]
    size = len(axes)
    own = np.array(affine.GetMatrix()).reshape(size, size)
    centre, moved = np.array(affine.GetCenter()), np.array(affine.GetTranslation())
    matrix, offset = np.diag(start[0]).astype(np.float64), np.array(start[1], dtype=np.float64)
    matrix[np.ix_(axes, axes)] = own
    offset[axes] = moved + centre - own @ centre
    return matrix, offset


def _affine(
    fixed: sitk.Image, moving: sitk.Image, starts: Sequence[sitk.AffineTransform], clock: _Clock, threads: int
) -> sitk.AffineTransform:
    dimension = fixed.GetDimension()
    middle = [size * step / 2 for size, step in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)]
    begun = []
    for start in starts:
        transform = sitk.AffineTransform(dimension)
        transform.SetCenter(middle)
        transform.SetMatrix(start.GetMatrix())
        shift = np.array(start.TransformPoint(middle)) - middle
        transform.SetTranslation(shift.tolist())
        begun.append(transform)
    coarse = _level(fixed, _AFFINE_LEVELS[0]), _level(moving, _AFFINE_LEVELS[0])
    rated = []
    for transform in begun:
        if _overlap(coarse[0], coarse[1], transform) >= _OVERLAP:
            try:
                rated.append((_metric(coarse[0], transform, threads).MetricEvaluate(*coarse), transform))
            except RuntimeError:  # fewer samples in common than ITK asks for
                continue
    if not rated:
        raise RuntimeError("no start in which the volumes overlap")
    rated.sort(key=lambda pair: pair[0])
    found = [_optimised(*coarse, transform, clock, threads) for _, transform in rated[:_TRIED]]
    found = [one for one in found if _overlap(*coarse, one[1]) >= _OVERLAP] or rated[:1]
    best = min(found, key=lambda pair: pair[0])[1]
    for step in _AFFINE_LEVELS[1:]:
        best = _optimised(_level(fixed, step), _level(moving, step), best, clock, threads)[1]
    return best


def _metric(image: sitk.Image, transform: sitk.Transform, threads: int) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(threads)
    method.SetMetricAsMattesMutualInformation(_BINS)
    share = _SAMPLED / image.GetNumberOfPixels()
    if share < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(share, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=False)
    return method


def _optimised(
    fixed: sitk.Image, moving: sitk.Image, start: sitk.AffineTransform, clock: _Clock, threads: int
) -> tuple[float, sitk.AffineTransform]:
    """The metric reached, lower is better, and the map."""
    method = _metric(fixed, sitk.AffineTransform(start), threads)
    step = min(fixed.GetSpacing())
    method.SetOptimizerAsRegularStepGradientDescent(step, step / 200, _AFFINE_STEPS, relaxationFactor=0.8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.AddCommand(sitk.sitkIterationEvent, lambda: method.StopRegistration() if clock.over else None)
    try:
        found = method.Execute(fixed, moving)
    except RuntimeError:  # it walked out of the volume
        return np.inf, start
    found = found.GetBackTransform() if found.GetName() == "CompositeTransform" else found
    return method.GetMetricValue(), sitk.AffineTransform(found)


def _overlap(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """Share of the smaller volume that lies in the other."""
    ones = sitk.Image(moving.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(moving)
    seen = sitk.GetArrayViewFromImage(sitk.Resample(ones, fixed, transform, sitk.sitkNearestNeighbor, 0))
    volumes = [np.prod(image.GetSize()) * np.prod(image.GetSpacing()) for image in (fixed, moving)]
    return float(np.count_nonzero(seen) * np.prod(fixed.GetSpacing()) / min(volumes))


def _deformation(
    fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, clock: _Clock, threads: int
) -> np.ndarray:
    """U (axes, *R) in mm, by demons on the moving image as the affine map brings it."""
    dark = float(sitk.GetArrayViewFromImage(moving).min())
    brought = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, dark)
    brought = sitk.HistogramMatching(brought, fixed, 256, 15, True)
    ones = sitk.Image(moving.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(moving)
    seen = sitk.Resample(ones, fixed, transform, sitk.sitkNearestNeighbor, 0)
    # what the moving volume does not show is as in the fixed one: nothing pulls there
    brought = sitk.Mask(brought, seen) + sitk.Mask(fixed, sitk.Cast(seen == 0, sitk.sitkUInt8))
    field: sitk.Image | None = None
    for step, steps in zip(_DEMONS_LEVELS, _DEMONS_STEPS, strict=True):
        here, there = _level(fixed, step), _level(brought, step)
        if field is not None:
            field = _resampled(field, here)
        for _ in range(0, steps, _BLOCK):
            if clock.over:
                break
            demons = sitk.DiffeomorphicDemonsRegistrationFilter()
            demons.SetNumberOfThreads(threads)
            demons.SetNumberOfIterations(_BLOCK)
            demons.SetStandardDeviations(_SMOOTHING)
            field = demons.Execute(here, there) if field is None else demons.Execute(here, there, field)
    if field is None:
        return np.zeros((fixed.GetDimension(), *fixed.GetSize()[::-1]))
    array = sitk.GetArrayFromImage(_resampled(field, fixed))
    return np.moveaxis(array, -1, 0)[::-1]


def _resampled(field: sitk.Image, to: sitk.Image) -> sitk.Image:
    """A field on another grid; beyond its own as at its edge."""
    if field.GetSize() == to.GetSize():
        return field
    identity = sitk.Transform(to.GetDimension(), sitk.sitkIdentity)
    return sitk.Resample(field, to, identity, sitk.sitkLinear, 0.0, field.GetPixelID(), True)
