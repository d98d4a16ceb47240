"""The method on arrays: sampled supports to a fitted structure, projections of a query to its map.

    s(v) = head(W f(v), u(v), a(v))         one head for each fold, averaged as probabilities
    s(v) + shift                            the volume above 0 is what the supports lead to expect, within a margin
    p(v) = 1 / (1 + exp(-slope (s(v) + shift) - bias))      fitted to supports that the others predict
    structure where p(v) is above the threshold of largest expected Dice (one support: where s(v) + shift > 0), unless
    it is absent

Nothing here knows files, networks or labels of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.calibration import Calibration, best_threshold, fit_calibration, out_of_fold
from nnunet_calib.fewshot.chunks import (
    Alignment,
    Chunks,
    Frame,
    Landmarks,
    frame_of_landmarks,
    frame_of_volumes,
    landmarks,
)
from nnunet_calib.fewshot.heads import HEADS, Head, LinearHead
from nnunet_calib.fewshot.prior import (
    MARGIN,
    Places,
    SizePrior,
    VolumeCurve,
    operating_shift,
    presence_limit,
    presence_score,
    whole_volumes,
)
from nnunet_calib.fewshot.transduction import Objective, Query, refine

SUPERIOR = 2
"""Patient axis from inferior to superior."""

_SLAB = 1 << 19  # voxels whose log odds are computed at once
_QUERY_VOXELS = 20_000  # of a query that a head is refined on
_NEAR = 0.8  # share of them near where the supports have the structure
_CERTAIN = 1e-7


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        head: key of ``HEADS``.
        chunks: n.
        mode: ``hard`` or ``interpolated``.
        extent: ``aligned`` or ``volume``.
        axis: of the patient that the chunks divide: 0 left-right, 1 posterior-anterior, 2 inferior-superior.
        margin: of the volume prior.
        objective: of the refinement on the query; None: no refinement.
        calibrate: fit slope and bias to left-out supports where there are two or more.
        options: arguments of ``Head.fit``.
    """

    head: str = "linear"
    chunks: int = 12
    mode: str = "interpolated"
    extent: str = "aligned"
    axis: int = SUPERIOR
    margin: float = MARGIN
    objective: Objective | None = None
    calibrate: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """Where the voxels S of a volume lie in the patient, and what the base model sees there.

    Attributes:
        spacing: mm along the axes of S.
        axes: of each axis of S its patient axis and direction, as ``Volume.axes``.
        base: integer (*S), the base model's labels.
    """

    spacing: tuple[float, float, float]
    axes: tuple[tuple[int, int], ...]
    base: np.ndarray

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.spacing))

    @cached_property
    def size(self) -> np.ndarray:
        """Mm from edge to edge along the patient axes, float64 (3,)."""
        size = np.empty(3)
        for (axis, _), step, voxels in zip(self.axes, self.spacing, self.base.shape, strict=True):
            size[axis] = step * voxels
        return size

    def mm(self, index: np.ndarray) -> np.ndarray:
        """Places (N, 3) along the patient axes of indices (N,) into the flat volume, mm from its edge."""
        found = np.empty((len(index), 3))
        for here, (axis, direction), step, voxels in zip(
            np.unravel_index(index, self.base.shape), self.axes, self.spacing, self.base.shape, strict=True
        ):
            along = (here + 0.5) * step
            found[:, axis] = along if direction > 0 else step * voxels - along
        return found

    @cached_property
    def landmarks(self) -> Landmarks:
        """Of the base classes, along the patient axes."""
        order = [next(i for i, (axis, _) in enumerate(self.axes) if axis == wanted) for wanted in range(3)]
        turned = np.flip(self.base, tuple(i for i, (_, direction) in enumerate(self.axes) if direction < 0)).transpose(
            order
        )
        classes = [int(c) for c in np.unique(self.base) if c > 0]
        return landmarks(turned, classes, [self.spacing[i] for i in order])

    @cached_property
    def body(self) -> dict[int, float]:
        """Volumes of the base classes that are whole in it, mm3."""
        return whole_volumes(self.base, self.voxel_mm3)


