"""The method on arrays: sampled supports to a fitted structure, projections of a query to its map.

    s(v) = head(W f(v), u(v), a(v))         one head for each fold, averaged as probabilities
    z(v) = trust(s(v), r(v), d(v))          with registration, what it carries from the supports (``trust``, ``atlas``)
    z(v) + shift                            the volume above 0 is what the supports lead to expect, within a margin
    p(v) = 1 / (1 + exp(-slope (z(v) + shift) - bias))      fitted to supports that the others predict
    structure where p(v) is above the threshold of largest expected Dice (one support: where z(v) + shift > 0), unless
    it is absent; with registration, components that lie far from where any support has it are left out

Nothing here knows files, networks or labels of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_calib.fewshot.structure.heads import HEADS, Head
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.structure.platt import PlattScaling, expected_dice, fit_platt, out_of_fold
from nnunet_calib.fewshot.structure.prior import (
    MARGIN,
    Places,
    SizePrior,
    VolumeCurve,
    operating_shift,
    presence_limit,
    presence_score,
)
from nnunet_calib.fewshot.structure.trust import Trust, candidates, fit_trust, trust_of_one
from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.atlas import Carried, Labelled, carry, sampled
from nnunet_calib.fewshot.volume.frame import Alignment, Chunks, Frame, frame_of_landmarks, frame_of_volumes
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.registration import Registration
from nnunet_calib.fewshot.volume.scan import Scan
from nnunet_calib.fewshot.volume.support import Support

SUPERIOR = 2
"""Patient axis from inferior to superior."""

_SLAB = 1 << 19  # voxels whose log odds are computed at once
_CERTAIN = 1e-7
_BELOW = np.float32(1e-3)  # log odds under the cut
_REACH_MM = 6.0  # of the errors of registration that a head is to mend
_FARTHEST = 0.01
_FAR_MM = 10.0  # from where any support has the structure, beyond which a component is none of it


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
        registration: of the supports to each other and to queries.
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
    registration: Registration = Registration("none")

    @property
    def registered(self) -> bool:
        """Supports are registered."""
        return self.registration.kind != "none"


@dataclass(frozen=True, eq=False)
class Atlas:
    """The supports as volumes, and how far what registration carries from them is to be trusted.

    Attributes:
        supports: of each its volume.
        trust: learned from left-out supports; None with one: the query tells (``trust_of_one``).
    """

    supports: tuple[Labelled, ...]
    trust: Trust | None


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
        atlas: where supports are registered to queries.
    """

    settings: Settings
    heads: list[Head]
    frame: Frame
    prior: SizePrior | None
    places: Places
    calibration: PlattScaling
    presence_limit: float
    samples: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    left_out: list[float]
    atlas: Atlas | None = None

    @property
    def calibrated(self) -> bool:
        """There were left-out supports to calibrate on."""
        return self.calibration != PlattScaling()

    def share_in_view(self, scan: Scan, alignment: Alignment) -> float:
        """Share of the places of the structure that lie in the field of view of a query."""
        low, high = (self.frame.position(alignment(end)) for end in (np.zeros(3), scan.size))
        return self.places.share_inside(low, high)

    @property
    def projections(self) -> list[Tensor]:
        """W of each fold, float32 (R, F)."""
        return [head.projections for head in self.heads]


@dataclass(frozen=True)
class NovelMap:
    """A structure in a query.

    Attributes:
        logit: float32 (*S), log odds with the volume prior, before the calibration.
        calibration: of the structure.
        threshold: probability above which is the structure.
        presence: score; below the limit of the fit the structure is called absent.
        absent: it is.
        expected_mm3: volume expected; None without prior.
        shift: what the volume prior added to the log odds.
        far_mm3: volume of components that were left out, for no support has the structure near.
        expected_dice: that the probabilities let expect; 0 to 1.
    """

    logit: np.ndarray
    calibration: PlattScaling
    threshold: float
    presence: float
    absent: bool
    expected_mm3: float | None
    shift: float
    far_mm3: float = 0.0
    expected_dice: float = float("nan")

    @property
    def probability(self) -> np.ndarray:
        """Calibrated, float32 (*S); computed anew."""
        return self.calibration.probability(torch.from_numpy(self.logit)).numpy()


