"""``nnunet-calib fewshot apply``."""

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
    shown_size,
)
from nnunet_calib.data.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the step's arguments."""
    parser.description = (
        "Segment a folder of images: what the model knows, and the structures of any number of tasks,\n"
        "in one pass of the network. CASE.fewshot.json says what became of each case."
    )
    parser.epilog = "example:\n  nnunet-calib fewshot apply MODEL hippocampus.fewshot -i imagesTs -o segmented"
    add_tasks(parser)
    parser.add_argument(
        "-i", dest="images", metavar="DIR", type=Path, required=True, help="images, named as in imagesTs"
    )
    parser.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="structures in folders of their own, the model's segmentation as nnUNetv2_predict writes it",
    )
    parser.add_argument("--save_probabilities", action="store_true", help="write .npz files as nnUNetv2_predict does")
    parser.add_argument("--continue_prediction", action="store_true", help="leave cases that have a report")
    parser.add_argument("-npp", type=int, default=1, help="images read ahead (default: 1)")
    add_registrations(parser)
    add_prediction(parser, "default: those of the tasks")


def run(args: argparse.Namespace) -> int:
    """Segment the images, and print what was found."""
    checks.at_least(0, npp=args.npp)
    if missing := [task for task in args.tasks if not task.exists()]:
        raise InputError(f"{missing[0]}: there is no such task file")
    check_files(args, args.images)
    from nnunet_calib.fewshot.apply.folder import apply_folder, wider_views

    reports = apply_folder(
        args.model,
        args.tasks,
        args.images,
        args.output,
        merge=not args.alone,
        probabilities=args.save_probabilities,
        readers=args.npp,
        registrations=args.registrations,
        overwrite=not args.continue_prediction,
        **prediction_of(args),
    )
    broken = [report for report in reports if "error" in report]
    for report in broken:
        print(f"nnunet-calib fewshot: {report['error']}", file=sys.stderr)
    for report in (report for report in reports if "error" not in report):
        for name, found in report["structures"].items():
            what = "absent" if found["absent"] else shown_size(found)
            print(f"{report['case']:<32} {name:<20} {what:>12}")
            for warning in found["warnings"]:
                print(f"nnunet-calib fewshot: {report['case']}, {name}: {warning}", file=sys.stderr)
    if wider := wider_views(reports):
        print(f"nnunet-calib fewshot: {wider}", file=sys.stderr)
    done = len(reports) - len(broken)
    left = f", {len(broken)} could not be used" if broken else ""
    print(f"{done} {'case' if done == 1 else 'cases'}{left}; written to {args.output}")
    return 1 if broken else 0
