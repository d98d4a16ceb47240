"""What calibration costs on large volumes: fitting 20 of 14 x 100 x 512 x 512, applying a temperature to one.

    python scripts/benchmark_calibrate.py -o WORK [--only fit|apply] [--volumes 20] [-np 2] [--rounds 5] [--table FILE]

One volume is made, in the compact format, and linked under many names: it lies in the system's file cache. The voxels
that are drawn differ with the name. Every fit runs in a process of its own, and its seconds include the start. Memory
is the largest sum over all its processes, looked at five times a second, what they share counted once (PSS).

Applying is measured inside one process, starts left out, against what nobody can do without: reading the probabilities
and writing the calibrated ones. The three are done in turn; shown are medians of the rounds. CPU seconds say more than
seconds on a busy machine. Results are kept in WORK; ``--table`` writes them into a document.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import blosc2
import numpy as np
import psutil
import SimpleITK as sitk
import torch
from kept import write_between
from scipy import ndimage

from nnunet_calib.data.files import write_whole
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact
from nnunet_calib.posthoc import TemperatureScaling
from nnunet_calib.posthoc.folders.apply import apply_folder

CLASSES, SHAPE = 14, (100, 512, 512)
SPACING = (0.8, 0.8, 3.0)  # mm, x y z
METHODS = ("temperature", "vector", "isotonic", "dirichlet")
TOO_SURE = 2.0
KINDS = ("float32", "float16")
MARKS = (
    "<!-- tables of scripts/benchmark_calibrate.py -->",
    "<!-- end of tables of scripts/benchmark_calibrate.py -->",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--only", choices=("fit", "apply"), help="default: both")
    parser.add_argument("--volumes", type=int, default=20)
    parser.add_argument("-np", type=int, default=2, help="processes of a fit (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of applying (default: 5)")
    parser.add_argument("--table", type=Path, help="measure nothing: write what is kept between the marks of this file")
    args = parser.parse_args()
    if args.table:
        write_between(args.table, MARKS, tables(read_results(args.work)))
        return
    for kind in KINDS:
        make_case(args.work, kind)
    if args.only != "apply":
        reference, prediction = link_cases(args.work, "float32", args.volumes)
        words = ["fit", prediction, "--reference", reference, "--method", *METHODS, "-np", args.np]
        found = measured([*words, "-o", args.work / "calibrator"])
        keep(args.work, f"fit {', '.join(METHODS)}; {args.volumes} volumes, -np {args.np}", found)
    if args.only != "fit":
        for kind in KINDS:
            _, prediction = link_cases(args.work, kind, 1)
            keep(args.work, f"apply {kind}", applied(args.work, prediction, args.rounds))


def read_results(work: Path) -> dict[str, dict]:
    file = work / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def keep(work: Path, name: str, found: dict) -> None:
    """Keep a result, with the day and the machine."""
    machine = f"{os.cpu_count()} cores of {platform.machine()}, numpy {np.__version__}, torch {torch.__version__}"
    found |= {"date": date.today().isoformat(), "machine": f"{machine}, blosc2 {blosc2.__version__}"}
    found["load"] = round(os.getloadavg()[1], 1)
    print(name, json.dumps(found), flush=True)
    write_whole(work / "results.json", json.dumps(read_results(work) | {name: found}, indent=1))


def tables(results: dict[str, dict]) -> str:
    """Markdown: where, fits, applying."""
    where = dict.fromkeys(f"{found['date']}; {found['machine']}" for found in results.values())
    loads = sorted(found["load"] for found in results.values())
    head = f"{'; '.join(where)}; load over five minutes {loads[0]} to {loads[-1]}"
    fits = ["| fit | seconds | CPU seconds | memory GB |", "|---|---|---|---|"]
    shown = ["read", "write", "apply"]
    ratios = [
        f"| stored | file GB | {' | '.join(f'{name}, CPU s' for name in shown)} | apply / (read + write), CPU | "
        f"{' | '.join(f'{name}, s' for name in shown)} | apply / (read + write), seconds |",
        "|---" * 10 + "|",
    ]
    for name, found in results.items():
        what, _, told = name.partition(" ")
        if what == "fit":
            fits.append(f"| {told} | {found['seconds']:.0f} | {found['cpu']:.0f} | {found['gigabytes']:.2f} |")
        else:
            cells = [told, f"{found['gigabytes']:.2f}"]
            for clock in ("cpu", "seconds"):
                cells += [f"{found[clock][one]:.2f}" for one in (*shown, "ratio")]
            ratios.append(f"| {' | '.join(cells)} |")
    return "\n\n".join([head, "\n".join(fits), "\n".join(ratios)])


def make_case(work: Path, kind: str) -> Path:
    """Folder of a reference, a prediction and probabilities that are too sure by ``TOO_SURE``."""
    folder = work / f"made_{kind}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if kind == KINDS[0]:
        reference, p = drawn()
        for name, labels in (("reference", reference), ("prediction", p.argmax(axis=0).astype(np.uint8))):
            image = sitk.GetImageFromArray(labels)
            image.SetSpacing(SPACING)
            sitk.WriteImage(image, str(folder / f"{name}.nii.gz"), useCompression=True)
        write_compact(folder / "probabilities.nncp", p, p.shape, kind)
    else:
        exact = make_case(work, KINDS[0])
        for name in ("reference", "prediction"):
            shutil.copyfile(exact / f"{name}.nii.gz", folder / f"{name}.nii.gz")
        stored = ProbabilityFile(exact / "probabilities.nncp")
        write_compact(folder / "probabilities.nncp", stored.channels(), stored.shape, kind)
    (folder / "done").touch()
    return folder


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """A reference uint8 (z, y, x) and probabilities float32 (C, z, y, x)."""
    rng = np.random.default_rng(0)
    best = np.full(SHAPE, -np.inf, dtype=np.float32)
    reference, p = np.zeros(SHAPE, dtype=np.uint8), np.empty((CLASSES, *SHAPE), dtype=np.float32)
    for c in range(CLASSES):
        p[c] = smooth(rng) + rng.standard_normal(SHAPE, dtype=np.float32) * np.float32(0.2)
        p[c] += 6 if c == 0 else 0
        truth = p[c] + rng.gumbel(size=SHAPE[1:]).astype(np.float32)  # one draw for all slices is quick
        reference[truth > best] = c
        best = np.maximum(best, truth)
    for z in range(SHAPE[0]):
        slab = p[:, z] * np.float32(TOO_SURE)
        slab = np.exp(slab - slab.max(axis=0))
        p[:, z] = slab / slab.sum(axis=0)
    return reference, p


def smooth(rng: np.random.Generator) -> np.ndarray:
    """Logits that change over some 16 voxels."""
    coarse = rng.normal(0, 5, [-(-length // 16) + 1 for length in SHAPE]).astype(np.float32)
    factors = [length / there for length, there in zip(SHAPE, coarse.shape, strict=True)]
    return ndimage.zoom(coarse, factors, order=1)


def link_cases(work: Path, kind: str, volumes: int) -> tuple[Path, Path]:
    """Folders of references and predictions."""
    made, reference, prediction = work / f"made_{kind}", work / "references", work / "predictions"
    for folder in (reference, prediction):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    labels = {"background": 0} | {f"organ {c}": c for c in range(1, CLASSES)}
    (prediction / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    for name in (f"case_{number:03d}" for number in range(volumes)):
        os.link(made / "reference.nii.gz", reference / f"{name}.nii.gz")
        os.link(made / "prediction.nii.gz", prediction / f"{name}.nii.gz")
        os.link(made / "probabilities.nncp", prediction / f"{name}.nncp")
    return reference, prediction


def applied(work: Path, prediction: Path, rounds: int) -> dict:
    """Medians of reading, writing and applying, and of the ratio."""
    calibrator = TemperatureScaling()
    calibrator.channels, calibrator.parameters = CLASSES, [{"temperature": TOO_SURE}]
    calibrator.save(work / "temperature.json")
    output, copied = work / "calibrated", work / "copied.nncp"
    (source,) = prediction.glob("*.nncp")

    def apply() -> None:
        apply_folder(work / "temperature.json", prediction, output)

    def read() -> None:
        for channel in ProbabilityFile(source).channels():
            del channel

    apply()
    stored = ProbabilityFile(output / source.name)
    calibrated = list(stored.channels())

    def write() -> None:
        write_compact(copied, calibrated, stored.shape, stored.dtype)

    times = [{step.__name__: timed(step) for step in (read, write, apply)} for _ in range(rounds)]
    found: dict = {"rounds": rounds, "gigabytes": source.stat().st_size / 1e9}
    for i, clock in enumerate(("seconds", "cpu")):
        each = [{name: both[i] for name, both in one.items()} | {"ratio": 0.0} for one in times]
        for one in each:
            one["ratio"] = one["apply"] / (one["read"] + one["write"])
        found[clock] = {name: round(statistics.median(one[name] for one in each), 4) for name in each[0]}
    copied.unlink()
    return found


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds and CPU seconds."""
    begin, used = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - begin, time.process_time() - used


def measured(words: list) -> dict:
    """Seconds, CPU seconds and memory of ``nnunet-calib calibrate``."""
    begin, used, most = time.perf_counter(), cpu_seconds(), 0
    told = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe nobody reads would fill up
    command = [sys.executable, "-m", "nnunet_calib.cli.main", "calibrate", *map(str, words)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=told)
    while process.poll() is None:
        most = max(most, memory(process))
        time.sleep(0.2)
    found = {"seconds": time.perf_counter() - begin, "cpu": cpu_seconds() - used, "gigabytes": most / 1e9}
    if process.returncode:
        told.seek(0)
        sys.exit(f"{command} failed: {told.read().decode()[-2000:]}")
    return {name: round(value, 2) for name, value in found.items()}


def cpu_seconds() -> float:
    """Of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all it started, what they share counted once."""
    total = 0
    for member in (process, *children(process)):
        try:
            total += member.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
