"""Every route to a calibrated network on Hippocampus, trained, predicted and scored through the stock commands.

    python scripts/experiment_hippocampus.py DATASET_FOLDER -o WORK [--jobs 2] [--only PATTERN] [--table FILE]

DATASET_FOLDER is ``Dataset004_Hippocampus`` in nnU-Net raw format with ``labelsTs``. All trainings have the same
number of steps, but for those fine-tuned from the finished stock network: these are to be compared with stock
fine-tuned as long. Unattended and resumable: what
is finished in WORK is not done again. ``--table`` writes the tables of all finished runs into a document. A second
run of a row is a training of its own: nnU-Net's are not seeded.
"""

import argparse
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from threading import Event

import numpy as np
import torch
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_calib.data.files import write_whole
from nnunet_calib.data.plans import add_configuration, read_plans
from nnunet_calib.metrics.intervals import percentile_interval, resampled_means

EPOCHS, STEPS = 8, 250
PATCH = [32, 40, 32]  # of images of about 36 x 50 x 35; half the voxels of the planned patch, for CPUs
VALIDATED = 4  # cases in nnU-Net's validation after each training; it mirrors eight times, slow on CPU
LATE = 0.9  # a later switch to try: of 8 epochs the last is the objective's
CHOSEN = 0.3  # weight of nnU-Net's Dice in the routes that decide the defaults
SHARE = 0.75  # of the steps that nnU-Net's own loss has in the routes that start with it
SCHEDULE = {"num_iterations_per_epoch": STEPS, "num_val_iterations_per_epoch": 10, "save_every": 1}
FULL = {**SCHEDULE, "num_epochs": EPOCHS}
FIRST = {**SCHEDULE, "num_epochs": round(EPOCHS * SHARE)}
FINETUNE = {
    **SCHEDULE,
    "num_epochs": EPOCHS - round(EPOCHS * SHARE),
    "initial_lr": 1e-3,
    "finetune_from": "StockTrainer",
}

# nnU-Net takes all cores on CPU; with several jobs side by side each gets one.
ONE_THREAD = (
    "import multiprocessing, sys; multiprocessing.cpu_count = lambda: 1; "
    "from importlib import import_module; module, function = sys.argv.pop(1).split(':'); "
    "sys.exit(getattr(import_module(module), function)())"
)
TRAIN = "nnunetv2.run.run_training:run_training_entry"
PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    configuration: str
    trainer: str
    route: str
    settings: dict = field(hash=False)
    base: str = "small"
    after: str | None = None

    @property
    def name(self) -> str:
        return f"{self.trainer}__{self.configuration}"


def runs() -> list[Run]:
    """All rows, in the order in which they tell most."""

    def stock(run: str = "") -> Run:
        return Run(f"full{run}", "StockTrainer", "stock Dice+CE", FULL)

    def finetuned(trainer: str, dice: float) -> Run:
        name = f"finetune_dice{dice:g}".replace(".", "p")
        route = f"the first {SHARE:.0%} of stock, then fine-tuned, Dice weight {dice:g}"
        return Run(name, trainer, route, {**FINETUNE, "dice_weight": dice}, "first", "first")

    def refined(trainer: str, dice: float | None = None) -> Run:
        """Fine-tuned from the finished stock network; without Dice weight the control that goes on with stock."""
        name = "refine" if dice is None else f"refine_dice{dice:g}".replace(".", "p")
        route = "stock, then fine-tuned" + ("" if dice is None else f", Dice weight {dice:g}")
        settings = FINETUNE if dice is None else {**FINETUNE, "dice_weight": dice}
        return Run(name, trainer, route, settings, "full", "full")

    def switched(trainer: str, share: float = SHARE, dice: float = CHOSEN, run: str = "") -> Run:
        name = f"switch{'' if share == SHARE else f'{share:g}'}_dice{dice:g}{run}".replace(".", "p")
        settings = {**FULL, "dice_weight": dice, "calibrate_from": share}
        return Run(name, trainer, f"calibrate_from {share:g}, Dice weight {dice:g}", settings)

    def scratch(trainer: str, dice: float) -> Run:
        route = "from scratch, paper's objective" if dice == 0 else f"from scratch, Dice weight {dice:g}"
        settings = {**FULL, "dice_weight": dice, "calibrate_from": 0}
        return Run(f"scratch_dice{dice:g}", trainer, route, settings)

    margin, neighbours, entropy, focal = "MbLSTrainer", "NACLTrainer", "MEEPTrainer", "FLTrainer"
    rows = [stock(), Run("first", "StockTrainer", f"the first {SHARE:.0%} of stock", FIRST)]
    rows += [finetuned(trainer, dice) for dice in (0, 0.1) for trainer in (margin, neighbours)]
    rows += [refined(trainer, CHOSEN) for trainer in (margin, neighbours)]
    rows += [switched(trainer, share) for share in (SHARE, LATE) for trainer in (margin, neighbours)]
    rows += [refined("StockTrainer"), *(refined(trainer, CHOSEN) for trainer in (entropy, focal))]
    rows += [stock("_run2"), *(switched(trainer) for trainer in (entropy, focal))]
    rows += [switched(trainer, dice=dice) for dice in (1, 0.6) for trainer in (margin, neighbours)]
    rows += [switched(trainer, dice=0.6) for trainer in (focal, entropy)] + [switched(focal, dice=1)]
    rows += [switched(trainer, dice=dice, run="_run2") for dice in (0.6, 1) for trainer in (margin, neighbours)]
    rows += [switched(entropy, dice=0.6, run="_run2"), switched(focal, dice=1, run="_run2")]
    rows += [scratch(trainer, 0) for trainer in (margin, neighbours)] + [switched(entropy, dice=1)]
    rows += [scratch(trainer, 1) for trainer in (margin, neighbours)] + [stock("_run3")]
    rows += [refined(trainer, dice) for dice in (1, 0) for trainer in (margin, neighbours)]
    return rows


