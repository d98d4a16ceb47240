"""``nnunet-calib evaluate``: score a folder of predictions."""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnunet_calib.cli.words import counted

HELP = "score a folder of predictions: overlap, surface distances, calibration"

_STRUCTURE_COLUMNS = ("Dice", "IoU", "HD", "HD95", "ASSD", "NSD")
_DISTANCE_COLUMNS = ("HD", "HD95", "ASSD", "MASD")
_CALIBRATION_COLUMNS = ("ECE", "CECE", "ACE", "NLL", "Brier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Score label maps against references: Dice, IoU, volumes, HD, HD95, ASSD, MASD and NSD of\n"
        "every label or region and, where there are probabilities (nnU-Net's <case>.npz of\n"
        "--save_probabilities, or others), ECE, CECE, ACE, adaptive ECE, MCE, AURC, NLL and Brier\n"
        "score. Writes summary.json (also readable by nnU-Net), cases.csv and reliability.json."
    )
    parser.epilog = "example:\n  nnunet-calib evaluate labelsTs predictions -o scores"
    parser.add_argument("reference", metavar="REF", type=Path, help="folder of reference label maps")
    parser.add_argument("prediction", metavar="PRED", type=Path, help="folder of predicted label maps")
    parser.add_argument("-o", dest="output", metavar="OUT", type=Path, required=True, help="folder for the results")
    parser.add_argument("-djfile", type=Path, help="dataset.json; else the one in or near PRED, then beside REF")
    parser.add_argument("-pfile", type=Path, help="plans.json; else the one in or near PRED, if any")
    parser.add_argument("-np", type=int, help="cases scored at the same time; default: one per processor, at most 8")
    parser.add_argument(
        "--engine",
        choices=["processes", "dask"],
        default="processes",
        help="processes (default), or dask: a Dask cluster of -np processes here",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS_OR_FILE",
        help="with --engine dask: a running cluster, tcp://host:port or its file",
    )
    parser.add_argument("--fresh", action="store_true", help="score every case again, unchanged ones too")
    parser.add_argument("--force", action="store_true", help="REF may look like predictions, and PRED like references")
    parser.add_argument("--chill", action="store_true", help="leave out references that have no prediction")
    parser.add_argument(
        "--nsd",
        metavar="[LABEL=]MM",
        type=_tolerance,
        nargs="+",
        default=[],
        help="tolerances of NSD in mm: the first for NSD (default: 1), others for NSD@<MM>mm, LABEL=MM for one label",
    )
    parser.add_argument(
        "--surface",
        choices=["voxel", "area"],
        default="voxel",
        help="voxel (default; as MONAI), or area (as DeepMind's tool)",
    )
    parser.add_argument(
        "--hd95",
        choices=["directed", "pooled"],
        default="directed",
        help="directed (default; as MONAI), or pooled (as medpy); of further percentiles too",
    )
    parser.add_argument(
        "--hd", metavar="P", type=float, nargs="+", default=[], help="further percentiles: 99 gives HD99"
    )
    parser.add_argument("--bins", metavar="N", type=int, default=15, help="calibration bins (default: 15)")
    parser.add_argument(
        "--dilate", metavar="MM", type=float, default=0.0, help="widen the region foreground by so many mm (default: 0)"
    )
    parser.add_argument("--boundary", action="store_true", help="calibration within 3 mm of the reference surface too")
    parser.add_argument(
        "--protocol", choices=["default", "nacl"], default="default", help="nacl: as the code of those papers, too"
    )
    parser.add_argument(
        "--calibrator",
        metavar="FILE",
        type=Path,
        help="score probabilities as this calibrator.json (of calibrate fit), or that of this folder, makes them",
    )
    parser.add_argument("--any-model", action="store_true", help="a calibrator of another model will do")
    parser.add_argument("-device", default="cpu", help="cpu (default), cuda or cuda:<number>")


def _tolerance(text: str) -> tuple[str | None, float]:
    label, given, millimetres = text.rpartition("=")
    try:
        return (label if given else None), float(millimetres)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither MM nor LABEL=MM (folders come before the options)"
        ) from error


def run(args: argparse.Namespace) -> int:
    """Score the folder, print the means; 1 if a case could not be scored."""
    from tqdm import tqdm

    from nnunet_calib.evaluation import Protocol, evaluate_folder

    everywhere = [mm for label, mm in args.nsd if label is None] or [Protocol.nsd_tolerance]
    summary = evaluate_folder(
        args.reference,
        args.prediction,
        args.output,
        args.djfile,
        args.pfile,
        processes=args.np,
        engine=args.engine,
        scheduler=args.scheduler,
        fresh=args.fresh,
        chill=args.chill,
        protocol=Protocol(
            bins=args.bins,
            nsd_tolerance=everywhere[0],
            structure_tolerances={label: mm for label, mm in args.nsd if label is not None},
            further_tolerances=tuple(everywhere[1:]),
            surface=args.surface,
            percentile_rule=args.hd95,
            further_percentiles=tuple(args.hd),
            boundary=args.boundary,
            dilate=args.dilate,
            nacl=args.protocol == "nacl",
            device=args.device,
        ),
        calibration=_calibration(args) if args.calibrator else None,
        on_failure=lambda line: tqdm.write(f"nnunet-calib evaluate: {line}", file=sys.stderr),
        stop_at_failure=args.debug,
        insist=args.force,
    )
    print("\n".join(tables(summary)))
    print(f"\nwritten to {args.output}: summary.json, cases.csv, reliability.json")
    return 1 if summary["failed"] else 0


