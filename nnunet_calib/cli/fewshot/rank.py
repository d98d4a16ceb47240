"""``nnunet-calib fewshot rank``."""

import argparse
import sys
from pathlib import Path

from nnunet_calib.cli import checks
from nnunet_calib.cli.fewshot.options import (
    add_prediction,
    add_registrations,
    add_tasks,
    check_files,
    prediction_of,
)
from nnunet_calib.data.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the step's arguments."""
    parser.description = (
        "Segment images as apply does, and order them by how much their segmentation is expected to be\n"
        "wrong: those to annotate first come first, each with the reasons. OUT/prefilled has a label map of\n"
        "each, with the values of the supports' label maps: correct it in ITK-SNAP or 3D Slicer, put it\n"
        "beside the others and fit again."
    )
    parser.epilog = "example:\n  nnunet-calib fewshot rank MODEL hippocampus.fewshot -i imagesUnlabelled -o ranked"
    add_tasks(parser)
    parser.add_argument("-i", dest="images", metavar="DIR", type=Path, required=True, help="images without label maps")
    parser.add_argument("-o", dest="output", metavar="OUT", type=Path, required=True, help="folder for the results")
    parser.add_argument("-npp", type=int, default=1, help="images read ahead (default: 1)")
    add_registrations(parser)
    add_prediction(parser, "default: those of the tasks")


def run(args: argparse.Namespace) -> int:
    """Order the images, and print the order."""
    checks.at_least(0, npp=args.npp)
    if missing := [task for task in args.tasks if not task.exists()]:
        raise InputError(f"{missing[0]}: there is no such task file")
    check_files(args, args.images)
    from nnunet_calib.fewshot.apply.rank import PREFILLED, RANKING, rank_folder

    ranked, broken = rank_folder(
        args.model,
        args.tasks,
        args.images,
        args.output,
        readers=args.npp,
        registrations=args.registrations,
        **prediction_of(args),
    )
    for error in broken:
        print(f"nnunet-calib fewshot: {error}", file=sys.stderr)
    for number, one in enumerate(ranked, start=1):
        kept = "; its label map was corrected, and is kept" if one.corrected else ""
        print(f"{number:>4}  {one.case:<32} need {one.need:.2f}  {'; '.join(one.why)}{kept}")
    print(f"written to {args.output / RANKING}; label maps to correct in {args.output / PREFILLED}")
    return 1 if broken else 0
