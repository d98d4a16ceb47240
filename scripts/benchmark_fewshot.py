"""What few-shot structures cost beside stock prediction: seconds, and memory of a large volume.

    python scripts/benchmark_fewshot.py -o WORK time [--patch 64] [--size 96] [--chunks 12] [--rounds 3]
    python scripts/benchmark_fewshot.py -o WORK memory [--shape 300 512 512] [--chunks 12]
    python scripts/benchmark_fewshot.py -o WORK brain DATA [--mirroring]

``time``: nnU-Net's plain U-Net of 32 to 256 features, random weights, one volume, one thread, no test-time augmentation
(with it the features cost less beside the eight-fold pass). Stock prediction and ``fewshot apply`` with one and with
three tasks run in turn in one process, files read and written; shown are medians of the rounds in CPU seconds, for the
machine may be busy.

``memory``: 32 features at full resolution from convolutions of one voxel, five classes, for memory does not depend on
the kernels. Stock prediction and ``fewshot apply`` run in processes of their own; shown are peaks of resident memory,
of Linux. Half an hour on two busy cores; ``--shape 100 256 256`` is the same in small.

``brain``: the commands ``fewshot fit`` (three supports, registration as by default) and ``fewshot apply`` on whole
brains of DATA's ``Dataset035_Brain`` at 1 mm, with a random network of 16 to 128 features, one query after the other;
wall seconds on all cores, so the machine has to be idle. Without test-time augmentation unless ``--mirroring``.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.apply.folder import apply_folder
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.task.fit import fit_folder

CLASSES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    steps = parser.add_subparsers(dest="what", required=True)
    measure_time = steps.add_parser("time")
    measure_time.add_argument("--patch", type=int, default=64)
    measure_time.add_argument("--size", type=int, default=96)
    measure_time.add_argument("--rounds", type=int, default=3)
    memory = steps.add_parser("memory")
    memory.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    brain = steps.add_parser("brain")
    brain.add_argument("data", type=Path)
    brain.add_argument("--mirroring", action="store_true")
    for step in (measure_time, memory):
        step.add_argument("--chunks", type=int, default=12)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = {"time": seconds, "memory": peaks, "brain": first_query}[args.what](args)
    text = json.dumps(found, indent=1)
    write_whole(args.work / f"{args.what}.json", text + "\n")
    print(text)


def seconds(args: argparse.Namespace) -> dict[str, Any]:
    model = write_model(args.work / "time", (32, 64, 128, 256), kernel=3, patch=args.patch, convolutions=2)
    tasks = fit_tasks(model, args.work / "time", args.patch, args.chunks, 3)
    images = args.work / "time" / "imagesTs"
    write_case(images, None, "query", (args.size,) * 3, 9)
    ways: dict[str, Callable[[], Any]] = {
        "stock": lambda: predict(model, images, args.work / "time" / "stock"),
        "one task": lambda: apply(model, tasks[:1], images, args.work / "time" / "one"),
        "three tasks": lambda: apply(model, tasks, images, args.work / "time" / "three"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            taken[name].append(time.process_time() - begin)
    medians = {name: statistics.median(rounds) for name, rounds in taken.items()}
    return {
        "cpu_seconds": taken,
        "median": medians,
        "of_stock": {name: medians[name] / medians["stock"] for name in ways},
        "patch": args.patch,
        "size": args.size,
        "chunks": args.chunks,
    }


def peaks(args: argparse.Namespace) -> dict[str, Any]:
    model = write_model(args.work / "memory", (32, 32, 32, 32), kernel=1, patch=128, convolutions=1)
    tasks = fit_tasks(model, args.work / "memory", 64, args.chunks, 1)
    images = args.work / "memory" / "imagesTs"
    write_case(images, None, "query", tuple(args.shape), 9)
    found: dict[str, Any] = {"shape": list(args.shape), "chunks": args.chunks, "peak_GB": {}}
    ways = {
        "stock": (predict, (model, images, args.work / "memory" / "stock", 1.0)),
        "one task, merged": (apply, (model, tasks, images, args.work / "memory" / "one", 1.0)),
    }
    for name, (function, arguments) in ways.items():
        # Not a multiprocessing.Pool: its workers may not have the children that nnU-Net starts.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found["peak_GB"][name] = pool.submit(peak_of, function, arguments).result()
        print(name, found["peak_GB"][name], flush=True)
    return found


def first_query(args: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of ``fit`` and of each query's ``apply``, as commands."""
    root, source = args.work / "brain", args.data.resolve() / "Dataset035_Brain"
    model = write_model(root, (16, 32, 64, 128), kernel=3, patch=64, convolutions=2)
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (source / "labelsTr").glob("*.nii.gz"))[:5]
    folders = {"imagesTr": cases[:3], "labelsTr": cases[:3], cases[3]: cases[3:4], cases[4]: cases[4:]}
    for folder, held in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for case in held:
            kind, name = ("labelsTr", f"{case}.nii.gz") if folder == "labelsTr" else ("imagesTr", f"{case}_0000.nii.gz")
            if not (root / folder / name).exists():
                (root / folder / name).symlink_to(source / kind / name)
    task = root / "hippocampus.fewshot"
    task.unlink(missing_ok=True)
    how = ["-f", "0", "-device", "cpu", *([] if args.mirroring else ["--disable_tta"])]
    given = ["--images", root / "imagesTr", "--labels", root / "labelsTr", "--label", "10", "--name", "hippocampus"]
    steps = {"fit": ["fit", model, *given, "-o", task]}
    for case in cases[3:]:
        shutil.rmtree(root / f"out_{case}", ignore_errors=True)
        steps[f"apply {case}"] = ["apply", model, task, "-i", root / case, "-o", root / f"out_{case}"]
    wall = {}
    for name, words in steps.items():
        begin = time.perf_counter()
        subprocess.run(["nnunet-calib", "fewshot", *map(str, words), *how], check=True, stdout=subprocess.DEVNULL)
        wall[name] = round(time.perf_counter() - begin, 1)
    return {"wall_seconds": wall, "cores": os.cpu_count(), "mirroring": args.mirroring}


