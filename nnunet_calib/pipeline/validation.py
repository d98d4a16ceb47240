"""The validation at the end of a training, and of a model that is already trained, with all of ``evaluate``'s numbers.

``scored_export`` says how a trainer's own validation is scored, by ``score_exported``; ``validate_model`` does the same
for a model that is already trained.
"""

import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor
from tqdm import tqdm

from nnunet_calib.data.cases import CaseFiles, all_probabilities
from nnunet_calib.data.dataset import Dataset, read_dataset
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.plans import preprocessed_folder
from nnunet_calib.evaluation.folder import RECORDS, summarise_records
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.evaluation.records import Records, setting
from nnunet_calib.pipeline.case import Prediction, Wanted
from nnunet_calib.posthoc.folders.samples import is_sample_of, read_sample
from nnunet_calib.posthoc.folders.sampling import VOXELS
from nnunet_calib.prediction.model import TrainedModel

_FOLDER = "validation"


@dataclass
class _Host:
    """nnU-Net's managers of the model that is validated; what ``Prediction`` asks of a model."""

    plans_manager: Any
    configuration_manager: Any
    label_manager: Any
    folds: tuple[str, ...] = ()


def score_exported(
    file: str, logits: Tensor, labels: np.ndarray, properties: dict[str, Any], plans_manager: Any, configuration: Any
) -> None:
    """Write the record of a validation case whose label map nnU-Net has just written, and its sample of voxels.

    Args:
        file: the label map, in the folder ``validation`` of a fold.
        logits: (C, *S) as nnU-Net's predictor gives them.
        labels: as written, axes in the order of the file.
        properties: what nnU-Net's preprocessor says of the case.
        plans_manager: nnU-Net's.
        configuration: nnU-Net's configuration manager.
    """
    folder = Path(file).parent
    model = folder.parent.parent
    dataset = read_dataset(model / "dataset.json", model / "plans.json")
    name = Path(file).name.removesuffix(dataset.file_ending)
    host = _Host(plans_manager, configuration, plans_manager.get_label_manager(dataset.content))
    work = _Validation(folder, dataset, plans_manager, _references(plans_manager.dataset_name))
    (folder / f"{name}.nncp").unlink(missing_ok=True)  # of ``validate`` with an earlier network: nnU-Net writes none
    prediction = Prediction(name, logits, (), properties, host)
    work.score(prediction, labels.transpose(prediction.grid.from_image))


def summarise_validation(
    fold: str | Path, names: Sequence[str], plans_manager: Any, on_failure: Callable[[str], None]
) -> dict[str, Any]:
    """Write ``validation/summary.json``, ``cases.csv`` and ``reliability.json`` of a fold whose cases are scored.

    Args:
        fold: the folder of the fold.
        names: its validation cases.
        plans_manager: nnU-Net's, of the model.
        on_failure: called with one line for each case without a score.

    Returns:
        The summary.
    """
    model = Path(fold).parent
    dataset = read_dataset(model / "dataset.json", model / "plans.json")
    work = _Validation(Path(fold) / _FOLDER, dataset, plans_manager, _references(plans_manager.dataset_name))
    return work.summarise(names, {}, on_failure)


def validation_means(summary: dict[str, Any]) -> dict[str, float]:
    """The means that a log shows: of the foreground, and of the calibration of each region."""
    structures = summary["foreground_mean"]
    means = {f"foreground/{name}": structures[name] for name in ("Dice", "HD95", "ASSD", "NSD") if name in structures}
    for region, scores in summary["calibration_mean"].items():
        means |= {f"{region}/{name}": scores[name] for name in ("ECE", "CECE", "NLL", "Brier")}
    return means


