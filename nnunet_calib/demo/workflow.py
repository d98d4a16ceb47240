"""The steps of the demo: make the data, plan, preprocess, train, predict, calibrate, evaluate, compare, report.

Everything lies in one folder. A step is done when its outputs are there; a step that has to run again first removes
them and all that was made from them, so a folder never mixes two runs.
"""

import gzip
import json
import os
import re
import shlex
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunet_calib
from nnunet_calib import _autoload
from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.data.plans import read_plans
from nnunet_calib.demo import phantom
from nnunet_calib.demo.commands import find_command, run_command
from nnunet_calib.demo.new_structure import NewStructure
from nnunet_calib.demo.step import Step, Tick
from nnunet_calib.evaluation import evaluate_folder
from nnunet_calib.posthoc.folders.apply import apply_folder
from nnunet_calib.posthoc.folders.fit import fit_folder

STOCK, FINETUNED, READERS = "stock", "meep", "readers"
CALIBRATED = {"stock_temperature": "temperature", "stock_isotonic": "isotonic"}
"""The stock network's probabilities after a calibrator, and the method of ``calibrate fit``."""


NAMES = {  # the runs: folders of ``evaluation`` and, but for the readers, of ``predictions``
    STOCK: "stock nnU-Net (Dice+CE)",
    "stock_temperature": "stock + temperature",
    "stock_isotonic": "stock + isotonic",
    FINETUNED: "MEEP, fine-tuned from stock",
    READERS: "the readers themselves",
}
REGION = "foreground"
BASE = "3d_fullres"
FOLD = "0"
FEATURES = (8, 16, 32, 64)
SCHEDULE = {"num_epochs": 8, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 2}
# A quarter of a schedule at nnU-Net's own rate: at the default of 0.001 so few steps change nothing.
FINETUNING: dict[str, Any] = {"finetune_from": "StockTrainer", "num_epochs": 4, "initial_lr": 0.01, "dice_weight": 0.3}
SETTINGS = {"schedule": SCHEDULE, "finetuning": FINETUNING}


@dataclass(frozen=True)
class Training:
    """A network of the demo: the trainer, the configuration of the plans, and how many epochs that is."""

    trainer: str
    configuration: str
    epochs: int


