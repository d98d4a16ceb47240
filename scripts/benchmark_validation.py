"""What scoring costs in the validation of a training: nnU-Net's own beside that of our trainers, same network.

    python scripts/benchmark_validation.py MODEL -o WORK [--fold 0] [--rounds 3]

MODEL is the folder of a model that was trained with ``StockTrainer``; ``nnUNet_raw`` and ``nnUNet_preprocessed`` are
set as for its training. ``nnUNetv2_train --val`` is run in turn with ``nnUNetTrainer`` and ``StockTrainer``, on the
CPU, with one export process. Seconds are of whole commands, start included; those of the processors count all
processes. Both must reach the same Dice.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from nnunet_calib.data.software import installed_versions

TRAINERS = {"stock": "nnUNetTrainer", "ours": "StockTrainer"}


def validate(trainer: str, model: Path, fold: str, results: Path) -> tuple[float, float, dict]:
    """Seconds of the clock and of the processors, and the summary."""
    _, plans, configuration = model.name.split("__")
    dataset = model.parent.name
    folder = results / dataset / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(model / f"fold_{fold}" / "checkpoint_final.pth", folder)
    for name in ("dataset.json", "plans.json"):
        shutil.copy(model / name, folder.parent)
    environment = os.environ | {"nnUNet_results": str(results), "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    command = ["nnUNetv2_train", dataset, configuration, fold, "-tr", trainer, "-p", plans, "--val", "-device", "cpu"]
    begin, used = time.perf_counter(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    now = os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return time.perf_counter() - begin, cpu, json.loads((folder / "validation" / "summary.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--fold", default="0")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {tool: [] for tool in TRAINERS}
    dice, cases = {}, 0
    for _ in range(args.rounds):
        for tool, trainer in TRAINERS.items():
            wall, cpu, summary = validate(trainer, args.model.resolve(), args.fold, args.work.resolve())
            taken[tool].append((wall, cpu))
            dice[tool], cases = summary["foreground_mean"]["Dice"], len(summary["metric_per_case"])
            if tool == "ours" and not summary["calibration_mean"]["volume"]["ECE"] >= 0:
                sys.exit("no calibration in the summary")
            print(f"{tool}: {wall:.1f} s, {cpu:.1f} CPU s, Dice {dice[tool]:.6f}", flush=True)
    if abs(dice["ours"] - dice["stock"]) > 1e-6:
        sys.exit("the two validations do not have the same Dice")
    versions = ", ".join(map(" ".join, installed_versions(("nnunetv2", "torch", "numba")).items()))
    print(f"{date.today()}; {os.cpu_count()} CPU cores, no GPU; {versions}; {cases} cases")
    for at, clock in enumerate(("clock", "processors")):
        ours, stock = ([one[at] for one in taken[tool]] for tool in ("ours", "stock"))
        more = statistics.median(a / b - 1 for a, b in zip(ours, stock, strict=True))
        medians = f"ours {statistics.median(ours):.1f} s, stock {statistics.median(stock):.1f} s"
        print(f"{clock}: {medians}, overhead {100 * more:+.1f} % (median of {args.rounds} pairs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
