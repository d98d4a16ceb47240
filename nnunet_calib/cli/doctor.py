"""``nnunet-calib doctor``: is this installation able to train?"""

import argparse
import inspect
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nnunet_calib
from nnunet_calib._autoload import OPT_OUT, VARIABLE, opted_out, trainers_folder

HELP = "check the installation: versions, variables, where each trainer comes from"

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments; example in the help."""
    parser.description = "Check versions, nnU-Net's folders and that nnU-Net finds every trainer. Exit code 1 if not."
    parser.epilog = "example:\n  nnunet-calib doctor"


def run(args: argparse.Namespace) -> int:
    """Print one line a check.

    Returns:
        0 if trainings can start, 1 if a problem is named.
    """
    problems = 0
    print(f"nnunet-calib  {nnunet_calib.__version__}  {Path(nnunet_calib.__file__).parent}")
    print(f"python        {sys.version.split()[0]}  {sys.executable}")
    for package in ("nnunetv2", "torch"):
        try:
            print(f"{package:13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:13} PROBLEM: not installed; pip install nnunet-calib")
            return 1
    import torch

    print(f"device        {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU only'}")
    for variable in _FOLDERS:
        folder = os.environ.get(variable)
        if not folder:
            problems += variable != "nnUNet_raw"  # only planning needs that one
            print(f"{variable:20} {'PROBLEM: ' if variable != 'nnUNet_raw' else ''}not set; see nnU-Net's set-up")
        elif not Path(folder).is_dir():
            problems += 1
            print(f"{variable:20} PROBLEM: {folder} does not exist")
        else:
            print(f"{variable:20} {folder}")
    return min(1, problems + _check_trainers())


def _check_trainers() -> int:
    listed = os.environ.get(VARIABLE, "")
    print(f"{VARIABLE:20} {listed or 'empty'}  ({_origin()})")
    if trainers_folder() not in [os.path.abspath(entry) for entry in listed.split(os.pathsep) if entry]:
        print(f"  PROBLEM: our folder is not in it; export {VARIABLE}=$(nnunet-calib trainers-path)")
        return 1
    from contextlib import redirect_stdout
    from io import StringIO

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_calib.training.trainers import TRAINERS

    problems = 0
    for name, trainer in TRAINERS.items():
        # nnU-Net tells its search on stdout.
        with redirect_stdout(StringIO()):
            found = recursive_find_trainer_class_by_name(name)
        if found is trainer:
            print(f"  {name:14} {inspect.getsourcefile(found)}")
        else:
            problems += 1
            print(f"  {name:14} PROBLEM: nnU-Net finds another class of that name in {inspect.getsourcefile(found)}")
    return problems


def _origin() -> str:
    """Who put our folder into the variable, as far as can be told."""
    if opted_out():
        return f"automatic registration is off by {OPT_OUT}"
    # Python 3.15 brought .start files; before, only the .pth runs.
    hook = "nnunet_calib.start" if sys.version_info >= (3, 15) else "nnunet_calib.pth"
    return f"{hook} in site-packages adds our folder" if _in_site_packages(hook) else "set by the user"


def _in_site_packages(name: str) -> bool:
    return any((Path(folder) / name).is_file() for folder in sys.path if folder)
