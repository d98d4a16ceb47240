"""A trained model as stock nnU-Net runs it: the network is nnU-Net's own, only the trainer's name is in the way."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json, whole_file
from nnunet_calib.data.model import CHECKPOINT, check_same_model, checkpoints_of, file_sha256, identify
from nnunet_calib.data.quiet import quiet

PROVENANCE = "nnunet_calib_export.json"
"""File of an exported model that says what it was made from."""
_MODEL_FILES = ("plans.json", "dataset.json")
_MORE_FILES = ("dataset_fingerprint.json", "thresholds.json")
_STATE_KEY = "nnunet_calib_state"


@dataclass(frozen=True)
class Exported:
    """What was written: the trainer of nnU-Net that runs the model, and its folder under ``nnUNet_results``."""

    stock_trainer: str
    place: Path
    folds: tuple[str, ...]


def export_model(
    model: Path,
    output: Path,
    folds: Sequence[str] | None = None,
    checkpoint: str = CHECKPOINT,
    calibrator: Path | None = None,
) -> Exported:
    """Write a model that needs nothing of this package.

    Weights are copied bit by bit; the trainer's name in the checkpoints becomes that of nnU-Net's class whose network
    it is. Validation results, log files and ``debug.json`` stay behind.

    Args:
        model: folder of a trained model, ``TRAINER__PLANS__CONFIGURATION``.
        output: a new folder, for ``nnUNetv2_predict_from_modelfolder -m``; or a new file ``.zip``, for
            ``nnUNetv2_install_pretrained_model_from_zip``. In the zip the plans have a name that holds the trainer's,
            so that no model of the same plans is overwritten.
        folds: numbers or ``all``; every fold that has the checkpoint if None.
        checkpoint: name of the file in each fold.
        calibrator: fitted to this model, put beside it; ``calibrator.json`` of the model's folder if None.

    Raises:
        UsageError: the output is there already, no trained model, or a fold that has no checkpoint.
        InputError: files that cannot be used, a checkpoint that holds more than weights and numbers, a network
            that is not nnU-Net's own, or a calibrator of another model.
    """
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise UsageError(f"{output} is there already; give a new name")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is no folder; make it first")
    chosen = list(checkpoints_of(model, folds, checkpoint))
    plans, dataset = read_json(model / "plans.json"), read_dataset(model / "dataset.json", model / "plans.json")
    calibrator = calibrator or next((file for file in [model / "calibrator.json"] if file.is_file()), None)
    identity = identify(model, dataset)
    if calibrator is not None:
        check_same_model(read_json(calibrator).get("model") or {}, identity, calibrator, model)

    import torch  # not before it is needed: a wrong name is told at once

    from nnunet_calib.data.checkpoints import read_checkpoint

    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        root = Path(temporary) / "model"
        root.mkdir()
        trainers, checksums = set(), {}
        configuration = ""
        for fold in chosen:
            source = model / f"fold_{fold}" / checkpoint
            content = read_checkpoint(source)
            trainer, configuration = _trainer_and_configuration(content, source)
            trainers.add(trainer)
            if len(trainers) > 1:
                raise InputError(f"{model}: its folds are of several trainers, {', '.join(sorted(trainers))}")
            content["trainer_name"] = stock_trainer(trainer)
            content["init_args"].pop(_STATE_KEY, None)  # no argument of nnU-Net's trainer
            target = root / f"fold_{fold}" / checkpoint
            target.parent.mkdir()
            torch.save(content, target)
            checksums[fold] = file_sha256(source)
        (trainer,) = trainers
        stock = stock_trainer(trainer)
        for name in (*_MODEL_FILES, *_MORE_FILES):
            if (model / name).is_file():
                shutil.copyfile(model / name, root / name)
        for file in model.glob("crossval_results_folds_*/postprocessing.*"):
            (root / file.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(file, root / file.parent.name / file.name)
        plans_name = f"{plans.get('plans_name', 'nnUNetPlans')}_{trainer}"
        place = Path(str(plans.get("dataset_name", "")), f"{stock}__{plans_name}__{configuration}")
        if calibrator is not None:
            _write_calibrator(root, calibrator, stock, configuration, checkpoint)
        made_from = {
            "trainer": trainer,
            "stock_trainer": stock,
            "model": model.resolve().name,
            "settings": plans.get("nnunet_calib_resolved"),
            "checkpoints": checksums,
            "checkpoint": checkpoint,
            "nnunet_calib": version("nnunet-calib"),
            "nnunetv2": version("nnunetv2"),
        }
        (root / PROVENANCE).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
        if output.suffix.lower() == ".zip":
            _write_zip(root, place, output)
        else:
            if output.is_dir():
                output.rmdir()
            os.replace(root, output)
    return Exported(stock, place, tuple(chosen))


def stock_trainer(name: str) -> str:
    """Name of nnU-Net's own class that builds the network of a trainer.

    Raises:
        InputError: nnU-Net does not find the trainer, or the class that builds its network is not nnU-Net's.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with quiet():  # where nnU-Net tells its search
            trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise InputError(f"nnU-Net finds no trainer {name}; put its folder into nnUNet_extTrainer") from error
    owner = next(base for base in trainer.__mro__ if "build_network_architecture" in vars(base))
    if not owner.__module__.startswith("nnunetv2."):
        raise InputError(
            f"{name} builds a network of its own ({owner.__module__}.{owner.__name__}), which stock nnU-Net does not "
            "know; such a model runs only where that class is installed"
        )
    return owner.__name__


def _trainer_and_configuration(content: dict[str, Any], source: Path) -> tuple[str, str]:
    arguments = content.get("init_args")
    trainer = content.get("trainer_name")
    configuration = arguments.get("configuration") if isinstance(arguments, dict) else None
    if not (isinstance(trainer, str) and trainer.isidentifier() and isinstance(configuration, str)):
        raise InputError(f"{source} does not name its trainer and configuration; it is no checkpoint of nnU-Net v2")
    return trainer, configuration


def _write_calibrator(root: Path, calibrator: Path, stock: str, configuration: str, checkpoint: str) -> None:
    """The calibrator as one of the exported model, whose trainer and checkpoints it names."""
    content = read_json(calibrator)
    fitted = content.get("model") or {}
    files = {path.parent.name.removeprefix("fold_"): path for path in root.glob(f"fold_*/{checkpoint}")}
    checksums = {fold: file_sha256(file) for fold, file in files.items() if fold in (fitted.get("checkpoints") or {})}
    content["model"] = fitted | {"trainer": stock, "configuration": configuration, "checkpoints": checksums}
    (root / "calibrator.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_zip(root: Path, place: Path, output: Path) -> None:
    with whole_file(output) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            archive.write(file, place / file.relative_to(root))
