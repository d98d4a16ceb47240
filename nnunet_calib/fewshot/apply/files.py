"""The files that ``apply`` leaves of a query: label maps and probabilities, as nnU-Net writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor

from nnunet_calib.data.cases import all_probabilities
from nnunet_calib.data.errors import UsageError
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.probabilities import write_npz
from nnunet_calib.data.software import installed_versions
from nnunet_calib.fewshot.apply.merge import merge_labels, merge_probabilities
from nnunet_calib.fewshot.apply.query import Found, Structures
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.structure.fitted import FittedStructure
from nnunet_calib.fewshot.task.file import Task
from nnunet_calib.fewshot.volume.files import MEASURES, Volume, to_image_grid, turn_back, voxel_size, write_segmentation

_PACKAGES = ("nnunet-calib", "nnunetv2", "torch", "numpy")
REPORT_ENDING = ".fewshot.json"
AXES = ("left to right", "posterior to anterior", "inferior to superior")
"""The patient axes, as reports name them."""

_OUTSIDE = -40.0  # log odds outside the box that nnU-Net crops to
_ROWS = 1 << 22  # logits at once


def make_folders(output: Path, model: BaseModel, structures: Structures, merge: bool) -> None:
    """Make the folders of the results, with ``dataset.json`` and ``plans.json`` as nnU-Net leaves them.

    Raises:
        UsageError: a folder that cannot be made.
    """
    content = model.dataset.content
    folders: dict[Path, Mapping[str, Any]] = {output: content}
    novel = {task.name: value for task, value in zip(structures.tasks, structures.values, strict=True)}
    if merge:
        # A segmentation never holds the ignore label, which would have to be the highest.
        labels = {name: value for name, value in content["labels"].items() if name != "ignore"} | novel
        order = {}
        if model.dataset.has_regions:
            order = {"regions_class_order": [*content["regions_class_order"], *structures.values]}
        folders[output] = {**content, **order, "labels": labels}
    else:
        for task in structures.tasks:
            alone = {name: value for name, value in content.items() if name != "regions_class_order"}
            folders[output / task.name] = {**alone, "labels": {"background": 0, task.name: 1}}
    for folder, dataset in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made a folder for the results ({error.strerror})") from error
        write_whole(folder / "dataset.json", json.dumps(dataset, indent=4) + "\n")
        write_whole(folder / "plans.json", json.dumps(model.plans_manager.plans, indent=4) + "\n")


def remove_case(output: Path, case: str, ending: str, names: Sequence[str]) -> None:
    """Remove what an earlier run left of a case: it would pass for results of this one.

    Args:
        output: folder, as ``make_folders`` made it.
        case: its name.
        ending: of label maps.
        names: of the structures, each of which has a folder where it was written alone.
    """
    for folder in (output, *(output / name for name in names)):
        for path in (*all_probabilities(folder, case), folder / f"{case}.pkl", folder / (case + ending)):
            path.unlink(missing_ok=True)
    (output / (case + REPORT_ENDING)).unlink(missing_ok=True)


def write_case(
    model: BaseModel,
    volume: Volume,
    logits: Tensor,
    structures: Structures,
    found: Sequence[Found],
    output: Path,
    merge: bool,
    probabilities: bool,
) -> list[int]:
    """Write label maps and, if asked for, probabilities, in place of those of an earlier run.

    Args:
        model: the base model.
        volume: the query.
        logits: of the base model, (C, *S).
        structures: that were looked for.
        found: of each.
        output: folder, as ``make_folders`` made it.
        merge: base classes and structures together; else each alone.
        probabilities: write them too.

    Returns:
        Voxels of each structure in the image.
    """
    base = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy(),
        model.plans_manager,
        model.configuration_manager,
        model.label_manager,
        volume.properties,
        return_probabilities=probabilities,
    )
    segmentation, base_probabilities = base if probabilities else (base, None)
    del base
    segmentation = turn_back(volume, segmentation[None])[0]
    if base_probabilities is not None:
        base_probabilities = turn_back(volume, base_probabilities)
    novel = _novel(model, volume, found)
    ending = model.dataset.file_ending
    remove_case(output, volume.case, ending, [task.name for task in structures.tasks])
    if merge:
        confidence = to_image_grid(model, volume, _confidence(model, logits)[None], 1.0)[0]
        merged = _merged(segmentation, confidence, novel, structures, found)
        write_segmentation(model, volume, merged, output / (volume.case + ending))
        if base_probabilities is not None:
            both = merge_probabilities(base_probabilities, novel, regions=model.dataset.has_regions)
            _write_probabilities(output / volume.case, both, volume)
        return [int(np.count_nonzero(merged == value)) for value in structures.values]
    write_segmentation(model, volume, segmentation, output / (volume.case + ending))
    if base_probabilities is not None:
        _write_probabilities(output / volume.case, base_probabilities, volume)
    voxels = []
    for task, p, one in zip(structures.tasks, novel, found, strict=True):
        mask = ((p > one.novel.threshold) & (not one.novel.absent)).astype(np.uint8)
        write_segmentation(model, volume, mask, output / task.name / (volume.case + ending))
        if probabilities:
            _write_probabilities(output / task.name / volume.case, np.stack([1 - p, p]), volume)
        voxels.append(int(np.count_nonzero(mask)))
    return voxels


def report_of(volume: Volume, structures: Structures, found: Sequence[Found], voxels: Sequence[int]) -> dict[str, Any]:
    """What is told of a case; JSON."""
    step = voxel_size(volume.place, volume.unit)
    measure = MEASURES[volume.unit]
    rows = zip(structures.tasks, structures.fitted, structures.values, found, voxels, strict=True)
    told: dict[str, Any] = {}
    for task, fitted, value, one, count in rows:
        novel = one.novel
        told[task.name] = {
            "label": value,
            "absent": novel.absent,
            "volume_mm3": None,
            "expected_volume_mm3": None,
            measure: count * step,
            f"expected_{measure}": novel.expected_mm3,
            "share_in_view": one.in_view,
            "shown_by_supports": dict(zip(AXES, np.round(one.shown, 3).tolist(), strict=True)),
            "presence_score": float(novel.presence) if np.isfinite(novel.presence) else None,
            "presence_limit": fitted.presence_limit,
            "shift_by_volume_prior": novel.shift,
            "registration": _registration(one),
            "threshold": novel.threshold,
            "expected_dice": round(novel.expected_dice, 4),
            "feature_distance": one.distance,
            "feature_distance_limit": task.background.limit,
            "landmarks": one.landmarks,
            "warnings": _warnings(task, fitted, volume, one),
        }
    return {
        "case": volume.case,
        "orientation": {"stored": volume.stored, "predicted": volume.orientation},
        "structures": told,
        "software": installed_versions(_PACKAGES),
    }


def _novel(model: BaseModel, volume: Volume, found: Sequence[Found]) -> np.ndarray:
    """Calibrated probabilities of the structures in the image, float32 (T, z, y, x); log odds are resampled."""
    novel = None
    for i, one in enumerate(found):
        calibrated = one.novel.calibration.slope * one.novel.logit
        calibrated += one.novel.calibration.bias
        in_image = to_image_grid(model, volume, calibrated[None], _OUTSIDE)[0]
        novel = np.empty((len(found), *in_image.shape), dtype=np.float32) if novel is None else novel
        novel[i] = in_image
    assert novel is not None, "no task"
    return torch.from_numpy(novel).sigmoid_().numpy()


def _merged(
    base: np.ndarray, confidence: np.ndarray, novel: np.ndarray, structures: Structures, found: Sequence[Found]
) -> np.ndarray:
    """Labels (z, y, x) of base classes and structures; only voxels that a structure claims are looked at."""
    merged = base.astype(np.promote_types(base.dtype, np.min_scalar_type(max(structures.values))))
    claimed = np.zeros(base.shape, dtype=bool)
    for p, one in zip(novel, found, strict=True):
        if not one.novel.absent:
            claimed |= p > one.novel.threshold
    here = [np.where(one.novel.absent, 0, p[claimed]) for p, one in zip(novel, found, strict=True)]
    merged[claimed] = merge_labels(
        base[claimed],
        confidence[claimed],
        np.stack(here),
        structures.values,
        [one.novel.threshold for one in found],
        [task.inside for task in structures.tasks],
    )
    return merged


def _confidence(model: BaseModel, logits: Tensor) -> np.ndarray:
    """The base model's probability of what it decides for, float32 (*S), of logits (C, *S)."""
    confidence = np.empty(logits.shape[1:], dtype=np.float32)
    rows = max(1, _ROWS // max(1, logits[:, 0].numel()))
    for first in range(0, len(confidence), rows):
        p = model.label_manager.apply_inference_nonlin(logits[:, first : first + rows])
        confidence[first : first + rows] = p.amax(dim=0)
    return confidence


def _write_probabilities(truncated: Path, channels: np.ndarray, volume: Volume) -> None:
    """``.npz`` and ``.pkl`` as nnU-Net writes them."""
    channels = np.ascontiguousarray(channels, dtype=np.float32)
    write_npz(truncated.with_name(truncated.name + ".npz"), channels, channels.shape, channels.dtype)
    save_pickle(volume.properties, str(truncated) + ".pkl")


def _warnings(task: Task, fitted: FittedStructure, volume: Volume, found: Found) -> list[str]:
    novel, warnings = found.novel, []
    if volume.turned:
        warnings.append(
            f"stored {volume.stored}, turned into {volume.orientation} of the supports and back: the base classes too "
            "are those of the turned image"
        )
    if not found.in_view:
        warnings.append("absent: no place where the supports have the structure lies in the field of view")
    elif novel.absent:
        warnings.append(f"absent: presence score {novel.presence:.1f}, limit {fitted.presence_limit:.1f}")
    elif fitted.prior is None:
        warnings.append("nothing is known of the structure's size; neither its volume nor its presence is checked")
    if 0 < found.in_view < 1:
        warnings.append(f"the field of view can hold {found.in_view:.0%} of the structure; less volume is expected")
    if found.distance > task.background.limit:
        warnings.append(
            f"features are {found.distance:.2f} from the supports' (limit {task.background.limit:.2f}): another "
            "modality or contrast? do not rely on the result"
        )
    if fitted.settings.extent == "aligned" and found.landmarks == 0:
        warnings.append("no base class to align the volume by: its ends are taken as those of the supports")
    if found.carried is not None:
        warps = found.carried.warps
        for count, what in (
            (sum(warp.failed for warp in warps), "could not be registered; they say little of where it is"),
            (sum(warp.limited for warp in warps), "reached the limit of time of a registration: less exact"),
        ):
            if count:
                warnings.append(f"{count} of {len(warps)} supports {what}")
        if novel.far_mm3:
            warnings.append(f"{novel.far_mm3 / 1000:.2f} ml left out, far from where the supports have it")
    return warnings


def _registration(found: Found) -> dict[str, Any] | None:
    """What is told of the registrations of a case."""
    if found.carried is None:
        return None
    warps = found.carried.warps
    return {
        "seconds": round(found.carried.seconds, 3),
        "limit_reached": sum(warp.limited for warp in warps),
        "failed": sum(warp.failed for warp in warps),
        "left_out_mm3": found.novel.far_mm3,
        "agreement": None if found.carried.agreement is None else round(found.carried.agreement, 3),
    }
