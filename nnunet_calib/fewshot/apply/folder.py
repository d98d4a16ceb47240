"""Use tasks: nnU-Net's prediction of a folder, and every novel structure in it, from one pass of the network.

What is known of a query is its image. Labels of queries have no place here.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_calib.data.errors import UsageError
from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.apply.files import make_folders, report_of, write_case
from nnunet_calib.fewshot.apply.query import Structures, find_structures
from nnunet_calib.fewshot.network.base_model import CHECKPOINT, BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.task.file import Task
from nnunet_calib.fewshot.volume.files import Volume, find_images, read_volume

REPORT_ENDING = ".fewshot.json"


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
    model.check_previous_stage(previous)
    structures = _structures(model, loaded, files)
    orientation = _orientation(loaded, files)
    cases = find_images(images, model.dataset.file_ending)
    if output.resolve() == images.resolve():
        raise UsageError(f"{output} holds the images; name another folder for the results")
    make_folders(output, model, structures, merge)
    if not overwrite:
        cases = {case: paths for case, paths in cases.items() if not (output / (case + REPORT_ENDING)).is_file()}
    predictor = FeaturePredictor(model, device, step_size=step_size, mirroring=mirroring)

    def read(case: str) -> Volume:
        stage = None if previous is None else previous / (case + model.dataset.file_ending)
        return read_volume(model, case, cases[case], orientation=orientation, previous=stage)

    def segment(volume: Volume) -> dict[str, Any]:
        begin = time.perf_counter()
        logits, found = find_structures(model, predictor, volume, structures, seed)
        voxels = write_case(model, volume, logits, structures, found, output, merge, probabilities)
        report = report_of(volume, structures, found, voxels) | {"seconds": round(time.perf_counter() - begin, 3)}
        write_whole(output / (volume.case + REPORT_ENDING), json.dumps(report, indent=1, allow_nan=False) + "\n")
        return report

    volumes = _ahead(read, list(cases), readers)
    return [segment(volume) for volume in tqdm(volumes, "cases", len(cases), unit="case", disable=not progress)]


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


def _ahead(read: Callable[[str], Volume], cases: Sequence[str], readers: int) -> Iterator[Volume]:
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
