"""Use a calibrator: on a case in memory, on some voxels of a case, on a folder of predictions."""

import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import Dataset, find_model_file, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json
from nnunet_calib.data.images import choose_reader, read_labels
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact, write_npz
from nnunet_calib.posthoc import load_calibrator
from nnunet_calib.posthoc.base import FILE_NAME, Calibrator, log_probabilities
from nnunet_calib.posthoc.model import check_same_model, identify
from nnunet_calib.posthoc.sample import decide, open_probabilities

_SLAB = 1 << 18  # voxels calibrated at once
_TILE = 64  # voxels along each side, for methods that look around
_COMPACT = ".nncp"


def calibrate_case(calibrator: Calibrator, probabilities: np.ndarray) -> np.ndarray:
    """Calibrate all probabilities of a case, in parts, so that little more memory is needed than for the result.

    Args:
        calibrator: fitted.
        probabilities: float (C, z, y, x), values in [0, 1].

    Returns:
        The same shape and type.

    Raises:
        ValueError: another number of channels than the calibrator was fitted to.
    """
    calibrated = np.empty_like(probabilities)
    for outer, inner, target in _tiles(probabilities.shape[1:], calibrator.margin):
        box, within, place = ((slice(None), *sides) for sides in (outer, inner, target))
        logits = log_probabilities(probabilities[box], multilabel=calibrator.multilabel)
        calibrated[place] = calibrator.apply(logits)[within]
    return calibrated


def probabilities_at(calibrator: Calibrator, files: CaseFiles, index: np.ndarray) -> np.ndarray:
    """Calibrated probabilities float64 (C, n) of some voxels of a case, given by their index in the flat volume.

    Raises:
        InputError: the file of probabilities cannot be used.
    """
    if files.probabilities is None:
        raise InputError(f"{files.prediction}: no probabilities beside it")
    whole = calibrate_case(calibrator, _read(ProbabilityFile(files.probabilities)))
    return whole.reshape(len(whole), -1)[:, index].astype(np.float64)


def apply_folder(
    calibrator_file: str | Path,
    predictions: str | Path,
    output: str | Path,
    dataset_json: str | Path | None = None,
    *,
    model: str | Path | None = None,
    any_model: bool = False,
) -> dict[str, Any]:
    """Write calibrated probabilities of every case of a folder, and its segmentation.

    Probabilities keep their type and their format, compact or ``.npz``. Where the method keeps labels the segmentation
    is copied; elsewhere it changes where the decision of the probabilities changes.

    Args:
        calibrator_file: from ``fit_folder``.
        predictions: label maps and probabilities.
        output: another folder; made if needed. Every file is written whole or not at all.
        dataset_json: found in or near the predictions if None.
        model: folder of the trained model the predictions come from, where it should be checked against the
            calibrator's; the predictions' own folder seldom says more than the plans.
        any_model: do not compare models.

    Returns:
        ``method``, ``keeps_labels`` and ``cases``: by name, ``voxels`` and ``changed`` (voxels with another label).

    Raises:
        UsageError: folders that make no sense.
        InputError: files that cannot be used, or a calibrator of another model.
    """
    file, predictions, output = Path(calibrator_file), Path(predictions), Path(output)
    file = file / FILE_NAME if file.is_dir() else file
    if not predictions.is_dir():
        raise UsageError(f"{predictions} is not a folder")
    if output.resolve() == predictions.resolve():
        raise UsageError(f"{output} holds the predictions themselves; name another folder for the calibrated ones")
    calibrator = load_calibrator(file)
    found = Path(dataset_json) if dataset_json else require_dataset_json(predictions, predictions)
    plans = find_model_file("plans.json", predictions)
    dataset = read_dataset(found, plans)
    if calibrator.multilabel != dataset.has_regions or calibrator.channels != len(dataset.channels):
        raise InputError(f"{file}: fitted to {calibrator.channels} {_kind(calibrator.multilabel)}, but {found} has "
                         f"{len(dataset.channels)} {_kind(dataset.has_regions)}")  # fmt: skip
    if not any_model:
        given = Path(model) if model else predictions
        check_same_model(read_json(file).get("model") or {}, identify(given, dataset), file, given)
    pairs = pair_cases(predictions, predictions, dataset.file_ending)
    if not (cases := [case for case in pairs if case.probabilities]):
        raise InputError(f"{predictions}: no probabilities beside the predictions; predict with --save_probabilities")
    reader = choose_reader(dataset, [case.prediction for case in cases])
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made a folder for the results ({error.strerror})") from error
    done = {}
    for case in tqdm(cases, desc="calibrate", unit="case"):
        done[case.name] = _apply_case(calibrator, case, dataset, reader, output)
    for name, source in (("dataset.json", found), ("plans.json", plans)):
        if source is not None:
            _copy(source, output / name)
    return {"method": calibrator.key, "keeps_labels": calibrator.keeps_labels, "cases": done}