@dataclass(frozen=True)
class Support:
    """Sampled voxels of an annotated volume.

    Attributes:
        scan: the volume.
        index: int64 (N,), into the flat volume.
        target: bool (N,).
        weight: float64 (N,), voxels that each stands for.
        features: of each fold float32 (N, F).
        structure_mm3: volume of the structure.
        cut: the structure touches an end of the volume.
        part: int64 (N,), chunk of each voxel where the pairing is given; None: by the extent.
    """

    scan: Scan
    index: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    features: list[Tensor]
    structure_mm3: float
    cut: bool = False
    part: np.ndarray | None = None


@dataclass(frozen=True)
class FittedStructure:
    """A structure fitted to k supports.

    Attributes:
        settings: as given.
        heads: of each fold.
        frame: coordinates of the task.
        prior: None if the field of view cuts the structure in all supports.
        places: where the supports have the structure.
        calibration: from left-out supports; the identity with one.
        presence_limit: presence scores below say that a query lacks the structure.
        samples: of each fold what the heads were fitted on, for the refinement on a query.
        left_out: Dice of each support predicted by the others, on its sample; empty with one.
    """

    settings: Settings
    heads: list[Head]
    frame: Frame
    prior: SizePrior | None
    places: Places
    calibration: Calibration
    presence_limit: float
    samples: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    left_out: list[float]

    @property
    def calibrated(self) -> bool:
        """There were left-out supports to calibrate on."""
        return self.calibration != Calibration()

    @property
    def projections(self) -> list[Tensor]:
        """W of each fold, float32 (R, F)."""
        return [head.projections for head in self.heads]


@dataclass(frozen=True)
class NovelMap:
    """A structure in a query.

    Attributes:
        logit: float32 (*S), log odds with the volume prior, before the calibration.
        probability: float32 (*S), calibrated.
        threshold: probability above which is the structure.
        presence: score; below the limit of the fit the structure is called absent.
        absent: it is.
        expected_mm3: volume expected; None without prior.
        shift: what the volume prior added to the log odds.
    """

    logit: np.ndarray
    probability: np.ndarray
    threshold: float
    presence: float
    absent: bool
    expected_mm3: float | None
    shift: float


def fit_structure(supports: Sequence[Support], settings: Settings) -> FittedStructure:
    """Fit heads, size prior and calibration.

    Args:
        supports: one or more, each with voxels of the structure.
        settings: see there.
    """
    sizes = [support.scan.size for support in supports]
    if settings.extent == "aligned":
        frame, alignments = frame_of_landmarks(sizes, [support.scan.landmarks for support in supports])
    else:
        frame, alignments = frame_of_volumes(sizes, settings.extent)
    position = torch.from_numpy(
        np.concatenate(
            [
                frame.position(alignment(support.scan.mm(support.index)))
                for support, alignment in zip(supports, alignments, strict=True)
            ]
        ).astype(np.float32)
    )
    target = torch.from_numpy(np.concatenate([support.target for support in supports]))
    weight = torch.from_numpy(np.concatenate([support.weight for support in supports]))
    number = torch.cat([torch.full((len(support.index),), i) for i, support in enumerate(supports)])
    given = None if supports[0].part is None else np.concatenate([support.part for support in supports])
    chunk = chunk_weights(settings, position, given)
    samples = [
        (torch.cat([support.features[fold] for support in supports]), target, weight, position, chunk, number)
        for fold in range(len(supports[0].features))
    ]
    fit: Callable[..., Head] = partial(HEADS[settings.head].fit, **settings.options)
    prior = _prior(supports)
    found = target.numpy()
    places = Places.of(position.numpy()[found], weight.numpy()[found])
    heads = [fit(*sample) for sample in samples]
    calibration, dice = Calibration(), list[float]()
    if len(supports) > 1:
        logit, scores, dice = _left_out(supports, samples, fit, settings)
        if settings.calibrate:
            calibration = fit_calibration(logit, target, weight, number)
    else:
        own = ensemble([head(*_seen(sample)) for head, sample in zip(heads, samples, strict=True)])
        scores = [presence_score(_curve(own, supports[0]), supports[0].structure_mm3)]
    limit = presence_limit(scores)
    return FittedStructure(settings, heads, frame, prior, places, calibration, limit, samples, dice)


