"""nnU-Net in a fresh environment: our package installed there, its own commands on data sets of a few voxels."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_calib.data.plans import add_configuration, read_plans

ROOT = Path(__file__).parents[2]
SHAPE, LOW = (24, 28, 28), (16, 20, 20)
LABELS = {"labels": {"background": 0, "a": 1, "b": 2}, "regions": {"background": 0, "whole": [1, 2], "core": [2]}}
IGNORE = 3
CASES = 6
_OWN = re.compile("nnUNet_|NNUNET_CALIB|PYTHON|VIRTUAL_ENV|OMP_THREAD_LIMIT")


def backend(*modules: str) -> list[str]:
    """Words for pip to build with what is installed, where it is; else pip fetches it."""
    return ["--no-build-isolation"] if all(find_spec(module) for module in modules) else []


def call(words: list[str], environment: dict[str, str], timeout: int = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


class Installed:
    """A new environment with our package in it; torch and nnU-Net are those of the environment that runs the tests."""

    def __init__(self, folder: Path, what: list[str]):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").glob("python*/site-packages"))
        there = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
        # Folders in a .pth come last on the path, and the .pth files in them are not read: an editable install of
        # ourselves over there stays out of sight.
        (self.site / "zz_host.pth").write_text("".join(f"{path}\n" for path in sorted(there)))
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps", *what]
        done = call(pip, {**os.environ})
        assert done.returncode == 0, last_words(done)
        # What the tests' own environment has registered must not help.
        self.environment = {name: value for name, value in os.environ.items() if not _OWN.match(name)}
        self.environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
        self.environment["OMP_WAIT_POLICY"] = "passive"  # threads that spin while they wait are slow on a busy machine

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python."""
        return call([str(self.python), *words], self.environment | environment)

    def command(self, name: str) -> str:
        """nnU-Net's console script, to be run by the environment's Python."""
        return str(Path(sysconfig.get_path("scripts"), name))


class Host:
    """nnU-Net's folders and commands, used as its users do."""

    def __init__(self, installed: Installed, root: Path):
        self.installed, self.root = installed, root
        folders = {name: root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        self.raw, self.preprocessed, self.results = folders.values()
        self.folders = {name: str(folder) for name, folder in folders.items()}

    def command(self, name: str, *words: str, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.installed.run(self.installed.command(name), *words, **self.folders)
        assert not succeeds or done.returncode == 0, last_words(done)
        return done

    def train(self, dataset: str, configuration: str, fold: str, trainer: str, *flags: str, succeeds: bool = True):
        words = [dataset[7:10], configuration, fold, "-tr", trainer, "-device", "cpu", *flags]
        return self.command("nnUNetv2_train", *words, succeeds=succeeds)

    def train_until(self, line: str, dataset: str, configuration: str, fold: str, trainer: str) -> None:
        """Start a training and kill it, workers too, when it has written ``line``."""
        words = [dataset[7:10], configuration, fold, "-tr", trainer, "-device", "cpu"]
        words = [str(self.installed.python), "-u", self.installed.command("nnUNetv2_train"), *words]
        output = self.root / "killed.log"
        environment = self.installed.environment | self.folders
        with output.open("w") as stream:
            process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            until = time.monotonic() + 300
            while not re.search(line, output.read_text()):
                assert process.poll() is None, output.read_text()[-3000:]
                assert time.monotonic() < until, output.read_text()[-3000:]
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def predict(self, dataset: str, configuration: str, fold: str, trainer: str, *flags: str) -> Path:
        """Predict the data set's one test image; returns the folder."""
        output = self.root / f"predicted_{dataset}_{configuration}"
        words = ["-i", str(self.raw / dataset / "imagesTs"), "-o", str(output), "-d", dataset[7:10]]
        words += ["-c", configuration, "-f", fold, "-tr", trainer, "-device", "cpu", "-npp", "1", "-nps", "1"]
        self.command("nnUNetv2_predict", *words, "--save_probabilities", *flags)
        return output

    def model(self, dataset: str, configuration: str, trainer: str) -> Path:
        return self.results / dataset / f"{trainer}__nnUNetPlans__{configuration}"

    def plans(self, dataset: str) -> Path:
        return self.preprocessed / dataset / "nnUNetPlans.json"

    def add_small(self, dataset: str, name: str, base: str, settings: dict[str, Any], **cascade: str) -> None:
        """Add a configuration whose patch is the whole image, with three stages of 4, 8 and 16 features."""
        plans = read_plans(self.plans(dataset))
        axes = 2 if base == "2d" else 3
        patch = list(LOW if base == "3d_lowres" else SHAPE)[-axes:]
        origin = base if "architecture" in plans["configurations"][base] else "3d_fullres"
        architecture = plans["configurations"][origin]["architecture"]
        architecture["arch_kwargs"] |= {
            "n_stages": 3,
            "features_per_stage": [4, 8, 16],
            "kernel_sizes": [[3] * axes] * 3,
            "strides": [[1] * axes, [2] * axes, [2] * axes],
            "n_conv_per_stage": [1] * 3,
            "n_conv_per_stage_decoder": [1] * 2,
        }
        overrides = {"batch_size": 2, "patch_size": patch, "architecture": architecture}
        schedule = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "save_every": 1}
        add_configuration(self.plans(dataset), name, base, schedule | settings, overrides, **cascade)

    def add_low_resolution(self, dataset: str) -> None:
        """Add a cascade to the plans as nnU-Net does for larger images."""
        plans = read_plans(self.plans(dataset))
        full = plans["configurations"]["3d_fullres"]
        low = {"data_identifier": "nnUNetPlans_3d_lowres", "spacing": [1.5] * 3, "patch_size": list(LOW)}
        low |= {"median_image_size_in_voxels": [size / 1.5 for size in SHAPE], "next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_lowres"] = full | low
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        self.plans(dataset).write_text(json.dumps(plans))


def write_dataset(raw: Path, kind: str) -> None:
    """Six training cases and a test image of two nested balls; with ``ignore`` a slab of each label is unknown."""
    what, _, ignore = kind.partition("_")
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    grid = np.indices(SHAPE)
    for case in range(CASES):
        centre = np.divide(SHAPE, 2) + rng.uniform(-2, 2, 3)
        radius = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(axis=0))
        labels = (radius < 9).astype(np.uint8) + (radius < 5)
        image = ndimage.gaussian_filter(labels + rng.normal(0, 0.3, SHAPE), 0.7).astype(np.float32)
        if ignore:
            labels[:, :6] = IGNORE
        sitk.WriteImage(sitk.GetImageFromArray(image), str(raw / "imagesTr" / f"case_{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(raw / "labelsTr" / f"case_{case}.nii.gz"))
    shutil.copy(raw / "imagesTr" / "case_0_0000.nii.gz", raw / "imagesTs" / "test_0000.nii.gz")
    dataset: dict[str, Any] = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS[what] | ({"ignore": IGNORE} if ignore else {}),
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    if what == "regions":
        dataset["regions_class_order"] = [1, 2]
    (raw / "dataset.json").write_text(json.dumps(dataset))
