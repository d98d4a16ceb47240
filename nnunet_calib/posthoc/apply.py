"""Use a calibrator: on a case in memory, on some voxels of a case, on a folder of predictions."""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from numpy.typing import DTypeLike
from tqdm import tqdm

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import Dataset, find_model_file, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json
from nnunet_calib.data.images import choose_reader, read_labels
from nnunet_calib.data.model import check_same_model, identify
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact, write_npz
from nnunet_calib.posthoc import load_calibrator
from nnunet_calib.posthoc.base import Calibrator, file_of
from nnunet_calib.posthoc.sample import decide, open_probabilities

_SLAB = 1 << 18  # probabilities calibrated at once: all that is made of them stays in the processor's cache
_ROW = 1 << 15  # voxels at once, at most: what torch does to more it spreads over threads, which wait for each other
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
    calibrated = np.empty(probabilities.shape, probabilities.dtype)
    source, target = _taken_apart(calibrator, probabilities), _taken_apart(calibrator, calibrated)
    for place, _, part in _calibrated_parts(calibrator, source):
        _put(part, target, place)
    return calibrated


def probabilities_at(calibrator: Calibrator, files: CaseFiles, index: np.ndarray) -> np.ndarray:
    """Calibrated probabilities float64 (C, n) of some voxels of a case, given by their index in the flat volume.

    Raises:
        InputError: the file of probabilities cannot be used.
    """
    if files.probabilities is None:
        raise InputError(f"{files.prediction}: no probabilities beside it")
    whole = calibrate_case(calibrator, np.stack(list(ProbabilityFile(files.probabilities).channels())))
    return whole.reshape(len(whole), -1)[:, index].astype(np.float64)


@dataclass(frozen=True)
class Calibration:
    """A calibrator and the data set it is used on; what ``evaluate_folder`` takes.

    Attributes:
        calibrator: fitted to the classes or regions of the data set.
        dataset: labels of the probabilities.
    """

    calibrator: Calibrator
    dataset: Dataset

    def __call__(self, stored: ProbabilityFile) -> Iterator[np.ndarray]:
        """Calibrated channels (z, y, x) of a file, with the numbers that ``apply_folder`` would write."""
        return iter(calibrate_file(self.calibrator, stored, self.dataset))

    def describe(self) -> dict[str, str]:
        """``method``, and ``sha256`` of all its parameters."""
        content = json.dumps(self.calibrator.state(), sort_keys=True)
        return {"method": self.calibrator.key, "sha256": hashlib.sha256(content.encode()).hexdigest()}


def open_calibration(
    calibrator_file: str | Path,
    predictions: str | Path,
    dataset_json: str | Path,
    plans: str | Path | None = None,
    *,
    model: str | Path | None = None,
    any_model: bool = False,
) -> Calibration:
    """Read a calibrator to be used on a folder.

    Args:
        calibrator_file: from ``fit_folder``.
        predictions: the folder.
        dataset_json: of the folder.
        plans: of the folder, if any.
        model: as for ``apply_folder``.
        any_model: as for ``apply_folder``.

    Raises:
        InputError: files that cannot be used, a calibrator of other classes or of another model.
    """
    file, found = file_of(calibrator_file), Path(dataset_json)
    calibrator, dataset = load_calibrator(file), read_dataset(found, Path(plans) if plans else None)
    if calibrator.multilabel != dataset.has_regions or calibrator.channels != len(dataset.channels):
        raise InputError(f"{file}: fitted to {calibrator.channels} {_kind(calibrator.multilabel)}, but {found} has "
                         f"{len(dataset.channels)} {_kind(dataset.has_regions)}")  # fmt: skip
    if not any_model:
        given = Path(model or predictions)
        check_same_model(read_json(file).get("model") or {}, identify(given, dataset), file, given)
    return Calibration(calibrator, dataset)


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
    predictions, output = Path(predictions), Path(output)
    if not predictions.is_dir():
        raise UsageError(f"{predictions} is not a folder")
    if output.resolve() == predictions.resolve():
        raise UsageError(f"{output} holds the predictions themselves; name another folder for the calibrated ones")
    found = Path(dataset_json) if dataset_json else require_dataset_json(predictions, predictions)
    plans = find_model_file("plans.json", predictions)
    calibration = open_calibration(calibrator_file, predictions, found, plans, model=model, any_model=any_model)
    calibrator, dataset = calibration.calibrator, calibration.dataset
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
            _copy_file(source, output / name)
    return {"method": calibrator.key, "keeps_labels": calibrator.keeps_labels, "cases": done}


def _apply_case(
    calibrator: Calibrator, files: CaseFiles, dataset: Dataset, reader: type[BaseReaderWriter], output: Path
) -> dict[str, int]:
    prediction = read_labels(files.prediction, reader, dataset.labels)
    stored = open_probabilities(files, dataset, prediction)
    labels = None if calibrator.keeps_labels else prediction.labels.copy()
    channels = calibrate_file(calibrator, stored, dataset, labels)
    target = output / files.prediction.name
    if labels is None:
        _copy_file(files.prediction, target)
    else:
        _write_labels(labels, files.prediction, target, reader)
    compact = stored.path.name.endswith(_COMPACT)
    write = write_compact if compact else write_npz
    write(output / (files.name + (_COMPACT if compact else ".npz")), channels, stored.shape, stored.dtype)
    changed = 0 if labels is None else int(np.count_nonzero(labels != prediction.labels))
    return {"voxels": int(prediction.labels.size), "changed": changed}