def apply_structure(
    fitted: FittedStructure,
    scan: Scan,
    projected: Sequence[Tensor],
    heads: Sequence[Head] | None = None,
    *,
    parts: np.ndarray | None = None,
    counted: np.ndarray | None = None,
    expected_mm3: float | None = None,
) -> NovelMap:
    """The map of a structure in a query.

    Args:
        fitted: the structure.
        scan: the query.
        projected: of each fold float (R, *S), by the projections of the heads.
        heads: refined on the query; those of the fit if None.
        parts: int64 (V,), chunk of each voxel of the flat volume where the pairing is given, in evaluation.
        counted: bool (V,), voxels that the volume prior counts, in evaluation; all if None.
        expected_mm3: volume to expect, in evaluation; from the supports if None.
    """
    alignment = fitted.frame.align(scan.size, scan.landmarks)
    expected = expected_mm3 if expected_mm3 is not None else expected_volume(fitted, scan, alignment)
    heads = fitted.heads if heads is None else heads
    flat = [maps.flatten(1) for maps in projected]
    logit = np.empty(scan.base.size, dtype=np.float32)
    curve = VolumeCurve()
    for first in range(0, logit.size, _SLAB):
        index = np.arange(first, min(first + _SLAB, logit.size))
        position = torch.from_numpy(fitted.frame.position(alignment(scan.mm(index))).astype(np.float32))
        chunk = chunk_weights(fitted.settings, position, None if parts is None else parts[index])
        found = ensemble(
            [
                head.logit(maps[:, first : first + len(index)].T.float(), position, chunk)
                for head, maps in zip(heads, flat, strict=True)
            ]
        ).numpy()
        logit[index] = found
        curve.add(found if counted is None else found[counted[index]], scan.voxel_mm3)
    shift, presence, absent = 0.0, np.inf, False
    if expected is not None:
        presence = presence_score(curve, expected)
        absent = presence < fitted.presence_limit
        shift = operating_shift(curve, expected, fitted.settings.margin, present=not absent)
    logit += shift
    shaped = logit.reshape(scan.base.shape)
    probability = fitted.calibration.probability(torch.from_numpy(shaped)).numpy()
    # Only of honest probabilities an expected Dice means something; else the volume prior draws the line.
    threshold = fitted.calibration.threshold
    if fitted.calibrated:
        threshold = best_threshold(probability, threshold)
    return NovelMap(shaped, probability, threshold, presence, absent, expected, shift)


def expected_volume(fitted: FittedStructure, scan: Scan, alignment: Alignment) -> float | None:
    """Volume of the structure to expect in a query, mm3; None without prior or out of view."""
    if fitted.prior is None:
        return None
    low, high = (fitted.frame.position(alignment(end)) for end in (np.zeros(3), scan.size))
    return fitted.prior.expected(scan.body, fitted.places.share_inside(low, high)) or None


