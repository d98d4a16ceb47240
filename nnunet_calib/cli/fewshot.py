"""``nnunet-calib fewshot``: a new structure from a few annotated volumes."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_calib.cli import checks
from nnunet_calib.data.errors import InputError, UsageError

if TYPE_CHECKING:
    from nnunet_calib.data.dataset import Dataset

HELP = "a new structure from a few annotated volumes, on top of a trained model"

_HEADS = ("linear", "prototype", "local_prototypes", "adapter")
FEWEST_SAMPLED = 100
"""Voxels of a volume without which a head has nothing to be fitted on."""

MOST_CHUNKS = 1000

_REGISTRATIONS = ("none", "affine", "deformable")
LIMIT_S = 120.0
"""Seconds that registering a pair of volumes may take by default."""

_AXES = {"lr": 0, "ap": 1, "is": 2}


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
    raw = argparse.RawDescriptionHelpFormatter

    fit = steps.add_parser("fit", help="fit a task to annotated volumes", formatter_class=raw)
    fit.description = (
        "Fit a task to every image that has a label map, and write it to one file. Prints how well\n"
        "each volume is predicted by the others: the number to look at."
    )
    fit.epilog = (
        "example:\n  nnunet-calib fewshot fit $nnUNet_results/Dataset035_Brain/nnUNetTrainer__nnUNetPlans__3d_fullres "
        "--images imagesTr --labels labelsTr --label 10 --name hippocampus -o hippocampus.fewshot"
    )
    fit.add_argument("model", metavar="MODEL", type=Path, help="folder of a trained model")
    fit.add_argument("--images", metavar="DIR", type=Path, required=True, help="images, named as in imagesTr")
    fit.add_argument("--labels", metavar="DIR", type=Path, required=True, help="label maps, named as in labelsTr")
    fit.add_argument(
        "--label", metavar="V", type=int, nargs="+", required=True, help="value of the structure in them, or of several"
    )
    fit.add_argument("--ignore", metavar="V", type=int, help="value of voxels that do not count")
    fit.add_argument(
        "--name", nargs="+", required=True, help="of the structure, or of each: the network runs once for all of them"
    )
    fit.add_argument(
        "--head",
        metavar="H",
        choices=_HEADS,
        default="linear",
        help=f"{', '.join(_HEADS)}: the last is trained for minutes on three volumes or more (default: linear)",
    )
    fit.add_argument("--chunks", metavar="N", type=int, default=12, help="intervals with a head each (default: 12)")
    fit.add_argument("--hard", action="store_true", help="heads change at the ends of chunks; default: interpolated")
    fit.add_argument(
        "--extent",
        choices=("aligned", "volume"),
        default="aligned",
        help="how chunks of two volumes are paired: by the base classes (default) or by the ends of the volumes",
    )
    fit.add_argument(
        "--axis", choices=tuple(_AXES), default="is", help="of the chunks: inferior-superior (default), ..."
    )
    fit.add_argument(
        "--refine",
        action="store_true",
        help="adapt the head to each query, without labels: two more passes over each query",
    )
    fit.add_argument(
        "--unlabelled",
        metavar="DIR",
        type=Path,
        help="with --head adapter: images without label maps, in which the structure is held to the volume expected",
    )
    fit.add_argument(
        "--inside",
        metavar="V",
        type=int,
        nargs="*",
        help="labels of the model that the structure may override; default: those it lies in",
    )
    fit.add_argument(
        "--margin",
        metavar="M",
        type=float,
        default=0.3,
        help="by how much the volume in a query may differ from the supports' before it is corrected: 0 to 1, larger "
        "for structures of variable size (default: 0.3)",
    )
    fit.add_argument(
        "--registration",
        choices=_REGISTRATIONS,
        default="none",
        help="register the supports to each other and to every query, and weigh their labels there against the head: "
        "takes seconds a pair, and the task file then holds the supports' images (default: none)",
    )
    _add_registrations(fit, limit=True)
    fit.add_argument(
        "--voxels", metavar="N", type=int, default=30_000, help="sampled from each volume (default: 30000)"
    )
    fit.add_argument("--seed", metavar="N", type=int, default=0, help="of the samples (default: 0)")
    fit.add_argument("-o", dest="output", metavar="TASK", type=Path, required=True, help="file or folder of the task")
    _add_prediction(fit, "default: all")

    apply = steps.add_parser("apply", help="segment new images", formatter_class=raw)
    apply.description = (
        "Segment a folder of images: what the model knows, and the structures of any number of tasks,\n"
        "in one pass of the network. CASE.fewshot.json says what became of each case."
    )
    apply.epilog = "example:\n  nnunet-calib fewshot apply MODEL hippocampus.fewshot -i imagesTs -o segmented"
    apply.add_argument("model", metavar="MODEL", type=Path, help="the model that the tasks were fitted to")
    apply.add_argument("tasks", metavar="TASK", type=Path, nargs="+", help="task files, or folders of them")
    apply.add_argument(
        "-i", dest="images", metavar="DIR", type=Path, required=True, help="images, named as in imagesTs"
    )
    apply.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="folder for the results")
    apply.add_argument(
        "--alone",
        action="store_true",
        help="structures in folders of their own, the model's segmentation as nnUNetv2_predict writes it",
    )
    apply.add_argument("--save_probabilities", action="store_true", help="write .npz files as nnUNetv2_predict does")
    apply.add_argument("--continue_prediction", action="store_true", help="leave cases that have a report")
    apply.add_argument("-npp", type=int, default=1, help="images read ahead (default: 1)")
    _add_registrations(apply)
    _add_prediction(apply, "default: those of the tasks")
    _add_rank(steps.add_parser("rank", help="say which images to annotate next", formatter_class=raw))
    _add_evaluate(steps.add_parser("evaluate", help="measure what k volumes are worth", formatter_class=raw))


def run(args: argparse.Namespace) -> int:
    """Do one step and print what came of it."""
    return {"fit": _fit, "apply": _apply, "rank": _rank, "evaluate": _evaluate}[args.step](args)


def _fit(args: argparse.Namespace) -> int:
    from nnunet_calib.fewshot.task.naming import check_asked

    if args.refine and args.head != "linear":
        raise UsageError(f"--refine works with head linear, not {args.head}")
    if args.unlabelled is not None and args.head != "adapter":
        raise UsageError(f"--unlabelled works with head adapter, not {args.head}")
    _check_structures(args.label, args.name)
    for label in args.label:
        _check_labels(label, args.ignore)
    checks.at_least(1, chunks=args.chunks)
    checks.at_least(0, seed=args.seed)
    checks.at_least(FEWEST_SAMPLED, voxels=args.voxels)
    if args.chunks > MOST_CHUNKS:
        raise UsageError(f"--chunks {args.chunks}: at most {MOST_CHUNKS}")
    _check_margin(args.margin)
    _check_limit(args.registration_limit)
    base = _check_files(args, args.images, args.labels, args.unlabelled)
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
        axis=_AXES[args.axis],
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
        **_prediction(args),
    )
    for task in tasks:
        told = describe(task)
        which = f"{task.name:<20} " if len(tasks) > 1 else ""
        for support in told["supports"]:
            dice = told["left_out_dice"].get(support["case"])
            by_others = "" if dice is None else f"   Dice by the others {dice:.3f}"
            print(f"{which}{support['case']:<32} {_size(support):>14}{by_others}")
        for note in told["notes"]:
            print(f"note: {which}{note}")
    print(f"written to {task_file(args.output, *args.name)}")
    return 0


def _apply(args: argparse.Namespace) -> int:
    checks.at_least(0, npp=args.npp)
    if missing := [task for task in args.tasks if not task.exists()]:
        raise InputError(f"{missing[0]}: there is no such task file")
    _check_files(args, args.images)
    from nnunet_calib.fewshot.apply.folder import apply_folder

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
        **_prediction(args),
    )
    broken = [report for report in reports if "error" in report]
    for report in broken:
        print(f"nnunet-calib fewshot: {report['error']}", file=sys.stderr)
    for report in (report for report in reports if "error" not in report):
        for name, found in report["structures"].items():
            what = "absent" if found["absent"] else _size(found)
            print(f"{report['case']:<32} {name:<20} {what:>12}")
            for warning in found["warnings"]:
                print(f"nnunet-calib fewshot: {report['case']}, {name}: {warning}", file=sys.stderr)
    done = len(reports) - len(broken)
    left = f", {len(broken)} could not be used" if broken else ""
    print(f"{done} {'case' if done == 1 else 'cases'}{left}; written to {args.output}")
    return 1 if broken else 0


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Segment images as apply does, and order them by how much their segmentation is expected to be\n"
        "wrong: those to annotate first come first, each with the reasons. OUT/prefilled has a label map of\n"
        "each, with the values of the supports' label maps: correct it in ITK-SNAP or 3D Slicer, put it\n"
        "beside the others and fit again."
    )
    parser.epilog = "example:\n  nnunet-calib fewshot rank MODEL hippocampus.fewshot -i imagesUnlabelled -o ranked"
    parser.add_argument("model", metavar="MODEL", type=Path, help="the model that the tasks were fitted to")
    parser.add_argument("tasks", metavar="TASK", type=Path, nargs="+", help="task files, or folders of them")
    parser.add_argument("-i", dest="images", metavar="DIR", type=Path, required=True, help="images without label maps")
    parser.add_argument("-o", dest="output", metavar="OUT", type=Path, required=True, help="folder for the results")
    parser.add_argument("-npp", type=int, default=1, help="images read ahead (default: 1)")
    _add_registrations(parser)
    _add_prediction(parser, "default: those of the tasks")


def _rank(args: argparse.Namespace) -> int:
    checks.at_least(0, npp=args.npp)
    if missing := [task for task in args.tasks if not task.exists()]:
        raise InputError(f"{missing[0]}: there is no such task file")
    _check_files(args, args.images)
    from nnunet_calib.fewshot.apply.rank import PREFILLED, RANKING, rank_folder

    ranked, broken = rank_folder(
        args.model,
        args.tasks,
        args.images,
        args.output,
        readers=args.npp,
        registrations=args.registrations,
        **_prediction(args),
    )
    for error in broken:
        print(f"nnunet-calib fewshot: {error}", file=sys.stderr)
    for number, one in enumerate(ranked, start=1):
        kept = "; its label map was corrected, and is kept" if one.corrected else ""
        print(f"{number:>4}  {one.case:<32} need {one.need:.2f}  {'; '.join(one.why)}{kept}")
    print(f"written to {args.output / RANKING}; label maps to correct in {args.output / PREFILLED}")
    return 1 if broken else 0


def _check_files(args: argparse.Namespace, *folders: Path | None) -> "Dataset":
    """Refuse a model or folders that are not there; the model's labels."""
    from nnunet_calib.data.dataset import read_dataset
    from nnunet_calib.data.model import checkpoints_of

    checks.step_size(args.step_size)
    checks.folders(*folders, args.prev_stage_predictions)
    checkpoints_of(args.model, args.folds, args.chk)
    return read_dataset(args.model / "dataset.json", args.model / "plans.json")


