"""Calibration after training on Hippocampus: every method, fitted on held-out cases, scored on the test cases.

    python scripts/experiment_posthoc.py DATASET_FOLDER -o WORK [--rows ROW ...] [--temperature ROW ...] [--table FILE]

WORK is that of ``scripts/experiment_hippocampus.py``: its networks and their predictions of the test cases are used,
and nothing of it is changed; all that is new goes to ``WORK/posthoc``. That experiment validated a few cases of fold 0
only, to save time, but trained on none of them: all are predicted here and fitted on. Unattended and resumable.
``--table`` writes the tables of what is finished into a document.
"""

import argparse
import contextlib
import fnmatch
import json
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from experiment_hippocampus import PREDICT, Bench, Run, runs
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_calib.cli.main import main as nnunet_calib
from nnunet_calib.data.files import write_whole
from nnunet_calib.posthoc import CALIBRATORS

ROWS = ("StockTrainer__full", "MbLSTrainer__switch_dice0p6", "MEEPTrainer__switch_dice0p6")
TEMPERATURE = (
    "*Trainer__refine*",
    "*Trainer__switch_dice0p3",
    "*Trainer__switch_dice0p6",
    "*Trainer__switch_dice1",
)
RAW, AUTO = "none", "auto"
ON = " on "  # method, then the region it is fitted to if that is not the volume
FOREGROUND = f"temperature{ON}foreground"
REGIONS = ("volume", "reference_foreground", "foreground", "boundary")
MEASURES = ("ECE", "CECE", "NLL", "Brier")
SHOWN = ("volume", "foreground")  # of the trainers with and without temperature
MARKS = (
    "<!-- tables of scripts/experiment_posthoc.py -->",
    "<!-- end of tables of scripts/experiment_posthoc.py -->",
)


