"""Every route to a calibrated network on Hippocampus, trained, predicted and scored through the stock commands.

    python scripts/experiment_hippocampus.py DATASET_FOLDER -o WORK [--jobs 2] [--only PATTERN] [--csv]

DATASET_FOLDER is ``Dataset004_Hippocampus`` in nnU-Net raw format with ``labelsTs``. All trainings have the same
number of steps, but for those fine-tuned from the finished stock network: these are to be compared with stock
fine-tuned as long. Pairs are trainings with ``-tr`` alone whose first part, which is nnU-Net's own loss in all of them,
is the same: they go on from one checkpoint of stock, so what differs between them is the last part only. Unattended and
resumable: what is finished in WORK is not done again. Finished rows are kept in ``docs/results/hippocampus.json``, and
those of a new WORK added to the old: the same route trained again is a further run, for nnU-Net's trainings are not
seeded.
``--csv`` writes the tables of all that is kept beside it; without DATASET_FOLDER and WORK nothing is added.
"""

import argparse
import fnmatch
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from time import sleep

import numpy as np
import torch
from kept import FOLDER, day, measured, number, put, read_rows, run_of, write_csvs, write_rows
from nnunetv2.utilities.crossval_split import generate_crossval_split
from tables_hippocampus import ALONE, MEASURES, PAIRED, tables

from nnunet_calib.data.files import whole_file, write_whole
from nnunet_calib.data.plans import add_configuration, read_plans
from nnunet_calib.training.settings import CALIBRATE_FROM, RESOLVED_KEY

KEPT = FOLDER / "hippocampus.json"

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
PAIRS = 6
AT_ONCE = {"MEEPTrainer": (0.6,), "NACLTrainer": (0.6,), "MbLSTrainer": (1,), "FLTrainer": (1, 0.6, CHOSEN)}
"""Dice weights with which trainers took over at once, in four pairs at most: the defaults before there was a ramp."""
PENALTY = 0.1  # weight in the papers of MbLS and NACL
SHARED = "shared.pth"  # checkpoint of stock at ``CALIBRATE_FROM``, beside those of nnU-Net
PAIR = {**FULL, "save_every": round(EPOCHS * CALIBRATE_FROM)}  # one checkpoint before the last

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
    paired: bool = False

    @property
    def name(self) -> str:
        return f"{self.trainer}__{self.configuration}"

    @property
    def route_name(self) -> str:
        """The name of its first run."""
        return self.name.partition("_run")[0]

    @property
    def start(self) -> "Run | None":
        """The finished training of stock that it goes on from."""
        return next((run for run in runs() if run.name == f"StockTrainer__{self.after}"), None)

    @property
    def control(self) -> str:
        """Configuration of the stock training that is as long."""
        return "pair" if self.paired else "refine" if self.after == "full" else "full"


