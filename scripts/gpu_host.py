"""nnU-Net for `check_gpu`: a data set, a small plan, and what trainers, predictions and evaluations do on a device.

The data are the demo's phantom, made and preprocessed here in seconds, or a data set of the user's with its plans
(Hippocampus: ``--dataset 4``), of which nothing is changed: the folders here hold links to it.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from benchmark_trainers import batch, build, step_time
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_calib.cli.main import main as nnunet_calib
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.data.plans import preprocessed_folder, read_plans
from nnunet_calib.demo.phantom import SPACING, make_case
from nnunet_calib.training.base import CalibrationTrainer
from nnunet_calib.training.trainers import TRAINERS

PHANTOM, PLANS, CONFIGURATION = "Dataset998_CheckGPU", "nnUNetPlans", "check_gpu"
TRAINING_CASES, TEST_CASES = 4, 2
DICE_OF_DEVICES = 0.99
PROBABILITIES_OF_DEVICES = 2e-2
"""nnU-Net predicts in float16 on CUDA and in float32 on a CPU: how far apart probabilities may be at most, and in mean
a tenth of it. Labels may differ where two classes are as likely."""
EVALUATION_OF_DEVICES = 1e-6


class Interrupted(Exception):
    """A training that was stopped on purpose."""


@dataclass(frozen=True)
class Host:
    """Folders of nnU-Net under ``work``; the data set is made with the first use.

    Attributes:
        work: kept between runs.
        device: "cuda" or "cpu".
        dataset: number of one in the user's folders, or None for the phantom.
        small: a network and patches that a processor trains in seconds.
    """

    work: Path
    device: str
    dataset: str | None
    small: bool

    def train(self, name: str) -> dict:
        """Two epochs of a trainer, stopped after the first and continued by another trainer object."""
        with self.folders() as (folder, plans):
            first = self._trainer(name, folder, plans)
            shutil.rmtree(first.output_folder, ignore_errors=True)
            first = self._trainer(name, folder, plans)
            _stop_after_an_epoch(first)
            with contextlib.suppress(Interrupted):
                first.run_training()
            kept = _state(first)
            second = self._trainer(name, folder, plans | {"continue_training": True})
            second.load_checkpoint(str(Path(first.output_folder, "checkpoint_latest.pth")))
            restored = second.current_epoch == 1 and _state(second) == kept
            second.run_training()
            losses = [*second.logger.get_value("train_losses", None), *second.logger.get_value("val_losses", None)]
            losses = [float(loss) for loss in losses]
            compiled = type(second.network).__name__ == "OptimizedModule"
            return {
                "train_and_validation_loss": losses,
                "compiled": compiled,
                "scaled": second.grad_scaler is not None,
                "resumed": restored,
                "passed": restored and len(losses) == 4 and all(map(math.isfinite, losses)),
            }

    def train_on_two(self, name: str) -> dict:
        """Two epochs of nnU-Net's own command with ``-num_gpus 2``."""
        if self.device != "cuda" or torch.cuda.device_count() < 2:
            return {"passed": True, "result": "not measured: there are no two GPUs"}
        with self.folders() as (folder, plans):
            output = Path(self._trainer(name, folder, plans).output_folder)
            shutil.rmtree(output, ignore_errors=True)
            train = Path(sys.executable).with_name("nnUNetv2_train")
            number = folder.name[7:10]
            words = [str(train), number, CONFIGURATION, "0", "-tr", name, "-p", PLANS, "-num_gpus", "2"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            if done.returncode:
                return {"passed": False, "error": (done.stderr.strip().splitlines() or ["no words"])[-1][:300]}
            checkpoint = torch.load(output / "checkpoint_final.pth", weights_only=False, map_location="cpu")
            losses = [float(loss) for loss in checkpoint["logging"]["train_losses"]]
            return {"train_loss": losses, "passed": len(losses) == 2 and all(map(math.isfinite, losses))}

    def step(self, name: str, side: int, classes: int, steps: int) -> dict:
        """Seconds and peak MiB of a whole step of a trainer in random patches of ``side``, batch 2."""
        with self.folders() as (folder, plans):
            plans = _plans_of(name, plans)
            features = [4, 8] if self.small else [32, 64, 128, 256, 320, 320]
            plans["configurations"][CONFIGURATION] |= network(features, [side] * 3)
            labels = {"background": 0} | {f"organ {number}": number for number in range(1, classes)}
            dataset = read_json(folder / "dataset.json") | {"labels": labels}
            dataset.pop("regions_class_order", None)
            trainer = build(name, plans, dataset, CONFIGURATION, torch.device(self.device))
            if self.device != "cuda":  # to show that it works; the time of a small patch says nothing
                loss = trainer.train_step(batch(trainer, 0))["loss"]
                return {"seconds": "not measured", "mib": "not measured", "passed": math.isfinite(loss)}
            seconds, mib = step_time(trainer, steps)
            return {"seconds": seconds, "mib": mib, "passed": True}

    def predict(self, name: str) -> dict:
        """Labels and probabilities of the test images on the device against the processor's."""
        with self.folders() as (folder, plans):
            fold = Path(self._trainer(name, folder, plans).output_folder)
            if not (fold / "checkpoint_final.pth").is_file():
                return {"passed": False, "error": f"{name} was not trained"}
            for device in {self.device, "cpu"}:
                words = ["predict", "-i", str(self._images(folder)), "-o", str(self._predictions(device))]
                words += ["-m", str(fold.parent), "-f", "0", "-device", device, "--probabilities", "npz", "--fresh"]
                if nnunet_calib([*words, "--disable_progress_bar"]) != 0:
                    return {"passed": False, "error": f"predict on {device} failed"}
            largest, means, dice = 0.0, [], []
            for file in sorted(self._predictions("cpu").glob("*.npz")):
                pair = [self._predictions(device) / file.name for device in (self.device, "cpu")]
                ours, theirs = (np.load(each)["probabilities"].astype(np.float64) for each in pair)
                largest = max(largest, float(np.abs(ours - theirs).max()))
                means.append(float(np.abs(ours - theirs).mean()))
                a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(each.with_suffix(".nii.gz")))) for each in pair)
                union = int((a > 0).sum() + (b > 0).sum())
                dice.append(2 * int(((a == b) & (a > 0)).sum()) / union if union else 1.0)
            mean = max(means)
            close = largest <= PROBABILITIES_OF_DEVICES and mean <= PROBABILITIES_OF_DEVICES / 10
            return {
                "largest_difference": largest,
                "mean_difference": mean,
                "dice_of_foreground": min(dice),
                "passed": close and min(dice) >= DICE_OF_DEVICES,
            }

    def evaluate(self) -> dict:
        """The record of the processor's predictions, computed on the device and on the processor."""
        with self.folders() as (folder, _):
            predictions = self._predictions("cpu")
            if not any(predictions.glob("*.npz")):
                return {"passed": False, "error": "nothing was predicted"}
            found = []
            for device in (self.device, "cpu"):
                output = self.work / f"evaluation_{device}{len(found)}"
                words = ["evaluate", str(self._images(folder).with_name("labelsTs")), str(predictions), "--fresh"]
                if nnunet_calib([*words, "-o", str(output), "-device", device, "-np", "1", "--boundary"]) != 0:
                    return {"passed": False, "error": f"evaluate on {device} failed"}
                summary = read_json(output / "summary.json")
                found.append({key: summary[key] for key in ("metric_per_case", "mean", "calibration_mean")})
            numbers, error = _apart(*found)
            return {"numbers": numbers, "error": error, "passed": numbers > 0 and error <= EVALUATION_OF_DEVICES}

    # ------------------------------------------------------------------------------------------------------- folders

    @contextlib.contextmanager
    def folders(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """nnU-Net's variables, one process, and the folder of preprocessed data with its plans."""
        theirs = None if self.dataset is None else preprocessed_folder(self.dataset)
        ours = {f"nnUNet_{name}": str(self.work / name) for name in ("raw", "preprocessed", "results")}
        before = {name: os.environ.get(name) for name in (*ours, "nnUNet_n_proc_DA", "nnUNet_raw")}
        user_raw = os.environ.get("nnUNet_raw")
        os.environ.update(ours, nnUNet_n_proc_DA="0")  # without processes of their own the batches are the same
        try:
            if theirs is None:
                folder = self.work / "preprocessed" / PHANTOM
                if not (folder / f"{PLANS}.json").is_file():
                    self._make_phantom(folder)
            else:
                folder = self._link(theirs, Path(user_raw or ""))
            yield folder, read_plans(folder / f"{PLANS}.json")
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def _make_phantom(self, folder: Path) -> None:
        raw = self.work / "raw" / PHANTOM
        number = 0
        for part, cases in (("Tr", TRAINING_CASES), ("Ts", TEST_CASES)):
            for kind in ("images", "labels"):
                (raw / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
            for _ in range(cases):
                case = make_case(0, np.random.default_rng(number))
                for file, array in (
                    (f"images{part}/case_{number}_0000", case.image),
                    (f"labels{part}/case_{number}", case.label),
                ):
                    image = sitk.GetImageFromArray(array)
                    image.SetSpacing(SPACING[::-1])
                    sitk.WriteImage(image, str(raw / f"{file}.nii.gz"), useCompression=True)
                number += 1
        values = sorted({int(value) for value in np.unique(case.label)} | {0})
        labels = {"background" if value == 0 else f"structure {value}": value for value in values}
        dataset = {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "numTraining": TRAINING_CASES,
            "file_ending": ".nii.gz",
        }
        patch = [16, 16, 16] if self.small else [32, 64, 64]
        plans = _plans(PHANTOM, list(case.image.shape), patch, [4, 8, 8] if self.small else [16, 32, 64])
        manager = PlansManager(plans)
        data = folder / "check_gpu"
        (folder / "gt_segmentations").mkdir(parents=True, exist_ok=True)
        data.mkdir(exist_ok=True)
        for label in sorted((raw / "labelsTr").glob("*.nii.gz")):
            name = label.name.removesuffix(".nii.gz")
            DefaultPreprocessor(verbose=False).run_case_save(
                str(data / name), [str(raw / "imagesTr" / f"{name}_0000.nii.gz")], str(label), manager,
                manager.get_configuration(CONFIGURATION), dataset,
            )  # fmt: skip
            shutil.copy(label, folder / "gt_segmentations")
        names = [f"case_{number}" for number in range(TRAINING_CASES)]
        write_whole(raw / "dataset.json", json.dumps(dataset))
        for file, content in (
            ("dataset.json", dataset),
            ("dataset_fingerprint.json", {}),
            ("splits_final.json", [{"train": names[1:], "val": names[:1]}]),
            (f"{PLANS}.json", plans),
        ):
            write_whole(folder / file, json.dumps(content))

    def _link(self, theirs: Path, user_raw: Path) -> Path:
        """A folder of links to the user's preprocessed data, with plans of ours."""
        folder = self.work / "preprocessed" / theirs.name
        folder.mkdir(parents=True, exist_ok=True)
        raw = self.work / "raw" / theirs.name
        raw.parent.mkdir(exist_ok=True)
        if not raw.exists():
            raw.symlink_to(user_raw / theirs.name)
        if not (folder / f"{PLANS}.json").is_file():
            for entry in theirs.iterdir():
                if entry.name not in (f"{PLANS}.json", "check_gpu") and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
            plans = read_plans(theirs / f"{PLANS}.json")
            patch = [16, 16, 16] if self.small else [32, 40, 32]
            features = [4, 8] if self.small else [16, 32, 64]
            plans["configurations"][CONFIGURATION] = {
                "inherits_from": "3d_fullres",
                **network(features, patch),
                **_schedule(),
            }
            write_whole(folder / f"{PLANS}.json", json.dumps(plans))
        return folder

    def _images(self, folder: Path) -> Path:
        return self.work / "raw" / folder.name / "imagesTs"

    def _predictions(self, device: str) -> Path:
        return self.work / f"predictions_{device}"

    def _trainer(self, name: str, folder: Path, plans: dict[str, Any]) -> CalibrationTrainer:
        plans = {"continue_training": False} | _plans_of(name, plans)
        return TRAINERS[name](plans, CONFIGURATION, 0, read_json(folder / "dataset.json"), torch.device(self.device))


def _plans_of(trainer: str, plans: dict[str, Any]) -> dict[str, Any]:
    """A copy with the settings that the trainer knows."""
    plans = copy.deepcopy(plans)
    if TRAINERS[trainer].LOSS is None:
        del plans["configurations"][CONFIGURATION]["nnunet_calib"]["calibrate_from"]
    return plans


def _write(file: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(file), useCompression=True)


def _stop_after_an_epoch(trainer: CalibrationTrainer) -> None:
    end = trainer.on_epoch_end

    def stop() -> None:
        end()
        raise Interrupted

    trainer.on_epoch_end = stop  # type: ignore[method-assign]


def _state(trainer: CalibrationTrainer) -> dict[str, Any]:
    """What the loss keeps in the checkpoint."""
    if trainer.LOSS is None:
        return {}
    return {name: value.tolist() for name, value in trainer._objective().calibration.state_dict().items()}


def _apart(ours: Any, theirs: Any) -> tuple[int, float]:
    """How many numbers two records have, and the largest difference, relative above 1; infinity for another form."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        pairs = [_apart(ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [_apart(*pair) for pair in zip(ours, theirs, strict=True)]
    elif isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
        return 1, abs(ours - theirs) / max(1.0, abs(theirs))
    else:
        return 0, 0.0 if ours == theirs else math.inf
    return sum(number for number, _ in pairs), max((error for _, error in pairs), default=0.0)


def _schedule() -> dict[str, Any]:
    schedule = {"num_epochs": 2, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 1, "save_every": 1}
    return {"nnunet_calib": schedule | {"calibrate_from": 0}}


def network(features: list[int], patch: list[int]) -> dict[str, Any]:
    stages = len(features)
    return {
        "batch_size": 2,
        "patch_size": patch,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": features,
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * stages,
                "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _plans(dataset: str, shape: list[int], patch: list[int], features: list[int]) -> dict[str, Any]:
    """As nnU-Net writes them, for images that need no resampling."""
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "check_gpu",
        "preprocessor_name": "DefaultPreprocessor",
        "median_image_size_in_voxels": [float(side) for side in shape],
        "spacing": list(SPACING),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "batch_dice": False,
    }
    return {
        "dataset_name": dataset,
        "plans_name": PLANS,
        "original_median_spacing_after_transp": list(SPACING),
        "original_median_shape_after_transp": shape,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "check_gpu",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
        "configurations": {CONFIGURATION: configuration | network(features, patch) | _schedule()},
    }
