"""Time and memory of the evaluation, side by side with its peers, on volumes the script makes.

    pip install "nnunet-calib[bench]"
    python scripts/benchmark_metrics.py -o WORK [--only PATTERN] [--rounds 5] [--table docs/benchmarks.md]

Three parts: surface distances (HD, HD95, ASSD, NSD at 2 mm and Dice of every structure), calibration (ECE, CECE, Brier
and NLL of the arrays in memory), and whole cases from disk. Every tool runs in a process of its own with one thread
(``threads2``: two), so that peaks of memory are its own; what it loads or compiles once is done before the clock
starts. Rounds go over all tools in turn, so that a drift of the machine's speed meets all of them; tools that need more
than ``--patience`` seconds run once. Figures are medians. ``(x13)`` marks a tool measured on one of 13 structures, or a
tenth of the voxels, and multiplied. Ratios are of CPU seconds, of all threads and child processes of a tool, which a
busy machine disturbs less than the clock on the wall; os.times counts them in hundredths, so that fast tools repeat
the work until it fills a second.
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
from scipy import ndimage

TOLERANCE = 2.0  # mm, NSD
VOLUMES = {  # shape, spacing (z, y, x), structures, voxels by which the bad prediction is shifted
    "abdomen": ((100, 512, 512), (3.0, 0.8, 0.8), 13, 60),
    "cardiac": ((10, 256, 216), (10.0, 1.4, 1.4), 3, 0),
    "hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0), 2, 0),
}
CLASSES = 14
REPEAT_FOR = 1.0  # seconds
SLOW = ("distances|abdomen prediction|medpy", "distances|abdomen bad|medpy", "distances|abdomen bad|MONAI")


# --- volumes -------------------------------------------------------------------------------------------------------


def phantom(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A reference of ellipsoids with wavy surfaces, and a prediction of the same with other waves: Dice about 0.9."""
    shape, _, structures, _ = VOLUMES[name]
    random = np.random.default_rng(0)
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    grid = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)
    waves = [
        ndimage.zoom(random.normal(size=[6, 10, 10]), np.divide(shape, [6, 10, 10]), order=1)[
            tuple(slice(side) for side in shape)
        ].astype(np.float32)
        for _ in range(2)
    ]
    for label in range(1, structures + 1):
        centre = random.uniform(-0.6, 0.6, 3)
        radius = random.uniform(0.06, 0.3, 3) if structures > 3 else random.uniform(0.3, 0.5, 3)
        distance = sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radius, strict=True))
        for labels, wave in zip((reference, prediction), waves, strict=True):
            labels[distance < 1 + 0.15 * wave] = label
    return reference, prediction


def probabilities(reference: np.ndarray, classes: int) -> np.ndarray:
    """Softmax of noisy logits around the reference, float32 (C, *S), made slice by slice."""
    random = np.random.default_rng(1)
    result = np.empty((classes, *reference.shape), np.float32)
    for z, labels in enumerate(reference):
        logits = random.normal(0, 1, (classes, *labels.shape)).astype(np.float32)
        np.put_along_axis(logits, labels[None].astype(np.intp), 6.0, axis=0)
        logits = ndimage.uniform_filter(logits, (0, 3, 3))
        logits -= logits.max(axis=0)
        np.exp(logits, out=logits)
        result[:, z] = logits / logits.sum(axis=0)
    return result


