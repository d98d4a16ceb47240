"""Fine-tuning with new classes: a data set of the supports for nnU-Net, and its own training on it.

Supports say where the new structures are, and nothing of the classes that the model knows. What they say of these is
the model's own prediction (self-distillation, as pseudo-labels): the training then holds the model to what it was.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.data.plans import SETTINGS_KEY, read_plans, resolve_configuration
from nnunet_calib.data.quiet import quiet
from nnunet_calib.fewshot.volume.files import find_supports, read_case
from nnunet_calib.prediction.model import TrainedModel
from nnunet_calib.prediction.predictor import ModelPredictor

_FINGERPRINT = "dataset_fingerprint.json"
_FOLDS = 5


@dataclass(frozen=True)
class AddedClass:
    """A data set that was made.

    Attributes:
        name: as nnU-Net names it, ``Dataset901_NAME``.
        labels: as in its ``dataset.json``.
        configuration: of the model.
        plans_name: of the model.
        cases: how many.
        fold: to be trained, ``all`` or 0 to 4.
    """

    name: str
    labels: dict[str, int]
    configuration: str
    plans_name: str
    cases: int
    fold: str


def prepare_dataset(
    model_folder: str | Path,
    images: Path,
    labels: Path,
    *,
    number: int,
    structures: Mapping[str, int],
    settings: Mapping[str, Any],
    trainer: str,
    ignore: int | None = None,
    fold: str = "all",
    folds: Sequence[str | int] | None = None,
    checkpoint: str = CHECKPOINT,
    device: str = "cpu",
    step_size: float = 0.5,
    mirroring: bool = True,
    progress: bool = True,
) -> AddedClass:
    """Make a data set of a model's classes and new ones, and preprocess it with the model's plans.

    Label maps are the model's predictions, with the structures over them. Images stay where they are: ``dataset.json``
    names them. What was made is taken away again if it cannot be finished.

    Args:
        model_folder: of a model with labels, no regions, that is no cascade.
        images: in nnU-Net's raw layout; those without label map are not used.
        labels: label maps of the structures.
        number: of the data set, 1 to 999, that no other has.
        structures: value in these label maps by name.
        settings: of the training, for the plans.
        trainer: its name; it must build the network that the model's own trainer built.
        ignore: value of voxels that do not count.
        fold: to be trained, ``all`` or 0 to 4.
        folds: of the model, for the predictions.
        checkpoint: its name in each fold.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window.
        mirroring: test-time augmentation.
        progress: show a bar.

    Raises:
        UsageError: a model that cannot be used, a number that is taken, or too few volumes for a fold.
        InputError: files that cannot be used.
    """
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    model = TrainedModel(model_folder, folds, checkpoint)
    if model.dataset.has_regions:
        raise UsageError(f"{model.folder}: the model has regions, to which no class can be added by fine-tuning")
    if model.previous_stage is not None:
        raise UsageError(f"{model.folder}: a cascade cannot be fine-tuned: its first stage does not know the structure")
    theirs, ours = (recursive_find_trainer_class_by_name(name) for name in (model.trainer_name, trainer))
    if theirs.build_network_architecture is not ours.build_network_architecture:
        raise UsageError(
            f"{model.folder}: {model.trainer_name} builds a network of its own, which {trainer} does not; name a "
            "trainer that combines the two with -tr, or use fewshot fit"
        )
    supports = find_supports(images, labels, model.dataset.file_ending)
    if fold != "all" and len(supports) < _FOLDS:
        raise UsageError(f"--fold {fold}: nnU-Net makes {_FOLDS} folds, of {len(supports)} volumes; use --fold all")
    name = _dataset_name(number, structures)
    raw, preprocessed = Path(str(nnUNet_raw), name), Path(str(nnUNet_preprocessed), name)
    new = _labels(model, structures, ignore)
    content = model.dataset.content | {
        "labels": new,
        "numTraining": len(supports),
        "dataset": {
            case: {
                "images": [str(path.absolute()) for path in paths],
                "label": f"labelsTr/{case}{model.dataset.file_ending}",
            }
            for case, (paths, _) in supports.items()
        },
    }
    with _taken_away_if_unfinished() as made:
        for folder in (raw, preprocessed):
            folder.mkdir(parents=True)
            made.append(folder)
        (raw / "labelsTr").mkdir()
        predictor = ModelPredictor(model, device, step_size=step_size, mirroring=mirroring)
        writer = model.plans_manager.image_reader_writer_class()
        found = set[str]()
        for case, (paths, label) in tqdm(supports.items(), "labels", unit="case", disable=not progress):
            image, properties, annotated = read_case(model, paths, label)
            with quiet():
                predicted = predictor.predict_single_npy_array(image, dict(properties))
            values = {name: value for name, value in ({**structures, "ignore": ignore}).items() if value is not None}
            found |= {name for name, value in values.items() if (annotated == value).any()}
            merged = overlaid(predicted, annotated, {value: new[name] for name, value in values.items()})
            writer.write_seg(merged, str(raw / "labelsTr" / f"{case}{model.dataset.file_ending}"), properties)
        if missing := [structure for structure in structures if structure not in found]:
            raise InputError(f"{labels}: no voxel of {missing[0]}, value {structures[missing[0]]}; check --label")
        for folder in (raw, preprocessed):
            write_whole(folder / "dataset.json", json.dumps(content, indent=1) + "\n")
        plans = _plans(model, name, settings)
        write_whole(preprocessed / f"{plans['plans_name']}.json", json.dumps(plans, indent=1) + "\n")
        fingerprint = model.folder / _FINGERPRINT  # of the model's data: its plans are used, so nothing else is known
        if fingerprint.is_file():
            shutil.copy(fingerprint, preprocessed / _FINGERPRINT)
        else:
            write_whole(preprocessed / _FINGERPRINT, "{}\n")
        _preprocess(model, raw, preprocessed, content, progress)
    return AddedClass(name, new, model.configuration_name, plans["plans_name"], len(supports), fold)


def train(made: AddedClass, trainer: str, device: str) -> None:
    """Train as ``nnUNetv2_train`` does.

    Args:
        made: the data set.
        trainer: name of a trainer that has ``finetune_from``.
        device: ``cpu``, ``cuda`` or ``mps``.
    """
    from nnunetv2.run.run_training import run_training

    run_training(made.name, made.configuration, made.fold, trainer, made.plans_name, device=torch.device(device))


def _dataset_name(number: int, structures: Mapping[str, int]) -> str:
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    if len(there := find_candidate_datasets(number)):
        raise UsageError(f"-d {number}: there is {there[0]} already; choose another number, or remove it")
    words = "".join(c if c.isascii() and c.isalnum() else "_" for c in "_".join(structures))
    return f"Dataset{number:03d}_{words}"[:100]


def _labels(model: TrainedModel, structures: Mapping[str, int], ignore: int | None) -> dict[str, int]:
    """The model's labels, then the structures, then the ignore label if there is one."""
    new = {name: value for name, value in model.dataset.content["labels"].items() if name != "ignore"}
    for name in structures:
        new[name] = max(new.values()) + 1
    if ignore is not None or model.dataset.ignore_label is not None:
        new["ignore"] = max(new.values()) + 1
    return new


