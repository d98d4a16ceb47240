"""``nnunet-calib fewshot finetune``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nnunet_calib.cli.configure import setting_of, trainers_that_start
from nnunet_calib.cli.fewshot.options import (
    add_prediction,
    add_supports,
    check_files,
    check_labels,
    check_structures,
    prediction_of,
)
from nnunet_calib.data.errors import UsageError

FEWEST = 5
"""Volumes below which a head on the features of the network is the better choice."""

EPOCHS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the step's arguments."""
    parser.description = (
        "Add classes to a trained model: its segmentation heads are widened, and all of the network is\n"
        "trained on, with nnU-Net's own training, on every image that has a label map. Labels of the classes\n"
        "that the model knows are its own predictions there. The result is an nnU-Net model of a new data set,\n"
        "for nnUNetv2_predict. It wants five volumes or more and a GPU, or patience."
    )
    parser.epilog = (
        "example:\n  nnunet-calib fewshot finetune MODEL --images imagesTr --labels labelsTr --label 10 "
        "--name hippocampus -d 901\n\n"
        "to try it on a CPU, in minutes for small networks; small structures need more steps:\n"
        "  ... -d 901 --set num_epochs=8 num_iterations_per_epoch=50 initial_lr=0.01 -device cpu"
    )
    add_supports(parser)
    parser.add_argument(
        "--label", metavar="V", type=int, nargs="+", required=True, help="value of the structure in them, or of several"
    )
    parser.add_argument("--ignore", metavar="V", type=int, help="value of voxels that do not count")
    parser.add_argument("--name", nargs="+", required=True, help="of the structure, or of each")
    parser.add_argument(
        "-d", dest="number", metavar="ID", type=int, required=True, help="number of the new data set, 1 to 999"
    )
    parser.add_argument(
        "-tr", dest="trainer", metavar="NAME", default="StockTrainer", help="one of ours (default: StockTrainer)"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        default=[],
        metavar="K=V",
        help=f"settings, as in configure (default: num_epochs={EPOCHS} save_every=5, and of finetune_from)",
    )
    parser.add_argument(
        "--fold",
        default="all",
        help="of the new training: all volumes (default), or 0 to 4, which leave a fifth out and validate on it",
    )
    parser.add_argument("--prepare", action="store_true", help="stop before the training, and print its command")
    add_prediction(parser, "default: all; the training starts from the first")


def run(args: argparse.Namespace) -> int:
    """Make the data set, train, and say how to use the model."""
    from nnunet_calib.data.host import FOLDERS, folder_problem
    from nnunet_calib.data.model import checkpoints_of
    from nnunet_calib.fewshot.task.naming import check_asked

    check_structures(args.label, args.name)
    for label in args.label:
        check_labels(label, args.ignore)
    if not 1 <= args.number <= 999:
        raise UsageError(f"-d {args.number}: data sets are numbered 1 to 999")
    if args.fold not in ("all", *"01234"):
        raise UsageError(f"--fold {args.fold}: it is all, or 0 to 4")
    base = check_files(args, args.images, args.labels)
    for name in args.name:
        check_asked(name, None, base)
    if base.has_regions:
        raise UsageError(
            f"{args.model}: the model has regions, to which no class can be added by fine-tuning; use fewshot fit"
        )
    start = next(iter(checkpoints_of(args.model, args.folds, args.chk).values()))
    settings = _checked_settings(args, start)
    for variable in FOLDERS:
        if problem := folder_problem(variable):
            raise UsageError(f"{variable}: {problem}")
    from nnunet_calib.fewshot.task.added_class import prepare_dataset, train

    prediction = prediction_of(args)
    if prediction.pop("previous") is not None:
        raise UsageError("a cascade cannot be fine-tuned; use fewshot fit")
    made = prepare_dataset(
        args.model,
        args.images,
        args.labels,
        number=args.number,
        structures=dict(zip(args.name, args.label, strict=True)),
        ignore=args.ignore,
        settings=settings,
        trainer=args.trainer,
        fold=args.fold,
        **prediction,
    )
    if made.cases < FEWEST:
        print(
            f"nnunet-calib fewshot: {made.cases} volumes are few to train a network on; from {FEWEST} on it can be "
            "worth it. Compare with fewshot fit",
            file=sys.stderr,
        )
    model = f"{made.configuration} -tr {args.trainer} -p {made.plans_name}"
    command = f"nnUNetv2_train {args.number} {made.configuration} {args.fold} -tr {args.trainer} -p {made.plans_name}"
    command += f" -device {prediction['device']}"
    print(f"{made.name}: {made.cases} volumes, labels {', '.join(f'{v} {n}' for n, v in made.labels.items() if v)}")
    if args.prepare:
        print(f"train: {command}")
    else:
        print(f"if the training is interrupted: {command} --c", flush=True)
        train(made, args.trainer, prediction["device"])
    print(
        f"segment: nnUNetv2_predict -i imagesTs -o segmented -d {args.number} -c {model} -f {args.fold} "
        f"-device {prediction['device']}"
    )
    return 0


def _checked_settings(args: argparse.Namespace, start: Path) -> dict[str, Any]:
    """All that the plans of the new data set say of the training."""
    from nnunet_calib.training.catalogue import check_may_be_ours, listed_trainers
    from nnunet_calib.training.settings import RefusedSettings, check_settings

    given = dict(setting_of(text) for text in args.settings)
    if "finetune_from" in given:
        raise UsageError("--set finetune_from: it is MODEL; leave it out")
    settings = {"num_epochs": EPOCHS, "save_every": 5, **given, "finetune_from": str(start.absolute())}
    check_may_be_ours(args.trainer)
    try:
        if (listed := listed_trainers().get(args.trainer)) is not None:
            check_settings(settings, listed.loss, listed.fixed)
        trainers_that_start([args.trainer], settings, 3)
    except RefusedSettings as refusal:
        raise UsageError(f"{args.trainer}: {str(refusal).removeprefix('nnunet-calib: ')}") from refusal
    return settings