class Bench:
    """The folders of one experiment and the commands that run in them."""

    def __init__(self, dataset: Path, work: Path, device: str, jobs: int):
        self.dataset, self.work, self.device = dataset, work, device
        self.one_thread = device == "cpu" and jobs > 1
        self.raw, self.preprocessed, self.results = work / "raw", work / "preprocessed", work / "results"
        self.environment = {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "1" if device == "cpu" else "8"),
            "nnUNet_def_n_proc": "2",
        }
        self.plans = self.preprocessed / dataset.name / "nnUNetPlans.json"
        self.number = dataset.name[7:10]
        self.machine = work / "machine.txt"

    def prepare(self, rows: list[Run]) -> None:
        """Plan, preprocess and write a configuration for every row."""
        for folder in (self.raw, self.preprocessed, self.results, self.work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else "no GPU"
        self.machine.write_text(f"{os.cpu_count()} cores of {platform.machine()}, {gpu}, torch {torch.__version__}")
        if not (self.raw / self.dataset.name).exists():
            (self.raw / self.dataset.name).symlink_to(self.dataset.resolve())
        done = self.work / "preprocessed.done"
        if not done.exists():
            words = ["nnUNetv2_plan_and_preprocess", "-d", self.number, "-c", "3d_fullres", "-np", "2"]
            self.call("preprocess", [str(Path(sys.executable).with_name(words[0])), *words[1:]])
            done.touch()
        self.write_split()
        there = read_plans(self.plans)["configurations"]
        if "small" not in there:
            architecture = there["3d_fullres"]["architecture"]
            architecture["arch_kwargs"]["features_per_stage"] = [8, 16, 32, 64]
            overrides = {"batch_size": 2, "patch_size": PATCH, "architecture": architecture}
            add_configuration(self.plans, "small", "3d_fullres", {}, overrides)
        for row in rows:
            if row.configuration not in read_plans(self.plans)["configurations"]:
                add_configuration(self.plans, row.configuration, row.base, row.settings)

    def write_split(self) -> None:
        """nnU-Net's own first fold, with only a few of its validation cases: the test cases are what is scored."""
        file = self.plans.with_name("splits_final.json")
        cases = sorted(label.name.removesuffix(".nii.gz") for label in (self.dataset / "labelsTr").glob("*.nii.gz"))
        fold = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
        write_whole(file, json.dumps([{"train": list(fold["train"]), "val": list(fold["val"])[:VALIDATED]}], indent=4))

    def model(self, row: Run) -> Path:
        return self.results / self.dataset.name / f"{row.trainer}__nnUNetPlans__{row.configuration}"

    def finish(self, row: Run) -> None:
        """Train, predict and score one row, each step only if it is not done yet."""
        fold = self.model(row) / "fold_0"
        if not (fold / "validation" / "summary.json").exists():
            trained = (fold / "checkpoint_final.pth").exists()
            resume = ["--val"] if trained else ["--c"] if (fold / "checkpoint_latest.pth").exists() else []
            words = [self.number, row.configuration, "0", "-tr", row.trainer, "-device", self.device, *resume]
            self.nnunet(f"train_{row.name}", "nnUNetv2_train", TRAIN, words)
        predictions = self.work / "predictions" / row.name
        if not (predictions / "done").exists():
            words = ["-i", str(self.raw / self.dataset.name / "imagesTs"), "-o", str(predictions), "-d", self.number]
            words += ["-c", row.configuration, "-tr", row.trainer, "-f", "0", "--save_probabilities", "--disable_tta"]
            words += ["-device", self.device, "-npp", "1", "-nps", "1"]
            self.nnunet(f"predict_{row.name}", "nnUNetv2_predict", PREDICT, words)
            (predictions / "done").touch()
        scores = self.work / "scores" / row.name
        if not (scores / "summary.json").exists():
            words = ["evaluate", str(self.dataset / "labelsTs"), str(predictions), "-o", str(scores), "-np", "1"]
            self.call(f"evaluate_{row.name}", [sys.executable, "-m", "nnunet_calib.cli.main", *words])

    def nnunet(self, log: str, command: str, entry: str, words: list[str]) -> None:
        script = str(Path(sys.executable).with_name(command))
        self.call(log, [sys.executable, "-c", ONE_THREAD, entry, *words] if self.one_thread else [script, *words])

    def call(self, log: str, words: list[str]) -> None:
        file = self.work / "logs" / f"{log}.txt"
        with file.open("a") as stream:
            code = subprocess.run(
                words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment
            ).returncode
        if code:
            raise RuntimeError(f"{log} failed with exit code {code}, see {file}")


def run_all(bench: Bench, rows: list[Run], jobs: int) -> int:
    """Run the rows, each after the one it starts from; one that fails does not end the others."""
    starts = {row.after for row in rows}
    finished = {row.configuration: Event() for row in rows if row.configuration in starts}

    def one(row: Run) -> bool:
        if row.after in finished:
            finished[row.after].wait()
        try:
            bench.finish(row)
            print(f"done   {row.name}", flush=True)
            return True
        except RuntimeError as error:
            print(f"FAILED {row.name}: {error}", flush=True)
            return False
        finally:
            if row.configuration in finished:
                finished[row.configuration].set()

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, rows)).count(False)