def runs() -> list[Run]:
    """All rows, in the order in which they tell most."""

    def stock(run: str = "") -> Run:
        return Run(f"full{run}", "StockTrainer", "stock Dice+CE", FULL)

    def paper(trainer: str) -> dict:
        """The penalty's weight in the paper, where the trainer's is another."""
        return {"weight": PENALTY} if trainer in (margin, neighbours) else {}

    def finetuned(trainer: str, dice: float) -> Run:
        name = f"finetune_dice{dice:g}".replace(".", "p")
        route = f"the first {SHARE:.0%} of stock, then fine-tuned, Dice weight {dice:g}"
        return Run(name, trainer, route, {**FINETUNE, **paper(trainer), "dice_weight": dice}, "first", "first")

    def refined(trainer: str, dice: float | None = None) -> Run:
        """Fine-tuned from the finished stock network; without Dice weight the control that goes on with stock."""
        name = "refine" if dice is None else f"refine_dice{dice:g}".replace(".", "p")
        route = "stock, then fine-tuned" + ("" if dice is None else f", Dice weight {dice:g}")
        settings = FINETUNE if dice is None else {**FINETUNE, **paper(trainer), "dice_weight": dice}
        return Run(name, trainer, route, settings, "full", "full")

    def switched(trainer: str, share: float = SHARE, dice: float = CHOSEN, run: str = "") -> Run:
        name = f"switch{'' if share == SHARE else f'{share:g}'}_dice{dice:g}{run}".replace(".", "p")
        settings = {**FULL, **paper(trainer), "dice_weight": dice, "calibrate_from": share, "ramp": 0}
        return Run(name, trainer, f"calibrate_from {share:g}, Dice weight {dice:g}", settings)

    def scratch(trainer: str, dice: float) -> Run:
        route = "from scratch, paper's objective" if dice == 0 else f"from scratch, Dice weight {dice:g}"
        settings = {**FULL, **paper(trainer), "dice_weight": dice, "calibrate_from": 0}
        return Run(f"scratch_dice{dice:g}", trainer, route, settings)

    def pairs() -> list[Run]:
        """One configuration for all trainers of a pair; stock of two pairs first, since jobs run side by side."""
        names = ["pair", *(f"pair_run{number}" for number in range(2, PAIRS + 1))]
        route = "stock, the first part of its pair"
        stocks = [Run(name, "StockTrainer", route, PAIR, paired=True) for name in names]
        ours = [
            [
                Run(name, trainer, ALONE, PAIR, after=name, paired=True)
                for trainer in (entropy, neighbours, margin, focal)
            ]
            for name in names
        ]
        ordered = []
        for first in range(0, PAIRS, 2):
            ordered += stocks[first : first + 2] + sum(ours[first : first + 2], [])
        first = [at_once(trainer, dice, name) for name in names[:4] for trainer in AT_ONCE for dice in AT_ONCE[trainer]]
        again = Run(
            "again_run4", "StockTrainer", "stock again, the first 75% of its pair", PAIR, after=names[3], paired=True
        )
        heavy = [heavier(trainer, name) for name in names for trainer in (neighbours, margin)]
        return [*ordered, again, *heavy, *first]

    def heavier(trainer: str, pair: str) -> Run:
        """With the paper's weight of the penalty."""
        route = f"the paper's weight {PENALTY:g}, the first {SHARE:.0%} of its pair"
        settings = {**PAIR, **paper(trainer)}
        return Run(pair.replace("pair", "paper_weight"), trainer, route, settings, after=pair, paired=True)

    def at_once(trainer: str, dice: float, pair: str) -> Run:
        settings = {**PAIR, **paper(trainer), "dice_weight": dice, "ramp": 0}
        configuration = pair.replace("pair", f"at_once_dice{dice:g}".replace(".", "p"))
        route = f"at once, Dice weight {dice:g}, the first {SHARE:.0%} of its pair"
        return Run(configuration, trainer, route, settings, after=pair, paired=True)

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
    rows += [switched(entropy, dice=0.6, run=run) for run in ("_run3", "_run4")]
    rows += [scratch(trainer, 0) for trainer in (margin, neighbours)] + [switched(entropy, dice=1)]
    rows += [scratch(trainer, 1) for trainer in (margin, neighbours)] + [stock("_run3")]
    rows += [refined(trainer, dice) for dice in (1, 0) for trainer in (margin, neighbours)]
    return rows + pairs()


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

    def dice_weight(self, row: Run) -> float | None:
        """What the training had, by setting or by the default of its day; None of nnU-Net's own loss."""
        return json.loads((self.model(row) / "plans.json").read_text())[RESOLVED_KEY].get("dice_weight")

    def fingerprint(self, row: Run) -> str:
        """What tells a training from others of the same row."""
        checkpoint = self.model(row) / "fold_0" / "checkpoint_final.pth"
        return hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]

    def is_scored(self, row: Run) -> bool:
        return (self.work / "scores" / row.name / "summary.json").exists()

    def finish(self, row: Run) -> None:
        """Train, predict and score one row, each step only if it is not done yet."""
        fold = self.model(row) / "fold_0"
        if not (fold / "validation" / "summary.json").exists():
            if row.paired and row.after:
                self.take_first_part(row, fold)
            trained = (fold / "checkpoint_final.pth").exists()
            resume = ["--val"] if trained else ["--c"] if (fold / "checkpoint_latest.pth").exists() else []
            words = [self.number, row.configuration, "0", "-tr", row.trainer, "-device", self.device, *resume]
            link_from = fold if row.paired and not row.after else None
            self.nnunet(f"train_{row.name}", "nnUNetv2_train", TRAIN, words, link_from)
        predictions = self.work / "predictions" / row.name
        if not (predictions / "done").exists():
            words = ["-i", str(self.raw / self.dataset.name / "imagesTs"), "-o", str(predictions), "-d", self.number]
            words += ["-c", row.configuration, "-tr", row.trainer, "-f", "0", "--save_probabilities", "--disable_tta"]
            words += ["-device", self.device, "-npp", "1", "-nps", "1"]
            self.nnunet(f"predict_{row.name}", "nnUNetv2_predict", PREDICT, words)
            (predictions / "done").touch()
        scores = self.work / "scores" / row.name
        if not self.is_scored(row):
            words = ["evaluate", str(self.dataset / "labelsTs"), str(predictions), "-o", str(scores), "-np", "1"]
            self.call(f"evaluate_{row.name}", [sys.executable, "-m", "nnunet_calib.cli.main", *words])

    def take_first_part(self, row: Run, fold: Path) -> None:
        """Let a training go on where stock of its pair had its own loss so far, unless it has gone on already."""
        if any((fold / f"checkpoint_{kind}.pth").exists() for kind in ("latest", "final")):
            return
        fold.mkdir(parents=True, exist_ok=True)
        # Ours, and whole: nnU-Net's own loss of it is what every trainer does until ``calibrate_from``.
        shared = torch.load(self.model(row.start) / "fold_0" / SHARED, map_location="cpu", weights_only=False)
        # else ``--c`` refuses another trainer's settings
        shared["init_args"]["plans"][RESOLVED_KEY] = {"trainer": row.trainer, **row.settings}
        with whole_file(fold / "checkpoint_latest.pth") as stream:
            torch.save(shared, stream)

    def nnunet(self, log: str, command: str, entry: str, words: list[str], link_from: Path | None = None) -> None:
        script = str(Path(sys.executable).with_name(command))
        words = [sys.executable, "-c", ONE_THREAD, entry, *words] if self.one_thread else [script, *words]
        self.call(log, words, link_from)

    def call(self, log: str, words: list[str], link_from: Path | None = None) -> None:
        """Run a command with its output in a log; keep the one checkpoint that nnU-Net writes before the last."""
        file = self.work / "logs" / f"{log}.txt"
        with file.open("a") as stream:
            process = subprocess.Popen(
                words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment
            )
            while link_from and process.poll() is None and not (link_from / SHARED).exists():
                sleep(1)
                if (latest := link_from / "checkpoint_latest.pth").exists():
                    os.link(latest, link_from / SHARED)  # nnU-Net deletes its name for it at the end
        if code := process.wait():
            raise RuntimeError(f"{log} failed with exit code {code}, see {file}")


