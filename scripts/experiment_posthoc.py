"""Calibration after training on Hippocampus: every method, fitted on held-out cases, scored on the test cases.

    python scripts/experiment_posthoc.py DATASET_FOLDER -o WORK [--rows ROW ...] [--temperature ROW ...] [--csv]

WORK is that of ``scripts/experiment_hippocampus.py``: its networks and their predictions of the test cases are used,
and nothing of it is changed; all that is new goes to ``WORK/posthoc``. That experiment validated a few cases of fold 0
only, to save time, but trained on none of them: all are predicted here and fitted on. Unattended and resumable.
Finished rows are kept in ``docs/results/posthoc.json``, and those of a new WORK added to the old; ``--csv`` writes
the tables of all that is kept beside it, and without DATASET_FOLDER and WORK adds nothing.
"""

import argparse
import contextlib
import fnmatch
import json
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from experiment_hippocampus import PREDICT, Bench, Run, runs
from experiment_hippocampus import keep as keep_network
from kept import FOLDER, day, machines, measured, number, put, read_rows, run_of, write_csvs, write_rows
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_calib.cli.main import main as nnunet_calib
from nnunet_calib.posthoc import CALIBRATORS

ROWS = ("StockTrainer__pair", "MbLSTrainer__pair", "MEEPTrainer__pair")
TEMPERATURE = (
    "*Trainer__refine*",
    "*Trainer__switch_dice0p3",
    "*Trainer__switch_dice0p6",
    "*Trainer__switch_dice1",
    "*Trainer__pair*",
)
KEPT = FOLDER / "posthoc.json"
RAW, AUTO = "none", "auto"
ON = " on "  # method, then the region it is fitted to if that is not the volume
FOREGROUND = f"temperature{ON}foreground"
REGIONS = ("volume", "reference_foreground", "foreground", "boundary")
MEASURES = ("ECE", "CECE", "NLL", "Brier")
SHOWN = ("volume", "foreground")  # of the trainers with and without temperature
TABLES = ("methods", "temperature")


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

    def keep(self, row: Run, method: str, file: Path = KEPT) -> None:
        """Keep what is finished of a method and a network, under the name that the network's own row is kept by."""
        fitted, summary = self.fitted(row, method), self.summary(row, method)
        made = self.places(row, method)[0] / "calibrator.json" if method == AUTO else None
        made = made or self.places(row, method)[2] / "summary.json"
        if not made.exists():
            return
        kept = {
            "network": keep_network(self.bench, row),
            "method": method,
            "loss": row.trainer.removesuffix("Trainer"),
            "route": row.route,
            "date": day(made),
            "machine": self.bench.machine.read_text().strip(),
        }
        if method == AUTO:
            kept["choice"] = fitted["choice"]
        else:
            kept["temperature"] = [number(value) for value in np.atleast_1d(fitted.get("temperature", []))]
            kept["changed"] = None if method == RAW else self.changed(row, method)
            kept["means"] = means(summary or {})
        rows = read_rows(file)
        put(rows, kept, ("network", "method"))
        write_rows(file, rows)


def means(summary: dict) -> dict[str, float | str]:
    """What the tables show."""
    scored = {"DSC": number(summary["foreground_mean"]["Dice"])}
    for region in REGIONS:
        for measure in MEASURES:
            scored[f"{measure} {region}"] = number(summary["calibration_mean"][region][measure])
    return scored


def labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def run_all(afterwards: Afterwards, work: list[tuple[Run, str]]) -> int:
    """Do the work; what fails does not end the rest."""
    failed = 0
    for row, method in work:
        try:
            afterwards.finish(row, method)
            afterwards.keep(row, method)
            print(f"done   {row.name} {method}", flush=True)
        except RuntimeError as error:
            failed += 1
            print(f"FAILED {row.name} {method}: {error}", flush=True)
    return failed


def tables(rows: list[dict]) -> str:
    """Markdown: all methods of the networks that have some, then every network with a temperature."""
    networks: dict[str, dict[str, dict]] = {}
    for row in rows:
        networks.setdefault(row["network"], {})[row["method"]] = row
    letters = machines(rows)
    chosen = [network for network in networks.values() if len(network) > 2]
    parts = [method_table(network, letters) for network in chosen if RAW in network]
    parts.append(temperature_table([network for network in networks.values() if {RAW, "temperature"} <= set(network)]))
    return "\n\n".join("\n".join(lines) for lines in parts)


