"""Which model something comes from, as far as its folder tells: what is fitted to a model fits that one only."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_calib.data.dataset import Dataset, find_model_file, key
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json

CHECKPOINT = "checkpoint_final.pth"
"""What ``nnUNetv2_train`` leaves in a fold at its end."""

CALIBRATED_FROM = "calibrated_from.json"
"""The file in a folder of calibrated probabilities that tells what they were made from."""

_COMPARED = ("classes", "plans", "trainer", "configuration")


def fold_folders(folder: Path) -> dict[str, Path]:
    """The folds of a trained model's folder by number; none if it is another folder. ``fold_all`` validates nothing."""
    folds = {path.name.removeprefix("fold_"): path for path in folder.glob("fold_*") if path.is_dir()}
    return {number: folds[number] for number in sorted(folds) if number.isdecimal()}


def checkpoints_of(
    folder: Path, folds: Sequence[str | int] | None = None, checkpoint: str = CHECKPOINT
) -> dict[str, Path]:
    """The checkpoints of a trained model, by fold.

    Args:
        folder: with ``plans.json``, ``dataset.json`` and ``fold_*``.
        folds: which of them; as in nnU-Net's own detection all numbered ones if None, or ``all`` where it is alone.
        checkpoint: name of the file in each fold.

    Raises:
        UsageError: not the folder of a trained model, or folds that are not there.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name that of a trained model, TRAINER__PLANS__CONFIGURATION")
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} is not the folder of a trained model: no {name} in it; it is called "
                "TRAINER__PLANS__CONFIGURATION"
            )
    files = {path.name.removeprefix("fold_"): path / checkpoint for path in sorted(folder.glob("fold_*"))}
    there = {fold: file for fold, file in files.items() if file.is_file()}
    if not there:
        raise UsageError(f"{folder}: no fold with {checkpoint}; train one, or name another with -chk")
    if folds is None:
        return {fold: file for fold, file in there.items() if fold != "all"} or there
    if missing := [fold for fold in map(str, folds) if fold not in there]:
        raise UsageError(f"{folder}: no {checkpoint} in fold {missing[0]}; there are {', '.join(there)}")
    return {fold: there[fold] for fold in map(str, folds)}


def identify(folder: Path, dataset: Dataset) -> dict[str, Any]:
    """What identifies the model of a folder.

    Args:
        folder: of a trained model, of one of its validations, or of predictions (``nnUNetv2_predict`` leaves
            ``plans.json`` there, but not which trainer it was).
        dataset: labels of the model.

    Returns:
        ``classes`` (keys of the channels) and, where known, ``plans`` (SHA-256 of their content), ``dataset``,
        ``trainer``, ``configuration`` and ``checkpoints`` (SHA-256 by fold).
    """
    found: dict[str, Any] = {"classes": [key(channel) for channel in dataset.channels]}
    plans = find_model_file("plans.json", folder)
    if (folder / "plans.json").is_file():
        plans = folder / "plans.json"
    if plans is not None:
        content = read_json(plans)
        found |= {"dataset": content.get("dataset_name"), "plans": json_sha256(content)}
    inside = folder.resolve()
    model = inside if fold_folders(inside) else inside.parent.parent
    folds = fold_folders(model)
    if inside.name == "validation" and inside.parent in folds.values():
        folds = {number: path for number, path in folds.items() if path == inside.parent}
    elif model != inside:
        return found
    if named := re.fullmatch(r"(.+?)__(.+)__(.+?)", model.name):
        found |= {"trainer": named[1], "plans_name": named[2], "configuration": named[3]}
    checkpoints = {number: path / CHECKPOINT for number, path in folds.items()}
    return found | {"checkpoints": {n: file_sha256(path) for n, path in checkpoints.items() if path.is_file()}}


def known_model(file: Path, model: Any) -> dict[str, Any]:
    """What a file says of a model, as ``identify`` wrote it; empty where it says nothing.

    Raises:
        InputError: it is something else.
    """
    texts = ("dataset", "plans", "trainer", "plans_name", "configuration")
    found = {} if model is None else model
    if (
        not isinstance(found, dict)
        or not all(isinstance(found.get(name), str | None) for name in texts)
        or not isinstance(found.get("classes", []), list)
        or not isinstance(found.get("checkpoints", {}), dict)
    ):
        raise InputError(f"{file}: 'model' does not describe a trained model; fit it again")
    return found


def check_same_model(fitted: Mapping[str, Any], given: Mapping[str, Any], calibrator: Path, folder: Path) -> None:
    """Refuse probabilities of another model than the calibrator's, where both tell.

    Raises:
        InputError: they differ; the message says in what.
    """
    for name in _COMPARED:
        if name in fitted and name in given and fitted[name] != given[name]:
            ours, theirs = fitted[name], given[name]
            what = f"other {name}" if name == "plans" else f"{name} {_shown(theirs)}, not {_shown(ours)}"
            raise _other_model(calibrator, folder, what)
    ours, theirs = fitted.get("checkpoints") or {}, given.get("checkpoints") or {}
    for fold in sorted(ours.keys() & theirs.keys()):
        if ours[fold] != theirs[fold]:
            raise _other_model(calibrator, folder, f"another checkpoint of fold {fold}")


def calibrated_from(folder: Path) -> dict[str, Any] | None:
    """What the probabilities of a folder were calibrated with; None if they are the network's.

    ``calibrate apply`` and ``predict`` with a calibrator write it.

    Raises:
        InputError: its file cannot be read.
    """
    file = folder / CALIBRATED_FROM
    return read_json(file) if file.is_file() else None


def refuse_calibrated(folder: Path) -> None:
    """Refuse probabilities that were calibrated: a calibrator is a map from those of the network.

    Raises:
        UsageError: ``calibrate apply`` or ``predict --calibrator`` wrote the folder.
    """
    if (made_from := calibrated_from(folder)) is not None:
        by = f" with {made_from['method']}" if isinstance(made_from.get("method"), str) else ""
        whence = f", {made_from['predictions']}" if isinstance(made_from.get("predictions"), str) else ""
        raise UsageError(f"{folder}: its probabilities are calibrated already{by}; name those of the network{whence}")


def json_sha256(content: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys and its layout on file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _other_model(calibrator: Path, folder: Path, what: str) -> InputError:
    return InputError(
        f"{calibrator} was fitted to another model than {folder} is of ({what}); fit one to this model, or pass "
        "--any-model"
    )


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
