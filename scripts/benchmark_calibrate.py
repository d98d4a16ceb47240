"""What calibration costs on large volumes: fitting 20 of 14 x 100 x 512 x 512, applying a temperature to one.

    python scripts/benchmark_calibrate.py -o WORK [--volumes 20] [-np 2] [--each] [--float16]

One volume is made, in the compact format, and linked under many names: it lies in the system's file cache. The
voxels that are drawn differ with the name. Every command runs in a process of its own; seconds include its start.
CPU seconds, of all its processes, say more on a busy machine. Memory is the largest sum over all its processes, looked
at five times a second, what they share counted once (PSS).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import SimpleITK as sitk
from scipy import ndimage

from nnunet_calib.data.probabilities import ProbabilityFile, write_compact

CLASSES, SHAPE = 14, (100, 512, 512)
SPACING = (0.8, 0.8, 3.0)  # mm, x y z
METHODS = ("temperature", "vector", "ensemble", "dirichlet")
TOO_SURE = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--volumes", type=int, default=20)
    parser.add_argument("-np", type=int, default=2, help="processes of a fit (default: 2)")
    parser.add_argument("--each", action="store_true", help="fit every method alone too")
    parser.add_argument("--float16", action="store_true", help="store 16 bits a value instead of 32")
    parser.add_argument("--plain", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        read_and_write(*args.plain)
        return
    kind = np.dtype("float16" if args.float16 else "float32")
    made = make_case(args.work / f"made_{kind.name}", kind)
    reference, prediction, one = link_cases(made, args.work, args.volumes)
    size = next(prediction.glob("*.nncp")).stat().st_size / 1e9
    print(
        f"{date.today()}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.volumes} volumes {CLASSES} x "
        f"{SHAPE}, {kind.name}, {size:.2f} GB a file\n\n"
        "| command | seconds | CPU seconds | memory GB |\n|---|---|---|---|",
        flush=True,
    )
    ours = [sys.executable, "-m", "nnunet_calib.cli.main", "calibrate"]
    for methods in [METHODS, *([[method] for method in METHODS] if args.each else [])]:
        fit = ["fit", prediction, "--reference", reference, "--method", *methods, "-np", args.np]
        measured([*ours, *fit, "-o", args.work / "calibrator"], f"fit {', '.join(methods)}; -np {args.np}")
    measured([*ours, "fit", one, "--reference", reference, "--method", "temperature", "-o", args.work / "one"])
    plain = measured(
        [sys.executable, __file__, "-o", args.work, "--plain", one, args.work / "copied"], "read and write"
    )
    applied = measured([*ours, "apply", args.work / "one", "-i", one, "-o", args.work / "calibrated"], "apply")
    print(f"\napply temperature / read and write: {applied / plain:.2f} of CPU seconds")


def make_case(folder: Path, kind: np.dtype) -> Path:
    """Folder of a reference, a prediction and probabilities that are too sure by ``TOO_SURE``."""
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    best = np.full(SHAPE, -np.inf, dtype=np.float32)
    reference, p = np.zeros(SHAPE, dtype=np.uint8), np.empty((CLASSES, *SHAPE), dtype=np.float32)
    for c in range(CLASSES):
        p[c] = smooth(rng) + rng.standard_normal(SHAPE, dtype=np.float32) * np.float32(0.2)
        p[c] += 6 if c == 0 else 0
        drawn = p[c] + rng.gumbel(size=SHAPE[1:]).astype(np.float32)  # one draw for all slices is quick
        reference[drawn > best] = c
        best = np.maximum(best, drawn)
    for z in range(SHAPE[0]):
        slab = p[:, z] * np.float32(TOO_SURE)
        slab = np.exp(slab - slab.max(axis=0))
        p[:, z] = slab / slab.sum(axis=0)
    for name, labels in (("reference", reference), ("prediction", p.argmax(axis=0).astype(np.uint8))):
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing(SPACING)
        sitk.WriteImage(image, str(folder / f"{name}.nii.gz"), useCompression=True)
    write_compact(folder / "probabilities.nncp", p.astype(kind), p.shape, kind)
    (folder / "done").touch()
    return folder


def smooth(rng: np.random.Generator) -> np.ndarray:
    """Logits that change over some 16 voxels."""
    coarse = rng.normal(0, 5, [-(-length // 16) + 1 for length in SHAPE]).astype(np.float32)
    factors = [length / there for length, there in zip(SHAPE, coarse.shape, strict=True)]
    return ndimage.zoom(coarse, factors, order=1)


def link_cases(made: Path, work: Path, volumes: int) -> tuple[Path, Path, Path]:
    """References, predictions, and a folder with one prediction."""
    reference, prediction, one = (work / name for name in ("references", "predictions", "one_prediction"))
    for folder in (reference, prediction, one):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    labels = {"background": 0} | {f"organ {c}": c for c in range(1, CLASSES)}
    for folder in (prediction, one):
        (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    for number in range(volumes):
        name = f"case_{number:03d}"
        os.link(made / "reference.nii.gz", reference / f"{name}.nii.gz")
        for folder in (prediction, one) if number == 0 else (prediction,):
            os.link(made / "prediction.nii.gz", folder / f"{name}.nii.gz")
            os.link(made / "probabilities.nncp", folder / f"{name}.nncp")
    return reference, prediction, one


def measured(words: list, name: str | None = None) -> float:
    """Run a command, print what it took as a row if it has a name; CPU seconds."""
    begin, used, most = time.perf_counter(), cpu_seconds(), 0
    told = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe nobody reads would fill up
    process = psutil.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=told)
    while process.poll() is None:
        most = max(most, memory(process))
        time.sleep(0.2)
    seconds, used = time.perf_counter() - begin, cpu_seconds() - used
    if process.returncode:
        told.seek(0)
        sys.exit(f"{name or words} failed: {told.read().decode()[-2000:]}")
    if name:
        print(f"| {name} | {seconds:.1f} | {used:.1f} | {most / 1e9:.2f} |", flush=True)
    return used


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


def read_and_write(source: Path, target: Path) -> None:
    """What ``calibrate apply`` reads and writes, and nothing else."""
    import nnunet_calib.posthoc.apply  # noqa: F401 - the same start

    target.mkdir(exist_ok=True)
    for file in source.glob("*.nncp"):
        stored = ProbabilityFile(file)
        write_compact(target / file.name, stored.channels(), stored.shape, stored.dtype)
        label_map = file.with_suffix(".nii.gz")
        sitk.ReadImage(str(label_map))
        shutil.copyfile(label_map, target / label_map.name)


if __name__ == "__main__":
    main()
