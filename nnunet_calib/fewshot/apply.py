"""Use tasks: nnU-Net's prediction of a folder, and every novel structure in it, from one pass of the network.

What is known of a query is its image. Labels of queries have no place here.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor
from tqdm import tqdm

from nnunet_calib.data.errors import UsageError
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.probabilities import write_npz
from nnunet_calib.data.software import installed_versions
from nnunet_calib.fewshot.fit import scan_of
from nnunet_calib.fewshot.heads import AdapterHead, Head
from nnunet_calib.fewshot.merge import merge_labels, merge_probabilities
from nnunet_calib.fewshot.method import FittedStructure, NovelMap, Scan, apply_structure, refine_on_query
from nnunet_calib.fewshot.model import CHECKPOINT, BaseModel
from nnunet_calib.fewshot.predictor import FeaturePredictor
from nnunet_calib.fewshot.shift import VOXELS
from nnunet_calib.fewshot.task import Task
from nnunet_calib.fewshot.volumes import (
    Volume,
    find_images,
    read_volume,
    to_image_grid,
    turn_back,
    write_segmentation,
)

REPORT_ENDING = ".fewshot.json"
_OUTSIDE = -40.0  # log odds outside the box that nnU-Net crops to
_ROWS = 1 << 22  # logits at once
_PACKAGES = ("nnunet-calib", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class Structures:
    """Tasks to be applied together.

    Attributes:
        tasks: fitted to the model.
        fitted: of each, the heads of the folds in use.
        values: label of each in a merged segmentation.
    """

    tasks: tuple[Task, ...]
    fitted: tuple[FittedStructure, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A structure in a query.

    Attributes:
        novel: log odds and decisions on the network's grid.
        distance: of the query's features from the supports'.
        landmarks: base classes that the query was aligned by.
        in_view: share of the structure that the field of view can hold.
    """

    novel: NovelMap
    distance: float
    landmarks: int
    in_view: float


