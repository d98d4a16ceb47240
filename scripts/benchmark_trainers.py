"""Step time and memory of every trainer, side by side, on random batches of a real configuration.

    python scripts/benchmark_trainers.py -d 4 -c 3d_fullres [--trainers MbLSTrainer ...] [--steps 20] [--keep]

Needs the data set's plans (``nnUNetv2_plan_and_preprocess``), no preprocessed images. On CUDA nnU-Net's mixed
precision and compile are in force, as in a training. Every step's loss must be finite. Rounds go over all trainers in
turn, so that a drift of the machine's speed meets all of them; figures are medians, ratios are to StockTrainer in the
same round. On CPU seconds are the processor's, on CUDA the wall's.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date

import numpy as np
import torch
from kept import write_csvs

from nnunet_calib.data.plans import preprocessed_folder, read_plans
from nnunet_calib.training.base import CalibrationTrainer
from nnunet_calib.training.trainers import TRAINERS

ROUNDS = 3


def build(name: str, plans: dict, dataset: dict, configuration: str, device: torch.device) -> CalibrationTrainer:
    """A trainer whose objective is in force, ready to step."""
    plans = copy.deepcopy(plans)
    plans["continue_training"] = False
    trainer = TRAINERS[name](plans, configuration, 0, dataset, device)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    if trainer.LOSS is not None:
        trainer.current_epoch = trainer.num_epochs - 1  # past calibrate_from
    trainer.on_train_epoch_start()
    return trainer


def batch(trainer: CalibrationTrainer, seed: int) -> dict:
    """Random images and labels of the configuration's shape, at every scale of deep supervision."""
    random = np.random.default_rng(seed)
    shape = tuple(trainer.configuration_manager.patch_size)
    regions = trainer.label_manager.has_regions
    channels = len(trainer.label_manager.foreground_regions) if regions else 1
    highest = 2 if regions else len(trainer.label_manager.all_labels)
    data = torch.from_numpy(
        random.normal(size=(trainer.batch_size, trainer.num_input_channels, *shape)).astype(np.float32)
    )
    blocks = random.integers(0, highest, (trainer.batch_size, channels, *(-(-side // 8) for side in shape)))
    labels = torch.from_numpy(blocks).float()
    labels = torch.nn.functional.interpolate(labels, size=shape, mode="nearest-exact")
    scales = trainer._get_deep_supervision_scales() or [[1] * len(shape)]
    target = [
        torch.nn.functional.interpolate(
            labels, size=[round(a * s) for a, s in zip(shape, scale, strict=True)], mode="nearest-exact"
        )
        for scale in scales
    ]
    target = [scale.bool() if regions else scale.to(torch.int16) for scale in target]
    return {"data": data, "target": target if trainer.enable_deep_supervision else target[0]}


def step_time(trainer: CalibrationTrainer, steps: int) -> tuple[float, float]:
    """Median seconds a step, and the peak of GPU memory in MiB (0 on CPU)."""
    given = batch(trainer, 0)
    for _ in range(3):
        trainer.train_step(given)
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if cuda else time.process_time
    seconds = []
    for _ in range(steps):
        start = clock()
        loss = trainer.train_step(given)["loss"]  # reads the loss, so the step is finished
        seconds.append(clock() - start)
        if not np.isfinite(loss):
            sys.exit(f"{type(trainer).__name__}: loss {loss}")
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True)
    parser.add_argument("-c", required=True)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="write the table into docs/results")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = preprocessed_folder(args.d)
    plans, dataset = read_plans(folder / f"{args.p}.json"), json.loads((folder / "dataset.json").read_text())
    names = ["StockTrainer", *(name for name in args.trainers if name != "StockTrainer")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results
        for _ in range(ROUNDS):
            for name in names:
                trainer = build(name, plans, dataset, args.c, device)
                median, memory[name] = step_time(trainer, args.steps)
                seconds[name].append(median)
                del trainer
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    )
    measured = f"{date.today()}, {where}, torch {torch.__version__}, {folder.name} {args.c}"
    lines = [
        "| trainer | s/step | ratio | GPU MiB |",
        "|---|---|---|---|",
    ]
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["StockTrainer"], strict=True))
        peak = f"{memory[name]:.0f}" if device.type == "cuda" else "not measured"
        lines.append(f"| {name} | {statistics.median(seconds[name]):.4f} | {ratio:.2f} | {peak} |")
    text = "\n".join(lines) + "\n"
    print(f"{measured}\n\n{text}")
    if args.keep:
        write_csvs("benchmark_trainers", ("steps",), text, measured=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
