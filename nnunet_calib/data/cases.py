"""Which reference, prediction and probability files belong together."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nnunet_calib.data import nifti
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_hidden, is_named, read_json
from nnunet_calib.data.probabilities import ENDINGS

MADE_FROM = "made_from"
"""Folder in one of predictions, with a JSON file of each case: what was written of it, and what from."""
_PROBABILITIES = "_probabilities"  # what NIfTI files of them have after the name of the case, or a case is called


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case.

    Attributes:
        name: the file name without its ending.
        reference: label map.
        prediction: label map.
        probabilities: of the prediction, beside it; None if they were not saved.
    """

    name: str
    reference: Path
    prediction: Path
    probabilities: Path | None


def pair_cases(
    reference_folder: Path, prediction_folder: Path, file_ending: str, *, chill: bool = False
) -> list[CaseFiles]:
    """Pair files as nnU-Net's evaluation does: every file of the prediction folder with its namesake.

    Probabilities are ``<case>.nncp`` (our compact format), ``<case>.npz`` (nnU-Net's) or
    ``<case>_probabilities.nii.gz``; where there are several, the first of these.

    Args:
        reference_folder: label maps.
        prediction_folder: label maps, and probabilities where they were saved.
        file_ending: from ``dataset.json``.
        chill: references without a prediction are left out instead of refused.

    Returns:
        The cases in the order of their names.

    Raises:
        UsageError: a folder does not exist.
        InputError: nothing to score, a prediction without reference or, without ``chill``, the opposite.
    """
    for folder in (reference_folder, prediction_folder):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
    references, predictions = (_names(folder, file_ending) for folder in (reference_folder, prediction_folder))
    predictions -= {name + _PROBABILITIES for name in predictions} - references
    label_maps = {name + file_ending for name in references | predictions}
    if not predictions:
        raise InputError(f"{prediction_folder}: no file ends with {file_ending} (the file_ending of dataset.json)")
    if unknown := sorted(predictions - references):
        images = f"{unknown[0]}_0000" in references
        raise InputError(
            f"{prediction_folder / (unknown[0] + file_ending)}: no reference of that name in {reference_folder}"
            f"{_and_more(unknown)}{'; the files there look like images, name the folder of labels' if images else ''}"
        )
    if (missing := sorted(references - predictions)) and not chill:
        raise InputError(
            f"{reference_folder / (missing[0] + file_ending)}: no prediction of that name in {prediction_folder}"
            f"{_and_more(missing)}; --chill leaves such cases out"
        )
    return [
        CaseFiles(
            name,
            reference_folder / (name + file_ending),
            prediction_folder / (name + file_ending),
            probabilities_of(prediction_folder, name, label_maps),
        )
        for name in sorted(predictions)
    ]


def probabilities_of(folder: Path, name: str, label_maps: Collection[str] = ()) -> Path | None:
    """The file of a case's probabilities beside its label map; None without one.

    Args:
        folder: of the label map.
        name: of the case.
        label_maps: names of files that are label maps, such as that of a case called x_probabilities.
    """
    paths = (folder / (name + ending) for ending in ENDINGS)
    return next((path for path in paths if path.name not in label_maps and is_named(path)), None)


def all_probabilities(folder: Path, name: str) -> list[Path]:
    """All files of a case's probabilities beside its label map, whatever their format.

    Args:
        folder: of the label map.
        name: of the case.
    """
    paths = (folder / (name + ending) for ending in ENDINGS)
    # a NIfTI file of one volume is the label map of a case called x_probabilities
    return [p for p in paths if p.is_file() and (nifti.has_channels(p) or not p.name.endswith(nifti.ENDINGS))]


def files_written(folder: Path, name: str) -> list[Path]:
    """The files that ``predict`` wrote of a case, as its record tells; none without one.

    Args:
        folder: of the predictions. What a record says lies outside, or is not named after the case, is left out.
        name: of the case.
    """
    try:
        files = list(read_json(folder / MADE_FROM / f"{name}.json")["files"])
    except (InputError, LookupError, TypeError):
        return []
    paths = [folder / file for file in files if isinstance(file, str) and ".." not in Path(file).parts]
    root = folder.resolve()
    return [path for path in paths if path.name.startswith(name) and path.resolve().is_relative_to(root)]


def find_images(folder: Path, file_ending: str) -> dict[str, list[Path]]:
    """Image files of each case of a folder in nnU-Net's raw layout, ``CASE_0000.nii.gz``, in the order of names.

    Raises:
        UsageError: not a folder.
        InputError: no image in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(file_ending)}")
    cases: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := pattern.fullmatch(path.name)) and not is_hidden(path):
            cases.setdefault(match[1], []).append(path)
    if not cases:
        raise InputError(f"{folder}: no images; nnU-Net names them CASE_0000{file_ending}, one file a channel")
    return {case: cases[case] for case in sorted(cases)}


def _names(folder: Path, ending: str) -> set[str]:
    """Names of the files that may be label maps."""
    return {
        path.name[: -len(ending)]
        for path in folder.iterdir()
        if path.name.endswith(ending)
        and not is_hidden(path)
        and is_named(path)
        and not (path.name.endswith(_PROBABILITIES + ending) and nifti.has_channels(path))
    }


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