TRAININGS = {
    STOCK: Training("StockTrainer", "demo", SCHEDULE["num_epochs"]),
    FINETUNED: Training("MEEPTrainer", "demo_finetuned", FINETUNING["num_epochs"]),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: means over the test cases; HD95 in mm, NLL in nats, the rest in [0, 1]."""

    name: str
    dice: float
    hd95: float
    ece: float
    cece: float
    nll: float


def check_folder(folder: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """Refuse a folder with other content, which the commands would mix with.

    Returns:
        The file that marks it as this demo's, and what it says.

    Raises:
        UsageError: as said.
    """
    marker = folder / "demo.json"
    ours = {"version": nnunet_calib.__version__, "seed": seed, "settings": SETTINGS}
    if marker.is_file():
        theirs = read_json(marker)
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        if differing:
            key = differing[0]
            what = f"a demo with {key} {theirs.get(key)}, not {ours[key]}"
            raise UsageError(f"{folder} holds {what}; choose another folder with -o")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and no demo's folder; choose another one with -o")
    elif folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; choose another one with -o")
    return marker, ours


class Workflow:
    """All steps of the demo in one folder.

    Args:
        folder: new, empty, or that of an earlier demo with the same seed.
        device: ``cpu`` or ``cuda``, as nnU-Net's ``-device``.
        seed: of the data; trainings are as random as nnU-Net's always are.
        fewshot: also teach the stock network a structure that it never saw, from three volumes.

    Raises:
        UsageError: the folder holds something else.
        InputError: nnU-Net's commands are not in this environment.
    """

    def __init__(self, folder: Path, device: str, seed: int, fewshot: bool = False):
        self.folder = folder.resolve()
        self.device = device
        self.seed = seed
        self.fewshot = fewshot
        self.raw = self.folder / "nnUNet_raw" / phantom.DATASET
        self.preprocessed = self.folder / "nnUNet_preprocessed" / phantom.DATASET
        self.results = self.folder / "nnUNet_results" / phantom.DATASET
        self.readers = self.folder / "readers"
        self.predictions = self.folder / "predictions"
        self.evaluation = self.folder / "evaluation"
        self.calibrators = self.folder / "calibrators"
        self.comparison = self.folder / "comparison"
        self.report = self.folder / "report.html"
        self.new = NewStructure(self.folder / "fewshot", self._fold(STOCK).parent, device, seed, self._run)
        self.logs = self.folder / "logs"
        for name in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
            find_command(name)
        self._claim()

    @property
    def variables(self) -> dict[str, str]:
        """nnU-Net's three variables, for the stock commands."""
        return {path.parent.name: str(path.parent) for path in (self.raw, self.preprocessed, self.results)}

    def steps(self) -> list[Step]:
        """All steps in their order."""
        plans = self.preprocessed / "nnUNetPlans.json"
        preprocess = Step(
            "plan and preprocess",
            done=lambda: _has_configuration(plans),
            work=self._plan_and_preprocess,
            ticks=phantom.TRAINING_CASES,
            voids=(
                self.preprocessed,
                self.results,
                self.predictions,
                self.calibrators,
                self.evaluation,
                *self._results,
            ),
        )
        data = Step(
            "make the data set",
            done=(self.raw / "dataset.json").is_file,
            work=lambda tick: phantom.write_dataset(self.raw, self.readers, self.seed, tick),
            ticks=phantom.TRAINING_CASES + phantom.TEST_CASES,
            voids=(self.raw, self.readers, *preprocess.voids),
        )
        return [
            data,
            preprocess,
            *map(self._training, TRAININGS),
            *map(self._prediction, TRAININGS),
            *map(self._calibration, CALIBRATED),
            *map(self._scoring, NAMES),
            self._reporting(),
            *(self.new.steps() if self.fewshot else ()),
        ]

    def rows(self) -> Iterator[Row]:
        """The table, once all steps are done."""
        for run, name in NAMES.items():
            summary = read_json(self.evaluation / run / "summary.json")
            overlap, calibration = summary["foreground_mean"], summary["calibration_mean"][REGION]
            scores = (calibration[metric] for metric in ("ECE", "CECE", "NLL"))
            yield Row(name, *map(float, (overlap["Dice"], overlap["HD95"], *scores)))

    def script(self) -> Path:
        """The commands that the steps run, as a shell script to read and to copy from."""
        return self.folder / "commands.sh"

    def commands(self) -> list[list[str]]:
        """The stock commands in their order, and those of ``nnunet-calib``, which the demo calls from within."""
        return [
            self._plan_command(),
            *(["nnunet-calib", "configure", "-d", "999", *words] for words in self._configurations()),
            *map(self._train_command, TRAININGS),
            *map(self._predict_command, TRAININGS),
            *(command for run in CALIBRATED for command in self._calibrate_commands(run)),
            *map(self._evaluate_command, NAMES),
            ["nnunet-calib", "compare", *self._compared(), "-o", str(self.comparison)],
            [
                "nnunet-calib",
                "report",
                *self._compared(),
                "-o",
                str(self.report),
                "--images",
                str(self.raw / "imagesTs"),
            ],
            *(self.new.commands() if self.fewshot else ()),
        ]

    def _claim(self) -> None:
        """Mark the folder as this demo's; refuse one with other content, the commands would mix with it."""
        marker, ours = check_folder(self.folder, self.seed)
        self.logs.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(ours, indent=2) + "\n")
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        write_whole(self.script(), "\n".join([*exports, *map(shlex.join, self.commands())]) + "\n")

    def _plan_and_preprocess(self, tick: Tick) -> None:
        cases = self.preprocessed / f"nnUNetPlans_{BASE}"
        self._run(self._plan_command(), "plan_and_preprocess", lambda: tick(len(list(cases.glob("*.pkl")))))
        for words in self._configurations():
            self._run(["nnunet-calib", "configure", "-d", "999", *words], "configure", lambda: None)

    def _configurations(self) -> list[list[str]]:
        """What follows ``nnunet-calib configure -d 999``: a network small enough for a processor, a short schedule."""
        stock, finetuned = TRAININGS[STOCK].configuration, TRAININGS[FINETUNED].configuration
        return [
            ["-c", BASE, "--name", stock, "--features", str(FEATURES[0]), "--set", *_words(SCHEDULE)],
            ["-c", stock, "--name", finetuned, "--set", *_words(FINETUNING), "-tr", TRAININGS[FINETUNED].trainer],
        ]

    def _training(self, run: str) -> Step:
        training, fold, log = TRAININGS[run], self._fold(run), f"train_{run}"

        def progress(tick: Tick) -> None:
            text = (self.logs / f"{log}.log").read_text(encoding="utf-8", errors="replace")
            tick(len(re.findall("Epoch time:", text)))

        return Step(
            f"train {run}",
            # the summary of nnU-Net's validation is the last thing that a training writes
            done=lambda: (fold / "checkpoint_final.pth").is_file() and (fold / "validation" / "summary.json").is_file(),
            work=lambda tick: self._run(self._train_command(run), log, lambda: progress(tick)),
            ticks=training.epochs,
            voids=(
                *self._made_from(run),
                *((self._fold(FINETUNED), *self._made_from(FINETUNED)) if run == STOCK else ()),
            ),
        )

    def _fold(self, run: str) -> Path:
        training = TRAININGS[run]
        return self.results / f"{training.trainer}__nnUNetPlans__{training.configuration}" / f"fold_{FOLD}"

    def _made_from(self, run: str) -> tuple[Path, ...]:
        """A network's folder and what is made with it."""
        own = (self._fold(run), self.predictions / run, self.evaluation / run, *self._results)
        if run != STOCK:
            return own
        calibrated = (path for run in CALIBRATED for path in self._made_by_calibration(run))
        return (*own, *calibrated, *self.new.made)

    def _made_by_calibration(self, run: str) -> tuple[Path, Path, Path]:
        return self.calibrators / CALIBRATED[run], self.predictions / run, self.evaluation / run

    @property
    def _results(self) -> tuple[Path, ...]:
        return self.comparison, self.report

    def _prediction(self, run: str) -> Step:
        output = self.predictions / run

        def done() -> bool:
            references = list((self.raw / "labelsTs").glob("[!.]*.nii.gz"))
            return bool(references) and all(_whole(output / reference.name) for reference in references)

        calibrated = (path for calibrated in CALIBRATED for path in self._made_by_calibration(calibrated)[1:])
        scores = (self.evaluation / run, *(calibrated if run == STOCK else ()))
        return Step(
            f"predict with {run}",
            done=done,
            work=lambda tick: self._run(
                self._predict_command(run), f"predict_{run}", lambda: tick(len(list(output.glob("*.nii.gz"))))
            ),
            ticks=phantom.TEST_CASES,
            voids=(output, *scores, *self._results),
        )

    def _calibration(self, run: str) -> Step:
        """A calibrator from the cases of the stock network's validation fold, and the test cases with it."""
        calibrator, predictions, scores = self._made_by_calibration(run)

        def work(tick: Tick) -> None:
            with self._logged(f"calibrate_{CALIBRATED[run]}"):
                labels = self.raw / "labelsTr"
                fit_folder(self._fold(STOCK) / "validation", calibrator, labels, methods=[CALIBRATED[run]])
                apply_folder(calibrator, self.predictions / STOCK, predictions)

        references = list((self.raw / "labelsTs").glob("*.nii.gz"))
        return Step(
            f"fit {CALIBRATED[run]}, apply it",
            done=lambda: bool(references) and all(_whole(predictions / reference.name) for reference in references),
            work=work,
            ticks=1,
            voids=(calibrator, predictions, scores, *self._results),
        )

    def _scored(self, run: str) -> Path:
        """The predictions that a run of the table scores."""
        return self.readers / "labelsTs" if run == READERS else self.predictions / run

    def _scoring(self, run: str) -> Step:
        output = self.evaluation / run

        def work(tick: Tick) -> None:
            with self._logged(f"evaluate_{run}"):
                dataset = self.raw / "dataset.json"
                references, predictions = self.raw / "labelsTs", self._scored(run)
                evaluate_folder(references, predictions, output, dataset, processes=1, stop_at_failure=True)

        return Step(
            f"evaluate {run}",
            done=(output / "summary.json").is_file,
            work=work,
            ticks=phantom.TEST_CASES,
            voids=(output, *self._results),
        )

    def _compared(self) -> list[str]:
        """The runs as words of ``compare``: the readers are no method."""
        return [f"{NAMES[run]}={self.evaluation / run}" for run in NAMES if run != READERS]

    def _reporting(self) -> Step:
        def work(tick: Tick) -> None:
            # with matplotlib and scipy.stats, which take a second
            from nnunet_calib.report.comparison import compare
            from nnunet_calib.report.page import write_report
            from nnunet_calib.report.runs import parse_runs
            from nnunet_calib.report.tables import write_tables

            compared = compare(parse_runs(self._compared()))
            write_tables(compared, self.comparison, "CalibDemo")
            dataset = read_dataset(self.raw / "dataset.json")
            write_report(compared, self.report, title="Demo", images=self.raw / "imagesTs", dataset=dataset)

        return Step("compare and report", done=self.report.is_file, work=work, ticks=1, voids=self._results)

    @contextmanager
    def _logged(self, name: str) -> Iterator[None]:
        """What is printed meanwhile goes to a log."""
        with (self.logs / f"{name}.log").open("w", encoding="utf-8") as log, redirect_stderr(log), redirect_stdout(log):
            yield

    def _run(self, command: list[str], log: str, tick: Callable[[], None]) -> None:
        run_command(command, self._environment(), self.logs / f"{log}.log", tick)

    def _environment(self) -> dict[str, str]:
        """The caller's environment with nnU-Net's folders in ours; the caller's own stay as they are."""
        listed = [entry for entry in os.environ.get(_autoload.VARIABLE, "").split(os.pathsep) if entry]
        ours = _autoload.trainers_folder()
        return {
            **os.environ,
            **self.variables,
            _autoload.VARIABLE: os.pathsep.join([*listed, *([] if ours in listed else [ours])]),
            "nnUNet_n_proc_DA": str(max(1, min(4, (os.cpu_count() or 1) - 1))),
            "nnUNet_def_n_proc": "1",  # every worker process first imports torch, which takes longer than its work here
            "nnUNet_compile": "f",  # compiling takes longer than this training
            "nnUNet_wandb_enabled": "0",
            "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take the processor from the augmentation
            "PYTHONUNBUFFERED": "1",
        }

    def _plan_command(self) -> list[str]:
        return ["nnUNetv2_plan_and_preprocess", "-d", "999", "-c", BASE, "-npfp", "1", "-np", "1"]

    def _train_command(self, run: str) -> list[str]:
        training = TRAININGS[run]
        words = ["nnUNetv2_train", "999", training.configuration, FOLD, "-tr", training.trainer, "-device", self.device]
        return [*words, "--npz"] if run == STOCK else words  # the calibrators are fitted to its probabilities

    def _predict_command(self, run: str) -> list[str]:
        training = TRAININGS[run]
        folders = ["-i", str(self.raw / "imagesTs"), "-o", str(self.predictions / run)]
        model = ["-d", "999", "-c", training.configuration, "-f", FOLD, "-tr", training.trainer]
        workers = ["-npp", "1", "-nps", "1", "-device", self.device]
        return ["nnUNetv2_predict", *folders, *model, "--save_probabilities", *workers]

    def _calibrate_commands(self, run: str) -> list[list[str]]:
        calibrator, predictions, _ = map(str, self._made_by_calibration(run))
        fit = [str(self._fold(STOCK) / "validation"), "--reference", str(self.raw / "labelsTr")]
        return [
            ["nnunet-calib", "calibrate", "fit", *fit, "--method", CALIBRATED[run], "-o", calibrator],
            ["nnunet-calib", "calibrate", "apply", calibrator, "-i", str(self.predictions / STOCK), "-o", predictions],
        ]

    def _evaluate_command(self, run: str) -> list[str]:
        folders = [str(self.raw / "labelsTs"), str(self._scored(run)), "-o", str(self.evaluation / run)]
        return ["nnunet-calib", "evaluate", *folders, "-djfile", str(self.raw / "dataset.json")]


def _words(settings: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def _has_configuration(plans: Path) -> bool:
    """Whether the last thing that planning adds is there; plans that nnU-Net was interrupted in do not count."""
    try:
        return TRAININGS[FINETUNED].configuration in read_plans(plans)["configurations"]
    except InputError:
        return False


def _whole(segmentation: Path) -> bool:
    """Whether a predicted case is there to the last byte: nnU-Net writes in place, an interruption leaves a part."""
    probabilities = segmentation.with_name(segmentation.name.removesuffix(".nii.gz") + ".npz")
    try:
        with gzip.open(segmentation) as stream:
            stream.read()
    except (OSError, EOFError):
        return False
    return zipfile.is_zipfile(probabilities)