def make_volumes(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for name, (_, _, structures, shift) in VOLUMES.items():
        if (work / f"{name}_prediction.npy").exists():
            continue
        reference, prediction = phantom(name)
        np.save(work / f"{name}_reference.npy", reference)
        if shift:
            np.save(work / f"{name}_bad.npy", np.roll(prediction, shift, axis=2))
        np.save(work / f"{name}_probabilities.npy", probabilities(reference, structures + 1))
        np.save(work / f"{name}_prediction.npy", prediction)


def make_case(work: Path) -> None:
    """The abdomen as files: label maps, ``.npz``, the compact format in float32 and float16."""
    import SimpleITK

    from nnunet_calib.data.probabilities import write_compact

    folders = [work / name for name in ("reference", "npz", "compact", "compact16")]
    if (work / "case.done").exists():
        return
    stored = np.load(work / "abdomen_probabilities.npy", mmap_mode="r")
    labels = {"reference": np.load(work / "abdomen_reference.npy"), "prediction": np.argmax(stored, axis=0)}
    for folder in folders:
        folder.mkdir(exist_ok=True)
        image = SimpleITK.GetImageFromArray(labels["reference" if folder.name == "reference" else "prediction"]
                                            .astype(np.uint8))  # fmt: skip
        image.SetSpacing(VOLUMES["abdomen"][1][::-1])
        SimpleITK.WriteImage(image, str(folder / "case.nii.gz"))
    content = {"labels": {"background": 0} | {f"organ{i}": i for i in range(1, CLASSES)}, "file_ending": ".nii.gz"}
    (work / "dataset.json").write_text(json.dumps(content | {"channel_names": {"0": "CT"}}))
    began = time.perf_counter()
    np.savez_compressed(work / "npz" / "case.npz", probabilities=stored)
    print(f"written in {time.perf_counter() - began:.1f} s: .npz")
    for folder, dtype in (("compact", np.float32), ("compact16", np.float16)):
        began = time.perf_counter()
        write_compact(work / folder / "case.nncp", stored, stored.shape, np.dtype(dtype))
        print(f"written in {time.perf_counter() - began:.1f} s: {folder}")
    (work / "case.done").touch()


# --- surface distances ---------------------------------------------------------------------------------------------


DEVICE = {"numpy": "cpu", "numba": "cpu", "torch": "cuda"}


def ours(backend: str) -> Callable:
    def measure(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
        from nnunet_calib import metrics

        labels = list(range(1, structures + 1))
        overlaps = metrics.overlaps(reference, prediction, labels, backend=backend)
        measured = metrics.structure_distances(
            reference, prediction, labels, spacing, backend=backend, device=DEVICE[backend]
        )
        return [
            [
                metrics.hausdorff(d),
                metrics.hausdorff_95(d),
                metrics.average_surface_distance(d),
                metrics.surface_dice(d, TOLERANCE),
                overlap.dice,
            ]
            for d, overlap in zip(measured, overlaps, strict=True)
        ]

    return measure


def monai(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    ours, theirs = (
        torch.stack([torch.from_numpy(labels == c) for c in range(structures + 1)])[None]
        for labels in (prediction, reference)
    )
    columns = [
        compute_hausdorff_distance(ours, theirs, spacing=spacing),
        compute_hausdorff_distance(ours, theirs, percentile=95, spacing=spacing),
        compute_average_surface_distance(ours, theirs, symmetric=True, spacing=spacing),
        compute_surface_dice(ours, theirs, [TOLERANCE] * structures, spacing=spacing),
        compute_dice(ours, theirs, include_background=False),
    ]
    return np.stack([column[0].numpy() for column in columns], axis=1).tolist()


def deepmind(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    import surface_distance as peer

    rows = []
    for label in range(1, structures + 1):
        theirs, mine = reference == label, prediction == label
        d = peer.compute_surface_distances(theirs, mine, spacing)
        rows.append(
            [
                peer.compute_robust_hausdorff(d, 100),
                peer.compute_robust_hausdorff(d, 95),
                float(np.mean(peer.compute_average_surface_distance(d))),
                peer.compute_surface_dice_at_tolerance(d, TOLERANCE),
                peer.compute_dice_coefficient(theirs, mine),
            ]
        )
    return rows


def panoptica(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    from panoptica import InputType, Panoptica_Evaluator
    from panoptica.metrics import Metric

    evaluator = Panoptica_Evaluator(
        expected_input=InputType.MATCHED_INSTANCE,
        instance_metrics=[Metric.DSC, Metric.HD, Metric.HD95, Metric.ASSD, Metric.NSD],
        verbose=False,
    )
    result = evaluator.evaluate(prediction, reference, voxelspacing=spacing, verbose=False)["ungrouped"]
    return [float(result.sq_dsc), float(result.sq_assd)]


def medpy(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    from medpy.metric import binary as peer

    mine, theirs = prediction == 1, reference == 1
    return [measure(mine, theirs, spacing) for measure in (peer.hd, peer.hd95, peer.assd)] + [peer.dc(mine, theirs)]


def nnunet_dice(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

    return [
        [int(n) for n in compute_tp_fp_fn_tn(*(region_or_label_to_mask(m, c) for m in (reference, prediction)))]
        for c in range(1, structures + 1)
    ]


DISTANCES: dict[str, Callable] = {
    "ours, [fast]": ours("numba"),
    "ours": ours("numpy"),
    "ours, torch": ours("torch"),
    "panoptica": panoptica,
    "DeepMind surface-distance": deepmind,
    "MONAI": monai,
    "medpy (one structure)": medpy,
    "nnU-Net (Dice only)": nnunet_dice,
}


# --- calibration ---------------------------------------------------------------------------------------------------


def ours_calibration(backend: str, threads: int = 1) -> Callable:
    def measure(p: np.ndarray, reference: np.ndarray) -> dict:
        from nnunet_calib import metrics

        whole = {"volume": np.ones(reference.shape, bool)}
        classes = list(range(len(p)))
        statistics, _ = metrics.calibration_statistics(
            p, reference, classes, whole, backend=backend, device=DEVICE[backend], threads=threads
        )
        scores = metrics.scores(statistics["volume"], [str(c) for c in classes])
        return {name: scores[name] for name in ("ECE", "CECE", "Brier", "NLL")}

    return measure


def read(p: np.ndarray, reference: np.ndarray) -> dict:
    """The least that any of them must do: look at every number once."""
    return {"largest": float(max(channel.max() for channel in p))}


def netcal(p: np.ndarray, reference: np.ndarray) -> dict:
    from netcal.metrics import ECE

    flat, labels = p.reshape(len(p), -1).T, reference.reshape(-1)
    classes = [ECE(15).measure(flat[:, c], (labels == c).astype(int)) for c in range(len(p))]
    return {"ECE": float(ECE(15).measure(flat, labels)), "CECE": float(np.mean(classes))}


def torchmetrics(p: np.ndarray, reference: np.ndarray) -> dict:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    flat = torch.from_numpy(np.ascontiguousarray(p.reshape(len(p), -1).T))
    labels = torch.from_numpy(reference.reshape(-1).astype(np.int64))
    classes = [binary_calibration_error(flat[:, c], (labels == c).long(), n_bins=15).item() for c in range(len(p))]
    overall = multiclass_calibration_error(flat, labels, len(p), n_bins=15).item()
    return {"ECE": overall, "CECE": float(np.mean(classes))}


def monai_calibration(p: np.ndarray, reference: np.ndarray) -> dict:
    import torch
    from monai.metrics import CalibrationErrorMetric

    one_hot = torch.stack([torch.from_numpy(reference == c) for c in range(len(p))]).float()[None]
    metric = CalibrationErrorMetric(num_bins=15, include_background=True, calibration_reduction="expected")
    metric(torch.from_numpy(p)[None], one_hot)
    return {"CECE": float(metric.aggregate())}


CALIBRATION: dict[str, Callable] = {
    "reading the array": read,
    "ours, [fast]": ours_calibration("numba"),
    "ours, [fast], threads2": ours_calibration("numba", 2),
    "ours": ours_calibration("numpy"),
    "ours, torch": ours_calibration("torch"),
    "netcal (a tenth)": netcal,
    "torchmetrics (a tenth)": torchmetrics,
    "MONAI (CECE only)": monai_calibration,
}


# --- whole cases ---------------------------------------------------------------------------------------------------


def whole_case(folder: str) -> Callable:
    def measure(work: Path) -> dict:
        from nnunet_calib.data.cases import pair_cases
        from nnunet_calib.data.dataset import read_dataset
        from nnunet_calib.data.images import choose_reader
        from nnunet_calib.evaluation import Protocol, evaluate_case

        dataset = read_dataset(work / "dataset.json", None)
        files = pair_cases(work / "reference", work / folder, ".nii.gz")[0]
        result = evaluate_case(files, dataset, choose_reader(dataset, [files.reference]), Protocol())
        return {name: result.record["calibration"]["volume"][name] for name in ("ECE", "CECE", "NLL")}

    return measure


def decompress(work: Path) -> dict:
    """What numpy needs to bring the probabilities into memory."""
    return {"largest": float(np.load(work / "npz" / "case.npz")["probabilities"][0, 0, 0, 0])}


CASES: dict[str, Callable] = {
    "decompressing the .npz (numpy)": decompress,
    "evaluate, .npz": whole_case("npz"),
    "evaluate, compact float32": whole_case("compact"),
    "evaluate, compact float16": whole_case("compact16"),
}


# --- the clock -----------------------------------------------------------------------------------------------------


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


MARKS = ("<!-- tables of scripts/benchmark_metrics.py -->", "<!-- end of tables -->")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True, help="folder for volumes and runs (9 GB)")
    parser.add_argument("--only", default="*", help="tasks part|volume|tool to run, a shell pattern")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=15, help="a tool that needs more seconds runs once")
    parser.add_argument("--table", type=Path, help="write the tables of all finished runs between the marks of a file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "make":
        make_volumes(args.work)
        make_case(args.work)
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
    if args.table:
        packages = ("numpy", "scipy", "torch", "monai", "panoptica", "netcal", "torchmetrics", "medpy", "numba")
        head = f"{date.today()}; {os.cpu_count()} cores of {platform.machine()}, no GPU; " + ", ".join(
            f"{package} {version(package)}" for package in packages
        )
        before, _, rest = args.table.read_text().partition(MARKS[0])
        args.table.write_text(f"{before}{MARKS[0]}\n{head}\n\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
