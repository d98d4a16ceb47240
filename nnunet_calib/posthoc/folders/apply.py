"""Use a calibrator: on some voxels of a case, on a file, on a folder of predictions."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunet_calib.data import nifti
from nnunet_calib.data.cases import CaseFiles, all_probabilities, pair_cases
from nnunet_calib.data.dataset import Dataset, find_model_file, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_hidden, read_json, write_whole
from nnunet_calib.data.images import choose_reader, read_labels
from nnunet_calib.data.model import CALIBRATED_FROM, check_same_model, identify, known_model, refuse_calibrated
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact, write_compact_slabs, write_npz
from nnunet_calib.posthoc.folders.sampling import decide, open_probabilities
from nnunet_calib.posthoc.maps import Calibrator, load_calibrator
from nnunet_calib.posthoc.maps.calibrator import file_of
from nnunet_calib.posthoc.maps.tempered import compiled_loops
from nnunet_calib.posthoc.maps.volume import calibrate_case, calibrated_parts, copy_into, in_full, taken_apart

_COMPACT = ".nncp"


def probabilities_at(calibrator: Calibrator, files: CaseFiles, index: np.ndarray) -> np.ndarray:
    """Calibrated probabilities float64 (C, n) of some voxels of a case, given by their index in the flat volume.

    Raises:
        InputError: the file of probabilities cannot be used.
    """
    if files.probabilities is None:
        raise InputError(f"{files.prediction}: no probabilities beside it")
    whole = calibrate_case(
        calibrator, ProbabilityFile(files.probabilities, exclusive=not calibrator.multilabel).whole()
    )
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
        UsageError: the probabilities are calibrated already.
    """
    refuse_calibrated(Path(predictions))
    file, found = file_of(calibrator_file), Path(dataset_json)
    calibrator, dataset = load_calibrator(file), read_dataset(found, Path(plans) if plans else None)
    if calibrator.multilabel != dataset.has_regions or calibrator.channels != len(dataset.channels):
        raise InputError(f"{file}: fitted to {calibrator.channels} {_kind(calibrator.multilabel)}, but {found} has "
                         f"{len(dataset.channels)} {_kind(dataset.has_regions)}")  # fmt: skip
    if not any_model:
        given = Path(model or predictions)
        check_same_model(known_model(file, read_json(file).get("model")), identify(given, dataset), file, given)
    return Calibration(calibrator, dataset)


@dataclass(frozen=True)
class Predictions:
    """A folder of predictions to use a calibrator on.

    Attributes:
        calibration: the calibrator and the folder's labels.
        cases: those with probabilities.
        without_probabilities: names of the others.
        reader: of the label maps.
        dataset_json: of the folder.
        plans: of the folder, if any.
    """

    calibration: Calibration
    cases: list[CaseFiles]
    without_probabilities: list[str]
    reader: type[BaseReaderWriter]
    dataset_json: Path
    plans: Path | None


def open_predictions(
    calibrator_file: str | Path,
    folder: str | Path,
    dataset_json: str | Path | None = None,
    *,
    model: str | Path | None = None,
    any_model: bool = False,
) -> Predictions:
    """Find the cases of a folder; arguments as ``apply_folder``.

    Raises:
        UsageError: there is no such folder.
        InputError: files that cannot be used, no probabilities, or a calibrator of another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    found = Path(dataset_json) if dataset_json else require_dataset_json(folder, folder)
    plans = find_model_file("plans.json", folder)
    calibration = open_calibration(calibrator_file, folder, found, plans, model=model, any_model=any_model)
    pairs = pair_cases(folder, folder, calibration.dataset.file_ending)
    cases = [case for case in pairs if case.probabilities]
    if not cases:
        raise InputError(f"{folder}: no probabilities beside the predictions; predict with --save_probabilities")
    reader = choose_reader(calibration.dataset)
    without = [case.name for case in pairs if not case.probabilities]
    return Predictions(calibration, cases, without, reader, found, plans)


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
        ``method``, ``keeps_labels``, ``cases``: by name, ``voxels`` and ``changed`` (voxels with another label), and
        ``without_probabilities``: names of the cases left out.

    Raises:
        UsageError: folders that make no sense.
        InputError: files that cannot be used, or a calibrator of another model.
    """
    predictions, output = Path(predictions), Path(output)
    if predictions.is_dir() and output.resolve() == predictions.resolve():
        raise UsageError(f"{output} holds the predictions themselves; name another folder for the calibrated ones")
    given = open_predictions(calibrator_file, predictions, dataset_json, model=model, any_model=any_model)
    calibrator, dataset = given.calibration.calibrator, given.calibration.dataset
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made a folder for the results ({error.strerror})") from error
    _claim(output, given)
    done = {}
    for case in tqdm(given.cases, desc="calibrate", unit="case"):
        done[case.name] = _apply_case(calibrator, case, dataset, given.reader, output)
    for name, source in (("dataset.json", given.dataset_json), ("plans.json", given.plans)):
        if source is not None:
            _copy_file(source, output / name)
    about = {"method": calibrator.key, "keeps_labels": calibrator.keeps_labels, "cases": done}
    return about | {"without_probabilities": given.without_probabilities}


