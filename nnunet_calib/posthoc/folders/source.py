"""Where the cases of a fit are: a folder of predictions with references, or a trained model's validations."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import Dataset, find_model_file, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json
from nnunet_calib.data.images import choose_reader
from nnunet_calib.data.model import fold_folders, identify, refuse_calibrated
from nnunet_calib.data.plans import preprocessed_folder, read_splits
from nnunet_calib.posthoc.folders.samples import sample_path


@dataclass(frozen=True)
class Source:
    """Cases to fit on.

    Attributes:
        dataset: their labels.
        reader: of their label maps.
        cases: all with probabilities, or a sample of them.
        model: what ``identify`` says of the model.
        without_probabilities: names of the cases left out, for they have none.
    """

    dataset: Dataset
    reader: type[BaseReaderWriter]
    cases: list[CaseFiles]
    model: dict[str, Any]
    without_probabilities: list[str]


def find_cases(folder: Path, reference: Path | None = None, dataset_json: Path | None = None) -> Source:
    """Find the cases of a folder.

    Args:
        folder: predictions with probabilities; or a trained model (``fold_0``, ...), whose validation cases are each
            predicted by the fold that was not trained on it.
        reference: label maps; of a trained model those in ``nnUNet_preprocessed`` if None.
        dataset_json: found in or near the folder if None.

    Raises:
        UsageError: folders that make no sense.
        InputError: no case with probabilities, or files that do not pair.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    refuse_calibrated(folder)
    folds = fold_folders(folder)
    _refuse_fold_all(folder, folds)
    reference = reference or (_own_references(folder) if folds else None)
    if reference is None:
        raise UsageError(f"{folder} holds predictions; name the folder of their references with --reference")
    found = dataset_json or (folder / "dataset.json" if folds else require_dataset_json(folder, reference))
    plans = folder / "plans.json" if folds else find_model_file("plans.json", folder)
    dataset = read_dataset(found, plans if plans is not None and plans.is_file() else None)
    cases: list[CaseFiles] = []
    for number, fold in folds.items():
        cases += _validation_cases(folder, number, fold, reference, dataset)
    without: list[str] = []
    if not folds:
        pairs = pair_cases(reference, folder, dataset.file_ending, chill=True)
        cases = [case for case in pairs if _can_be_fitted(case)]
        without = [case.name for case in pairs if not _can_be_fitted(case)]
        if not cases:
            raise InputError(f"{folder}: no probabilities beside the predictions; predict with --save_probabilities")
    if twice := {case.name for case in cases if sum(case.name == other.name for other in cases) > 1}:
        raise InputError(f"{folder}: case {min(twice)} is in the validation of more than one fold; whose is it?")
    if (fold := folder.resolve().parent).name.startswith("fold_") and fold.name[5:].isdecimal():
        _refuse_training_cases(fold, cases, plans)
    reader = choose_reader(dataset)
    return Source(dataset, reader, sorted(cases, key=lambda case: case.name), identify(folder, dataset), without)


def _validation_cases(model: Path, number: str, fold: Path, reference: Path, dataset: Dataset) -> list[CaseFiles]:
    validation = fold / "validation"
    cases = pair_cases(reference, validation, dataset.file_ending, chill=True) if validation.is_dir() else []
    missing = [case for case in cases if not _can_be_fitted(case)]
    if missing or not cases:
        raise InputError(
            f"{validation}: {len(missing) or 'all'} cases without probabilities; run nnunet-calib validate {model} "
            f"-f {number}"
        )
    _refuse_training_cases(fold, cases, model / "plans.json")
    return cases


def _can_be_fitted(case: CaseFiles) -> bool:
    return case.probabilities is not None or sample_path(case).is_file()


def _refuse_fold_all(folder: Path, folds: dict[str, Path]) -> None:
    """Refuse what a model of ``-f all`` calls its validation: it was trained on those cases."""
    inside = folder.resolve()
    if "fold_all" in (inside.name, *(parent.name for parent in inside.parents)):
        raise InputError(
            f"{folder}: fold_all was trained on all cases, these training cases among them; fit to the validation of "
            "folds 0 to 4, or to predictions of cases that were not trained on"
        )
    if not folds and (folder / "fold_all").is_dir():
        raise InputError(
            f"{folder}: only fold_all is there, whose validation holds its own training cases; train folds 0 to 4, or "
            "name predictions of other cases, with --reference"
        )


def _refuse_training_cases(fold: Path, cases: list[CaseFiles], plans: Path | None) -> None:
    """Refuse cases that the split of the fold lists as training, where ``splits_final.json`` is at hand."""
    root, name = os.environ.get("nnUNet_preprocessed"), read_json(plans).get("dataset_name") if plans else None
    file = Path(root, name, "splits_final.json") if root and isinstance(name, str) else None
    if file is None or not file.is_file():
        return
    splits = read_splits(file)
    number = int(fold.name.removeprefix("fold_"))
    trained = set(splits[number]["train"]) if number < len(splits) else set()
    if seen := sorted(case.name for case in cases if case.name in trained):
        raise InputError(
            f"{fold}: {seen[0]}{f' and {len(seen) - 1} more' if seen[1:] else ''} are training cases of this fold "
            f"({file}); a calibrator must not be fitted to them"
        )


def _own_references(model: Path) -> Path:
    """The references that nnU-Net validates against."""
    folder = preprocessed_folder(_dataset_name(model)) / "gt_segmentations"
    if not folder.is_dir():
        raise UsageError(f"{folder} is not there; name the folder of the references with --reference")
    return folder


def _dataset_name(model: Path) -> str:
    name = read_json(model / "plans.json").get("dataset_name")
    if not isinstance(name, str):
        raise InputError(f"{model / 'plans.json'}: no 'dataset_name' in it; not the plans of a trained model")
    return name