def refine_on_query(
    fitted: FittedStructure,
    scan: Scan,
    sampled: Callable[[np.ndarray], list[Tensor]],
    objective: Objective,
    seed: int = 0,
) -> list[Head]:
    """Heads refined on a query without its labels.

    Args:
        fitted: linear heads.
        scan: the query.
        sampled: features of each fold, float (N, F), at indices (N,) into its flat volume.
        objective: what is minimised.
        seed: of the voxels drawn.
    """
    alignment = fitted.frame.align(scan.size, scan.landmarks)
    expected = expected_volume(fitted, scan, alignment)
    every = np.arange(scan.base.size)
    near = np.concatenate(
        [
            fitted.places.reach(fitted.frame.position(alignment(scan.mm(index))))
            for index in np.array_split(every, max(1, every.size // _SLAB))
        ]
    )
    rng = np.random.default_rng(seed)
    index, weight = [], []
    for members, share in ((every[near], _NEAR), (every[~near], 1 - _NEAR)):
        if members.size:
            drawn = rng.choice(members, min(members.size, round(share * _QUERY_VOXELS)), replace=False)
            index.append(drawn)
            weight.append(np.full(drawn.size, members.size / drawn.size))
    chosen, weights = np.concatenate(index), torch.from_numpy(np.concatenate(weight))
    position = torch.from_numpy(fitted.frame.position(alignment(scan.mm(chosen))).astype(np.float32))
    chunk = chunk_weights(fitted.settings, position)
    within = torch.from_numpy(near[chosen])
    share_expected = None if expected is None else expected / (scan.base.size * scan.voxel_mm3)
    refined: list[Head] = []
    for head, sample, features in zip(fitted.heads, fitted.samples, sampled(chosen), strict=True):
        assert isinstance(head, LinearHead)
        query = Query(features, position, chunk, weights, within)
        refined.append(refine(head, sample, query, share_expected, objective))
    return refined


def chunk_weights(settings: Settings, position: Tensor, part: np.ndarray | None = None) -> Tensor:
    """Weights float32 (N, n) of the chunks at positions (N, 3) of the frame, or of given chunks."""
    if part is not None:
        return torch.nn.functional.one_hot(torch.from_numpy(part), settings.chunks).float()
    return Chunks(settings.chunks, settings.mode).weights(position[:, settings.axis])


def ensemble(logits: Sequence[Tensor]) -> Tensor:
    """Log odds of the mean probability of the folds, of the shape of each."""
    if len(logits) == 1:
        return logits[0]
    mean = torch.stack([logit.double().sigmoid() for logit in logits]).mean(dim=0)
    return torch.logit(mean.clamp(_CERTAIN, 1 - _CERTAIN)).float()


def _prior(supports: Sequence[Support]) -> SizePrior | None:
    return SizePrior.of(
        [support.structure_mm3 for support in supports],
        [not support.cut for support in supports],
        [support.scan.body for support in supports],
    )


def _seen(sample: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, positions and chunks of a sample."""
    return sample[0], sample[3], sample[4]


def _curve(logit: Tensor, support: Support) -> VolumeCurve:
    return VolumeCurve().add(logit.numpy(), support.weight * support.scan.voxel_mm3)


def _left_out(
    supports: Sequence[Support],
    samples: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]],
    fit: Callable[..., Head],
    settings: Settings,
) -> tuple[Tensor, list[float], list[float]]:
    """Log odds with the volume prior, presence score and Dice of every support, as the others predict it."""
    number, target, weight = samples[0][5], samples[0][1], samples[0][2]
    logit = ensemble([out_of_fold(fit, *sample) for sample in samples])
    scores, dice = [], []
    for i, support in enumerate(supports):
        own = number == i
        found = logit[own]
        prior = _prior([other for j, other in enumerate(supports) if j != i])
        if prior is not None:
            expected, curve = prior.expected(support.scan.body), _curve(found, support)
            scores.append(presence_score(curve, expected))
            found = found + operating_shift(curve, expected, settings.margin)
        logit[own] = found
        inside, w = found > 0, weight[own]
        both = float(w[inside & target[own]].sum())
        dice.append(2 * both / max(float(w[inside].sum() + w[target[own]].sum()), 1e-12))
    return logit, scores or [np.inf], dice