def calibrate_file(
    calibrator: Calibrator, stored: ProbabilityFile, dataset: Dataset, labels: np.ndarray | None = None
) -> list[np.ndarray]:
    """Calibrated probabilities of a file, in its type.

    They take the place of those that were read: no more memory is needed than for the file's content, but for methods
    that look around, which need it twice.

    Args:
        calibrator: fitted to as many channels.
        stored: the file.
        dataset: its labels.
        labels: integer (z, y, x), contiguous; takes on the decision of the calibrated probabilities where it is
            another than that of those in the file.

    Returns:
        Channels (z, y, x).

    Raises:
        InputError: the file is damaged, or a method that must keep labels does not.
    """
    channels = [np.ascontiguousarray(channel) for channel in stored.channels()]
    volume = _taken_apart(calibrator, channels)
    decided = None if labels is None else _taken_apart(calibrator, [labels])[0]
    source = [channel.copy() for channel in volume] if calibrator.margin else volume  # neighbours stay as they were
    for place, before, part in _calibrated_parts(calibrator, source):
        if calibrator.keeps_labels and not _kept(before, part, dataset.has_regions):
            raise InputError(f"{stored.path}: the calibrator changed labels that it must keep; fit it again")
        _put(part, volume, place)
        if decided is not None and not calibrator.keeps_labels:
            after = decide(_picked(volume, place, part.dtype), dataset)
            np.copyto(decided[place], after, where=after != decide(before, dataset), casting="unsafe")
    return channels


def _kept(before: np.ndarray, after: np.ndarray, regions: bool) -> bool:
    """Whether every voxel (C, ...) has the label it had, or one of the same probability but for rounding."""
    rounding = 4 * np.finfo(np.float32).eps
    if regions:
        return not (((before > 0.5) != (after > 0.5)) & (np.abs(after - 0.5) > rounding)).any()
    return not ((before == before.max(axis=0)) & (after < after.max(axis=0) - rounding)).any()


def _taken_apart(calibrator: Calibrator, channels: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The channels, or rows of voxels (n,) where each voxel is calibrated on its own; views."""
    return [channel if calibrator.margin else channel.reshape(-1) for channel in channels]


def _calibrated_parts(
    calibrator: Calibrator, channels: Sequence[np.ndarray]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray, np.ndarray]]:
    """Where a part of the volume lies, its probabilities (C, ...) float32 or float64, and what they become."""
    stored = channels[0].dtype
    working = np.promote_types(stored, np.float32)
    for outer, inner, target in _tiles(len(channels), channels[0].shape, calibrator.margin):
        part = _picked(channels, outer, working)
        within = (slice(None), *inner)
        yield target, part[within], calibrator.calibrate(part, stored)[within]


def _picked(channels: Sequence[np.ndarray], place: tuple[slice, ...], dtype: DTypeLike) -> np.ndarray:
    """A part of all channels (C, ...)."""
    rows = [channel[place] for channel in channels]
    part = np.empty((len(rows), *rows[0].shape), dtype=dtype)
    _copy(rows, list(part))
    return part


def _put(part: np.ndarray, channels: Sequence[np.ndarray], place: tuple[slice, ...]) -> None:
    _copy(list(part), [channel[place] for channel in channels])


def _copy(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> None:
    """Copy arrays into arrays of perhaps another type; numpy converts half precision one value at a time."""
    one, other = sources[0], targets[0].dtype
    if one.dtype != other and np.float16 in (one.dtype, other) and one.flags.writeable:  # torch takes no other
        for source, target in zip(sources, targets, strict=True):
            torch.from_numpy(target).copy_(torch.from_numpy(source))
    else:
        for source, target in zip(sources, targets, strict=True):
            target[...] = source


def _tiles(channels: int, shape: tuple[int, ...], margin: int) -> Iterator[tuple[tuple[slice, ...], ...]]:
    """Boxes that cover a volume: with their margin, the box within that, and where it lies in the volume."""
    size = (_TILE,) * 3 if margin else (min(_ROW, max(1, _SLAB // channels)),)
    for corner in itertools.product(*(range(0, length, step) for length, step in zip(shape, size, strict=True))):
        sides = [(a, min(a + step, length), length) for a, step, length in zip(corner, size, shape, strict=True)]
        yield (
            tuple(slice(max(0, a - margin), min(length, b + margin)) for a, b, length in sides),
            tuple(slice(min(a, margin), min(a, margin) + b - a) for a, b, _ in sides),
            tuple(slice(a, b) for a, b, _ in sides),
        )


def _copy_file(source: Path, target: Path) -> None:
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
