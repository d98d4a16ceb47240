"""The steps of the demo: make the data, plan, preprocess, train, predict, evaluate.

Everything lies in one folder. A step is done when its outputs are there; a step that has to run again first removes
them and all that was made from them, so a folder never mixes two runs.
"""

import gzip
import json
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import nnunet_calib
from nnunet_calib import _autoload
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.data.plans import add_configuration, read_plans
from nnunet_calib.demo import phantom
from nnunet_calib.demo.commands import find_command, run_command
from nnunet_calib.evaluation import evaluate_folder

TRAINERS = {
    "StockTrainer": "stock nnU-Net (Dice+CE)",
    "MbLSTrainer": "MbLS",
    "NACLTrainer": "NACL",
}
READERS_ROW = "the readers themselves"
REGION = "foreground"
BASE = "3d_fullres"
STOCK_CONFIGURATION = "demo"
CONFIGURATION = "demo_calibrated"
FOLD = "0"
FEATURES = (8, 16, 32, 64)
EPOCHS = 8
SETTINGS = {"num_epochs": EPOCHS, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 2}
CALIBRATE_FROM = 0.5  # of so few steps the default would leave the objective too few to be seen

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        title: what it does.
        done: whether its outputs are whole.
        work: does it; given a function to call with the number of ticks reached.
        ticks: how many it has.
        voids: folders and files that it makes, and those made from them.
    """

    title: str
    done: Callable[[], bool]
    work: Callable[[Tick], None]
    ticks: int
    voids: tuple[Path, ...]

    def run(self, tick: Tick) -> None:
        """Remove what an earlier, unfinished run left, then do the step.

        Raises:
            InputError: it failed.
        """
        for path in self.voids:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.work(tick)


@dataclass(frozen=True)
class Row:
    """A line of the table: means over the test cases; HD95 in mm, the rest in [0, 1]."""

    name: str
    dice: float
    hd95: float
    ece: float
    cece: float


class Road:
    """All steps of the demo in one folder.

    Args:
        folder: new, empty, or that of an earlier demo with the same seed.
        device: ``cpu`` or ``cuda``, as nnU-Net's ``-device``.
        seed: of the data; trainings are as random as nnU-Net's always are.

    Raises:
        UsageError: the folder holds something else.
        InputError: nnU-Net's commands are not in this environment.
    """

    def __init__(self, folder: Path, device: str, seed: int):
        self.folder = folder.resolve()
        self.device = device
        self.seed = seed
        self.raw = self.folder / "nnUNet_raw" / phantom.DATASET
        self.preprocessed = self.folder / "nnUNet_preprocessed" / phantom.DATASET
        self.results = self.folder / "nnUNet_results" / phantom.DATASET
        self.readers = self.folder / "readers"
        self.predictions = self.folder / "predictions"
        self.evaluation = self.folder / "evaluation"
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
            voids=(self.preprocessed, self.results, self.predictions, self.evaluation),
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
            *map(self._training, TRAINERS),
            *map(self._prediction, TRAINERS),
            *(self._scoring(trainer, self.predictions / trainer) for trainer in TRAINERS),
            self._scoring("readers", self.readers / "labelsTs"),
        ]

    def rows(self) -> Iterator[Row]:
        """The table, once all steps are done."""
        for run, name in [*TRAINERS.items(), ("readers", READERS_ROW)]:
            summary = read_json(self.evaluation / run / "summary.json")
            overlap, calibration = summary["foreground_mean"], summary["calibration_mean"][REGION]
            yield Row(name, *map(float, (overlap["Dice"], overlap["HD95"], calibration["ECE"], calibration["CECE"])))

    def script(self) -> Path:
        """The commands that the steps run, as a shell script to read and to copy from."""
        return self.folder / "commands.sh"

    def commands(self) -> list[list[str]]:
        """The stock commands in their order, and ``nnunet-calib evaluate``, which the demo calls from within."""
        return [
            self._plan_command(),
            *map(self._train_command, TRAINERS),
            *map(self._predict_command, TRAINERS),
            *(self._evaluate_command(trainer, self.predictions / trainer) for trainer in TRAINERS),
            self._evaluate_command("readers", self.readers / "labelsTs"),
        ]

    def _claim(self) -> None:
        """Mark the folder as this demo's; refuse one with other content, the commands would mix with it."""
        marker = self.folder / "demo.json"
        ours = {"version": nnunet_calib.__version__, "seed": self.seed, "settings": SETTINGS}
        if marker.is_file():
            theirs = read_json(marker)
            differing = [key for key in ours if theirs.get(key) != ours[key]]
            if differing:
                key = differing[0]
                what = f"a demo with {key} {theirs.get(key)}, not {ours[key]}"
                raise UsageError(f"{self.folder} holds {what}; choose another folder with -o")
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} is not empty and no demo's folder; choose another one with -o")
        elif self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is not a folder; choose another one with -o")
        self.logs.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(ours, indent=2) + "\n")
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        write_whole(self.script(), "\n".join([*exports, *map(shlex.join, self.commands())]) + "\n")

    def _plan_and_preprocess(self, tick: Tick) -> None:
        cases = self.preprocessed / f"nnUNetPlans_{BASE}"
        self._run(self._plan_command(), "plan_and_preprocess", lambda: tick(len(list(cases.glob("*.pkl")))))
        plans = self.preprocessed / "nnUNetPlans.json"
        # nnU-Net's own plan with a network small enough for a processor
        architecture = read_plans(plans)["configurations"][BASE]["architecture"]
        arguments = architecture["arch_kwargs"]
        arguments["features_per_stage"] = list(FEATURES[: arguments["n_stages"]])
        add_configuration(plans, STOCK_CONFIGURATION, BASE, SETTINGS, {"architecture": architecture})
        add_configuration(plans, CONFIGURATION, STOCK_CONFIGURATION, {"calibrate_from": CALIBRATE_FROM})

    def _training(self, trainer: str) -> Step:
        fold = self.results / f"{trainer}__nnUNetPlans__{_configuration(trainer)}" / f"fold_{FOLD}"
        log = f"train_{trainer}"

        def progress(tick: Tick) -> None:
            tick(
                len(re.findall("Epoch time:", (self.logs / f"{log}.log").read_text(encoding="utf-8", errors="replace")))
            )

        return Step(
            f"train {trainer}",
            # the summary of nnU-Net's validation is the last thing that a training writes
            done=lambda: (fold / "checkpoint_final.pth").is_file() and (fold / "validation" / "summary.json").is_file(),
            work=lambda tick: self._run(self._train_command(trainer), log, lambda: progress(tick)),
            ticks=EPOCHS,
            voids=(fold, self.predictions / trainer, self.evaluation / trainer),
        )

    def _prediction(self, trainer: str) -> Step:
        output = self.predictions / trainer

        def done() -> bool:
            references = list((self.raw / "labelsTs").glob("*.nii.gz"))
            return bool(references) and all(_whole(output / reference.name) for reference in references)

        return Step(
            f"predict with {trainer}",
            done=done,
            work=lambda tick: self._run(
                self._predict_command(trainer), f"predict_{trainer}", lambda: tick(len(list(output.glob("*.nii.gz"))))
            ),
            ticks=phantom.TEST_CASES,
            voids=(output, self.evaluation / trainer),
        )

    def _scoring(self, run: str, predictions: Path) -> Step:
        output = self.evaluation / run

        def work(tick: Tick) -> None:
            with (self.logs / f"evaluate_{run}.log").open("w", encoding="utf-8") as log, redirect_stderr(log):
                evaluate_folder(
                    self.raw / "labelsTs",
                    predictions,
                    output,
                    self.raw / "dataset.json",
                    processes=1,
                    stop_at_failure=True,
                )

        return Step(
            f"evaluate {run}",
            done=(output / "summary.json").is_file,
            work=work,
            ticks=phantom.TEST_CASES,
            voids=(output,),
        )

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

    def _train_command(self, trainer: str) -> list[str]:
        return ["nnUNetv2_train", "999", _configuration(trainer), FOLD, "-tr", trainer, "-device", self.device]

    def _predict_command(self, trainer: str) -> list[str]:
        folders = ["-i", str(self.raw / "imagesTs"), "-o", str(self.predictions / trainer)]
        model = ["-d", "999", "-c", _configuration(trainer), "-f", FOLD, "-tr", trainer]
        return [
            "nnUNetv2_predict",
            *folders,
            *model,
            "--save_probabilities",
            "-npp",
            "1",
            "-nps",
            "1",
            "-device",
            self.device,
        ]

    def _evaluate_command(self, run: str, predictions: Path) -> list[str]:
        folders = [str(self.raw / "labelsTs"), str(predictions), "-o", str(self.evaluation / run)]
        return ["nnunet-calib", "evaluate", *folders, "-djfile", str(self.raw / "dataset.json")]


def _configuration(trainer: str) -> str:
    return STOCK_CONFIGURATION if trainer == "StockTrainer" else CONFIGURATION


def _has_configuration(plans: Path) -> bool:
    """Whether the last thing that planning adds is there; plans that nnU-Net was interrupted in do not count."""
    try:
        return CONFIGURATION in read_plans(plans)["configurations"]
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
