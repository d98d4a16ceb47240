"""Tell nnU-Net where the trainers are. Run by ``nnunet_calib.pth`` / ``.start`` at every interpreter start.

Standard library only, silent, never raises. It appends one folder to the environment variable ``nnUNet_extTrainer``,
which nnU-Net reads when it looks for a trainer by name; nothing else is touched. Opt out: ``NNUNET_CALIB_AUTOLOAD=0``.
"""

import os
from contextlib import suppress

VARIABLE = "nnUNet_extTrainer"
OPT_OUT = "NNUNET_CALIB_AUTOLOAD"
MODULE = "nnunet_calib_trainers.py"


def trainers_folder() -> str:
    """Folder that nnU-Net has to search: inside the wheel, or beside the package in a source checkout.

    Returns:
        Absolute path; an empty string where neither exists.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    for folder in (os.path.join(package, "_trainers"), os.path.join(os.path.dirname(package), "trainers")):
        if os.path.isfile(os.path.join(folder, MODULE)):
            return folder
    return ""


def opted_out() -> bool:
    """Whether the user switched the automatic registration off."""
    return os.environ.get(OPT_OUT, "").strip().lower() in ("0", "false", "no", "off")


def register() -> None:
    """Append the trainers folder to ``nnUNet_extTrainer`` unless it is there already or the user opted out."""
    with suppress(Exception):
        if opted_out():
            return
        folder = trainers_folder()
        listed = [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]
        if folder and folder not in listed:
            os.environ[VARIABLE] = os.pathsep.join([*listed, folder])
