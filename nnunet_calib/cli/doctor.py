"""``nnunet-calib doctor``: is this installation able to train?"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nnunet_calib
from nnunet_calib._autoload import MODULE, OPT_OUT, VARIABLE, opted_out, trainers_folder

HELP = "check the installation: versions, variables, where each trainer comes from"

_DRIVERS = ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg")
"""What is there where a computer has a GPU of NVIDIA, of AMD, or one under Windows' Linux."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments; example in the help."""
    parser.description = (
        "Check versions, nnU-Net's variables and folders, and that nnU-Net finds every trainer. Exit code 1 if not."
    )
    parser.epilog = "example:\n  nnunet-calib doctor"


def run(args: argparse.Namespace) -> int:
    """Print one line a check.

    Returns:
        0 if trainings can start, 1 if a problem is named.
    """
    from nnunet_calib.data.host import FOLDERS, folder_problem, variable_problems

    print(f"nnunet-calib  {nnunet_calib.__version__}  {Path(nnunet_calib.__file__).parent}")
    print(f"python        {sys.version.split()[0]}  {sys.executable}")
    for package in ("nnunetv2", "torch"):
        try:
            print(f"{package:13} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:13} PROBLEM: not installed; pip install nnunet-calib")
            return 1
    problems = 0
    if problem := _torchvision_problem():
        problems += 1
        print(f"torchvision   PROBLEM: {problem}")
    print(f"device        {_device()}")
    for variable in FOLDERS:
        problem = folder_problem(variable)
        if problem is None:
            print(f"{variable:20} {os.environ[variable]}")
        elif variable == "nnUNet_raw" and not os.environ.get(variable):
            print(f"{variable:20} not set; only planning needs it")
        else:
            problems += 1
            print(f"{variable:20} PROBLEM: {problem}")
    for variable, problem in variable_problems():
        problems += 1
        print(f"{variable:20} PROBLEM: {problem}")
    return min(1, problems + _check_trainers())


def _torchvision_problem() -> str | None:
    """Why this torchvision, which nnU-Net's networks import, does not work with this torch; both are only looked up."""
    try:
        theirs, ours = version("torchvision"), version("torch")
    except PackageNotFoundError:
        return "not installed; install the pair of torch and torchvision for this machine (docs/install.md)"
    # Under Linux PyPI has builds for CUDA, without a mark, and a CPU build does not load beside one of them.
    if sys.platform == "linux" and ours.endswith("+cpu") != theirs.endswith("+cpu"):
        return f"{theirs} and torch {ours} are of different builds; install both from one index (docs/install.md)"
    return None


def _device() -> str:
    """What a training would run on; torch, which takes seconds, is asked only where there may be a GPU."""
    if sys.platform == "linux" and not shutil.which("nvidia-smi") and not any(map(os.path.exists, _DRIVERS)):
        return "CPU only"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if torch.backends.mps.is_available() else "CPU only; torch sees no GPU"


def _check_trainers() -> int:
    from nnunet_calib.data.host import modules_with_trainers
    from nnunet_calib.training.catalogue import listed_trainers, other_folders

    listed, ours = os.environ.get(VARIABLE, ""), trainers_folder()
    print(f"{VARIABLE:20} {listed or 'empty'}  ({_origin()})")
    if ours not in [os.path.abspath(entry) for entry in listed.split(os.pathsep) if entry]:
        print(f"  PROBLEM: our folder is not in it; export {VARIABLE}=$(nnunet-calib trainers-path)")
        return 1
    names = list(listed_trainers())
    own, *others = other_folders()
    problems: dict[str, str] = {}
    if modules_with_trainers(names, [own]) or any(any(folder.rglob("*.py")) for folder in others):
        problems = _search(names)  # there is something else that nnU-Net could find, or stumble over
    found = [name for name in names if name not in problems]
    if found:
        print(f"  {len(found)} trainers in {os.path.join(ours, MODULE)}: {', '.join(found)}")
    for problem in dict.fromkeys(problems.values()):
        print(f"  PROBLEM: {problem} ({', '.join(name for name in problems if problems[name] == problem)})")
    return len(problems)


def _search(names: Iterable[str]) -> dict[str, str]:
    """What is wrong with trainers, by name, when nnU-Net searches for them, which imports what it searches."""
    import traceback

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_calib.data.host import modules_with_trainers
    from nnunet_calib.data.quiet import quiet
    from nnunet_calib.training.catalogue import other_folders
    from nnunet_calib.training.trainers import TRAINERS

    problems = {}
    for name in names:
        try:
            with quiet():  # where nnU-Net tells its search
                found = recursive_find_trainer_class_by_name(name)
        except Exception as error:  # of a module of others, imported in the search
            passed = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
            where = [file for file in passed if any(folder in file.parents for folder in other_folders()[1:])]
            reason = " ".join(str(error).split())[:200]
            problems[name] = f"nnU-Net's search ends{f' in {where[-1]}' if where else ''}: {reason}"
            continue
        if found is not TRAINERS[name]:
            file = next(iter(modules_with_trainers([name], other_folders())), found.__module__)
            problems[name] = f"nnU-Net finds another class of that name in {file}"
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
