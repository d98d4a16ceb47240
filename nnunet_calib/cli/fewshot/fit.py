"""``nnunet-calib fewshot fit``."""

import argparse
from pathlib import Path

from nnunet_calib.cli import checks
from nnunet_calib.cli.fewshot.options import (
    AXES,
    FEWEST_SAMPLED,
    HEADS,
    MOST_CHUNKS,
    REGISTRATIONS,
    add_prediction,
    add_registrations,
    add_supports,
    check_files,
    check_labels,
    check_limit,
    check_margin,
    check_structures,
    prediction_of,
    shown_size,
)
from nnunet_calib.data.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the step's arguments."""
    parser.description = (
        "Fit a task to every image that has a label map, and write it to one file. Prints how well\n"
        "each volume is predicted by the others: the number to look at."
    )
    parser.epilog = (
        "example:\n  nnunet-calib fewshot fit $nnUNet_results/Dataset035_Brain/nnUNetTrainer__nnUNetPlans__3d_fullres "
        "--images imagesTr --labels labelsTr --label 10 --name hippocampus -o hippocampus.fewshot"
    )
    add_supports(parser)
    parser.add_argument(
        "--label", metavar="V", type=int, nargs="+", required=True, help="value of the structure in them, or of several"
    )
    parser.add_argument("--ignore", metavar="V", type=int, help="value of voxels that do not count")
    parser.add_argument(
        "--name", nargs="+", required=True, help="of the structure, or of each: the network runs once for all of them"
    )
    parser.add_argument(
        "--head",
        metavar="H",
        choices=HEADS,
        default="linear",
        help=f"{', '.join(HEADS)}: the last is trained for minutes on three volumes or more (default: linear)",
    )
    parser.add_argument("--chunks", metavar="N", type=int, default=12, help="intervals with a head each (default: 12)")
    parser.add_argument("--hard", action="store_true", help="heads change at the ends of chunks; default: interpolated")
    parser.add_argument(
        "--extent",
        choices=("aligned", "volume"),
        default="aligned",
        help="how chunks of two volumes are paired: by the base classes (default) or by the ends of the volumes",
    )
    parser.add_argument(
        "--axis", choices=tuple(AXES), default="is", help="of the chunks: inferior-superior (default), ..."
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="adapt the head to each query, without labels: two more passes over each query",
    )
    parser.add_argument(
        "--unlabelled",
        metavar="DIR",
        type=Path,
        help="with --head adapter: images without label maps, in which the structure is held to the volume expected",
    )
    parser.add_argument(
        "--inside",
        metavar="V",
        type=int,
        nargs="*",
        help="labels of the model that the structure may override; default: those it lies in",
    )
    parser.add_argument(
        "--margin",
        metavar="M",
        type=float,
        default=0.3,
        help="by how much the volume in a query may differ from the supports' before it is corrected: 0 to 1, larger "
        "for structures of variable size (default: 0.3)",
    )
    parser.add_argument(
        "--registration",
        choices=REGISTRATIONS,
        default="deformable",
        help="register the supports to each other and to every query, and weigh their labels there against the head: "
        "takes seconds a pair, and the task file then holds the supports' images; none: for structures that lie "
        "anywhere, and for a task without images (default: deformable)",
    )
    add_registrations(parser, limit=True)
    parser.add_argument(
        "--voxels", metavar="N", type=int, default=30_000, help="sampled from each volume (default: 30000)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "-o", dest="output", metavar="TASK", type=Path, required=True, help="file or folder of the task"
    )
    add_prediction(parser, "default: all")


def run(args: argparse.Namespace) -> int:
    """Fit, and print what each support says."""
    from nnunet_calib.fewshot.task.naming import check_asked

    if args.refine and args.head != "linear":
        raise UsageError(f"--refine works with head linear, not {args.head}")
    if args.unlabelled is not None and args.head != "adapter":
        raise UsageError(f"--unlabelled works with head adapter, not {args.head}")
    check_structures(args.label, args.name)
    for label in args.label:
        check_labels(label, args.ignore)
    checks.at_least(1, chunks=args.chunks)
    checks.at_least(0, seed=args.seed)
    checks.at_least(FEWEST_SAMPLED, voxels=args.voxels)
    if args.chunks > MOST_CHUNKS:
        raise UsageError(f"--chunks {args.chunks}: at most {MOST_CHUNKS}")
    check_margin(args.margin)
    check_limit(args.registration_limit)
    base = check_files(args, args.images, args.labels, args.unlabelled)
    for name in args.name:
        check_asked(name, args.inside, base)
    from nnunet_calib.fewshot.structure.fitted import Settings
    from nnunet_calib.fewshot.structure.objective import Objective
    from nnunet_calib.fewshot.task.fit import describe, fit_folder, task_file
    from nnunet_calib.fewshot.volume.registration import Registration

    settings = Settings(
        head=args.head,
        chunks=args.chunks,
        mode="hard" if args.hard else "interpolated",
        extent=args.extent,
        axis=AXES[args.axis],
        margin=args.margin,
        objective=Objective() if args.refine else None,
        registration=Registration(args.registration, args.registration_limit),
    )
    tasks = fit_folder(
        args.model,
        args.images,
        args.labels,
        args.output,
        structures=dict(zip(args.name, args.label, strict=True)),
        ignore=args.ignore,
        settings=settings,
        inside=args.inside,
        unlabelled=args.unlabelled,
        registrations=args.registrations,
        voxels=args.voxels,
        seed=args.seed,
        **prediction_of(args),
    )
    for task in tasks:
        told = describe(task)
        which = f"{task.name:<20} " if len(tasks) > 1 else ""
        for support in told["supports"]:
            dice = told["left_out_dice"].get(support["case"])
            by_others = "" if dice is None else f"   Dice by the others {dice:.3f}"
            print(f"{which}{support['case']:<32} {shown_size(support):>14}{by_others}")
        for note in told["notes"]:
            print(f"note: {which}{note}")
    if settings.registered:
        print("note: the task holds the images and label maps of its supports; --registration none leaves them out")
    print(f"written to {task_file(args.output, *args.name)}")
    return 0
