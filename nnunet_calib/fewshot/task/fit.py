"""Fit a task: from a folder of annotated volumes to one file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_calib.data.cases import find_images
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.data.software import installed_versions
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.background import Background
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.structure.from_supports import fit_structure
from nnunet_calib.fewshot.structure.heads import AdapterHead, Head
from nnunet_calib.fewshot.task.adapters import adapt
from nnunet_calib.fewshot.task.file import ENDING, Task, thinned, write_tasks
from nnunet_calib.fewshot.task.naming import check_asked, valid_name
from nnunet_calib.fewshot.volume.files import MEASURES, Volume, find_supports, read_structures, read_volume
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.sampling import VOXELS
from nnunet_calib.fewshot.volume.scan import Scan, scan_of
from nnunet_calib.fewshot.volume.support import Annotated, Support, read_supports

_MOSTLY = 0.5  # share of the structure in one base class from which it lies inside that
_SAME = 0.5  # Dice with a base class from which it may be that class
_POOR = 0.3  # Dice of left-out supports
_ODD = 0.5  # of the median of it
_PACKAGES = ("nnunet-calib", "nnunetv2", "torch", "numpy")


def fit_folder(
    model_folder: str | Path,
    images: str | Path,
    labels: str | Path,
    output: str | Path,
    *,
    structures: Mapping[str, int],
    ignore: int | None = None,
    settings: Settings | None = None,
    inside: Sequence[int] | None = None,
    folds: Sequence[str | int] | None = None,
    checkpoint: str = CHECKPOINT,
    device: str = "cpu",
    step_size: float = 0.5,
    mirroring: bool = True,
    previous: Path | None = None,
    unlabelled: Path | None = None,
    registrations: Path | None = None,
    voxels: int = VOXELS,
    seed: int = 0,
    progress: bool = True,
) -> list[Task]:
    """Fit tasks to a folder of supports, one for each structure, and write their file.

    The network looks at every support once for all of them.

    Args:
        model_folder: of the base model.
        images: in nnU-Net's raw layout.
        labels: label maps of the supports; cases without one are not used.
        output: the task file, or a folder for NAME.fewshot, of several names joined by ``+``.
        structures: label value of each structure, by its name.
        ignore: label value of voxels that do not count.
        settings: choices; if None the defaults, without registration, unlike the command.
        inside: base labels that the structures may override; those that each is found in if None.
        folds: of the base model; all if None.
        checkpoint: its name in each fold.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window.
        mirroring: test-time augmentation of the base classes.
        previous: of a cascade, the folder of the previous stage's segmentations.
        unlabelled: folder of images in nnU-Net's raw layout, in which adapters are held to the volume expected
            there; other heads have no use for it. Where it is ``images``, those without label map.
        registrations: folder where registrations are kept for other runs; None: they are not.
        voxels: sampled from each support.
        seed: of the samples.
        progress: show a bar.

    Returns:
        The tasks, in the order of the structures.

    Raises:
        UsageError: options or folders that make no sense.
        InputError: files that cannot be used, or no support with one of the structures.
    """
    settings = settings or Settings()
    file = task_file(Path(output), *structures)
    model = BaseModel(model_folder, folds, checkpoint)
    model.check_previous_stage(previous)
    for name in structures:
        check_asked(name, inside, model.dataset)
    cases = find_supports(Path(images), Path(labels), model.dataset.file_ending)
    others = {} if unlabelled is None else find_images(unlabelled, model.dataset.file_ending)
    if unlabelled is not None and unlabelled.resolve() == Path(images).resolve():
        others = {case: files for case, files in others.items() if case not in cases}
    predictor = FeaturePredictor(model, device, step_size=step_size, mirroring=mirroring)
    supports: dict[str, list[Annotated]] = {name: [] for name in structures}
    volumes: dict[str, list[Volume]] = {name: [] for name in structures}
    notes: dict[str, list[str]] = {name: [] for name in structures}
    orientation: str | None = None

    def stage(case: str) -> Path | None:
        return None if previous is None else previous / (case + model.dataset.file_ending)

    for case, (files, label) in tqdm(cases.items(), desc="supports", unit="case", disable=not progress):
        read = read_structures(
            model,
            case,
            files,
            label=label,
            values=tuple(structures.values()),
            ignore=ignore,
            orientation=orientation,
            previous=stage(case),
        )
        seeds = [seed + len(there) for there in supports.values()]
        seen = read_supports(model, predictor, read, voxels=voxels, seeds=seeds, labelled=settings.registered)
        for name, volume, support in zip(structures, read, seen, strict=True):
            if isinstance(support, InputError):
                notes[name].append(f"support left out: {support}")
                continue
            orientation = volume.orientation
            supports[name].append(support)
            if settings.head == AdapterHead.key:
                volumes[name].append(volume)
    for name, there in supports.items():
        if not there:
            which = f"{name}: " if len(structures) > 1 else ""
            why = notes[name][0].removeprefix("support left out: ")
            raise InputError(f"{labels}: {which}no support can be used; {why}")
    assert orientation is not None
    queries = []
    if settings.head == AdapterHead.key:
        for case, images_of in others.items():
            query = read_volume(model, case, images_of, orientation=orientation, previous=stage(case))
            queries.append((query, scan_of(model, query, predictor.predict(torch.from_numpy(query.image)).base)))
    registrar = Registrar(registrations)
    tasks = []
    for name, there in supports.items():
        adapted = None
        if settings.head == AdapterHead.key:
            own = [support.support for support in there]
            adapted = adapt(model, predictor, volumes[name], own, queries, settings, progress=progress)
        tasks.append(fit_task(name, model, orientation, there, settings, inside, adapted, registrar))
        tasks[-1].report["notes"][:0] = notes[name]
        tasks[-1].report["value"] = structures[name]
    write_tasks(file, tasks)
    return tasks


def fit_task(
    name: str,
    model: BaseModel,
    orientation: str,
    supports: Sequence[Annotated],
    settings: Settings,
    inside: Sequence[int] | None = None,
    adapted: tuple[Sequence[Support], Sequence[Head]] | None = None,
    registrar: Registrar | None = None,
) -> Task:
    """Fit a task to supports that were read; arguments as ``fit_folder``, and what ``adapt`` gives."""
    notes = [note for support in supports for note in support.notes]
    slices = min(_slices(support.support.scan, settings.axis) for support in supports)
    if settings.chunks > slices:
        notes.append(f"{settings.chunks} chunks for {slices} slices: reduced to {slices}")
        settings = replace(settings, chunks=slices)
    seen = [support.support for support in supports]
    fitted = fit_structure(seen if adapted is None else adapted[0], settings, registrar)
    if adapted is not None:
        fitted = replace(fitted, heads=list(adapted[1]))
    if fitted.prior is None:
        notes.append("the structure reaches the border of the image in every support: nothing is known of its size")
    if len(supports) == 1:
        notes.append("one support: there is no other volume to calibrate on; the probabilities are the head's own")
    elif settings.calibrate and not fitted.calibrated:
        notes.append(
            "the supports predict each other too poorly to calibrate on: the probabilities are the head's own; compare "
            "their label maps"
        )
    if settings.extent == "aligned" and not fitted.frame.landmarks:
        notes.append("the base model predicts no class to align volumes by: the ends of the volumes are used")
    notes += _disagreements([support.case for support in supports], fitted.left_out)
    containing, told = nested(model, [support.overlaps for support in supports], inside)
    return Task(
        name=name,
        model=model.fingerprint(),
        orientation=orientation,
        folds=model.folds,
        structure=thinned(fitted),
        inside=containing,
        background=Background.of([support.even for support in seen]),
        report={
            "supports": [
                {
                    "case": support.case,
                    MEASURES[support.unit]: support.support.structure_mm3,
                    "cut": support.support.cut,
                    "voxels": len(support.support.index),
                    "landmarks": sorted(int(c) for c in support.support.scan.landmarks),
                }
                for support in supports
            ],
            "notes": notes + told,
            "software": installed_versions(_PACKAGES),
        },
    )


def task_file(output: Path, *names: str) -> Path:
    """Where tasks are written: ``output``, or NAME.fewshot in it if it is a folder, of several names joined by ``+``.

    Raises:
        UsageError: a name or a place that cannot be used.
    """
    for name in names:
        if not valid_name(name):
            raise UsageError(f"{name!r} cannot name a structure")
    if output.is_dir():
        return output / ("+".join(names) + ENDING)
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a folder")
    return output if output.suffix == ENDING else output.with_name(output.name + ENDING)


def _slices(scan: Scan, axis: int) -> int:
    return next(size for size, (patient, _) in zip(scan.base.shape, scan.axes, strict=True) if patient == axis)


def nested(
    model: BaseModel, overlaps: Sequence[Mapping[int, tuple[float, float]]], inside: Sequence[int] | None
) -> tuple[tuple[int, ...], list[str]]:
    """Base labels that the structure may override, and what is to be said of base classes it overlaps."""
    found, notes = [], []
    for c in sorted({c for overlap in overlaps for c in overlap}):
        share, dice = np.mean([overlap.get(c, (0.0, 0.0)) for overlap in overlaps], axis=0)
        named = f"{model.dataset.names[str(c)]} ({c})"
        if dice > _SAME:
            notes.append(
                f"the base model predicts the structure as {named}, Dice {dice:.2f}: it may be that class already; "
                "use it as it is, or train on corrected labels"
            )
        elif share > _MOSTLY and inside is None:
            found.append(c)
            notes.append(f"{share:.0%} of the structure lies in {named} and will override it; else pass --inside")
    return (tuple(found) if inside is None else tuple(sorted(set(inside)))), notes


def _disagreements(cases: Sequence[str], dice: Sequence[float]) -> list[str]:
    """What left-out supports say of each other."""
    if not dice:
        return []
    typical = float(np.median(dice))
    if typical < _POOR:
        return [
            f"the supports predict each other poorly, median Dice {typical:.2f}: compare their label maps, or annotate "
            "more volumes"
        ]
    return [
        f"{case}: the other supports predict it with Dice {value:.2f}, the median is {typical:.2f}: check its label map"
        for case, value in zip(cases, dice, strict=True)
        if value < _ODD * typical
    ]


def describe(task: Task) -> dict[str, Any]:
    """What a user is told of a fitted task; JSON."""
    fitted = task.structure
    return {
        "name": task.name,
        "head": fitted.settings.head,
        "chunks": fitted.settings.chunks,
        "extent": fitted.settings.extent,
        "left_out_dice": dict(zip((row["case"] for row in task.report["supports"]), fitted.left_out, strict=False)),
        "calibration": {"slope": fitted.calibration.slope, "bias": fitted.calibration.bias},
        "expected_volume_mm3": None if fitted.prior is None else fitted.prior.volume,
        **task.report,
    }
