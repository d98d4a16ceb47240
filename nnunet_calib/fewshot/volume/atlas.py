"""What registration carries from the supports to a query: how far each voxel is inside the structure.

    d_j(v)   signed distance to the structure of support j in mm, above 0 inside, at the place of v in that support
    d(v)     = sum_ju w_ju d_j(v + u) / sum_ju w_ju
    r(v)     = logit( sum_ju w_ju sigmoid(d_j(v + u) / s) / sum_ju w_ju ),    s the mean voxel of the grid, mm

u is none or one of the 18 voxels that touch v at a face or an edge: a registration is off by about a voxel, and the
images say where to (non-local label fusion; Coupe et al., Patch-based segmentation using expert priors, NeuroImage
2011). w_ju(v) = ( m_ju(v) / var + e )^-3 says how alike the query around v and the support around v + u are: m_ju is
the mean squared difference of the two images after their quantiles are matched, in a Gaussian window, var the variance
of the query (Artaechevarria et al., Combination strategies in multi-atlas image segmentation, TMI 2009). Where the
annotation of the support does not count it is all but 0. With s = 0 the sign of r were that of the vote; a few
millimetres say that a border is not carried more exactly than that. Beyond the field of view of a support its distance
is that of the nearest edge, less the way there: a structure that the edge cuts does not end with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import ndimage, optimize
from scipy.special import expit

from nnunet_calib.fewshot.volume.anatomy import Anatomy, nearest_on_grid, on_grid, signed_distance
from nnunet_calib.fewshot.volume.files import IGNORED, STRUCTURE, Volume
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.registration import Registration, Warp

CAP_MM = 30.0
"""Distances to a structure beyond are all the same."""

_FEWEST = 100  # voxels of a class from which it says how well volumes lie on each other
_NEAR_MM = 15.0
_EVERY = 7  # voxel of those near a border
_SLOPES = (0.1, 4.0)
_WINDOW = 0.7  # standard deviation of the window that images are compared in, voxels
_POWER = 3
_LEAST = 1e-2  # e: differences below a hundredth of the variance are noise
_STEPS = [u for u in product((-1, 0, 1), repeat=3) if np.abs(u).sum() < 3]  # to where else a place may lie
_LEVELS = np.linspace(0, 100, 65)  # percentiles that are matched, of what is brighter than
_DARKEST = 1.0  # percentile
_UNKNOWN = 1e-20  # factor where a support says nothing: it decides where no other says anything
_LEAST_VOTE = 1e-12
VOTE = 3  # of the way supports vote, for results that are kept; 1: one vote each, 2: by how alike they look


@dataclass(frozen=True, eq=False)
class Labelled:
    """An annotated volume that labels are carried from.

    Attributes:
        anatomy: the volume.
        distance: float16 (*R), signed distance to the structure, mm, within ``CAP_MM``.
        known: bool (*R), where its annotation counts; None: everywhere.
    """

    anatomy: Anatomy
    distance: np.ndarray
    known: np.ndarray | None = None

    @classmethod
    def of(cls, volume: Volume, anatomy: Anatomy) -> Labelled:
        """From a preprocessed support, and as registration sees it."""
        assert volume.label is not None
        distance = signed_distance(volume.label == STRUCTURE, volume.spacing, CAP_MM)
        ignored = volume.label == IGNORED
        known = ~nearest_on_grid(ignored, anatomy.shape) if ignored.any() else None
        return cls(anatomy, on_grid(distance, anatomy.shape).astype(np.float16), known)


@dataclass(frozen=True, eq=False)
class Carried:
    """Labels of supports in another volume.

    Attributes:
        log_odds: float32 (*R), r.
        distance: float32 (*R), d.
        nearest: float32 (*R), the largest d_j: how near any support has the structure.
        warps: of each support.
        agreement: how exactly base classes are carried (``agreement``), the mean over supports; None: not asked for.
    """

    log_odds: np.ndarray
    distance: np.ndarray
    nearest: np.ndarray
    warps: tuple[Warp, ...]
    agreement: float | None = None

    @property
    def failed(self) -> bool:
        """No support could be registered."""
        return all(warp.failed for warp in self.warps)

    @property
    def seconds(self) -> float:
        """Of the processor, that the registrations took when they were made."""
        return sum(warp.seconds for warp in self.warps)

    def at(self, index: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log odds and distances float32 (N,), at indices (N,) into a flat volume S over the same field of view."""
        one, other = (sampled(part, index, shape) for part in (self.log_odds, self.distance))
        return one, other


def carry(
    fixed: Anatomy, supports: Sequence[Labelled], how: Registration, registrar: Registrar, compared: bool = False
) -> Carried:
    """Labels of the supports in another volume; ``compared``: and how well its base classes are carried."""
    scale = float(np.prod(fixed.spacing)) ** (1 / 3)
    inside, outside, mean, total = (np.zeros(fixed.shape, dtype=np.float32) for _ in range(4))
    nearest = np.full(fixed.shape, -CAP_MM, dtype=np.float32)
    warps = []
    for support in supports:
        warp = registrar(fixed, support.anatomy, how)
        maps = [support.distance, support.anatomy.image, *([] if support.known is None else [support.known])]
        (distance, image, *known), beyond = warp.carry(fixed, support.anatomy, maps)
        distance = np.maximum(distance - beyond, -CAP_MM)
        alike = _Likeness(fixed.image, image, beyond == 0)
        counts = np.maximum(known[0], _UNKNOWN) if known else np.ones_like(distance)
        votes = expit(distance / scale), expit(-distance / scale)  # both: 1 less the first is 0 before the second is
        for there, counted, far, yes, no in zip(
            *(_around(part) for part in (alike.matched, counts, distance, *votes)), strict=True
        ):
            weight = alike(there) * counted
            inside += weight * yes
            outside += weight * no
            mean += weight * far
            total += weight
        np.maximum(nearest, distance, out=nearest)
        warps.append(warp)
    found = None
    if compared:
        found = float(np.mean([agreement(fixed, one.anatomy, w) for one, w in zip(supports, warps, strict=True)]))
    least = _LEAST_VOTE * total
    log_odds = np.log(np.maximum(inside, least)) - np.log(np.maximum(outside, least))
    return Carried(log_odds, mean / total, nearest, tuple(warps), found)


