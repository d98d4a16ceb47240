"""The folders of one experiment and the stock commands that run in them."""

import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from time import sleep

import numpy as np
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from protocol import Protocol, Training

from nnunet_calib.data.files import whole_file, write_whole
from nnunet_calib.data.plans import add_configuration, read_plans, resolve_configuration
from nnunet_calib.training.settings import CALIBRATE_FROM, RESOLVED_KEY

CHECKPOINT = "shared.pth"  # of the first part of a pair, beside those of nnU-Net
VALIDATED = 2  # cases in nnU-Net's validation after each training, which mirrors: all are predicted by the harness
BASE = "evidence"  # configuration with the protocol's network

# nnU-Net takes all cores on CPU; with several jobs side by side each gets one.
ONE_THREAD = (
    "import multiprocessing, sys; multiprocessing.cpu_count = lambda: 1; "
    "from importlib import import_module; module, function = sys.argv.pop(1).split(':'); "
    "sys.exit(getattr(import_module(module), function)())"
)
PLAN = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_experiment_entry"
FINGERPRINT = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:extract_fingerprint_entry"
PREPROCESS = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry"
TRAIN = "nnunetv2.run.run_training:run_training_entry"
PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"


class Bench:
    """Raw data, plans, models and predictions of a protocol in a work folder."""

    def __init__(self, protocol: Protocol, data: Path, work: Path, device: str = "cpu"):
        self.protocol, self.device = protocol, device
        self.dataset = data.resolve() / protocol.content["dataset"]
        self.work = work.resolve() / protocol.name
        self.number = self.dataset.name[7:10]
        folders = {name: self.work / name for name in ("raw", "preprocessed", "results")}
        trainers = Path(__file__).resolve().parent / "trainers"
        listed = [str(trainers), *filter(None, [os.environ.get("nnUNet_extTrainer")])]
        self.environment = {
            **os.environ,
            **{f"nnUNet_{name}": str(folder) for name, folder in folders.items()},
            "nnUNet_extTrainer": os.pathsep.join(listed),
            "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "1" if device == "cpu" else "8"),
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if device == "cpu" else "4"),
        }
        self.raw, self.preprocessed, self.results = folders.values()
        self.plans = self.preprocessed / self.dataset.name / "nnUNetPlans.json"
        self.machine = self.work / "machine.txt"
        self.shift = data.resolve() / protocol.content["shift"]["dataset"] if "shift" in protocol.content else None

    def prepare(self) -> None:
        """Plan, preprocess, split by patient, and write a configuration for every training."""
        for folder in (self.raw, self.preprocessed, self.results, self.work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else "no GPU"
        self.machine.write_text(
            f"{multiprocessing.cpu_count()} cores of {platform.machine()}, {gpu}, torch {torch.__version__}"
        )
        if not (self.raw / self.dataset.name).exists():
            self._give_raw(self.raw / self.dataset.name)
        if not self.plans.exists():
            self.stock("prepare", FINGERPRINT, "-d", self.number, "-np", "2")
            self.stock("prepare", PLAN, "-d", self.number)
        content = self.protocol.content
        if BASE not in read_plans(self.plans)["configurations"]:
            planned = resolve_configuration(read_plans(self.plans), content["configuration"])
            overrides = {"data_identifier": f"{BASE}_{content['configuration']}", **content["network"]}
            overrides["architecture"] = self._architecture(planned, content["network"].get("architecture", {}))
            add_configuration(self.plans, BASE, content["configuration"], {}, overrides)
        done = self.work / "preprocessed.done"
        if not done.exists():
            self.stock("prepare", PREPROCESS, "-d", self.number, "-c", BASE, "-np", "2")
            done.touch()
        train, validation = self.protocol.split(self.cases())
        if len(train) + len(validation) != len(self.cases()):
            raise RuntimeError("a case is on both sides of the split")
        split = json.dumps([{"train": train, "val": validation[:VALIDATED]}], indent=1)
        write_whole(self.plans.with_name("splits_final.json"), split)
        self._link_images(validation)
        for training in self.protocol.trainings:
            self._configure(training)

    def _give_raw(self, folder: Path) -> None:
        """Let nnU-Net see the data set, or its images with sparse labels."""
        if (sparse := self.protocol.content.get("sparse")) is None:
            folder.symlink_to(self.dataset)
            return
        dataset = json.loads((self.dataset / "dataset.json").read_text())
        dataset["labels"]["ignore"] = sparse["ignore"]
        folder.mkdir()
        (folder / "imagesTr").symlink_to(self.dataset / "imagesTr")
        (folder / "labelsTr").symlink_to(self.dataset / sparse["folder"])
        write_whole(folder / "dataset.json", json.dumps(dataset, indent=1))

    def _architecture(self, planned: dict, changed: dict) -> dict:
        architecture = dict(planned["architecture"])
        architecture["arch_kwargs"] = {**architecture["arch_kwargs"], **changed}
        return architecture

    def _configure(self, training: Training) -> None:
        """A configuration of its own for every training; the finished network it starts from is that of its base."""
        if training.name in read_plans(self.plans)["configurations"]:
            return
        finished = training.start is not None and not training.shares
        settings = {**self.protocol.content["schedule"], **training.settings}
        if not training.shares:
            settings["save_every"] = self.first_epochs(settings)
        add_configuration(self.plans, training.name, training.start_name if finished else BASE, settings)

    @staticmethod
    def first_epochs(settings: dict) -> int:
        """Epochs of the first part of a pair."""
        return int(settings["num_epochs"] * CALIBRATE_FROM)

    def _link_images(self, cases: list[str]) -> None:
        folder = self.images("validation")
        folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            for image in (self.dataset / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9].*"):
                if not (folder / image.name).exists():
                    (folder / image.name).symlink_to(image)

    def cases(self) -> list[str]:
        """All training cases by name."""
        return sorted(label.name.removesuffix(".nii.gz") for label in (self.dataset / "labelsTr").glob("*.nii.gz"))

    def images(self, part: str) -> Path:
        """Images of ``validation``, ``test`` or ``shift``."""
        if part == "validation":
            return self.work / "images" / part
        return (self.shift if part == "shift" and self.shift else self.dataset) / "imagesTs"

    def references(self, part: str) -> Path:
        if part == "shift":
            return self.work / "references" / part
        return self.dataset / ("labelsTs" if part == "test" else "labelsTr")

    def map_references(self) -> None:
        """Write the label maps of the other data set with the values that the networks know."""
        values = {int(given): int(ours) for given, ours in self.protocol.content["shift"]["labels"].items()}
        folder = self.references("shift")
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted((self.shift or self.dataset).glob("labelsTs/*.nii.gz")):
            if (folder / file.name).exists():
                continue
            labels, properties = SimpleITKIO().read_seg(str(file))
            mapped = np.zeros_like(labels)
            for given, ours in values.items():
                mapped[labels == given] = ours
            if set(np.unique(labels)) - {0, *values}:
                raise RuntimeError(f"{file}: labels that the protocol does not map")
            SimpleITKIO().write_seg(mapped[0].astype(np.uint8), str(folder / file.name), properties)

    def model(self, training: Training) -> Path:
        return self.results / self.dataset.name / f"{training.trainer}__nnUNetPlans__{training.name}"

    def predictions(self, training: Training, part: str) -> Path:
        return self.work / "predictions" / part / training.name

    def train(self, training: Training) -> None:
        """Train unless it is finished; go on where it was interrupted."""
        fold = self.model(training) / "fold_0"
        if (fold / "validation" / "summary.json").exists():
            return
        if training.shares:
            self._take_first_part(training, fold)
        trained = (fold / "checkpoint_final.pth").exists()
        resume = ["--val"] if trained else ["--c"] if (fold / "checkpoint_latest.pth").exists() else []
        words = [self.number, training.name, "0", "-tr", training.trainer, "-device", self.device, *resume]
        self.stock(f"train_{training.name}", TRAIN, *words, keep_first_part=None if training.shares else fold)

    def predict(self, training: Training, part: str) -> None:
        """Predict a set with probabilities, without mirroring."""
        predictions = self.predictions(training, part)
        if (predictions / "done").exists():
            return
        words = ["-i", str(self.images(part)), "-o", str(predictions), "-d", self.number, "-c", training.name]
        words += ["-tr", training.trainer, "-f", "0", "--save_probabilities", "--disable_tta"]
        self.stock(f"predict_{part}_{training.name}", PREDICT, *words, "-device", self.device, "-npp", "1", "-nps", "1")
        (predictions / "done").touch()

    def _take_first_part(self, training: Training, fold: Path) -> None:
        """Let a training go on where its pair had nnU-Net's own loss so far, unless it has gone on already."""
        if any((fold / f"checkpoint_{kind}.pth").exists() for kind in ("latest", "final")):
            return
        fold.mkdir(parents=True, exist_ok=True)
        start = self.protocol.training(str(training.start_name))
        # Ours, and whole: nnU-Net's own loss of it is what every trainer does until ``calibrate_from``.
        shared = torch.load(self.model(start) / "fold_0" / CHECKPOINT, map_location="cpu", weights_only=False)
        # For ``--c``, which refuses other settings than those of the checkpoint: they begin only now.
        given = {**self.protocol.content["schedule"], **training.settings}
        shared["init_args"]["plans"][RESOLVED_KEY] = {"trainer": training.trainer, **given}
        shared["init_args"]["configuration"] = training.name
        with whole_file(fold / "checkpoint_latest.pth") as stream:
            torch.save(shared, stream)

    def stock(self, log: str, entry: str, *words: str, keep_first_part: Path | None = None) -> None:
        """Run one of nnU-Net's commands; on CPU with one thread.

        ``keep_first_part``: a fold's folder. nnU-Net writes one checkpoint before the last there, at the end of the
        first part, and deletes it at the end; it is copied.
        """
        start = [ONE_THREAD, entry] if self.device == "cpu" else [ONE_THREAD.partition("; ")[2], entry]
        self.call(log, [sys.executable, "-c", *start, *words], keep_first_part)

    def call(self, log: str, words: list[str], keep_first_part: Path | None = None) -> None:
        """Run a command with its output in a log."""
        file = self.work / "logs" / f"{log}.txt"
        with file.open("a") as stream:
            process = subprocess.Popen(
                words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment
            )
            while keep_first_part and process.poll() is None and not (keep_first_part / CHECKPOINT).exists():
                sleep(1)
                _copy_whole(keep_first_part / "checkpoint_latest.pth", keep_first_part / CHECKPOINT)
        if code := process.wait():
            raise RuntimeError(f"{log} failed with exit code {code}, see {file}")


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a checkpoint that is there and finished: nnU-Net writes it in place."""
    try:
        torch.load(source, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError):
        return
    with whole_file(target) as stream, source.open("rb") as given:
        shutil.copyfileobj(given, stream)