def apply_folder(
    model_folder: str | Path,
    tasks: Sequence[str | Path],
    images: str | Path,
    output: str | Path,
    *,
    merge: bool = True,
    probabilities: bool = False,
    folds: Sequence[str | int] | None = None,
    checkpoint: str = CHECKPOINT,
    device: str = "cpu",
    step_size: float = 0.5,
    mirroring: bool = True,
    previous: Path | None = None,
    readers: int = 1,
    overwrite: bool = True,
    progress: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Segment a folder of images.

    Args:
        model_folder: of the base model.
        tasks: task files, or folders of them.
        images: in nnU-Net's raw layout.
        output: another folder; made if needed. ``CASE.nii.gz`` holds base classes and structures together or, without
            ``merge``, the base classes as ``nnUNetv2_predict`` writes them, and ``NAME/CASE.nii.gz`` each structure.
            ``CASE.fewshot.json`` is the report of a case.
        merge: as said.
        probabilities: write ``.npz`` files as nnU-Net does.
        folds: of the base model; those of the tasks if None.
        checkpoint: its name in each fold.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window.
        mirroring: test-time augmentation of the base classes.
        previous: of a cascade, the folder of the previous stage's segmentations.
        readers: cases read ahead.
        overwrite: else cases with a report are left as they are.
        progress: show a bar.
        seed: of sampled voxels.

    Returns:
        The reports of the cases.

    Raises:
        UsageError: options or folders that make no sense.
        InputError: files that cannot be used, or a task of another model.
    """
    images, output = Path(images), Path(output)
    files = _task_files([Path(task) for task in tasks])
    loaded = [Task.load(file) for file in files]
    model = BaseModel(model_folder, _folds(loaded, folds), checkpoint)
    structures = _structures(model, loaded, files)
    orientation = _orientation(loaded, files)
    cases = find_images(images, model.dataset.file_ending)
    if output.resolve() == images.resolve():
        raise UsageError(f"{output} holds the images; name another folder for the results")
    _make_folders(output, model, structures, merge)
    if not overwrite:
        cases = {case: paths for case, paths in cases.items() if not (output / (case + REPORT_ENDING)).is_file()}
    predictor = FeaturePredictor(model, device, step_size=step_size, mirroring=mirroring)

    def read(case: str) -> Volume:
        stage = None if previous is None else previous / (case + model.dataset.file_ending)
        return read_volume(model, case, cases[case], orientation=orientation, previous=stage)

    reports = []
    volumes = tqdm(
        _ahead(read, list(cases), readers), total=len(cases), desc="cases", unit="case", disable=not progress
    )
    for volume in volumes:
        begin = time.perf_counter()
        logits, found = find_structures(model, predictor, volume, structures, seed)
        told = _write_case(model, volume, logits, structures, found, output, merge, probabilities)
        report = _report(volume, structures, found, told) | {"seconds": round(time.perf_counter() - begin, 3)}
        write_whole(output / (volume.case + REPORT_ENDING), json.dumps(report, indent=1, allow_nan=False) + "\n")
        reports.append(report)
    return reports


def find_structures(
    model: BaseModel, predictor: FeaturePredictor, volume: Volume, structures: Structures, seed: int = 0
) -> tuple[Tensor, list[Found]]:
    """The base model's logits (C, *S) of a query, and every structure in it.

    One pass of the network, whatever the number of tasks; two plain passes more for each task that is refined on the
    query, one for each with adapters.
    """
    image = torch.from_numpy(volume.image)
    generator = np.random.default_rng(seed)
    some = torch.from_numpy(np.stack([generator.integers(0, size, VOXELS) for size in volume.shape], axis=1))
    plain = [fitted for fitted in structures.fitted if _in_one_pass(fitted)]
    seen = predictor.predict(image, _projections([fitted.heads for fitted in plain], predictor.folds), some)
    scan = scan_of(model, volume, seen.base)
    rows = iter(_rows(seen.projected, [fitted.heads for fitted in plain]))
    found = []
    for task, fitted in zip(structures.tasks, structures.fitted, strict=True):
        if fitted.settings.head == AdapterHead.key:
            heads, projected = fitted.heads, predictor.project_adapted(image, [head.state() for head in fitted.heads])
        elif fitted.settings.objective is None:
            heads, projected = fitted.heads, next(rows)
        else:
            heads = refine_on_query(
                fitted, scan, partial(_sampled, predictor, image), fitted.settings.objective, seed=seed
            )
            projected = predictor.project(image, [head.projections for head in heads])
        novel = apply_structure(fitted, scan, projected, heads)
        found.append(_found(task, fitted, scan, novel, seen.sampled[0]))
    return seen.base, found


def _in_one_pass(fitted: FittedStructure) -> bool:
    """All that is wanted of the query is projections, known before it is looked at."""
    return fitted.settings.objective is None and fitted.settings.head != AdapterHead.key


def _sampled(predictor: FeaturePredictor, image: Tensor, index: np.ndarray) -> list[Tensor]:
    return predictor.features_at(image, torch.from_numpy(np.stack(np.unravel_index(index, image.shape[1:]), axis=1)))


def _found(task: Task, fitted: FittedStructure, scan: Scan, novel: NovelMap, features: Tensor) -> Found:
    alignment = fitted.frame.align(scan.size, scan.landmarks)
    low, high = (fitted.frame.position(alignment(end)) for end in (np.zeros(3), scan.size))
    return Found(
        novel,
        task.background.distance(features),
        int(alignment.landmarks[fitted.settings.axis]),
        fitted.places.share_inside(low, high),
    )


def _projections(heads: Sequence[Sequence[Head]], folds: int) -> list[Tensor] | None:
    """W of each fold: the rows of all tasks, one below the other."""
    if not heads:
        return None
    return [torch.cat([of_folds[fold].projections for of_folds in heads]) for fold in range(folds)]


def _rows(projected: Sequence[Tensor], heads: Sequence[Sequence[Head]]) -> Iterator[list[Tensor]]:
    """Of each task its projections of every fold."""
    first = [0] * len(projected)
    for of_folds in heads:
        counts = [len(head.projections) for head in of_folds]
        yield [maps[a : a + n] for maps, a, n in zip(projected, first, counts, strict=True)]
        first = [a + n for a, n in zip(first, counts, strict=True)]


def _write_case(
    model: BaseModel,
    volume: Volume,
    logits: Tensor,
    structures: Structures,
    found: Sequence[Found],
    output: Path,
    merge: bool,
    probabilities: bool,
) -> list[int]:
    """Write label maps and probabilities; returns the voxels of each structure in the image."""
    base = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy(),
        model.plans_manager,
        model.configuration_manager,
        model.label_manager,
        volume.properties,
        return_probabilities=probabilities,
    )
    segmentation, base_probabilities = base if probabilities else (base, None)
    segmentation = turn_back(volume, segmentation[None])[0]
    if base_probabilities is not None:
        base_probabilities = turn_back(volume, base_probabilities)
    calibrated = np.stack(
        [
            fitted.calibration.slope * one.novel.logit + fitted.calibration.bias
            for fitted, one in zip(structures.fitted, found, strict=True)
        ]
    )
    novel = to_image_grid(model, volume, calibrated, _OUTSIDE)
    del calibrated
    novel = torch.from_numpy(novel).sigmoid_().numpy()
    thresholds = [one.novel.threshold for one in found]
    present = [not one.novel.absent for one in found]
    ending = model.dataset.file_ending
    if merge:
        confidence = to_image_grid(model, volume, _confidence(model, logits)[None], 1.0)[0]
        merged = _merged(segmentation, confidence, novel, structures, thresholds, present)
        write_segmentation(model, volume, merged, output / (volume.case + ending))
        if base_probabilities is not None:
            both = merge_probabilities(base_probabilities, novel, regions=model.dataset.has_regions)
            _write_probabilities(output / volume.case, both, volume)
        return [int(np.count_nonzero(merged == value)) for value in structures.values]
    write_segmentation(model, volume, segmentation, output / (volume.case + ending))
    if base_probabilities is not None:
        _write_probabilities(output / volume.case, base_probabilities, volume)
    voxels = []
    for task, p, threshold, there in zip(structures.tasks, novel, thresholds, present, strict=True):
        mask = ((p > threshold) & there).astype(np.uint8)
        write_segmentation(model, volume, mask, output / task.name / (volume.case + ending))
        if probabilities:
            _write_probabilities(output / task.name / volume.case, np.stack([1 - p, p]), volume)
        voxels.append(int(np.count_nonzero(mask)))
    return voxels


def _merged(
    base: np.ndarray,
    confidence: np.ndarray,
    novel: np.ndarray,
    structures: Structures,
    thresholds: Sequence[float],
    present: Sequence[bool],
) -> np.ndarray:
    """Labels (z, y, x) of base classes and structures; only voxels that a structure claims are looked at."""
    merged = base.astype(np.promote_types(base.dtype, np.min_scalar_type(max(structures.values))))
    claimed = np.zeros(base.shape, dtype=bool)
    for p, threshold, there in zip(novel, thresholds, present, strict=True):
        if there:
            claimed |= p > threshold
    here = [np.where(there, p[claimed], 0) for p, there in zip(novel, present, strict=True)]
    merged[claimed] = merge_labels(
        base[claimed],
        confidence[claimed],
        np.stack(here),
        structures.values,
        thresholds,
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


def _report(volume: Volume, structures: Structures, found: Sequence[Found], voxels: Sequence[int]) -> dict[str, Any]:
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


def _structures(model: BaseModel, tasks: Sequence[Task], files: Sequence[Path]) -> Structures:
    names = [task.name for task in tasks]
    for file, task in zip(files, tasks, strict=True):
        task.check(model, file)
        if names.count(task.name) > 1:
            raise UsageError(f"{file}: two tasks for {task.name!r}; name one")
    first = max(model.dataset.labels) + 1
    return Structures(
        tuple(tasks), tuple(task.of_folds(model.folds) for task in tasks), tuple(range(first, first + len(tasks)))
    )


def _orientation(tasks: Sequence[Task], files: Sequence[Path]) -> str:
    for file, task in zip(files, tasks, strict=True):
        if task.orientation != tasks[0].orientation:
            raise UsageError(
                f"{file}: its supports lie {task.orientation}, those of {files[0]} {tasks[0].orientation}; "
                "apply these tasks one after the other"
            )
    return tasks[0].orientation


def _folds(tasks: Sequence[Task], folds: Sequence[str | int] | None) -> Sequence[str | int]:
    if folds is not None:
        return folds
    return [fold for fold in tasks[0].folds if all(fold in task.folds for task in tasks)] or list(tasks[0].folds)


def _task_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.fewshot")) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: no task file in it; fewshot fit writes NAME.fewshot")
        files += inside
    if not files:
        raise UsageError("no task is named")
    return files


def _make_folders(output: Path, model: BaseModel, structures: Structures, merge: bool) -> None:
    """The folders of the results, with ``dataset.json`` and ``plans.json`` as nnU-Net leaves them."""
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


def _ahead(read: Any, cases: Sequence[str], readers: int) -> Iterator[Volume]:
    """Volumes in order; up to ``readers`` are read while others are predicted."""
    if readers < 1:
        yield from map(read, cases)
        return
    with ThreadPoolExecutor(readers) as pool:
        waiting = []
        for case in cases:
            waiting.append(pool.submit(read, case))
            if len(waiting) > readers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