def validate_model(
    model_folder: str | Path,
    folds: Sequence[str] | None = None,
    *,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    wanted: Wanted | None = None,
    previous: str | Path | None = None,
    on_failure: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Validate a trained model, each fold on the cases it was not trained on, as the end of its training does.

    Args:
        model_folder: with ``plans.json``, ``dataset.json`` and ``fold_*``.
        folds: which; all numbered ones that are trained if None.
        checkpoint: of each fold.
        device: ``cpu``, ``cuda`` or ``mps``.
        wanted: of every case besides its label map.
        previous: of a cascade, the folder of the previous stage's label maps; nnU-Net's own if None.
        on_failure: called with one line for every case that failed.

    Returns:
        The summary of each fold; ``validation/summary.json`` and the others are beside its predictions.

    Raises:
        UsageError: folders or folds that make no sense.
        InputError: files that cannot be used.
    """
    first = TrainedModel(model_folder, folds, checkpoint)
    if "all" in first.folds:
        raise UsageError("fold all is trained on every case; it has none to be validated on")
    preprocessed = preprocessed_folder(first.plans_manager.dataset_name)
    splits = _splits(preprocessed)
    summaries = {}
    for fold in first.folds:
        model = TrainedModel(model_folder, [fold], checkpoint)
        if int(fold) >= len(splits):
            raise UsageError(f"{preprocessed / 'splits_final.json'} has {len(splits)} folds; there is no fold {fold}")
        names = splits[int(fold)]["val"]
        summaries[fold] = _validate_fold(model, fold, names, preprocessed, device, wanted, previous, on_failure)
    return summaries


def _validate_fold(
    model: TrainedModel,
    fold: str,
    names: Sequence[str],
    preprocessed: Path,
    device: str,
    wanted: Wanted | None,
    previous: str | Path | None,
    on_failure: Callable[[str], None],
) -> dict[str, Any]:
    configuration = model.configuration_manager
    data_folder = str(preprocessed / configuration.data_identifier)
    if not os.path.isdir(data_folder):
        raise UsageError(f"{data_folder} is not there; run nnUNetv2_preprocess for {model.configuration_name} first")
    stage = None
    if model.previous_stage is not None:
        own = model.folder.parent / f"{model.trainer_name}__{model.plans_manager.plans_name}__{model.previous_stage}"
        stage = str(previous or own / "predicted_next_stage" / model.configuration_name)
    cases = infer_dataset_class(data_folder)(data_folder, list(names), folder_with_segs_from_previous_stage=stage)
    folder = model.folder / f"fold_{fold}" / _FOLDER
    folder.mkdir(exist_ok=True)
    references = _references(model.plans_manager.dataset_name)
    work = _Validation(folder, model.dataset, model.plans_manager, references)
    # Here, because the processes that export a training's validation import this module: it takes them two seconds.
    from nnunet_calib.pipeline.predictor import Predictor, one_thread_each

    predictor = Predictor(model, torch.device(device))
    failed: dict[str, str] = {}

    def collect(name: str, future: Future) -> None:
        if (error := future.exception()) is not None:
            failed[name] = f"case {name}: {' '.join(str(error).split())[:500]}"
            on_failure(failed[name])

    with one_thread_each(1, "export") as export:
        behind: tuple[str, Future] | None = None
        for name in tqdm(names, desc=f"validate fold {fold}", unit="case"):
            try:
                data, _, labels, properties = cases.load_case(name)
                data = data[:]
                if stage is not None:
                    known = model.label_manager.foreground_labels
                    data = np.vstack((data, convert_labelmap_to_one_hot(labels[:], known, output_dtype=data.dtype)))
                logits = predictor.predict(torch.from_numpy(np.ascontiguousarray(data)))
            except Exception as error:  # one bad case must not end the others
                failed[name] = f"case {name}: {' '.join(str(error).split())[:500]}"
                on_failure(failed[name])
                continue
            if behind is not None:
                collect(*behind)
            prediction = Prediction(name, logits, (), properties, model)
            behind = (name, export.submit(work.finish, prediction, wanted or Wanted()))
        if behind is not None:
            collect(*behind)
    return work.summarise(names, failed, on_failure)


class _Validation:
    """What is done to every case of a fold, and the summary of them."""

    def __init__(self, folder: Path, dataset: Dataset, plans_manager: Any, references: Path):
        self.folder, self.dataset, self.references = folder, dataset, references
        self.reader = plans_manager.image_reader_writer_class
        self.protocol = Protocol()
        self.plans = folder.parent.parent / "plans.json"
        self.setting = setting(self.protocol, dataset.path, self.plans, self.reader.__name__)

    def finish(self, prediction: Prediction, wanted: Wanted) -> None:
        """Write a case's files and its record."""
        labels, files = prediction.write(self.folder, self.dataset, self.reader, wanted)
        try:
            self.score(prediction, labels)
        finally:
            self._remove_others(prediction.name, files)

    def score(self, prediction: Prediction, labels: np.ndarray) -> None:
        """Write the record of a case whose files are written; ``labels`` have the axes of the plans."""
        (self.folder / RECORDS).mkdir(exist_ok=True)

        def score(pair: CaseFiles) -> Any:
            return prediction.score(pair, labels, self.dataset, self.reader, self.protocol, leave_sample=True)

        Records(self.folder / RECORDS, score, self.setting)(self._pair(prediction.name))

    def _remove_others(self, name: str, files: Collection[Path]) -> None:
        """Remove the probabilities of an earlier validation beside a label map; those of the same network stay."""
        pair = self._pair(name)
        sample = read_sample(pair, self.dataset, voxels=VOXELS, seed=0)
        for path in all_probabilities(self.folder, name):
            ours = replace(pair, probabilities=path)
            if path not in files and not (sample and is_sample_of(sample, ours, self.dataset, self.reader)):
                path.unlink()

    def summarise(self, names: Sequence[str], failed: dict[str, str], on_failure: Callable[[str], None]) -> dict:
        """The three files, from the records of the cases."""

        def fail(pair: CaseFiles, error: Exception) -> None:
            failed[pair.name] = f"case {pair.name}: {error}"
            on_failure(failed[pair.name])

        records = Records(self.folder / RECORDS, _never, self.setting)
        about = {"dataset_json": str(self.dataset.path), "plans": str(self.plans), "reader": self.reader.__name__}
        about |= {"calibrator": None, "probabilities": "in memory"}
        pairs = [self._pair(name) for name in sorted(names)]
        for pair in pairs:  # a record may be one of an earlier network
            if pair.name not in failed and not records.hold(pair):
                fail(pair, InputError("it was not scored when it was predicted"))
        return summarise_records(self.folder, records, pairs, failed, self.dataset, self.protocol, about, fail)

    def _pair(self, name: str) -> CaseFiles:
        file = f"{name}{self.dataset.file_ending}"
        return CaseFiles(name, self.references / file, self.folder / file, None)


def _references(dataset_name: str) -> Path:
    return preprocessed_folder(dataset_name) / "gt_segmentations"


def _splits(preprocessed: Path) -> list[dict[str, list[str]]]:
    file = preprocessed / "splits_final.json"
    if not file.is_file():
        raise UsageError(f"{file} is not there; it says which cases a fold was validated on")

    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
        return [{"val": [str(name) for name in split["val"]]} for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not nnU-Net's splits") from error


def _never(_: CaseFiles) -> Any:
    raise InputError("it was not scored when it was predicted")