def _apply_case(
    calibrator: Calibrator, files: CaseFiles, dataset: Dataset, reader: type[BaseReaderWriter], output: Path
) -> dict[str, int]:
    prediction = read_labels(files.prediction, reader, dataset.labels)
    stored = open_probabilities(files, dataset, prediction)
    probabilities = _read(stored)
    before = decide(probabilities, dataset)
    calibrated = calibrate_case(calibrator, probabilities)
    del probabilities
    changed = decide(calibrated, dataset) != before
    if calibrator.keeps_labels:
        _check_kept(calibrated, before, changed, dataset, stored.path)
        _copy(files.prediction, output / files.prediction.name)
        changes = 0
    else:
        labels = np.where(changed, decide(calibrated, dataset), prediction.labels)
        _write_labels(labels, files.prediction, output / files.prediction.name, reader)
        changes = int(np.count_nonzero(changed))
    compact = stored.path.name.endswith(_COMPACT)
    write = write_compact if compact else write_npz
    write(output / (files.name + (_COMPACT if compact else ".npz")), calibrated, calibrated.shape, calibrated.dtype)
    return {"voxels": int(changed.size), "changed": changes}


def _check_kept(p: np.ndarray, before: np.ndarray, changed: np.ndarray, dataset: Dataset, path: Path) -> None:
    """A method that keeps labels may at most round two probabilities to the same number.

    Raises:
        InputError: it did not keep them.
    """
    p, before = p[:, changed].astype(np.float64), before[changed]
    rounding = 4 * float(np.finfo(p.dtype).eps)
    if dataset.has_regions:
        kept = (np.abs(p - 0.5).min(axis=0) <= rounding).all()
    else:
        own = p[np.searchsorted(dataset.labels, before), np.arange(before.size)]
        kept = (own >= p.max(axis=0) - rounding).all()
    if not kept:
        raise InputError(f"{path}: the calibrator changed labels that it must keep; fit it again")


def _read(stored: ProbabilityFile) -> np.ndarray:
    whole = np.empty(stored.shape, dtype=stored.dtype)
    for c, channel in enumerate(stored.channels()):
        whole[c] = channel
    return whole


def _tiles(shape: tuple[int, ...], margin: int) -> Iterator[tuple[tuple[slice, ...], ...]]:
    """Boxes that cover a volume: with their margin, the box within that, and where it lies in the volume."""
    size = (_TILE,) * 3 if margin else (max(1, _SLAB // math.prod(shape[1:])), *shape[1:])
    for corner in itertools.product(*(range(0, length, step) for length, step in zip(shape, size, strict=True))):
        sides = [(a, min(a + step, length), length) for a, step, length in zip(corner, size, shape, strict=True)]
        yield (
            tuple(slice(max(0, a - margin), min(length, b + margin)) for a, b, length in sides),
            tuple(slice(min(a, margin), min(a, margin) + b - a) for a, b, _ in sides),
            tuple(slice(a, b) for a, b, _ in sides),
        )


def _copy(source: Path, target: Path) -> None:
    """Copy a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        shutil.copyfile(source, temporary)
        shutil.copymode(source, temporary)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_labels(labels: np.ndarray, like: Path, target: Path, reader: type[BaseReaderWriter]) -> None:
    """Write a label map where another lies in space, whole or not at all."""
    _, properties = reader().read_seg(str(like))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        temporary = os.path.join(folder, target.name)  # readers go by the ending
        reader().write_seg(labels, temporary, properties)
        os.replace(temporary, target)


def _kind(multilabel: bool) -> str:
    return "regions" if multilabel else "classes"
