"""What a task may hold. One check for the task that ``fit`` has made and for the file that a stranger has sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.background import Background
from nnunet_calib.fewshot.structure.fitted import Atlas, FittedStructure, Settings
from nnunet_calib.fewshot.structure.heads import HEADS, AdapterHead, LinearHead
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.structure.prior import Places, SizePrior
from nnunet_calib.fewshot.task.naming import valid_name
from nnunet_calib.fewshot.volume.anatomy import MOST_VOXELS
from nnunet_calib.fewshot.volume.atlas import CAP_MM
from nnunet_calib.fewshot.volume.files import UNKNOWN
from nnunet_calib.fewshot.volume.frame import MODES, Frame
from nnunet_calib.fewshot.volume.registration import KINDS

MOST_CHUNKS = 1000
_MOST_SUPPORTS = 1000
_EXTENTS = ("aligned", "volume")


def check_parts(
    name: str,
    model: Mapping[str, Any],
    orientation: str,
    folds: Sequence[str],
    structure: FittedStructure,
    inside: Sequence[int],
    background: Background,
    report: Mapping[str, Any],
) -> None:
    """Refuse a task of which any part makes no sense, or does not fit the others.

    Raises:
        ValueError: it says which part.
    """
    _require(valid_name(name), f"{name!r:.60} cannot name a structure")
    _require(isinstance(model, Mapping) and isinstance(model.get("checkpoints"), Mapping), "no model")
    _require(isinstance(report, Mapping), "no report")
    _require(_is_count(report.get("value", 1), 1), "value in label maps")
    _require(_is_orientation(orientation), f"orientation {orientation!r:.20}")
    _require(
        0 < len(folds) == len(set(folds)) and all(isinstance(f, str) and (f.isdecimal() or f == "all") for f in folds),
        f"folds {folds!r:.60}",
    )
    _require(all(_is_count(label, 1) for label in inside) and len(set(inside)) == len(inside), "inside")
    _check_settings(structure.settings)
    _check_frame(structure.frame, structure.settings)
    _check_prior(structure.prior)
    _check_places(structure.places)
    slope, bias = structure.calibration.slope, structure.calibration.bias
    _require(_is_number(slope) and 0 < slope <= 1e6 and _is_number(bias) and abs(bias) <= 1e6, "calibration")
    limit = structure.presence_limit
    _require(_is_number(limit) and limit <= 0, f"presence limit {limit!r:.30}")
    _require(all(_is_number(dice) and 0 <= dice <= 1 + 1e-6 for dice in structure.left_out), "left_out")
    _check_heads(structure, len(folds))
    _check_samples(structure, len(folds))
    _check_background(background, structure)
    _require((structure.atlas is not None) == structure.settings.registered, "volumes of the supports")
    if structure.atlas is not None:
        _check_atlas(structure.atlas)


def _check_settings(settings: Settings) -> None:
    _require(isinstance(settings.head, str) and settings.head in HEADS, f"head {settings.head!r:.30}")
    _require(_is_count(settings.chunks, 1) and settings.chunks <= MOST_CHUNKS, f"chunks {settings.chunks!r:.30}")
    _require(settings.mode in MODES, f"mode {settings.mode!r:.30}")
    _require(settings.extent in _EXTENTS, f"extent {settings.extent!r:.30}")
    _require(_is_count(settings.axis, 0) and settings.axis <= 2, f"axis {settings.axis!r:.30}")
    _require(_is_number(settings.margin) and 0 <= settings.margin < 1, f"margin {settings.margin!r:.30}")
    _require(isinstance(settings.calibrate, bool), "calibrate")
    _require(isinstance(settings.options, Mapping), "options")
    how = settings.registration
    _require(how.kind in KINDS and _is_number(how.limit_s) and 0 < how.limit_s <= 1e6, "registration")
    if settings.objective is not None:
        _require(settings.head == LinearHead.key, f"refinement of head {settings.head}")
        _check_objective(settings.objective)


def _check_objective(objective: Objective) -> None:
    weights = (objective.support, objective.prior, objective.entropy)
    _require(all(_is_number(weight) and weight >= 0 for weight in weights), "weights of the refinement")
    margin = objective.margin
    _require(margin is None or (_is_number(margin) and 0 <= margin < 1), "margin of the refinement")
    ways = (objective.uniform, objective.alternating, objective.predicted)
    _require(all(isinstance(way, bool) for way in ways), "refinement")


def _check_frame(frame: Frame, settings: Settings) -> None:
    _require(frame.extent == settings.extent, "frame of another extent")
    ends = (frame.low, frame.high)
    _require(all(end.shape == (3,) and np.isfinite(end).all() for end in ends), "frame without ends")
    _require(bool((frame.high - frame.low > 0).all() and np.abs(ends).max() < 1e7), "frame without extent")
    for c, place in frame.landmarks.items():
        _require(_is_count(c, 1) and place.shape == (3, 3) and not np.isinf(place).any(), "landmarks")


def _check_prior(prior: SizePrior | None) -> None:
    if prior is not None:
        _require(_is_number(prior.volume) and 0 < prior.volume < 1e12, f"volume {prior.volume!r:.30}")
        _require(_is_number(prior.spread) and prior.spread >= 0 and _is_count(prior.supports, 1), "volumes")
        _require(all(_is_count(c, 1) and _is_number(v) and v > 0 for c, v in prior.body.items()), "volumes of classes")


def _check_places(places: Places) -> None:
    points = places.points
    fits = points.ndim == 2 and points.shape[1] == 3 and len(points) and points.dtype.kind == "f"
    _require(bool(fits and np.isfinite(points).all()), "places")


def _check_heads(structure: FittedStructure, folds: int) -> None:
    heads, settings = structure.heads, structure.settings
    _require(len(heads) == folds, f"{len(heads)} heads for {folds} folds")
    for head in heads:
        _require(isinstance(head, HEADS[settings.head]), "heads of another kind")
        for name, part in head.state().items():
            _finite(part, f"head, {name}")
        if not isinstance(head, AdapterHead):
            _require(head.projections.ndim == 2 and len(head.projections) > 0, "heads without projections")
            _require(head.projections.shape[1] == heads[0].projections.shape[1], "heads of different features")
            # as it will be used: whatever is of another size than the rest fails here
            few = torch.zeros(1, len(head.projections))
            logit = head.logit(few, torch.zeros(1, 3), torch.full((1, settings.chunks), 1 / settings.chunks))
            _require(logit.shape == (1,) and bool(logit.isfinite().all()), "heads that give no log odds")


def _check_samples(structure: FittedStructure, folds: int) -> None:
    _require(
        len(structure.samples) == (folds if structure.settings.objective is not None else 0) or not structure.samples,
        "samples of other folds",
    )
    _require(bool(structure.samples) or structure.settings.objective is None, "no samples to refine with")
    for head, (features, target, weight, position, chunk, support) in zip(
        structure.heads, structure.samples, strict=False
    ):
        n = len(features)
        shapes = [tuple(part.shape) for part in (features, target, weight, position, chunk, support)]
        wanted = [(n, head.projections.shape[1]), (n,), (n,), (n, 3), (n, structure.settings.chunks), (n,)]
        _require(shapes == wanted and target.dtype == torch.bool and not support.is_floating_point(), "samples")
        _require(bool((weight > 0).all() and target.any() and not target.all()), "samples")
        for part in (features, weight, position, chunk):
            _finite(part, "samples")


def _check_background(background: Background, structure: FittedStructure) -> None:
    limit = background.limit
    _require(_is_number(limit) and limit > 0, f"limit of the feature distance {limit!r:.30}")
    mean, factor = background.mean, background.factor
    _require(mean.ndim == 2 and mean.numel() > 0 and factor.shape == (*mean.shape, mean.shape[1]), "background")
    size = mean.shape[1]
    _finite(background.mean, "background")
    _finite(background.factor, "background")
    _require(bool((factor.diagonal(dim1=1, dim2=2) > 0).all()), "background without spread")
    if structure.settings.head != AdapterHead.key:
        _require(size == structure.heads[0].projections.shape[1], "background of other features")


def _check_atlas(atlas: Atlas) -> None:
    trust = atlas.trust
    _require((trust is None) == (len(atlas.supports) == 1), "trust")
    if trust is not None:
        weights = (trust.head, trust.vote, trust.distance)
        _require(all(_is_number(weight) and 0 <= weight <= 1e6 for weight in weights), "trust")
        _require(_is_number(trust.bias) and abs(trust.bias) <= 1e6, "trust")
    _require(0 < len(atlas.supports) <= _MOST_SUPPORTS, f"{len(atlas.supports)} volumes of supports")
    for support in atlas.supports:
        anatomy = support.anatomy
        shape, kinds = anatomy.image.shape, (anatomy.base.dtype, support.distance.dtype)
        _require(len(shape) == 3 and 0 < anatomy.image.size <= MOST_VOXELS, f"a volume of {shape}")
        _require(anatomy.base.shape == support.distance.shape == shape, "volumes of different sizes")
        _require(kinds[0] in (np.uint8, np.uint16) and kinds[1] == np.float16, "volumes of other types")
        _require(
            len(anatomy.spacing) == 3 and all(_is_number(s) and 1e-4 < s < 1e4 for s in anatomy.spacing), "spacing"
        )
        _require(bool(np.isfinite(anatomy.image).all()), "a volume that is not finite")
        _require(bool((np.abs(support.distance) <= CAP_MM).all()), "distances")  # NaN is not
        known = support.known
        _require(known is None or (known.shape == shape and known.dtype == np.bool_), "where annotations count")


def _is_orientation(orientation: object) -> bool:
    if not isinstance(orientation, str) or orientation == UNKNOWN:
        return orientation == UNKNOWN
    axes = [next((i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair), 3) for letter in orientation]
    return sorted(axes) == [0, 1, 2]


def _finite(part: Tensor, what: str) -> None:
    _require(bool(part.isfinite().all()), f"{what} is not finite")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(fulfilled: bool, otherwise: str) -> None:
    if not fulfilled:
        raise ValueError(otherwise)
