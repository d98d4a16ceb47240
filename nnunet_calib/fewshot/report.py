"""What ``apply`` tells of a query."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_calib.data.software import installed_versions
from nnunet_calib.fewshot.method import FittedStructure
from nnunet_calib.fewshot.query import Found, Structures
from nnunet_calib.fewshot.task import Task
from nnunet_calib.fewshot.volumes import Volume

_PACKAGES = ("nnunet-calib", "nnunetv2", "torch", "numpy")


def report_of(volume: Volume, structures: Structures, found: Sequence[Found], voxels: Sequence[int]) -> dict[str, Any]:
    """What is told of a case; JSON."""
    step = float(np.prod(volume.file_properties["spacing"]))
    rows = zip(structures.tasks, structures.fitted, structures.values, found, voxels, strict=True)
    told: dict[str, Any] = {}
    for task, fitted, value, one, count in rows:
        novel = one.novel
        told[task.name] = {
            "label": value,
            "absent": novel.absent,
            "volume_mm3": count * step,
            "expected_volume_mm3": novel.expected_mm3,
            "share_in_view": one.in_view,
            "presence_score": None if novel.presence == np.inf else float(novel.presence),
            "presence_limit": fitted.presence_limit,
            "shift_by_volume_prior": novel.shift,
            "threshold": novel.threshold,
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


def _warnings(task: Task, fitted: FittedStructure, volume: Volume, found: Found) -> list[str]:
    novel, warnings = found.novel, []
    if volume.turned:
        warnings.append(
            f"stored {volume.stored}, turned into {volume.orientation} of the supports and back: the base classes too "
            "are those of the turned image"
        )
    if novel.absent:
        warnings.append(f"absent: presence score {novel.presence:.1f}, limit {fitted.presence_limit:.1f}")
    elif fitted.prior is None:
        warnings.append("nothing is known of the structure's size; neither its volume nor its presence is checked")
    if found.in_view < 1:
        warnings.append(f"the field of view can hold {found.in_view:.0%} of the structure; less volume is expected")
    if found.distance > task.background.limit:
        warnings.append(
            f"features are {found.distance:.2f} from the supports' (limit {task.background.limit:.2f}): another "
            "modality or contrast? do not rely on the result"
        )
    if fitted.settings.extent == "aligned" and found.landmarks == 0:
        warnings.append("no base class to align the volume by: its ends are taken as those of the supports")
    return warnings
