"""Time and memory of the evaluation, side by side with its peers, on volumes the script makes.

    pip install "nnunet-calib[bench]"
    python scripts/benchmark_metrics.py -o WORK [--only PATTERN] [--rounds 5] [--keep]

Three parts: surface distances (HD, HD95, ASSD, NSD at 2 mm and Dice of every structure), calibration (ECE, CECE, Brier
and NLL of the arrays in memory), and whole cases from disk. Every tool runs in a process of its own with one thread
(``threads2``: two), so that peaks of memory are its own; what it loads or compiles once is done before the clock
starts. Rounds go over all tools in turn, so that a drift of the machine's speed meets all of them; tools that need more
than ``--patience`` seconds run once. Figures are medians. ``(x13)`` marks a tool measured on one of 13 structures, or a
tenth of the voxels, and multiplied. Ratios are of CPU seconds, of all threads and child processes of a tool, which a
busy machine disturbs less than the clock on the wall; os.times counts them in hundredths, so that tools which need less
than a second repeat the work until it fills one, after a first time that is not counted: a virtual machine may get its
memory from the host then, which takes longer than the work.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from kept import write_csvs
from tools_metrics import CALIBRATION, CASES, DISTANCES
from volumes_metrics import VOLUMES, make_case, make_volumes

REPEAT_FOR = 1.0  # seconds
FAST = "ours, [fast]"
SLOW = ("distances|abdomen prediction|medpy", "distances|abdomen bad|medpy", "distances|abdomen bad|MONAI")


def task_names() -> list[str]:
    """``part|volume|tool``, in the order of the tables: torch where there is a GPU, none that takes many minutes."""
    import torch

    names = []
    for volume, (*_, shift) in VOLUMES.items():
        for prediction in ("prediction", "bad") if shift else ("prediction",):
            names += [f"distances|{volume} {prediction}|{tool}" for tool in DISTANCES]
    names += [f"calibration|{volume}|{tool}" for volume in VOLUMES for tool in CALIBRATION]
    names += [f"case|abdomen|{tool}" for tool in CASES]
    on_gpu = torch.cuda.is_available()
    return [name for name in names if (on_gpu or name[-5:] != "torch") and not name.startswith(SLOW)]


def run_task(name: str, work: Path) -> dict[str, Any]:
    """One run of one tool: seconds, MiB beyond its inputs, and its numbers."""
    part, volume, tool = name.split("|")
    threads = 2 if tool.endswith("threads2") else 1
    import torch

    torch.set_num_threads(threads)
    factor = 1
    if part == "case":
        function: Callable[[], Any] = lambda: CASES[tool](work)  # noqa: E731
        function() if tool != next(iter(CASES)) else None
    elif part == "distances":
        volume, kind = volume.split()
        _, spacing, structures, _ = VOLUMES[volume]
        reference, prediction = (np.load(work / f"{volume}_{of}.npy") for of in ("reference", kind))
        DISTANCES[tool](*(np.load(work / f"hippocampus_{of}.npy") for of in ("reference", "prediction")), (1, 1, 1), 2)
        factor = structures if "one structure" in tool else 1
        function = lambda: DISTANCES[tool](reference, prediction, spacing, structures)  # noqa: E731
    else:
        p, reference = np.load(work / f"{volume}_probabilities.npy"), np.load(work / f"{volume}_reference.npy")
        if "a tenth" in tool and volume == "abdomen":
            p, reference, factor = np.ascontiguousarray(p[:, ::10]), np.ascontiguousarray(reference[::10]), 10
        small = [np.load(work / f"hippocampus_{of}.npy") for of in ("probabilities", "reference")]
        CALIBRATION[tool](*small)
        function = lambda: CALIBRATION[tool](p, reference)  # noqa: E731
    before = peak()
    began, worked = time.perf_counter(), processor_seconds()
    numbers, repeats = function(), 1
    if time.perf_counter() - began < REPEAT_FOR:
        began, worked, repeats = time.perf_counter(), processor_seconds(), 0
    while time.perf_counter() - began < REPEAT_FOR:
        function()
        repeats += 1
    seconds, work_done = (time.perf_counter() - began) / repeats, (processor_seconds() - worked) / repeats
    return {
        "seconds": seconds * factor,
        "processor": work_done * factor,
        "factor": factor,
        "mib": peak() - before,
        "peak": peak(),
        "numbers": numbers,
    }


def compile_ours(work: Path) -> None:
    """Run every compiled tool on every volume once: machine code is kept on disk."""
    for volume, (_, spacing, structures, shift) in VOLUMES.items():
        reference = np.load(work / f"{volume}_reference.npy")
        for kind in ("prediction", "bad") if shift else ("prediction",):
            DISTANCES[FAST](reference, np.load(work / f"{volume}_{kind}.npy"), spacing, structures)
        CALIBRATION[FAST](np.load(work / f"{volume}_probabilities.npy"), reference)


def processor_seconds() -> float:
    """Of this process with all its threads, and of the processes it waited for."""
    return sum(os.times()[:4])


def peak() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(names: list[str], work: Path, rounds: int, patience: float) -> dict[str, list[dict]]:
    """All runs of all tools, kept in WORK: a second start goes on."""
    file = work / "runs.json"
    runs: dict[str, list[dict]] = json.loads(file.read_text()) if file.exists() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    for turn in range(rounds):
        for name in names:
            done = runs.setdefault(name, [])
            if len(done) > turn or (done and (done[0]["seconds"] > patience or "failed" in done[0])):
                continue
            words = [sys.executable, __file__, "-o", str(work), "--task", name]
            child = subprocess.run(words, capture_output=True, text=True, env=environment)
            if child.returncode:
                reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
                done.append({"seconds": float("inf"), "processor": float("inf"), "failed": reason})
            else:
                done.append(json.loads(child.stdout.splitlines()[-1]))
            print(f"{turn + 1}/{rounds} {name}: {done[-1]['seconds']:.4g} s {done[-1].get('failed', '')}", flush=True)
            file.write_text(json.dumps(runs))
    return runs


def tables(runs: dict[str, list[dict]]) -> str:
    """Markdown, one table a part; ratios are to the fastest peer, or to the row named in the head."""
    yardstick = {"distances": "best peer", "calibration": "netcal (a tenth)", "case": "decompressing the .npz (numpy)"}
    text = []
    for part, against in yardstick.items():
        volumes = list(dict.fromkeys(name.split("|")[1] for name in runs if name.startswith(part)))
        head = f"| volume | tool | seconds | CPU seconds | runs | {against} / tool | extra MiB | peak MiB |"
        text += [f"### {part}", "", head, "|---" * 8 + "|"]
        for volume in volumes:
            rows = {name.split("|")[2]: of for name, of in runs.items() if name.startswith(f"{part}|{volume}|")}
            medians = {tool: statistics.median(run["processor"] for run in of) for tool, of in rows.items()}
            peers = [m for tool, m in medians.items() if not tool.startswith("ours") and "Dice only" not in tool]
            base = min(peers) if against == "best peer" else medians.get(against, float("nan"))
            for tool, of in rows.items():
                if "failed" in of[0]:
                    text.append(f"| {volume} | {tool} | failed: {of[0]['failed']} | | {len(of)} | | | |")
                    continue
                factor = f" (x{of[0]['factor']})" if of[0]["factor"] > 1 else ""
                wall, extra, most = (statistics.median(run[key] for run in of) for key in ("seconds", "mib", "peak"))
                text.append(
                    f"| {volume} | {tool} | {wall:.4g}{factor} | {medians[tool]:.4g} | {len(of)} "
                    f"| {base / medians[tool]:.2f} | {extra:.0f} | {most:.0f} |"
                )
        text.append("")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True, help="folder for volumes and runs (9 GB)")
    parser.add_argument("--only", default="*", help="tasks part|volume|tool to run, a shell pattern")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=15, help="a tool that needs more seconds runs once")
    parser.add_argument("--keep", action="store_true", help="write the tables of all finished runs into docs/results")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "make":
        make_volumes(args.work)
        make_case(args.work)
        compile_ours(args.work)
        return 0
    if args.task:
        print(json.dumps(run_task(args.task, args.work)))
        return 0
    names = [name for name in task_names() if fnmatch.fnmatch(name, args.only)]
    # Not in this process: Linux counts its peak of memory among those of its children.
    subprocess.run([sys.executable, __file__, "-o", str(args.work), "--task", "make"], check=True)
    runs = measure(names, args.work, args.rounds, args.patience)
    text = tables(runs)
    print(text)
    if args.keep:
        packages = ("numpy", "scipy", "torch", "monai", "panoptica", "netcal", "torchmetrics", "medpy", "numba")
        measured = f"{date.today()}; {os.cpu_count()} cores of {platform.machine()}, no GPU; " + ", ".join(
            f"{package} {version(package)}" for package in packages
        )
        write_csvs("benchmark_metrics", ("distances", "calibration", "case"), text, measured=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