def overlaid(predicted: np.ndarray, annotated: np.ndarray, values: Mapping[int, int]) -> np.ndarray:
    """Labels of a model, and over them what was annotated.

    Args:
        predicted: integer (*S), the model's labels.
        annotated: integer (*S).
        values: which of its values count, and what they become.

    Returns:
        Integer (*S), of the smallest type that holds all values.
    """
    merged = predicted.astype(np.min_scalar_type(max(int(predicted.max()), *values.values())))
    for value, becomes in values.items():
        merged[annotated == value] = becomes
    return merged


def _plans(model: TrainedModel, dataset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model's plans for another data set."""
    plans = read_plans(model.folder / "plans.json")
    # Settings that the model's own training recorded are not those of this one.
    plans = {key: value for key, value in plans.items() if not key.startswith(SETTINGS_KEY)}
    plans["dataset_name"] = dataset
    configuration = plans["configurations"][model.configuration_name]
    configuration[SETTINGS_KEY] = dict(settings)
    if resolve_configuration(plans, model.configuration_name).get("next_stage"):
        configuration["next_stage"] = []  # it is not fine-tuned, so nothing is predicted for it
    return plans


def _preprocess(model: TrainedModel, raw: Path, preprocessed: Path, content: Mapping[str, Any], progress: bool) -> None:
    """As ``nnUNetv2_preprocess``, without processes of its own: they take longer to start than a few volumes need."""
    configuration = model.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    shutil.copytree(raw / "labelsTr", preprocessed / "gt_segmentations")
    folder = preprocessed / configuration.data_identifier
    folder.mkdir()
    for case, files in tqdm(content["dataset"].items(), "preprocessing", unit="case", disable=not progress):
        with quiet():
            preprocessor.run_case_save(
                str(folder / case),
                files["images"],
                str(raw / files["label"]),
                model.plans_manager,
                configuration,
                content,
            )


@contextmanager
def _taken_away_if_unfinished() -> Iterator[list[Path]]:
    """Remove the folders that were put into the list within it, if it ends with an error or is interrupted."""
    folders: list[Path] = []
    try:
        yield folders
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
