"""``nnunet-calib trainers-path``: the folder for ``nnUNet_extTrainer``."""

import argparse

from nnunet_calib._autoload import trainers_folder
from nnunet_calib.data.errors import InputError

HELP = "print the folder that nnUNet_extTrainer has to name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments; example in the help."""
    parser.description = "Print the folder with our trainers. Only needed where the automatic way is switched off."
    parser.epilog = "example:\n  export nnUNet_extTrainer=$(nnunet-calib trainers-path)"


def run(args: argparse.Namespace) -> int:
    """Print the folder.

    Raises:
        InputError: the installation lacks it.
    """
    folder = trainers_folder()
    if not folder:
        raise InputError("the trainers folder is missing from this installation; reinstall nnunet-calib")
    print(folder)
    return 0