def fit_structure(
    supports: Sequence[Support], settings: Settings, registrar: Registrar | None = None
) -> FittedStructure:
    """Fit heads, size prior and calibration.

    Args:
        supports: one or more, each with voxels of the structure.
        settings: see there.
        registrar: of the supports, where they are registered; a new one if None.
    """
    frame, position = _placed(supports, settings)
    target = torch.from_numpy(np.concatenate([support.target for support in supports]))
    weight = torch.from_numpy(np.concatenate([support.weight for support in supports]))
    number = torch.cat([torch.full((len(support.index),), i) for i, support in enumerate(supports)])
    given = None if supports[0].part is None else np.concatenate([support.part for support in supports])
    chunk = chunk_weights(settings, position, given)
    attention = torch.cat([_attention(support) for support in supports]) if settings.registered else 1.0
    samples = [
        (
            torch.cat([support.features[fold] for support in supports]),
            target,
            weight * attention,
            position,
            chunk,
            number,
        )
        for fold in range(len(supports[0].features))
    ]
    fit: Callable[..., Head] = partial(HEADS[settings.head].fit, **settings.options)
    prior = _prior(supports)
    places = _places(position, target, weight)
    heads = [fit(*sample) for sample in samples]
    calibration, dice = PlattScaling(), list[float]()
    trust: Trust | None = None
    if len(supports) > 1:
        logit = ensemble([out_of_fold(fit, *sample) for sample in samples])
        tried: list[tuple[Trust | None, Tensor]] = [(None, logit)]
        if settings.registered:
            log_odds, distance = _from_others(supports, settings, registrar or Registrar())
            learned = fit_trust(logit, log_odds, distance, target, weight, number)
            tried = [(one, one(logit, log_odds, distance)) for one in candidates(learned)]
        best = -1.0
        for one, z in tried:
            of_one = _shifted(supports, z, number, settings)
            calibrated = fit_platt(z, target, weight, number) if settings.calibrate else PlattScaling()
            reached = [_dice(z[number == i], support, calibrated) for i, support in enumerate(supports)]
            if np.mean(reached) > best:
                best = float(np.mean(reached))
                trust, scores, calibration, dice = one, of_one, calibrated, reached
    else:
        own = ensemble([head(*_seen(sample)) for head, sample in zip(heads, samples, strict=True)])
        if settings.registered:
            own = Trust()(own, *_from_itself(supports[0]))
        scores = [presence_score(_curve(own, supports[0]), supports[0].structure_mm3)]
    limit = presence_limit(scores)
    atlas = Atlas(tuple(_labelled(support) for support in supports), trust) if settings.registered else None
    return FittedStructure(settings, heads, frame, prior, places, calibration, limit, samples, dice, atlas)


