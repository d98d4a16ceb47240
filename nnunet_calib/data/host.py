"""nnU-Net as it is set up on this computer: its variables and its modules of trainers, without importing it."""

import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
TRAINER_FOLDERS = "nnUNet_extTrainer"
_YES, _NO = ("true", "1", "t"), ("false", "0", "f")


def folder_problem(variable: str) -> str | None:
    """What is wrong with a variable of ``FOLDERS``, and what to do; None if nothing is."""
    folder = os.environ.get(variable)
    if not folder:
        return f"not set; export {variable}=FOLDER, as in nnU-Net's set-up"
    if folder.startswith("~"):
        return f"{folder}: nnU-Net does not expand ~; write the whole path"
    if not os.path.isdir(folder):
        what = "is no folder" if os.path.exists(folder) else f"does not exist; mkdir -p {folder}"
        return f"{folder} {what}"
    # nnU-Net only reads the raw data.
    needed = os.R_OK | os.X_OK | (0 if variable == "nnUNet_raw" else os.W_OK)
    return None if os.access(folder, needed) else f"{folder} cannot be {'written to' if needed & os.W_OK else 'read'}"


def variable_problems() -> Iterator[tuple[str, str]]:
    """Other variables whose value ends nnU-Net's commands, or means something else than it says: name and what."""
    for variable, ended in (
        ("nnUNet_n_proc_DA", "planning"),
        ("nnUNet_def_n_proc", "every command of nnU-Net"),
    ):
        if (value := os.environ.get(variable)) is not None and _whole(value) < 1:
            yield variable, f"{value!r} ends {ended}; unset it, or set 1 or more"
    for variable in ("nnUNet_npp", "nnUNet_nps"):
        value = os.environ.get(variable)
        both = all(_whole(os.environ.get(name, "")) == 0 for name in ("nnUNet_npp", "nnUNet_nps"))
        if value and _whole(value) < 1 and not both:  # both 0: one after the other
            yield variable, f"{value!r} is no number of processes of nnUNetv2_predict; unset it, or set 1 or more"
    compiled = os.environ.get("nnUNet_compile")
    if compiled is not None and compiled.lower() not in (*_YES, *_NO):
        yield "nnUNet_compile", f"{compiled!r} switches compilation off; set true or false"
    logged = os.environ.get("nnUNet_wandb_enabled", "0")
    if logged not in ("0", "False", "false", "1", "True", "true"):
        yield "nnUNet_wandb_enabled", f"{logged!r} ends every training; set 0 or 1"
    elif logged in ("1", "True", "true") and find_spec("wandb") is None:
        yield "nnUNet_wandb_enabled", "wandb is not installed, which ends every training; pip install wandb, or set 0"
    for folder in trainer_folders():
        if not folder.is_dir():
            yield TRAINER_FOLDERS, f"{folder} does not exist"


def trainer_folders() -> list[Path]:
    """The folders of ``nnUNet_extTrainer``, in the order in which nnU-Net searches them."""
    listed = os.environ.get(TRAINER_FOLDERS, "").split(os.pathsep)
    return list(dict.fromkeys(Path(entry) for entry in listed if entry.strip()))


def modules_with_trainers(names: Iterable[str], folders: Iterable[Path]) -> list[Path]:
    """Python files that may define one of these classes: they hold its name, or import all of another module."""
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b|import \*")
    return [file for folder in folders for file in _modules(folder) if wanted.search(_text(file))]


def own_trainer_folders() -> list[Path]:
    """The folder in nnU-Net itself that it searches first; none if it is not installed."""
    package = find_spec("nnunetv2")
    places = package.submodule_search_locations if package is not None else None
    return [Path(place, "training", "nnUNetTrainer") for place in places or ()]


def _modules(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.py") if not file.name.startswith("."))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _whole(text: str) -> int:
    """A whole number as ``int`` reads it; -1 for anything else."""
    try:
        return int(text)
    except ValueError:
        return -1