def method_table(network: dict[str, dict], letters: dict[str, str]) -> list[str]:
    """Markdown: one network, every method and region."""
    columns = [f"{measure} {region}" for region in REGIONS for measure in MEASURES]
    lines = [
        f"**{network[RAW]['loss']}, {network[RAW]['route']}, run {run_of(network[RAW]['network'])}**",
        "",
        f"| method | on | temperature | voxels changed | DSC | {' | '.join(columns)} |",
        "|---" * (5 + len(columns)) + "|",
    ]
    for method in (RAW, *CALIBRATORS, FOREGROUND):
        if row := network.get(method):
            changed = "" if row["changed"] is None else str(row["changed"])
            cells = [letters[row["machine"]], temperature(row), changed, f"{row['means']['DSC']:.3f}"]
            cells += [f"{float(row['means'][column]):.4f}" for column in columns]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    if auto := network.get(AUTO):
        lines += ["", f"`auto`: {auto['choice']}."]
    return lines


def temperature_table(networks: list[dict[str, dict]]) -> list[str]:
    """Markdown: networks before and after one temperature."""
    columns = [f"{measure} {region}" for region in SHOWN for measure in ("ECE", "NLL")]
    heads = [*columns, *(f"{column} with T" for column in columns)]
    lines = [f"| loss | route | run | T | DSC | {' | '.join(heads)} |", "|---" * (5 + len(heads)) + "|"]
    for network in networks:
        before, after = network[RAW], network["temperature"]
        cells = [str(run_of(before["network"])), temperature(after), f"{before['means']['DSC']:.3f}"]
        cells += [f"{float(row['means'][column]):.4f}" for row in (before, after) for column in columns]
        lines.append(f"| {before['loss']} | {before['route']} | {' | '.join(cells)} |")
    return lines


def temperature(row: dict) -> str:
    """The temperatures of a calibrator; empty if it has none."""
    return ", ".join(f"{value:.2f}" for value in row["temperature"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("-o", dest="work", type=Path, help="folder of the finished experiment")
    parser.add_argument("--rows", nargs="+", default=ROWS, help="TRAINER__CONFIGURATION that get every method")
    parser.add_argument(
        "--temperature", nargs="*", default=TEMPERATURE, help="shell patterns of rows that get a temperature only"
    )
    parser.add_argument("--methods", nargs="+", choices=CALIBRATORS, default=list(CALIBRATORS))
    parser.add_argument("--csv", action="store_true", help="write docs/results/posthoc_*.csv from all that is kept")
    args = parser.parse_args()
    if (args.dataset is None) != (args.work is None) or not (args.work or args.csv):
        parser.error("DATASET_FOLDER and -o WORK go together; only --csv can do without them")
    finished: list[Run] = []
    if args.work:
        bench = Bench(args.dataset, args.work.resolve(), "cuda" if torch.cuda.is_available() else "cpu", jobs=2)
        afterwards = Afterwards(bench)
        finished = [row for row in runs() if bench.is_scored(row)]
    if args.csv:
        for row in finished:
            for method in (RAW, *CALIBRATORS, FOREGROUND, AUTO):
                afterwards.keep(row, method)
        rows = read_rows(KEPT)
        print(measured(rows))
        write_csvs("posthoc", TABLES, tables(rows))
        return 0
    by_name = {row.name: row for row in finished}
    if unknown := [name for name in args.rows if name not in by_name]:
        sys.exit(f"{unknown[0]} is not finished in {args.work}; there is {', '.join(by_name)}")
    chosen = [by_name[name] for name in args.rows]
    afterwards.prepare()
    slow = [method for method in args.methods if CALIBRATORS[method].margin]
    fast = [method for method in args.methods if method not in slow]
    others = [row for row in finished if any(fnmatch.fnmatch(row.name, pattern) for pattern in args.temperature)]
    work = [(row, method) for row in chosen for method in (RAW, *fast, FOREGROUND, AUTO)]
    work += [(row, method) for row in others if row not in chosen for method in (RAW, "temperature")]
    work += [(row, method) for method in slow for row in chosen]
    return min(1, run_all(afterwards, work))


if __name__ == "__main__":
    sys.exit(main())