def _calibration(args: argparse.Namespace) -> Any:
    from nnunet_calib.data.dataset import find_model_file, require_dataset_json
    from nnunet_calib.posthoc.folders.apply import open_calibration

    found = args.djfile or require_dataset_json(args.prediction, args.reference)
    plans = args.pfile or find_model_file("plans.json", args.prediction)
    return open_calibration(args.calibrator, args.prediction, found, plans, any_model=args.any_model)


def tables(summary: dict[str, Any]) -> Iterator[str]:
    """The means of a summary, line by line."""
    cases = len(summary["metric_per_case"])
    yield f"{counted(cases, 'case')} scored" + (f", {len(summary['failed'])} failed" if summary["failed"] else "")
    if summary["mean"]:
        yield ""
        yield _row("mean over cases", [*_STRUCTURE_COLUMNS, "missed"])
        for label, scores in summary["mean"].items():
            structure = summary["structures"][label]
            cells = [_number(scores[name]) for name in _STRUCTURE_COLUMNS]
            yield _row(f"{label} {structure['name']}", [*cells, str(structure["missed"])])
        yield _row("foreground", [_number(summary["foreground_mean"][name]) for name in _STRUCTURE_COLUMNS])
        yield from _finite(summary)
    if summary["calibration_mean"]:
        yield ""
        if summary["protocol"]["calibrator"]:
            yield f"probabilities calibrated: {summary['protocol']['calibrator']['method']}"
        elif made_from := summary["protocol"].get("calibrated_from"):
            yield f"probabilities calibrated before: {made_from.get('method', 'unknown method')}"
        if 0 < (calibrated := sum(bool(record["calibration"]) for record in summary["metric_per_case"])) < cases:
            yield f"calibration of {calibrated} of {cases} cases: the others have no probabilities (<case>.npz)"
        yield _row("mean over cases", [*_CALIBRATION_COLUMNS, "cases"])
        for region, scores in summary["calibration_mean"].items():
            yield _row(region, [*(_number(scores[name]) for name in _CALIBRATION_COLUMNS), str(scores["cases"])])
    if "nacl" in summary:
        numbers = [_number(summary["nacl"][name]) for name in ("DSC", "HD", "ECE", "CECE")]
        yield ""
        yield _row("protocol nacl", ["DSC", "HD voxel", "ECE", "CECE"])
        yield _row("mean over cases", numbers)
    yield from _notes(summary["metric_per_case"])
    if cases and not summary["calibration_mean"]:
        yield "no probabilities (<case>.npz) beside the predictions: no calibration"


def _finite(summary: dict[str, Any]) -> Iterator[str]:
    """Where a mean distance is infinite: the mean over the cases that have the structure in both, and the median."""
    infinite = [label for label, scores in summary["mean"].items() if math.isinf(scores["HD95"])]
    if not infinite:
        return
    yield ""
    yield "a missed or invented structure makes a mean distance infinite; without those cases, and as median of all:"
    yield _row("", [*_DISTANCE_COLUMNS, "cases", "med HD95"])
    for label in infinite:
        both, median = summary["mean_in_both"][label], summary["median"][label]
        name = f"{label} {summary['structures'][label]['name']}"
        cells, number = [_number(both[column]) for column in _DISTANCE_COLUMNS], summary["structures"][label]["cases"]
        yield _row(name, [*cells, f"{both['cases']} of {number}", _number(median["HD95"])])


def _notes(records: list[dict[str, Any]]) -> Iterator[str]:
    """The notes of the cases, each kind once, with how many cases have it."""
    kinds: dict[str, list[int]] = {}
    for record in records:
        for note in record["notes"]:
            number, _, rest = note.partition(" ")
            kinds.setdefault(rest if number.isdecimal() else note, []).append(int(number) if number.isdecimal() else 0)
    for kind, numbers in kinds.items():
        voxels = f"{sum(numbers)} " if any(numbers) else ""
        yield f"note on {len(numbers)} of {counted(len(records), 'case')}: {voxels}{kind}"


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name[:23]:<24}" + "".join(f" {cell:>8}" for cell in cells)


def _number(value: float) -> str:
    return f"{value:.4f}"