def _size(measured: Mapping[str, Any]) -> str:
    """Size of a structure: ml, or what a 2D image has instead."""
    if "area_mm2" in measured:
        return f"{measured['area_mm2']:.1f} mm2"
    return f"{measured['pixels']:.0f} pixels" if "pixels" in measured else f"{measured['volume_mm3'] / 1000:.2f} ml"


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 1:
        raise UsageError(f"--margin {margin:g}: it must be at least 0 and below 1")


def _check_limit(seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--registration_limit {seconds:g}: it must be above 0 seconds")


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--registration_limit",
        metavar="S",
        type=float,
        default=LIMIT_S,
        help="seconds that a pair of volumes may take; what is reached by then is used, and told (default: 120)",
    )


def _add_registrations(parser: argparse.ArgumentParser, limit: bool = False) -> None:
    if limit:
        _add_limit(parser)
    parser.add_argument(
        "--registrations", metavar="DIR", type=Path, help="folder where registrations are kept for the next run"
    )


def _check_structures(labels: Sequence[int], names: Sequence[str]) -> None:
    if len(labels) != len(names):
        raise UsageError(f"--label has {len(labels)} values, --name {len(names)} names; give one name for each value")
    for flag, given in (("--label", labels), ("--name", names)):
        if twice := [one for one in given if list(given).count(one) > 1]:
            raise UsageError(f"{flag} {twice[0]} is there twice")