def run_all(bench: Bench, rows: list[Run], jobs: int) -> int:
    """Run the rows, each after the one it starts from; one that fails does not end the others."""
    starts = {row.start for row in rows}
    finished = {row: Event() for row in rows if row in starts}
    one_writes = Lock()

    def one(row: Run) -> bool:
        if row.start in finished:
            finished[row.start].wait()
        try:
            bench.finish(row)
            with one_writes:
                keep(bench, row)
            print(f"done   {row.name}", flush=True)
            return True
        except RuntimeError as error:
            print(f"FAILED {row.name}: {error}", flush=True)
            return False
        finally:
            if row in finished:
                finished[row].set()

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, rows)).count(False)


def keep(bench: Bench, row: Run, file: Path = KEPT) -> str:
    """Keep a scored row: in place of the same training's, or as a further run of its route; its name there."""
    rows = read_rows(file)
    network = bench.fingerprint(row)
    same = [kept["name"] for kept in rows if kept["training"] == network]
    taken = {kept["name"] for kept in rows}
    further = (f"{row.route_name}_run{number}" for number in itertools.count(2))
    name = same[0] if same else next(name for name in itertools.chain([row.name], further) if name not in taken)
    scores = bench.work / "scores" / row.name / "summary.json"
    summary = json.loads(scores.read_text())
    put(
        rows,
        {
            "name": name,
            "loss": row.trainer.removesuffix("Trainer"),
            "route": row.route,
            "run": run_of(name),
            "control": row.control,
            "settings": row.settings,
            "dice_weight": bench.dice_weight(row),
            "training": network,
            "start": bench.fingerprint(row.start) if row.start else None,
            "date": day(scores),
            "machine": bench.machine.read_text().strip(),
            "means": means(summary),
            "cases": per_case(summary),
        },
        ("name",),
    )
    write_rows(file, rows)
    return name


def means(summary: dict) -> dict[str, float | str]:
    """What the first table shows."""
    scored = {"DSC": summary["foreground_mean"]["Dice"], "HD95 mm": summary["foreground_mean"]["HD95"]}
    for region, measures in summary["calibration_mean"].items():
        scored |= {f"{measure} {region}": measures[measure] for measure in MEASURES}
    return {name: number(value) for name, value in scored.items()}


def per_case(summary: dict) -> dict[str, list]:
    """What the paired differences need: Dice (mean over structures) and calibration, by case."""
    cases = sorted(summary["metric_per_case"], key=lambda case: case["case"])
    found: dict[str, list] = {"case": [case["case"] for case in cases]}
    found["DSC"] = [number(np.mean([float(s["Dice"]) for s in case["metrics"].values()])) for case in cases]
    for column in PAIRED[1:]:
        measure, region = column.split()
        found[column] = [number(case["calibration"][region][measure]) for case in cases]
    return found


TABLES = ("rows", "differences", "dice_weight", "pairs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("-o", dest="work", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (CPU: one thread each)")
    parser.add_argument("--only", default="*", help="rows TRAINER__CONFIGURATION to run, a shell pattern")
    parser.add_argument("--csv", action="store_true", help="write docs/results/hippocampus_*.csv from all that is kept")
    args = parser.parse_args()
    if (args.dataset is None) != (args.work is None) or not (args.work or args.csv):
        parser.error("DATASET_FOLDER and -o WORK go together; only --csv can do without them")
    rows = runs()
    if args.work:
        bench = Bench(args.dataset, args.work, "cuda" if torch.cuda.is_available() else "cpu", args.jobs)
    if args.csv:
        for row in rows if args.work else []:
            if bench.is_scored(row):
                keep(bench, row)
        kept = read_rows(KEPT)
        how = f"; {EPOCHS} x {STEPS} steps, patch {PATCH}, batch 2"
        print(measured(kept, how))
        write_csvs("hippocampus", TABLES, tables(kept))
        return 0
    if not shutil.which("nnUNetv2_train", path=str(Path(sys.executable).parent)):
        sys.exit("nnUNetv2_train is not beside this Python; pip install nnunet-calib here")
    bench.prepare(rows)
    return min(1, run_all(bench, [row for row in rows if fnmatch.fnmatch(row.name, args.only)], args.jobs))


if __name__ == "__main__":
    sys.exit(main())