class Afterwards:
    """Calibrators of the networks of an experiment: one folder a network, one folder a method in it."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.folder = bench.work / "posthoc"
        self.fold = self.folder / "images"

    def prepare(self) -> None:
        """Link the images of fold 0's validation cases, in nnU-Net's own split."""
        for folder in (self.fold, self.folder / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        labels = self.bench.dataset / "labelsTr"
        cases = sorted(label.name.removesuffix(".nii.gz") for label in labels.glob("*.nii.gz"))
        for case in generate_crossval_split(cases, seed=12345, n_splits=5)[0]["val"]:
            image = self.fold / f"{case}_0000.nii.gz"
            if not image.exists():
                image.symlink_to((self.bench.dataset / "imagesTr" / image.name).resolve())

    def finish(self, row: Run, method: str) -> None:
        """Predict, fit, apply and score, each step only if it is not done yet."""
        there = self.folder / row.name
        held_out = there / "held_out"
        if not (held_out / "done").exists():
            words = ["-i", str(self.fold), "-o", str(held_out), "-d", self.bench.number, "-c", row.configuration]
            words += ["-tr", row.trainer, "-f", "0", "--save_probabilities", "--disable_tta"]
            words += ["-device", self.bench.device, "-npp", "1", "-nps", "1"]
            self.bench.nnunet(self.log(f"predict_{row.name}"), "nnUNetv2_predict", PREDICT, words)
            (held_out / "done").touch()
        predictions = self.bench.work / "predictions" / row.name
        calibrator, calibrated, scores = self.places(row, method)
        if method != RAW and not (calibrator / "calibrator.json").exists():
            name, _, region = method.partition(ON)
            words = ["fit", str(held_out), "--reference", str(self.bench.dataset / "labelsTr"), "--method", name]
            words += ["--region", region or "volume", "-o", str(calibrator)]
            self.ours(f"fit_{row.name}_{method}", "calibrate", *words)
        if method == AUTO:
            return  # the best of the others: it is applied as one of them
        if method != RAW and not (calibrated / "done").exists():
            words = ["apply", str(calibrator), "-i", str(predictions), "-o", str(calibrated)]
            self.ours(f"apply_{row.name}_{method}", "calibrate", *words)
            (calibrated / "done").touch()
        if not (scores / "summary.json").exists():
            scored = predictions if method == RAW else calibrated
            words = [str(self.bench.dataset / "labelsTs"), str(scored), "-o", str(scores), "--boundary", "-np", "1"]
            self.ours(f"evaluate_{row.name}_{method}", "evaluate", *words)

    def places(self, row: Run, method: str) -> tuple[Path, Path, Path]:
        """Folders of the calibrator, the calibrated probabilities and their scores."""
        there = self.folder / row.name
        name = method.replace(" ", "_")
        return there / f"{name}_fit", there / f"{name}_calibrated", there / f"{name}_scores"

    def log(self, name: str) -> str:
        return str(self.folder / "logs" / name.replace(" ", "_"))

    def ours(self, log: str, *words: str) -> None:
        """Run ``nnunet-calib`` here: its start would take longer than most of the work."""
        file = Path(f"{self.log(log)}.txt")
        with file.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            code = nnunet_calib(words)
        if code:
            raise RuntimeError(f"{log} failed with exit code {code}, see {file}")

    def summary(self, row: Run, method: str) -> dict | None:
        file = self.places(row, method)[2] / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def fitted(self, row: Run, method: str) -> dict:
        file = self.places(row, method)[0] / "calibrator.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def changed(self, row: Run, method: str) -> int:
        """Voxels of the test cases whose label the calibrator changed."""
        before, after = self.bench.work / "predictions" / row.name, self.places(row, method)[1]
        return sum(int(np.count_nonzero(labels(file) != labels(before / file.name))) for file in after.glob("*.nii.gz"))


def labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def run_all(afterwards: Afterwards, work: list[tuple[Run, str]]) -> int:
    """Do the work; what fails does not end the rest."""
    failed = 0
    for row, method in work:
        try:
            afterwards.finish(row, method)
            print(f"done   {row.name} {method}", flush=True)
        except RuntimeError as error:
            failed += 1
            print(f"FAILED {row.name} {method}: {error}", flush=True)
    return failed


def method_table(afterwards: Afterwards, row: Run) -> list[str]:
    """Markdown: one network, every method and region."""
    columns = [f"{measure} {region}" for region in REGIONS for measure in MEASURES]
    lines = [
        f"**{title(row)}**",
        "",
        f"| method | temperature | voxels changed | DSC | {' | '.join(columns)} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for method in (RAW, *CALIBRATORS, FOREGROUND):
        if (summary := afterwards.summary(row, method)) is None:
            continue
        changed = "" if method == RAW else str(afterwards.changed(row, method))
        dice = f"{float(summary['foreground_mean']['Dice']):.3f}"
        cells = [temperature(afterwards.fitted(row, method)), changed, dice]
        cells += [f"{float(summary['calibration_mean'][part][name]):.4f}" for part in REGIONS for name in MEASURES]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if choice := afterwards.fitted(row, AUTO).get("choice"):
        lines += ["", f"`auto`: {choice}."]
    return lines


def temperature_table(afterwards: Afterwards, rows: list[Run]) -> list[str]:
    """Markdown: every network that has a temperature, before and after."""
    head = [f"{name} {region}" for region in SHOWN for name in ("ECE", "NLL")]
    columns = [*head, *(f"{name} with T" for name in head)]
    lines = [f"| loss | route | T | DSC | {' | '.join(columns)} |", "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        before, after = (afterwards.summary(row, method) for method in (RAW, "temperature"))
        if before is None or after is None:
            continue
        cells = [temperature(afterwards.fitted(row, "temperature")), f"{float(before['foreground_mean']['Dice']):.3f}"]
        for summary in (before, after):
            mean = summary["calibration_mean"]
            cells += [f"{float(mean[region][name]):.4f}" for region in SHOWN for name in ("ECE", "NLL")]
        lines.append(f"| {row.trainer.removesuffix('Trainer')} | {row.route} | {' | '.join(cells)} |")
    return lines


def temperature(fitted: dict) -> str:
    """The temperatures of a calibrator; empty if it has none."""
    return ", ".join(f"{value:.2f}" for value in np.atleast_1d(fitted.get("temperature", [])))


def title(row: Run) -> str:
    return f"{row.trainer.removesuffix('Trainer')}, {row.route}"


def tables(afterwards: Afterwards, chosen: list[Run], rows: list[Run]) -> str:
    parts = ["\n".join(method_table(afterwards, row)) for row in chosen if afterwards.summary(row, RAW)]
    return "\n\n".join([*parts, "\n".join(temperature_table(afterwards, rows))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True, help="folder of the finished experiment")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="TRAINER__CONFIGURATION that get every method")
    parser.add_argument(
        "--temperature", nargs="*", default=TEMPERATURE, help="shell patterns of rows that get a temperature only"
    )
    parser.add_argument("--methods", nargs="+", choices=CALIBRATORS, default=list(CALIBRATORS))
    parser.add_argument("--table", type=Path, help="write the tables between the marks of this file")
    args = parser.parse_args()
    bench = Bench(args.dataset, args.work.resolve(), "cuda" if torch.cuda.is_available() else "cpu", jobs=2)
    afterwards = Afterwards(bench)
    predicted = [row for row in runs() if (bench.work / "predictions" / row.name / "done").exists()]
    by_name = {row.name: row for row in predicted}
    if unknown := [name for name in args.rows if name not in by_name]:
        sys.exit(f"{unknown[0]} has no predictions in {args.work}; it has {', '.join(by_name)}")
    chosen = [by_name[name] for name in args.rows]
    if args.table:
        head = f"{date.today()}; {bench.machine.read_text().strip()}, Python {platform.python_version()}"
        before, _, rest = args.table.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        text = f"{MARKS[0]}\n{head}\n\n{tables(afterwards, chosen, predicted)}\n{MARKS[1]}"
        write_whole(args.table, before + text + after)
        return 0
    afterwards.prepare()
    slow = [method for method in args.methods if CALIBRATORS[method].margin]
    fast = [method for method in args.methods if method not in slow]
    others = [row for row in predicted if any(fnmatch.fnmatch(row.name, pattern) for pattern in args.temperature)]
    work = [(row, method) for row in chosen for method in (RAW, *fast, FOREGROUND, AUTO)]
    work += [(row, method) for row in others if row not in chosen for method in (RAW, "temperature")]
    work += [(row, method) for method in slow for row in chosen]
    return min(1, run_all(afterwards, work))


if __name__ == "__main__":
    sys.exit(main())
