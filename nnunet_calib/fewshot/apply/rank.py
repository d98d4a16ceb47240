"""What to annotate next: unlabelled cases in the order of how much their segmentation is expected to be wrong.

    need = mean over structures of 1 - D,    D the Dice that the case's own probabilities let expect, 0 where absent

D is of calibrated probabilities (two supports or more), and is as good as these are: a case that is unlike the supports
is told, for there they mean nothing. Every case gets a label map with the values of the supports' own, to be corrected
and put beside them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.data.model import CHECKPOINT, file_sha256
from nnunet_calib.fewshot.apply.folder import apply_folder, task_files
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.task.file import Task, read_tasks

RANKING = "ranking.csv"
PREFILLED = "prefilled"
_WRITTEN = ".written.json"
"""In the folder of label maps: checksums of what was written, to know those that a user has corrected."""


@dataclass(frozen=True)
class Ranked:
    """An unlabelled case.

    Attributes:
        case: its name.
        need: in [0, 1], the larger the more there is to correct.
        expected_dice: of each structure; 0 where it is absent.
        why: sentences.
        corrected: its label map is not as it was written: it was left as it is.
    """

    case: str
    need: float
    expected_dice: Mapping[str, float]
    why: tuple[str, ...]
    corrected: bool = False


def rank_folder(
    model_folder: str | Path, tasks: Sequence[str | Path], images: str | Path, output: str | Path, **options: Any
) -> tuple[list[Ranked], list[str]]:
    """Segment a folder of images, and say which to annotate first.

    Args:
        model_folder: of the base model.
        tasks: task files, or folders of them.
        images: in nnU-Net's raw layout, none of them a support.
        output: folder for what ``apply_folder`` writes, ``ranking.csv`` and ``prefilled``, a folder with a label map of
            each case, whose values are those of the supports' label maps. A map there that was corrected since is kept.
        options: of ``apply_folder``.

    Returns:
        The cases, the most needed first, and a line for every case that cannot be used.

    Raises:
        UsageError: structures that had the same value in label maps; what ``apply_folder`` raises.
        InputError: likewise.
    """
    output = Path(output)
    loaded = [task for file in task_files([Path(task) for task in tasks]) for task in read_tasks(file)]
    values = [int(task.report["value"]) for task in loaded]
    if twice := [value for value in values if values.count(value) > 1]:
        raise UsageError(
            f"two structures have the value {twice[0]} in the label maps of their supports; rank them apart"
        )
    checkpoint = options.get("checkpoint", CHECKPOINT)
    model = BaseModel(model_folder, options.get("folds"), checkpoint)  # before all is segmented
    reports = apply_folder(model_folder, tasks, images, output, **options)
    usable = [report for report in reports if "error" not in report]
    corrected = _prefill(model, output, usable, loaded)
    ranked = [_ranked(report, loaded, report["case"] in corrected) for report in usable]
    ranked.sort(key=lambda one: (-one.need, one.case))
    write_whole(output / RANKING, _table(ranked, [task.name for task in loaded]))
    return ranked, [report["error"] for report in reports if "error" in report]


def _ranked(report: Mapping[str, Any], tasks: Sequence[Task], corrected: bool) -> Ranked:
    dice, why = {}, []
    for task in tasks:
        found = report["structures"][task.name]
        dice[task.name] = 0.0 if found["absent"] else float(found["expected_dice"])
        which = f"{task.name}: " if len(tasks) > 1 else ""
        told = [] if found["absent"] else [f"expected Dice {dice[task.name]:.2f}"]
        if shift := found["shift_by_volume_prior"]:
            told.append(f"the log odds were moved by {shift:+.1f} to fit the expected volume")
        told += [warning for warning in found["warnings"] if not warning.startswith("stored ")]
        why += [which + one for one in told]
    need = 1 - float(np.mean(list(dice.values())))
    return Ranked(report["case"], need, dice, tuple(why), corrected)


def _prefill(model: BaseModel, output: Path, reports: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> set[str]:
    """Write label maps of the structures alone, with the values of the supports; cases that a user has corrected."""
    folder, ending = output / PREFILLED, model.dataset.file_ending
    folder.mkdir(exist_ok=True)
    try:
        written: dict[str, str] = read_json(folder / _WRITTEN)
    except InputError:
        written = {}
    reader, corrected = model.plans_manager.image_reader_writer_class(), set()
    for report in reports:
        file = folder / (report["case"] + ending)
        if file.exists() and written.get(file.name) != file_sha256(file):
            corrected.add(report["case"])
            continue
        merged, properties = reader.read_seg(str(output / file.name))
        labels = np.zeros(merged.shape[1:], dtype=np.uint16)
        for task in tasks:
            labels[merged[0] == report["structures"][task.name]["label"]] = int(task.report["value"])
        temporary = folder / f".new{ending}"
        reader.write_seg(labels, str(temporary), properties)
        temporary.replace(file)
        written[file.name] = file_sha256(file)
        write_whole(folder / _WRITTEN, json.dumps(written, indent=1) + "\n")
    return corrected


def _table(ranked: Sequence[Ranked], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "case", "need", *(f"expected_dice_{name}" for name in names), "why"])
    for number, one in enumerate(ranked, start=1):
        dice = [f"{one.expected_dice[name]:.4f}" for name in names]
        writer.writerow([number, one.case, f"{one.need:.4f}", *dice, "; ".join(one.why)])
    return text.getvalue()
