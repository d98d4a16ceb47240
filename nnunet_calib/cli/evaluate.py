"""``nnunet-calib evaluate``: score a folder of predictions."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HELP = "score a folder of predictions: overlap, surface distances, calibration"

_STRUCTURE_COLUMNS = ("Dice", "IoU", "HD", "HD95", "ASSD", "NSD")
_CALIBRATION_COLUMNS = ("ECE", "CECE", "ACE", "NLL", "Brier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Score label maps against references: Dice, IoU, HD, HD95, ASSD and NSD of every label\n"
        "or region and, where nnUNetv2_predict --save_probabilities left <case>.npz files, ECE,\n"
        "CECE, ACE, MCE, NLL and Brier score. Writes summary.json (also readable by nnU-Net),\n"
        "cases.csv and reliability.json."
    )
    parser.epilog = "example:\n  nnunet-calib evaluate labelsTs predictions -o scores"
    parser.add_argument("reference", metavar="REF", type=Path, help="folder of reference label maps")
    parser.add_argument("prediction", metavar="PRED", type=Path, help="folder of predicted label maps")
    parser.add_argument("-o", dest="output", metavar="OUT", type=Path, required=True, help="folder for the results")
    parser.add_argument("-djfile", type=Path, help="dataset.json; else the one in or near PRED, then beside REF")
    parser.add_argument("-pfile", type=Path, help="plans.json; else the one in or near PRED, if any")
    parser.add_argument("-np", type=int, help="cases scored at the same time; default: one per processor, at most 8")
    parser.add_argument(
        "--engine", default="processes", help="processes (default), or dask: a Dask cluster of -np processes here"
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS_OR_FILE",
        help="with --engine dask: a running cluster, tcp://host:port or its file",
    )
    parser.add_argument("--fresh", action="store_true", help="score every case again, unchanged ones too")
    parser.add_argument("--chill", action="store_true", help="leave out references that have no prediction")
    parser.add_argument("--nsd", metavar="MM", type=float, default=1.0, help="tolerance of NSD in mm (default: 1)")
    parser.add_argument("--bins", metavar="N", type=int, default=15, help="calibration bins (default: 15)")
    parser.add_argument(
        "--dilate", metavar="MM", type=float, default=0.0, help="widen the region foreground by so many mm (default: 0)"
    )
    parser.add_argument("--boundary", action="store_true", help="calibration within 3 mm of the reference surface too")


def run(args: argparse.Namespace) -> int:
    """Score the folder, print the means; 1 if a case could not be scored."""
    from tqdm import tqdm

    from nnunet_calib.evaluation import Protocol, evaluate_folder

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
        protocol=Protocol(bins=args.bins, nsd_tolerance=args.nsd, boundary=args.boundary, dilate=args.dilate),
        on_failure=lambda line: tqdm.write(f"nnunet-calib evaluate: {line}", file=sys.stderr),
        stop_at_failure=args.debug,
    )
    print("\n".join(_tables(summary)))
    print(f"\nwritten to {args.output}: summary.json, cases.csv, reliability.json")
    return 1 if summary["failed"] else 0


def _tables(summary: dict[str, Any]) -> Iterator[str]:
    cases = len(summary["metric_per_case"])
    yield f"{cases} cases scored" + (f", {len(summary['failed'])} failed" if summary["failed"] else "")
    if summary["mean"]:
        yield ""
        yield _row("mean over cases", [*_STRUCTURE_COLUMNS, "missed"])
        for label, scores in summary["mean"].items():
            structure = summary["structures"][label]
            cells = [_number(scores[name]) for name in _STRUCTURE_COLUMNS]
            yield _row(f"{label} {structure['name']}", [*cells, str(structure["missed"])])
        yield _row("foreground", [_number(summary["foreground_mean"][name]) for name in _STRUCTURE_COLUMNS])
    if summary["calibration_mean"]:
        yield ""
        if 0 < (calibrated := sum(bool(record["calibration"]) for record in summary["metric_per_case"])) < cases:
            yield f"calibration of {calibrated} of {cases} cases: the others have no probabilities (<case>.npz)"
        yield _row("mean over cases", [*_CALIBRATION_COLUMNS, "cases"])
        for region, scores in summary["calibration_mean"].items():
            yield _row(region, [*(_number(scores[name]) for name in _CALIBRATION_COLUMNS), str(scores["cases"])])
    elif cases:
        yield "no probabilities (<case>.npz) beside the predictions: no calibration"


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name[:23]:<24}" + "".join(f"{cell:>9}" for cell in cells)


def _number(value: float) -> str:
    return f"{value:.4f}"
