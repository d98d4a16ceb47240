"""``nnunet-calib fewshot``: a new structure from a few annotated volumes. One file a step."""

import argparse

from nnunet_calib.cli.fewshot import apply, evaluate, finetune, fit, rank

HELP = "a new structure from a few annotated volumes, on top of a trained model"

_STEPS = {
    "fit": (fit, "fit a task to annotated volumes"),
    "apply": (apply, "segment new images"),
    "rank": (rank, "say which images to annotate next"),
    "evaluate": (evaluate, "measure what k volumes are worth"),
    "finetune": (finetune, "train the whole network on with the new classes, from five volumes or more"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Learn a new structure from one to ten annotated volumes, on the features of any trained\n"
        "nnU-Net, and segment it in new images beside the classes that the model knows."
    )
    parser.epilog = (
        "examples:\n"
        "  nnunet-calib fewshot fit MODEL --images imagesTr --labels labelsTr --label 10 --name hippocampus "
        "-o hippocampus.fewshot\n"
        "  nnunet-calib fewshot apply MODEL hippocampus.fewshot -i imagesTs -o segmented"
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    for name, (step, told) in _STEPS.items():
        step.add_arguments(steps.add_parser(name, help=told, formatter_class=argparse.RawDescriptionHelpFormatter))


def run(args: argparse.Namespace) -> int:
    """Do one step and print what came of it."""
    return _STEPS[args.step][0].run(args)