def peak_of(function: Callable[..., Any], arguments: tuple) -> float:
    """Peak of this process's resident memory, GB, after calling."""
    torch.set_num_threads(1)
    function(*arguments)
    # not getrusage: its peak is inherited from the process that started this one
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def predict(model: Path, images: Path, output: Path, step_size: float = 0.5) -> None:
    output.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(step_size, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        predictor.predict_from_files_sequential(str(images), str(output))


def apply(model: Path, tasks: list[Path], images: Path, output: Path, step_size: float = 0.5) -> None:
    apply_folder(model, tasks, images, output, mirroring=False, step_size=step_size, readers=0, progress=False)


def fit_tasks(model: Path, root: Path, size: int, chunks: int, number: int) -> list[Path]:
    """Tasks for a rod from bottom to top, so that every chunk has a head."""
    write_case(root / "imagesTr", root / "labelsTr", "support", (size,) * 3, 1)
    files = []
    for i in range(number):
        files.append(root / f"rod_{i}.fewshot")
        fit_folder(
            model,
            root / "imagesTr",
            root / "labelsTr",
            files[-1],
            structures={f"rod_{i}": 1},
            settings=Settings(chunks=chunks),
            mirroring=False,
            step_size=1.0,
            progress=False,
        )
    return files


def write_case(images: Path, labels: Path | None, name: str, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(1, 0.3, shape).astype(np.float32)
    rod = np.zeros(shape, dtype=np.uint8)
    rod[2:-2, shape[1] // 3 : shape[1] // 2, shape[2] // 3 : shape[2] // 2] = 1
    image += 2 * rod
    for folder, array, file in ((images, image, f"{name}_0000.nii.gz"), (labels, rod, f"{name}.nii.gz")):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / file), True)


def write_model(root: Path, features: tuple[int, ...], kernel: int, patch: int, convolutions: int) -> Path:
    """A trained model's folder with random weights."""
    stages = len(features)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[kernel] * 3] * stages,
            "strides": [[1] * 3, *[[2] * 3] * (stages - 1)],
            "n_conv_per_stage": [convolutions] * stages,
            "n_conv_per_stage_decoder": [convolutions] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration: dict[str, Any] = {
        "data_identifier": "made",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [patch] * 3,
        "median_image_size_in_voxels": [patch] * 3,
        "spacing": [1.0] * 3,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": architecture,
    }
    for name, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        arguments = {"is_seg": name == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{name}_kwargs"] = arguments
    plans = {
        "dataset_name": "Dataset999_Made",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"3d_fullres": configuration},
    }
    labels = {"background": 0} | {f"class_{c}": c for c in range(1, CLASSES)}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    folder = root / "Dataset999_Made" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "plans.json", json.dumps(plans))
    write_whole(folder / "dataset.json", json.dumps(dataset))
    torch.manual_seed(0)
    keywords = architecture["_kw_requires_import"]
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], keywords, 1, CLASSES
    )
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


if __name__ == "__main__":
    main()
