"""``nnunet-calib trainers``: what can stand behind ``-tr``."""

import argparse

HELP = "list the trainers with their loss, settings and paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Optional name of one trainer."""
    parser.description = "List the trainers, or all settings of one with their defaults."
    parser.epilog = "example:\n  nnunet-calib trainers\n  nnunet-calib trainers MbLSTrainer"
    parser.add_argument("name", nargs="?", help="one trainer: show its settings")


def run(args: argparse.Namespace) -> int:
    """Print the table or one trainer's settings.

    Raises:
        UsageError: there is no trainer of that name.
    """
    from nnunet_calib.data.errors import UsageError
    from nnunet_calib.training.trainers import TRAINERS

    if args.name is None:
        for name, trainer in TRAINERS.items():
            print(f"{name:14} {trainer.LOSS or '-':6} {_summary(trainer)}")
        print("\nsettings: nnunet-calib trainers NAME\ntrain:    nnUNetv2_train DATASET CONFIGURATION FOLD -tr NAME")
        return 0
    if args.name not in TRAINERS:
        raise UsageError(f"no trainer {args.name!r}; there are {', '.join(TRAINERS)}")
    trainer = TRAINERS[args.name]
    print(f"{args.name}: {_summary(trainer)}")
    for key, value in trainer.check_settings({}).items():
        print(f"  {key:28} {value!r}")
    return 0


def _summary(trainer: type) -> str:
    return (trainer.__doc__ or "").splitlines()[0]