def _claim(output: Path, given: Predictions) -> None:
    """Refuse a folder that holds anything else than these cases calibrated so; write down what it holds.

    Raises:
        UsageError: it holds other results, or cases of another data set.
    """
    file, ending = output / CALIBRATED_FROM, given.calibration.dataset.file_ending
    ours = {case.prediction.name for case in given.cases}
    there = (path for path in output.iterdir() if path.name.endswith(ending) and not is_hidden(path))
    others = sorted(path.name for path in there if path.name not in ours and not nifti.has_channels(path))
    if others:
        raise UsageError(
            f"{output} holds other cases ({others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}); name "
            "another folder with -o"
        )
    made_from = given.calibration.describe() | {"predictions": str(given.cases[0].prediction.parent.resolve())}
    if file.is_file() and read_json(file) != made_from:
        raise UsageError(
            f"{output} holds probabilities of another calibrator or of other predictions ({file}); name another folder "
            "with -o"
        )
    write_whole(file, json.dumps(made_from, indent=1) + "\n")


def _apply_case(
    calibrator: Calibrator, files: CaseFiles, dataset: Dataset, reader: type[BaseReaderWriter], output: Path
) -> dict[str, int]:
    prediction = read_labels(files.prediction, reader, dataset.labels)
    stored = open_probabilities(files, dataset, prediction)
    labels = None if calibrator.keeps_labels else prediction.labels.copy()
    compact = stored.path.name.endswith(_COMPACT)
    file = output / (files.name + (_COMPACT if compact else ".npz"))
    if compact and not calibrator.margin:
        slabs = _calibrated_slabs(calibrator, stored, dataset, labels)
        write_compact_slabs(file, slabs, stored.shape, stored.dtype)
    else:
        write = write_compact if compact else write_npz
        write(file, calibrate_file(calibrator, stored, dataset, labels), stored.shape, stored.dtype)
    for other in all_probabilities(output, files.name):  # of predictions that were stored in another format
        if other != file:
            other.unlink()
    target = output / files.prediction.name
    if labels is None:
        _copy_file(files.prediction, target)
    else:
        _write_labels(labels, files.prediction, target, reader)
    changed = 0 if labels is None else int(np.count_nonzero(labels != prediction.labels))
    return {"voxels": int(prediction.labels.size), "changed": changed}


def calibrate_file(
    calibrator: Calibrator, stored: ProbabilityFile, dataset: Dataset, labels: np.ndarray | None = None
) -> np.ndarray:
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
        (C, z, y, x).

    Raises:
        InputError: the file is damaged, or a method that must keep labels does not.
    """
    whole = stored.whole()
    _calibrate_in_place(calibrator, whole, dataset, labels, stored.path)
    return whole


def _calibrated_slabs(
    calibrator: Calibrator, stored: ProbabilityFile, dataset: Dataset, labels: np.ndarray | None
) -> Iterator[np.ndarray]:
    """``calibrate_file`` in the memory of ``stored.slabs``, for methods that look at every voxel on its own.

    Memory that has just been used is much quicker than as much as a whole volume takes.
    """
    z = 0
    for slab in stored.slabs():
        end = z + slab.shape[1]
        _calibrate_in_place(calibrator, slab, dataset, None if labels is None else labels[z:end], stored.path)
        yield slab
        z = end


def _calibrate_in_place(
    calibrator: Calibrator, probabilities: np.ndarray, dataset: Dataset, labels: np.ndarray | None, path: Path
) -> None:
    volume = taken_apart(calibrator, probabilities)
    decided = None if labels is None else taken_apart(calibrator, labels[None])[0]
    for place, before, part in calibrated_parts(calibrator, volume):
        if calibrator.keeps_labels and not _kept(before, part, dataset.has_regions):
            raise InputError(f"{path}: the calibrator changed labels that it must keep; fit it again")
        was = None if decided is None else decide(before, dataset)  # before it is overwritten
        copy_into(part, volume[place])
        if decided is not None:
            after = decide(in_full(volume[place]), dataset)  # of what is stored, which is rounded
            np.copyto(decided[place[1:]], after, where=after != was, casting="unsafe")


def _kept(before: np.ndarray, after: np.ndarray, regions: bool) -> bool:
    """Whether every voxel (C, ...) has the label it had, or one of the same probability but for rounding."""
    rounding = 4 * np.finfo(np.float32).eps
    if regions:
        return not (((before > 0.5) != (after > 0.5)) & (np.abs(after - 0.5) > rounding)).any()
    if before.ndim == 2 and (loops := compiled_loops()):
        return loops.keeps_largest(before, after, rounding)
    label = before.argmax(axis=0)[None]  # of equal ones the first
    return bool((np.take_along_axis(after, label, axis=0)[0] >= after.max(axis=0) - rounding).all())


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
