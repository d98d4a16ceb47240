"""Thousands of small cases through an engine, one worker killed in the middle: speed, memory, and all records there.

    python scripts/benchmark_folder.py --cases 10000 --engine dask -np 2

Cases are the size of the Hippocampus data set's (36 x 50 x 35, two structures, probabilities as ``.npz``); a few
different ones are made and linked under many names. Prints cases per second (start-up included), records, failures,
and the coordinator's resident memory: with the first records (libraries loaded, cluster up), when all are there, and
with the summary.
"""

import argparse
import json
import os
import re
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk
from scipy import ndimage

from nnunet_calib.evaluation import evaluate_folder
from nnunet_calib.evaluation.folder import ENGINES

SHAPE = (36, 50, 35)
CLASSES = 3
DIFFERENT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--engine", choices=ENGINES, default="dask")
    parser.add_argument("-np", type=int, default=2)
    parser.add_argument("--no-kill", action="store_true", help="leave the workers alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        reference, prediction, output = (Path(root, name) for name in ("labelsTs", "predicted", "scores"))
        make_cases(reference, prediction, args.cases)
        seen: dict[str, float] = {}
        killed: list[int] = []
        kill_after = args.cases if args.no_kill else args.cases // 2
        threading.Thread(target=watch, args=(output, args.cases, kill_after, seen, killed), daemon=True).start()
        begin = time.perf_counter()
        summary = evaluate_folder(reference, prediction, output, processes=args.np, engine=args.engine)
        seconds, seen["at the end"] = time.perf_counter() - begin, memory()
        begin = time.perf_counter()
        again = evaluate_folder(reference, prediction, output, processes=args.np, engine=args.engine)
        unchanged = time.perf_counter() - begin
        assert json.dumps(again) == json.dumps(summary)
        records = len(list((output / "cases").glob("*.json")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.engine}, {args.np} workers, {len(killed)} killed: {args.cases} cases in {seconds:.0f} s "
        f"({args.cases / seconds:.1f} cases/s), {records} records, {len(summary['failed'])} failed; "
        f"all of it again, unchanged: {unchanged:.1f} s\ncoordinator: "
        + ", ".join(f"{megabytes:.0f} MB {when}" for when, megabytes in seen.items())
        + f", peak {peak:.0f} MB"
    )


def make_cases(reference: Path, prediction: Path, cases: int) -> None:
    """A few cases, linked under many names."""
    reference.mkdir()
    prediction.mkdir()
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    (prediction / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    for seed in range(DIFFERENT):
        rng = np.random.default_rng(seed)
        logits = np.stack([ndimage.gaussian_filter(rng.normal(0, 60, SHAPE), 4) for _ in range(CLASSES)])
        truth = (logits + rng.gumbel(0, 0.3, logits.shape)).argmax(axis=0)
        probabilities = np.exp(logits - logits.max(axis=0))
        probabilities = (probabilities / probabilities.sum(axis=0)).astype(np.float32)
        made = [reference / "case_00000.nii.gz", prediction / "case_00000.nii.gz", prediction / "case_00000.npz"]
        made = [path.with_name(path.name.replace("00000", f"{seed:05}")) for path in made]
        for path, volume in zip(made, (ndimage.median_filter(truth, 3), probabilities.argmax(axis=0)), strict=False):
            sitk.WriteImage(sitk.GetImageFromArray(volume.astype(np.uint8)), str(path), True)
        np.savez_compressed(made[2], probabilities=probabilities)
        for number in range(seed + DIFFERENT, cases, DIFFERENT):
            for path in made:
                os.link(path, path.with_name(re.sub(r"\d{5}", f"{number:05}", path.name)))


def watch(output: Path, cases: int, kill_after: int, seen: dict[str, float], killed: list[int]) -> None:
    """Note the memory with the first and the last record; kill a worker between, the one most busy so far."""
    done = 0
    while done < cases:
        time.sleep(0.2)
        done = sum(1 for _ in os.scandir(output / "cases")) if (output / "cases").is_dir() else 0
        if done:
            seen.setdefault("with the first records", memory())
        if kill_after <= done < cases and not killed:
            worker = max(psutil.Process().children(recursive=True), key=lambda child: child.cpu_times().user)
            worker.send_signal(signal.SIGKILL)
            killed.append(worker.pid)
    seen["with all records"] = memory()


def memory() -> float:
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss / (1 << 20)


if __name__ == "__main__":
    main()
