"""Sampled supports to a fitted structure: heads, frame, volume prior, calibration, and trust in the registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.fitted import (
    Atlas,
    FittedStructure,
    Settings,
    chunk_weights,
    ensemble,
    expected_in,
)
from nnunet_calib.fewshot.structure.heads import HEADS, Head
from nnunet_calib.fewshot.structure.platt import PlattScaling, fit_platt, out_of_fold
from nnunet_calib.fewshot.structure.prior import (
    Places,
    SizePrior,
    VolumeCurve,
    operating_shift,
    presence_limit,
    presence_score,
)
from nnunet_calib.fewshot.structure.trust import Trust, candidates, fit_trust
from nnunet_calib.fewshot.volume.atlas import Labelled, carry, sampled
from nnunet_calib.fewshot.volume.frame import Frame, frame_of_landmarks, frame_of_volumes
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.scan import Scan
from nnunet_calib.fewshot.volume.support import Support

_REACH_MM = 6.0  # of the errors of registration that a head is to mend
_FARTHEST = 0.01
_LEAST_IN_VIEW = 0.01  # of a structure that is annotated in the volume


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
        shares = [
            _share_in_view(support, frame, _places(position[number != i], target[number != i], weight[number != i]))
            for i, support in enumerate(supports)
        ]
        best = -1.0
        for one, z in tried:
            of_one = _shifted(supports, z, number, settings, shares)
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


def expected_without_fit(supports: Sequence[Support], settings: Settings, scans: Sequence[Scan]) -> list[float | None]:
    """As ``expected_volume`` of each scan, from supports that nothing was fitted to yet."""
    frame, position = _placed(supports, settings)
    target, weight = (
        torch.from_numpy(np.concatenate([getattr(support, name) for support in supports]))
        for name in ("target", "weight")
    )
    prior, places = _prior(supports), _places(position, target, weight)
    return [expected_in(prior, frame, places, scan, frame.align(scan.size, scan.landmarks)) for scan in scans]


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


def _share_in_view(support: Support, frame: Frame, places: Places) -> float:
    """Share of the structure, where other supports have it, in a support's field of view; 1 where that cuts nothing."""
    if not support.cut:
        return 1.0
    alignment = frame.align(support.scan.size, support.scan.landmarks)
    low, high = (frame.position(alignment(end)) for end in (np.zeros(3), support.scan.size))
    return max(places.share_inside(low, high), _LEAST_IN_VIEW)


def _shifted(
    supports: Sequence[Support], logit: Tensor, number: Tensor, settings: Settings, shares: Sequence[float]
) -> list[float]:
    """Shift the log odds of every support, as the others predict it, by the volume prior; presence scores of each.

    ``shares`` of the structure are in view in each, as ``expected_in`` has it of a query.
    """
    scores = []
    for i, support in enumerate(supports):
        prior = _prior([other for j, other in enumerate(supports) if j != i])
        if prior is not None:
            own = number == i
            expected, curve = prior.expected(support.scan.body, shares[i]), _curve(logit[own], support)
            scores.append(presence_score(curve, expected))
            logit[own] += operating_shift(curve, expected, settings.margin)
    return scores or [np.inf]


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


def _labelled(support: Support) -> Labelled:
    assert support.labelled is not None, "a support without its volume"
    return support.labelled


def _dice(logit: Tensor, support: Support, calibration: PlattScaling) -> float:
    """Of a support's sample with these log odds, labelled as ``apply_structure`` would label it."""
    threshold = calibration.cut(logit.numpy(), support.weight)
    found = calibration.probability(logit).numpy() > threshold
    both = float(support.weight[found & support.target].sum())
    return 2 * both / max(float(support.weight[found].sum() + support.weight[support.target].sum()), 1e-12)