def _around(part: np.ndarray) -> Iterator[np.ndarray]:
    """A map (*R) as it is at every one of ``_STEPS`` from each voxel, (*R); beyond its edge as at the edge."""
    padded = np.pad(part, 1, mode="edge")
    for step in _STEPS:
        yield padded[tuple(slice(1 + u, 1 + u + size) for u, size in zip(step, part.shape, strict=True))]


class _Likeness:
    """How alike a query and a support's image are that was carried to it, both (*R), seen where the support shows it.

    Attributes:
        matched: float32 (*R), the support's image with the quantiles of the query.
    """

    def __init__(self, image: np.ndarray, carried: np.ndarray, seen: np.ndarray):
        self._image, self._any, self.matched = image.astype(np.float32), bool(seen.any()), carried
        self._variance = max(float(np.var(image)), 1e-12)
        if self._any:
            # how much of either is dark, or masked out, says nothing of the brightness of tissue
            darkest = np.percentile(carried[seen], _DARKEST), np.percentile(image[seen], _DARKEST)
            tissue = seen & (carried > darkest[0]) & (image > darkest[1])
            of_each = [
                np.append(low, np.percentile(one[tissue], _LEVELS) if tissue.any() else [])
                for low, one in zip(darkest, (carried, image), strict=True)
            ]
            own, first = np.unique(of_each[0], return_index=True)
            self.matched = np.interp(carried, own, of_each[1][first]).astype(np.float32)

    def __call__(self, there: np.ndarray) -> np.ndarray:
        """w_ju float32 (*R), of the matched image at v + u."""
        if not self._any:
            return np.full(self._image.shape, _UNKNOWN, dtype=np.float32)
        apart = ndimage.gaussian_filter(np.square(self._image - there), _WINDOW, mode="nearest")
        return (apart / self._variance + _LEAST) ** -_POWER


def agreement(fixed: Anatomy, moving: Anatomy, warp: Warp) -> float:
    """How exactly a registration carries the base classes, which the model predicts in both volumes.

    The slope of the logistic regression of a class in the fixed volume on the signed distance, in voxels, to the
    carried one (d above, of one support), of all voxels within 15 mm of its border and of all classes, each counting
    the same. 1 is what the vote assumes: borders off by about a voxel. It is larger where they lie closer, near 0 where
    nothing fits. No label of the structure is needed.

    Returns:
        Within [0.1, 4]; 1 without a class of 100 voxels in common.
    """
    scale = float(np.prod(fixed.spacing)) ** (1 / 3)
    counts = [np.bincount(one.base.ravel()) for one in (fixed, moving)]
    common = [c for c in range(1, min(map(len, counts))) if min(count[c] for count in counts) >= _FEWEST]
    (image, *carried), beyond = warp.carry(
        fixed, moving, [moving.image] + [signed_distance(moving.base == c, moving.spacing, CAP_MM) for c in common]
    )
    alike = _Likeness(fixed.image, image, beyond == 0)
    weights = [alike(there).ravel() for there in _around(alike.matched)]
    x, y, w = [np.zeros(0)], [np.zeros(0, bool)], [np.zeros(0)]
    for c, distance in zip(common, carried, strict=True):
        near = np.flatnonzero((np.abs(distance) < _NEAR_MM) & (beyond == 0))[::_EVERY]
        there = zip(weights, _around(np.maximum(distance - beyond, -CAP_MM)), strict=True)
        vote = sum(weight[near] * far.ravel()[near] for weight, far in there)
        x.append(vote / sum(weight[near] for weight in weights) / scale)
        y.append(fixed.base.ravel()[near] == c)
        w.append(np.full(len(near), 1 / max(len(near), 1)))
    voxels, inside, weight = (np.concatenate(parts) for parts in (x, y, w))
    if not len(voxels):
        return 1.0
    weight /= weight.sum()

    def nll(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = theta[0] * voxels + theta[1]
        off = weight * (expit(z) - inside)
        return float(weight @ (np.logaddexp(0, z) - inside * z)), np.array([off @ voxels, off.sum()])

    slope = optimize.minimize(nll, np.array([1.0, 0.0]), jac=True, method="BFGS").x[0]
    return float(np.clip(slope, *_SLOPES))


def sampled(grid: np.ndarray, index: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A map (*R), float32 (N,), at indices (N,) into a flat volume S over the same field of view; linear."""
    if grid.shape == tuple(shape):
        return grid.ravel()[index]
    places = [
        (here + 0.5) * new / old - 0.5
        for here, new, old in zip(np.unravel_index(index, tuple(shape)), grid.shape, shape, strict=True)
    ]
    return ndimage.map_coordinates(grid, np.stack(places), order=1, mode="nearest", output=np.float32)
