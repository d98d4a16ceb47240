"""Use tasks: nnU-Net's prediction of a folder, and every novel structure in it, from one pass of the network.

What is known of a query is its image. Labels of queries have no place here.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_calib.data.cases import find_images
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_hidden, read_json, write_whole
from nnunet_calib.data.model import CHECKPOINT, file_sha256
from nnunet_calib.fewshot.apply.files import AXES, REPORT_ENDING, make_folders, remove_case, report_of, write_case
from nnunet_calib.fewshot.apply.query import Structures, find_structures
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.task.file import Task, read_tasks
from nnunet_calib.fewshot.volume.files import Volume, read_volume
from nnunet_calib.fewshot.volume.registrar import Registrar

MADE_FROM = "made_from.json"
"""What all cases of a folder were made from."""

_SHOWN = 0.75
"""Share of a query's extent along an axis that supports should show: less is told. Images differ by some air around."""


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
    registrations: Path | None = None,
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
        registrations: folder where registrations are kept for other runs; None: they are not.
        overwrite: else cases with a report of the same images are left as they are.
        progress: show a bar.
        seed: of sampled voxels.

    Returns:
        The reports of the cases; of one whose files cannot be used ``case`` and ``error``, a line, and no file.

    Raises:
        UsageError: options or folders that make no sense; an output that holds other cases made with other tasks,
            options or another order of tasks, or anything to be continued that was.
        InputError: tasks that cannot be used, or of another model.
    """
    images, output = Path(images), Path(output)
    together = [(file, task) for file in task_files([Path(task) for task in tasks]) for task in read_tasks(file)]
    files, loaded = [file for file, _ in together], [task for _, task in together]
    model = BaseModel(model_folder, _folds(loaded, folds), checkpoint)
    model.check_previous_stage(previous)
    structures = _structures(model, loaded, files)
    orientation = _orientation(loaded, files)
    cases = find_images(images, model.dataset.file_ending)
    if output.resolve() == images.resolve():
        raise UsageError(f"{output} holds the images; name another folder for the results")
    made_from = {
        "model": model.fingerprint() | {"folds": list(model.folds)},
        "tasks": [{"name": task.name, "sha256": file_sha256(file)} for file, task in zip(files, loaded, strict=True)],
        "options": {
            "merge": merge,
            "probabilities": probabilities,
            "step_size": step_size,
            "mirroring": mirroring,
            "previous": None if previous is None else str(previous.resolve()),
            "seed": seed,
        },
    }
    _check_same_results(output, made_from, cases if overwrite else ())
    make_folders(output, model, structures, merge)
    write_whole(output / MADE_FROM, json.dumps(made_from, indent=1) + "\n")
    if not overwrite:
        cases = {case: paths for case, paths in cases.items() if not _is_done(output, case, paths)}
    predictor = FeaturePredictor(model, device, step_size=step_size, mirroring=mirroring)
    registrar = Registrar(registrations)

    def read(case: str) -> Volume | InputError:
        stage = None if previous is None else previous / (case + model.dataset.file_ending)
        try:
            return read_volume(model, case, cases[case], orientation=orientation, previous=stage)
        except InputError as error:  # of one case; the others are done
            return error

    def segment(case: str, volume: Volume | InputError) -> dict[str, Any]:
        if isinstance(volume, InputError):
            remove_case(output, case, model.dataset.file_ending, [task.name for task in structures.tasks])
            return {"case": case, "error": str(volume)}
        begin = time.perf_counter()
        images_of = _checksums(cases[case])
        logits, found = find_structures(model, predictor, volume, structures, seed, registrar)
        voxels = write_case(model, volume, logits, structures, found, output, merge, probabilities)
        report = report_of(volume, structures, found, voxels)
        report |= {"images": images_of, "seconds": round(time.perf_counter() - begin, 3)}
        write_whole(output / (volume.case + REPORT_ENDING), json.dumps(report, indent=1, allow_nan=False) + "\n")
        return report

    volumes = _ahead(read, list(cases), readers)
    bar = tqdm(zip(cases, volumes, strict=True), "cases", len(cases), unit="case", disable=not progress)
    return [segment(case, volume) for case, volume in bar]


def wider_views(reports: Sequence[Mapping[str, Any]]) -> str | None:
    """A line where queries show much more of the body than the supports do, for there nothing is found; else None.

    Args:
        reports: of ``apply_folder``.
    """
    told = []
    for axis in AXES:
        shown = {
            report["case"]: min(found["shown_by_supports"][axis] for found in report["structures"].values())
            for report in reports
            if "error" not in report
        }
        if wider := [case for case in shown if shown[case] < _SHOWN]:
            worst = min(wider, key=shown.__getitem__)
            told.append(f"{len(wider)} of {len(shown)} {axis} (of {worst} they show {shown[worst]:.0%})")
    if not told:
        return None
    return (
        f"cases show much more of the body than the supports: {', '.join(told)}; what no support shows is not found. "
        "Annotate volumes that show all of it, or crop the images"
    )


def _check_same_results(output: Path, made_from: Mapping[str, Any], replaced: Collection[str]) -> None:
    """Refuse a folder with cases of other tasks, options or another model beside which these would lie.

    Args:
        output: the folder.
        made_from: what all cases of this run are made from.
        replaced: cases that this run makes anew.

    Raises:
        UsageError: as said.
    """
    reports = (file for file in output.glob("*" + REPORT_ENDING) if not is_hidden(file))
    kept = {file.name.removesuffix(REPORT_ENDING) for file in reports} - set(replaced)
    if not kept:
        return
    try:
        there = read_json(output / MADE_FROM)
    except InputError:
        there = {}
    different = next((name for name in made_from if there.get(name) != made_from[name]), None)
    if different is not None:
        shown = {"model": "another model", "tasks": "other tasks, or in another order", "options": "other options"}
        why = shown[different] if there else "another version of nnunet-calib"
        raise UsageError(
            f"{output} holds {sorted(kept)[0]}, made with {why}: its labels mean something else; name another folder"
        )


def _is_done(output: Path, case: str, images: Sequence[Path]) -> bool:
    """Whether a case has a report, of these images."""
    try:
        return read_json(output / (case + REPORT_ENDING)).get("images") == _checksums(images)
    except (InputError, OSError):
        return False


def _checksums(images: Sequence[Path]) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in images}


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


def task_files(paths: Sequence[Path]) -> list[Path]:
    """Task files, and those in folders.

    Raises:
        UsageError: none.
    """
    files: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.glob("*.fewshot") if not is_hidden(file))
        if not inside:
            raise UsageError(f"{path}: no task file in it; fewshot fit writes NAME.fewshot")
        files += inside
    if not files:
        raise UsageError("no task is named")
    return files


def _ahead(
    read: Callable[[str], Volume | InputError], cases: Sequence[str], readers: int
) -> Iterator[Volume | InputError]:
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