def tables(bench: Bench, rows: list[Run]) -> str:
    """Markdown: every scored row, and its paired difference to stock of the same length."""
    summaries = {}
    for row in rows:
        file = bench.work / "scores" / row.name / "summary.json"
        if file.exists():
            summaries[row.name] = json.loads(file.read_text())
    columns = [f"{measure} {region}" for region in REGIONS for measure in MEASURES]
    lines = [f"| loss | route | run | DSC | HD95 mm | {' | '.join(columns)} |", "|---" * (5 + len(columns)) + "|"]
    differences = [
        "| loss | route | run | DSC | NLL foreground | ECE foreground | ECE volume |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name not in summaries:
            continue
        summary = summaries[row.name]
        run = row.configuration.partition("_run")[2] or "1"
        head = f"| {row.trainer.removesuffix('Trainer')} | {row.route} | {run} |"
        mean, calibration = summary["foreground_mean"], summary["calibration_mean"]
        cells = [f"{float(mean['Dice']):.3f}", f"{float(mean['HD95']):.2f}"]
        cells += [f"{float(calibration[region][measure]):.4f}" for region in REGIONS for measure in MEASURES]
        lines.append(f"{head} {' | '.join(cells)} |")
        stock = "StockTrainer__" + ("refine" if row.after == "full" else "full_run2" if run == "2" else "full")
        if stock in summaries and row.trainer != "StockTrainer":
            differences.append(f"{head} {' | '.join(paired_differences(summary, summaries[stock]))} |")
    return "\n".join(lines) + "\n\n" + "\n".join(differences)


def paired_differences(summary: dict, stock: dict) -> list[str]:
    """Mean difference over the cases with its 95 % bootstrap interval."""
    values = per_case(summary) - per_case(stock)
    resampled = resampled_means(values)
    cells = []
    for column, mean in enumerate(values.mean(axis=0)):
        low, high = percentile_interval(resampled[:, column])
        cells.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    return cells


def per_case(summary: dict) -> np.ndarray:
    """Dice (mean over structures), NLL and ECE of the foreground, ECE of the volume, one row a case."""
    return np.array(
        [
            [
                np.mean([float(scores["Dice"]) for scores in case["metrics"].values()]),
                float(case["calibration"]["foreground"]["NLL"]),
                float(case["calibration"]["foreground"]["ECE"]),
                float(case["calibration"]["volume"]["ECE"]),
            ]
            for case in sorted(summary["metric_per_case"], key=lambda case: case["case"])
        ]
    )


REGIONS = ("volume", "reference_foreground", "foreground")
MEASURES = ("ECE", "CECE", "NLL", "Brier")
MARKS = ("<!-- tables of scripts/experiment_hippocampus.py -->", "<!-- end of tables -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (CPU: one thread each)")
    parser.add_argument("--only", default="*", help="rows TRAINER__CONFIGURATION to run, a shell pattern")
    parser.add_argument("--table", type=Path, help="write the tables between the marks of this file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench, rows = Bench(args.dataset, args.work, device, args.jobs), runs()
    if args.table:
        head = f"{date.today()}; {bench.machine.read_text().strip()}; {EPOCHS} x {STEPS} steps, patch {PATCH}, batch 2"
        before, _, rest = args.table.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        write_whole(args.table, f"{before}{MARKS[0]}\n{head}\n\n{tables(bench, rows)}\n{MARKS[1]}{after}")
        return 0
    if not shutil.which("nnUNetv2_train", path=str(Path(sys.executable).parent)):
        sys.exit("nnUNetv2_train is not beside this Python; pip install nnunet-calib here")
    bench.prepare(rows)
    return min(1, run_all(bench, [row for row in rows if fnmatch.fnmatch(row.name, args.only)], args.jobs))


if __name__ == "__main__":
    sys.exit(main())
