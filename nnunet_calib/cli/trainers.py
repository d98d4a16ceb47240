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
    from nnunet_calib.training.catalogue import listed_trainers, no_trainer
    from nnunet_calib.training.settings import check_settings

    trainers = listed_trainers()
    if args.name is None:
        for name, trainer in trainers.items():
            print(f"{name:14} {trainer.loss or '-':6} {trainer.summary}")
        print("\nsettings: nnunet-calib trainers NAME\ntrain:    nnUNetv2_train DATASET CONFIGURATION FOLD -tr NAME")
        return 0
    if args.name not in trainers:
        raise UsageError(no_trainer(args.name))
    trainer = trainers[args.name]
    print(f"{args.name}: {trainer.summary}")
    for key, value in check_settings({}, trainer.loss, trainer.fixed).items():
        print(f"  {key:28} {value!r}")
    return 0