def apply_structure(
    fitted: FittedStructure,
    scan: Scan,
    projected: Sequence[Tensor],
    heads: Sequence[Head] | None = None,
    *,
    carried: Carried | None = None,
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
        carried: from the supports, where the structure has an atlas.
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
    trust = Trust()
    if fitted.atlas is not None:
        assert carried is not None
        assert carried.agreement is not None or fitted.atlas.trust is not None
        trust = fitted.atlas.trust or trust_of_one(carried.agreement or 1.0)
    for first in range(0, logit.size, _SLAB):
        index = np.arange(first, min(first + _SLAB, logit.size))
        position = torch.from_numpy(fitted.frame.position(alignment(scan.mm(index))).astype(np.float32))
        chunk = chunk_weights(fitted.settings, position, None if parts is None else parts[index])
        found = ensemble(
            [
                head.logit(maps[:, first : first + len(index)].T.float(), position, chunk)
                for head, maps in zip(heads, flat, strict=True)
            ]
        )
        if carried is not None:
            found = trust(found, *map(torch.from_numpy, carried.at(index, scan.base.shape)))
        logit[index] = found.numpy()
        curve.add(logit[index] if counted is None else logit[index][counted[index]], scan.voxel_mm3)
    shift, presence, absent = 0.0, np.inf, False
    if expected_mm3 is None and not fitted.share_in_view(scan, alignment):
        presence, absent = -np.inf, True  # whatever looks like it there is something else
    elif expected is not None:
        presence = presence_score(curve, expected)
        absent = presence < fitted.presence_limit
        shift = operating_shift(curve, expected, fitted.settings.margin, present=not absent)
    logit += shift
    threshold = fitted.calibration.cut(logit)
    whole, far_mm3 = logit.reshape(scan.base.shape), 0.0
    if carried is not None and not carried.failed:
        far_mm3 = scan.voxel_mm3 * _leave_far(whole, fitted.calibration, threshold, carried)
    dice = expected_dice(whole, fitted.calibration, threshold)
    return NovelMap(whole, fitted.calibration, threshold, presence, absent, expected, shift, far_mm3, dice)


def expected_volume(fitted: FittedStructure, scan: Scan, alignment: Alignment) -> float | None:
    """Volume of the structure to expect in a query, mm3; None without prior, 0 out of view."""
    return _expected(fitted.prior, fitted.frame, fitted.places, scan, alignment)


def expected_without_fit(supports: Sequence[Support], settings: Settings, scans: Sequence[Scan]) -> list[float | None]:
    """As ``expected_volume`` of each scan, from supports that nothing was fitted to yet."""
    frame, position = _placed(supports, settings)
    target, weight = (
        torch.from_numpy(np.concatenate([getattr(support, name) for support in supports]))
        for name in ("target", "weight")
    )
    prior, places = _prior(supports), _places(position, target, weight)
    return [_expected(prior, frame, places, scan, frame.align(scan.size, scan.landmarks)) for scan in scans]


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


def _placed(supports: Sequence[Support], settings: Settings) -> tuple[Frame, Tensor]:
    """The frame of the supports, and the positions float32 (N, 3) in it of all that was sampled of them."""
    sizes = [support.scan.size for support in supports]
    if settings.extent == "aligned":
        frame, alignments = frame_of_landmarks(sizes, [support.scan.landmarks for support in supports])
    else:
        frame, alignments = frame_of_volumes(sizes, settings.extent)
    positions = [
        frame.position(alignment(support.scan.mm(support.index)))
        for support, alignment in zip(supports, alignments, strict=True)
    ]
    return frame, torch.from_numpy(np.concatenate(positions).astype(np.float32))


def _places(position: Tensor, target: Tensor, weight: Tensor) -> Places:
    found = target.numpy()
    return Places.of(position.numpy()[found], weight.numpy()[found])


def _expected(prior: SizePrior | None, frame: Frame, places: Places, scan: Scan, alignment: Alignment) -> float | None:
    if prior is None:
        return None
    low, high = (frame.position(alignment(end)) for end in (np.zeros(3), scan.size))
    return prior.expected(scan.body, places.share_inside(low, high))


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


def _shifted(supports: Sequence[Support], logit: Tensor, number: Tensor, settings: Settings) -> list[float]:
    """Shift the log odds of every support, as the others predict it, by the volume prior; presence scores of each."""
    scores = []
    for i, support in enumerate(supports):
        prior = _prior([other for j, other in enumerate(supports) if j != i])
        if prior is not None:
            own = number == i
            expected, curve = prior.expected(support.scan.body), _curve(logit[own], support)
            scores.append(presence_score(curve, expected))
            logit[own] += operating_shift(curve, expected, settings.margin)
    return scores or [np.inf]


def carry_to(fitted: FittedStructure, anatomy: Anatomy, registrar: Registrar) -> Carried | None:
    """What registration carries from the supports to a query; None of a structure without atlas."""
    if fitted.atlas is None:
        return None
    alone = fitted.atlas.trust is None
    return carry(anatomy, fitted.atlas.supports, fitted.settings.registration, registrar, compared=alone)


def _labelled(support: Support) -> Labelled:
    assert support.labelled is not None, "a support without its volume"
    return support.labelled


def _from_others(supports: Sequence[Support], settings: Settings, registrar: Registrar) -> tuple[Tensor, Tensor]:
    """Log odds and distances (N,) of what was sampled of every support, carried from the others."""
    parts = []
    for i, support in enumerate(supports):
        others = [_labelled(other) for j, other in enumerate(supports) if j != i]
        carried = carry(_labelled(support).anatomy, others, settings.registration, registrar)
        parts.append(carried.at(support.index, support.scan.base.shape))
    log_odds, distance = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return log_odds, distance


def _from_itself(support: Support) -> tuple[Tensor, Tensor]:
    """As ``_from_others``, as if the support had been carried without error."""
    labelled = _labelled(support)
    distance = sampled(labelled.distance.astype(np.float32), support.index, support.scan.base.shape)
    scale = float(np.prod(labelled.anatomy.spacing)) ** (1 / 3)
    return torch.from_numpy(distance / scale), torch.from_numpy(distance)


def _attention(support: Support) -> Tensor:
    """Weights (N,) by which a head is fitted where registration says what lies far from the structure.

    exp(-|d| / 6 mm), and a hundredth at least: the head is to tell the structure from what registration confuses it
    with, and its share is the one there, not that of the whole volume, which the vote knows already.
    """
    _, distance = _from_itself(support)
    return (-distance.abs() / _REACH_MM).exp().clamp_min(_FARTHEST).double()


def _leave_far(logit: np.ndarray, calibration: PlattScaling, threshold: float, carried: Carried) -> int:
    """Bring components of the structure that lie far from that of any support below the threshold, in place.

    Args:
        logit: (*S).
        calibration: of the log odds.
        threshold: probability above which is the structure.
        carried: from the supports.

    Returns:
        How many voxels. None if no component is near: then the registration is more likely to be wrong than all of
        them.
    """
    cut = (float(np.log(threshold / (1 - threshold))) - calibration.bias) / calibration.slope
    components, count = ndimage.label(logit > cut, np.ones((3, 3, 3)))
    if count < 2:
        return 0
    inside = np.flatnonzero(components)
    number = components.ravel()[inside]
    nearest = sampled(carried.nearest, inside, logit.shape)
    highest = ndimage.maximum(nearest, number, np.arange(1, count + 1))
    far = np.asarray(highest) < -_FAR_MM
    if far.all() or not far.any():
        return 0
    left = inside[far[number - 1]]
    flat = logit.reshape(-1)
    flat[left] = np.minimum(flat[left], np.float32(cut) - _BELOW)
    return int(left.size)


def _dice(logit: Tensor, support: Support, calibration: PlattScaling) -> float:
    """Of a support's sample with these log odds, labelled as ``apply_structure`` would label it."""
    threshold = calibration.cut(logit.numpy(), support.weight)
    found = calibration.probability(logit).numpy() > threshold
    both = float(support.weight[found & support.target].sum())
    return 2 * both / max(float(support.weight[found].sum() + support.weight[support.target].sum()), 1e-12)
