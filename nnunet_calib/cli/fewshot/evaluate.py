"""``nnunet-calib fewshot evaluate``."""

import argparse
from pathlib import Path

from nnunet_calib.cli import checks
from nnunet_calib.cli.fewshot.options import (
    AXES,
    FEWEST_SAMPLED,
    HEADS,
    REGISTRATIONS,
    add_prediction,
    add_registrations,
    add_supports,
    check_files,
    check_labels,
    check_limit,
    check_margin,
    prediction_of,
)
from nnunet_calib.data.errors import UsageError

_PUBLISHED = ("repri", "tim", "tim_adm", "tim_volume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the step's arguments."""
    parser.description = (
        "Fit to every set of k annotated volumes and try each on every other, for any combination of\n"
        "heads, chunks and extents. P1 is the papers' protocol: one support, three chunks, and the\n"
        "extent of the structure taken from the query's own labels. P2 is the real one: nothing is\n"
        "known of the query. Both are in one table; finished pairs are not computed again."
    )
    parser.epilog = (
        "example:\n  nnunet-calib fewshot evaluate MODEL --images imagesTr --labels labelsTr --label 10 "
        "--name hippocampus -k 1 3 5 -o evaluated"
    )
    add_supports(parser)
    parser.add_argument("--label", metavar="V", type=int, required=True, help="value of the structure in them")
    parser.add_argument("--name", required=True, help="of the structure")
    parser.add_argument(
        "--queries",
        metavar=("IMAGES", "LABELS"),
        type=Path,
        nargs=2,
        help="folders of other cases to try on; default: the supports, each by the others",
    )
    parser.add_argument(
        "--base_labels",
        metavar="DIR",
        type=Path,
        help="label maps of the queries with the model's own labels: scores the base classes before and after",
    )
    parser.add_argument("--protocols", nargs="+", choices=("P1", "P2"), default=["P1", "P2"], help="default: both")
    parser.add_argument(
        "--heads",
        metavar="H",
        nargs="+",
        choices=(*HEADS, "registration"),
        default=["linear", "prototype", "registration"],
        help=f"of {', '.join(HEADS)} (this one in P2 with k > 2), and registration: labels that registration carries, "
        "without a head or a network, in P2 (default: linear prototype registration)",
    )
    parser.add_argument(
        "--registration",
        nargs="+",
        choices=REGISTRATIONS,
        default=["none", "deformable"],
        help="of the supports, in P2: heads with each of these; registration alone with each but none (default: none "
        "deformable)",
    )
    add_registrations(parser, limit=True)
    parser.add_argument("--ignore", metavar="V", type=int, help="value of voxels that do not count")
    parser.add_argument(
        "--inside",
        metavar="V",
        type=int,
        nargs="*",
        help="labels of the model that the structure may override; default: those it lies in",
    )
    parser.add_argument("--margin", metavar="M", type=float, default=0.3, help="as in fit (default: 0.3)")
    parser.add_argument("--axis", choices=tuple(AXES), default="is", help="of the chunks (default: is)")
    parser.add_argument("--chunks", metavar="N", type=int, nargs="+", default=[12], help="P2 (default: 12)")
    parser.add_argument("--hard", action="store_true", help="heads change at the ends of chunks")
    parser.add_argument(
        "--extents", nargs="+", choices=("aligned", "volume"), default=["aligned"], help="P2 (default: aligned)"
    )
    parser.add_argument("-k", metavar="K", type=int, nargs="+", default=[1, 3, 5], help="P2 (default: 1 3 5)")
    parser.add_argument("--sets", metavar="N", type=int, help="of k supports; default: as many as supports")
    parser.add_argument(
        "--refine",
        metavar="H",
        type=float,
        nargs="+",
        default=[],
        help="also with the linear head refined on each query, with these weights of the entropy",
    )
    parser.add_argument(
        "--refinements",
        metavar="R",
        nargs="+",
        choices=_PUBLISHED,
        default=[],
        help=f"also with the linear head refined as published: {', '.join(_PUBLISHED)} (TIM by gradient "
        "descent, and by turns; the last with the volume expected in place of equal shares); P2",
    )
    parser.add_argument("--voxels", metavar="N", type=int, default=30_000, help="of each support (default: 30000)")
    parser.add_argument(
        "-o",
        dest="output",
        metavar="OUT",
        type=Path,
        required=True,
        help="folder for summary.json, pairs.csv and the features of every case (90 MB for a brain of 2 mm)",
    )
    add_prediction(parser, "default: all")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the table."""
    check_labels(args.label, args.ignore)
    check_margin(args.margin)
    checks.at_least(1, chunks=min(args.chunks), sets=args.sets)
    checks.at_least(FEWEST_SAMPLED, voxels=args.voxels)
    if min(args.k) < 1:
        raise UsageError(f"-k {min(args.k)}: it must be 1 or more")
    if not all(0 <= weight < float("inf") for weight in args.refine):
        raise UsageError("--refine: weights of the entropy are 0 or more")
    check_limit(args.registration_limit)
    check_files(args, args.images, args.labels, *(args.queries or ()), args.base_labels)
    from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
    from nnunet_calib.fewshot.measure.trials import grid
    from nnunet_calib.fewshot.volume.registration import Registration

    prediction = prediction_of(args)
    if prediction.pop("previous") is not None:
        raise UsageError("evaluate takes no cascade")
    trials = grid(
        args.heads,
        args.chunks,
        args.extents,
        args.k,
        args.protocols,
        [None, *args.refine],
        args.sets,
        "hard" if args.hard else "interpolated",
        [Registration(kind, args.registration_limit) for kind in args.registration],
        args.margin,
        AXES[args.axis],
        args.refinements,
    )
    images, labels = args.queries or (None, None)
    rows = evaluate_folder(
        args.model,
        args.images,
        args.labels,
        args.output,
        name=args.name,
        value=args.label,
        trials=trials,
        query_images=images,
        query_labels=labels,
        base_labels=args.base_labels,
        voxels=args.voxels,
        ignore=args.ignore,
        inside=args.inside,
        registrations=args.registrations,
        **prediction,
    )
    names = ("protocol", "head", "registration", "chunks", "extent", "k", "refinement", "entropy", "pairs")
    numbers = ("Dice", "Dice_worst_tenth", "HD95_median", "ECE_volume", "ECE_foreground", "base_before", "base_after")
    print("  ".join([*names, *numbers]))
    for row in rows:
        cells = ["-" if row[name] is None else str(row[name]) for name in names]
        print("  ".join([*cells, *(f"{row[name]:.4f}" for name in numbers)]))
    print(f"written to {args.output}")
    return 0
