"""One pair: a structure fitted to the supports of an episode, and what it scores in the query."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nnunet_calib.fewshot.apply.refine import refine_on_query
from nnunet_calib.fewshot.measure.cache import FeatureCache
from nnunet_calib.fewshot.measure.case import Case
from nnunet_calib.fewshot.measure.protocols import PAPER, Episode
from nnunet_calib.fewshot.measure.registered import propagated
from nnunet_calib.fewshot.measure.scores import novel_scores
from nnunet_calib.fewshot.measure.trials import Trial
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.structure.fitted import FittedStructure, NovelMap
from nnunet_calib.fewshot.structure.from_supports import fit_structure
from nnunet_calib.fewshot.structure.heads.adapter import AdapterHead
from nnunet_calib.fewshot.structure.in_query import apply_structure, carry_to
from nnunet_calib.fewshot.task.adapters import adapt
from nnunet_calib.fewshot.task.fit import nested
from nnunet_calib.fewshot.volume.atlas import Carried
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.support import Support


def fit_trial(
    model: BaseModel,
    cache: FeatureCache,
    trial: Trial,
    episode: Episode,
    case: Callable[[str], Case],
    registrar: Registrar,
) -> FittedStructure:
    """The structure fitted to the supports of an episode."""
    settings = trial.settings
    if settings.head == AdapterHead.key:
        volumes = [case(name).volume for name in episode.supports]
        seen = _supports(trial, episode, case)
        seen, trained = adapt(model, cache.predictor, volumes, seen, settings=settings, progress=False)
        return replace(fit_structure(seen, settings, registrar), heads=list(trained))
    if trial.protocol == PAPER:
        supports = [case(name).paper_support(settings.axis, settings.chunks) for name in episode.supports]
    else:
        supports = _supports(trial, episode, case)
    return fit_structure(supports, settings, registrar)


def _supports(trial: Trial, episode: Episode, case: Callable[[str], Case]) -> list[Support]:
    """Of P2, with their volumes where they are registered."""
    if not trial.settings.registered:
        return [case(name).support for name in episode.supports]
    return [replace(case(name).support, labelled=case(name).labelled) for name in episode.supports]


def score_pair(
    model: BaseModel,
    cache: FeatureCache,
    trial: Trial,
    episode: Episode,
    fitted: FittedStructure,
    case: Callable[[str], Case],
    registrar: Registrar,
    inside: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores of a fitted structure in a query; ``inside`` as in ``fit_folder``."""
    query, settings = case(episode.query), trial.settings
    if trial.protocol == PAPER:
        parts, counted = query.paper_query(settings.axis, settings.chunks)
        counted = counted & query.valid.ravel()
        expected = query.paper_volume(settings.axis, case(episode.supports[0]), settings.chunks)
        projected = query.predicted.projected(fitted.projections)
        found = apply_structure(fitted, query.scan, projected, parts=parts, counted=counted, expected_mm3=expected)
        scores = novel_scores(
            found.probability,
            query.structure,
            query.volume.spacing,
            found.probability > found.threshold,
            counted.reshape(query.structure.shape),
        )
        return scores | _about(found) | {"base_before": float("nan"), "base_after": float("nan")}
    for support in fitted.atlas.supports if fitted.atlas is not None else ():
        registrar(query.anatomy, support.anatomy, settings.registration)  # before the clock: it has its own
    begin = time.process_time()
    heads = None
    if settings.objective is not None:
        heads = refine_on_query(fitted, query.scan, query.predicted.sampled, settings.objective)
    if settings.head == AdapterHead.key:
        image = torch.from_numpy(query.volume.image)
        projected = cache.predictor.project_adapted(image, [head.state() for head in fitted.heads])
    else:
        projected = query.predicted.projected([head.projections for head in heads or fitted.heads])
    carried = None if fitted.atlas is None else carry_to(fitted, query.anatomy, registrar)
    found = apply_structure(fitted, query.scan, projected, heads, carried=carried)
    spent = time.process_time() - begin
    return _score_map(model, episode, found, case, inside) | _cost(spent, carried)


def score_registration(
    model: BaseModel,
    trial: Trial,
    episode: Episode,
    case: Callable[[str], Case],
    registrar: Registrar,
    inside: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Scores of registration alone in a query."""
    query, how = case(episode.query), trial.settings.registration
    supports = [case(name).labelled for name in episode.supports]
    for support in supports:
        registrar(query.anatomy, support.anatomy, how)  # before the clock: it has its own
    begin = time.process_time()
    found, carried = propagated(query.anatomy, query.structure.shape, supports, how, registrar)
    spent = time.process_time() - begin
    return _score_map(model, episode, found, case, inside) | _cost(spent, carried)


def _score_map(
    model: BaseModel, episode: Episode, found: NovelMap, case: Callable[[str], Case], inside: Sequence[int] | None
) -> dict[str, Any]:
    """Scores of P2: the whole query, on the grid of its image."""
    query = case(episode.query)
    logit = query.on_image_grid(found.logit)
    probability = found.calibration.probability(torch.from_numpy(logit)).numpy()
    segmentation = (probability > found.threshold) & (not found.absent)
    scores = novel_scores(probability, query.reference, query.image_spacing, segmentation, query.counted)
    under, _ = nested(model, [case(name).overlaps for name in episode.supports], inside)
    return scores | _about(found) | query.base_scores(probability, found, under)


def _cost(spent: float, carried: Carried | None) -> dict[str, Any]:
    """Seconds of the processor that a query took, without the network; registrations as when they were made."""
    if carried is None:
        return {"seconds": round(spent, 3), "seconds_registration": 0.0, "registrations_limited": 0}
    limited = sum(warp.limited or warp.failed for warp in carried.warps)
    return {
        "seconds": round(spent, 3),
        "seconds_registration": round(carried.seconds, 3),
        "registrations_limited": limited,
    }


def _about(found: NovelMap) -> dict[str, Any]:
    return {
        "presence": float(np.clip(found.presence, -1e6, 1e6)),
        "absent": found.absent,
        "expected_mm3": found.expected_mm3,
        "expected_dice": found.expected_dice,
    }