def _check_labels(label: int, ignore: int | None) -> None:
    if label < 1:
        raise UsageError(f"--label {label}: label maps hold a structure as 1 or more; 0 is background")
    if ignore is not None and ignore in (0, label):
        what = "background" if ignore == 0 else "the structure"
        raise UsageError(f"--ignore {ignore} is {what}; name the value of voxels that do not count")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a trained model")
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="images of the supports")
    parser.add_argument("--labels", metavar="DIR", type=Path, required=True, help="label maps of the supports")
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
        choices=(*_HEADS, "registration"),
        default=["linear", "prototype"],
        help=f"of {', '.join(_HEADS)} (this one in P2 with k > 2), and registration: labels that registration carries, "
        "without a head or a network, in P2 (default: linear prototype)",
    )
    parser.add_argument(
        "--registration",
        nargs="+",
        choices=_REGISTRATIONS,
        default=["none"],
        help="of the supports, in P2: heads with each of these; registration alone with each but none (default: none)",
    )
    _add_registrations(parser, limit=True)
    parser.add_argument("--ignore", metavar="V", type=int, help="value of voxels that do not count")
    parser.add_argument(
        "--inside",
        metavar="V",
        type=int,
        nargs="*",
        help="labels of the model that the structure may override; default: those it lies in",
    )
    parser.add_argument("--margin", metavar="M", type=float, default=0.3, help="as in fit (default: 0.3)")
    parser.add_argument("--axis", choices=tuple(_AXES), default="is", help="of the chunks (default: is)")
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
    parser.add_argument("--voxels", metavar="N", type=int, default=30_000, help="of each support (default: 30000)")
    parser.add_argument(
        "-o",
        dest="output",
        metavar="OUT",
        type=Path,
        required=True,
        help="folder for summary.json, pairs.csv and the features of every case (90 MB for a brain of 2 mm)",
    )
    _add_prediction(parser, "default: all")


def _evaluate(args: argparse.Namespace) -> int:
    _check_labels(args.label, args.ignore)
    _check_margin(args.margin)
    checks.at_least(1, chunks=min(args.chunks), sets=args.sets)
    checks.at_least(FEWEST_SAMPLED, voxels=args.voxels)
    if min(args.k) < 1:
        raise UsageError(f"-k {min(args.k)}: it must be 1 or more")
    if not all(0 <= weight < float("inf") for weight in args.refine):
        raise UsageError("--refine: weights of the entropy are 0 or more")
    _check_limit(args.registration_limit)
    _check_files(args, args.images, args.labels, *(args.queries or ()), args.base_labels)
    from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
    from nnunet_calib.fewshot.measure.trials import grid
    from nnunet_calib.fewshot.volume.registration import Registration

    prediction = _prediction(args)
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
        _AXES[args.axis],
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
    names = ("protocol", "head", "registration", "chunks", "extent", "k", "entropy", "pairs")
    numbers = ("Dice", "Dice_worst_tenth", "HD95_median", "ECE_volume", "ECE_foreground", "base_before", "base_after")
    print("  ".join([*names, *numbers]))
    for row in rows:
        cells = ["-" if row[name] is None else str(row[name]) for name in names]
        print("  ".join([*cells, *(f"{row[name]:.4f}" for name in numbers)]))
    print(f"written to {args.output}")
    return 0


def _add_prediction(parser: argparse.ArgumentParser, folds: str) -> None:
    """Flags of nnUNetv2_predict."""
    parser.add_argument("-f", dest="folds", metavar="F", nargs="+", help=f"folds of the model ({folds})")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="name of the checkpoint (checkpoint_final.pth)")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, else cpu")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the sliding window (default: 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, base classes less accurate")
    parser.add_argument(
        "-prev_stage_predictions", metavar="DIR", type=Path, help="of a cascade, segmentations of the stage before"
    )


def _prediction(args: argparse.Namespace) -> dict[str, Any]:
    import multiprocessing

    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = args.device or ("cuda" if there["cuda"] else "cpu")
    if not there[device]:
        raise UsageError(f"-device {device}: torch finds none here; use -device cpu")
    if device == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())  # as nnUNetv2_predict does
    return {
        "folds": args.folds,
        "checkpoint": args.chk,
        "device": device,
        "step_size": args.step_size,
        "mirroring": not args.disable_tta,
        "previous": args.prev_stage_predictions,
    }
