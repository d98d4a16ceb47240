"""From logits in memory to labels, calibration counts and probabilities: time and memory, beside stock nnU-Net.

    python scripts/benchmark_pipeline.py -o WORK --time labels/14/half --rounds 3     one piece; of an idle machine
    python scripts/benchmark_pipeline.py -o WORK --memory                             all pieces
    python scripts/benchmark_pipeline.py -o WORK --table docs/benchmarks_pipeline.md  measures nothing

Logits (float16) are made: organs are ellipsoids, their logits fall by two a voxel at the surface, smooth noise is
added; the same numbers every time. Image and reference have 2.0 x 0.8 x 0.8 mm, the
logits 1.25 times that in every axis.

    labels     label map in memory: ours, and nnU-Net's ``convert_predicted_logits_to_segmentation_with_correct_shape``
    counts     label map and scores: ours all that ``evaluate`` computes (calibration of four regions, overlap and
               surface distances), from the logits; nnU-Net writes ``.npz``, numpy reads it, and netcal computes ECE
               and CECE of the volume alone
    compact    label map and probabilities on disk: ours in the compact format, nnU-Net's export in ``.npz``

Both tools run in turn in one process, after a first run of ours on a tiny image (what numba compiled is loaded then).
Shown are medians. Results of both are compared in every round. Memory is measured in a process for each tool: its
largest resident memory while it works, less what it had with the logits loaded.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kept import write_between
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.images import LabelImage, Place
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.data.software import installed_versions
from nnunet_calib.evaluation.case import score
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.pipeline.case import Prediction, Wanted
from nnunet_calib.prediction import Grid, PredictedCase

SHAPES = {"full": (100, 512, 512), "half": (50, 256, 256), "tiny": (10, 40, 40)}
SPACING = (2.0, 0.8, 0.8)  # mm
FINER = 1.25
TASKS, TOOLS, CLASSES = ("labels", "counts", "compact"), ("ours", "stock"), (14, 61, 117)
GOALS = {"labels/14": 15, "labels/117": 40, "counts/14": 20, "counts/61": 20, "counts/117": 20}
WITHOUT_STOCK = {"61/full", "117/full"}  # nnU-Net would need some 11 and 21 GB by our estimate; not run
MARKS = ("<!-- tables of scripts/benchmark_pipeline.py -->", "<!-- end of tables of scripts/benchmark_pipeline.py -->")


class Volume:
    """A case: logits, nnU-Net's managers, and a reference."""

    def __init__(self, work: Path, classes: int, size: str):
        self.work, self.classes, self.shape = work, classes, SHAPES[size]
        self.source = tuple(round(n / FINER) for n in self.shape)
        self.folder = work / f"{classes}_{size}"
        self.folder.mkdir(parents=True, exist_ok=True)
        resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
        self.plans = PlansManager(
            {
                "dataset_name": "Dataset001_Made",
                "transpose_forward": [0, 1, 2],
                "transpose_backward": [0, 1, 2],
                "image_reader_writer": "SimpleITKIO",
                "label_manager": "LabelManager",
                "configurations": {
                    "3d_fullres": {
                        "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
                        "spacing": [step * FINER for step in SPACING],
                        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                        "resampling_fn_probabilities_kwargs": resampling,
                    }
                },
            }
        )
        labels = {"background": 0} | {f"organ {c}": c for c in range(1, classes)}
        content = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}
        write_whole(self.folder / "dataset.json", json.dumps(content))
        self.dataset = read_dataset(self.folder / "dataset.json")
        self.properties: dict[str, Any] = {
            "spacing": list(SPACING),
            "shape_before_cropping": self.shape,
            "shape_after_cropping_and_before_resampling": self.shape,
            "bbox_used_for_cropping": [[0, n] for n in self.shape],
            "sitk_stuff": {
                "spacing": SPACING[::-1],
                "origin": (0.0, 0.0, 0.0),
                "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
            },
        }
        self.configuration = self.plans.get_configuration("3d_fullres")
        self.manager = self.plans.get_label_manager(content)

    @cached_property
    def logits(self) -> torch.Tensor:
        """(C, z, y, x) float16."""
        file = self.folder / "logits.npy"
        if not file.exists():
            stored = np.lib.format.open_memmap(file, "w+", np.float16, (self.classes, *self.source))
            for c, channel in enumerate(made_logits(self.classes, self.source)):
                stored[c] = channel
            stored.flush()
        return torch.from_numpy(np.load(file))

    @cached_property
    def reference(self) -> np.ndarray:
        """The label map, shifted by two voxels in its plane."""
        file = self.folder / "reference.npy"
        if not file.exists():
            np.save(file, np.roll(self.case().label_map(), (2, 2), (1, 2)))
        return np.load(file)

    def case(self) -> PredictedCase:
        """Ours."""
        grid = Grid.of(tuple(self.logits.shape), self.properties, self.plans, self.configuration)
        return PredictedCase(self.logits, grid, self.manager, self.configuration)

    def prediction(self) -> Prediction:
        """Ours, which writes files."""
        host = SimpleNamespace(
            plans_manager=self.plans, configuration_manager=self.configuration, label_manager=self.manager, folds=("0",)
        )
        return Prediction("case", self.logits, (), self.properties, host)


def made_logits(classes: int, shape: tuple[int, ...]):
    """Yield the logits of one class after the other."""
    rng = np.random.default_rng(0)
    axes = [
        np.linspace(0, 1, n, dtype=np.float32).reshape([-1 if i == a else 1 for i in range(3)])
        for a, n in enumerate(shape)
    ]
    size = (classes - 1) ** (-1 / 3)  # many organs are small ones
    for c in range(classes):
        noise = rng.standard_normal([max(2, n // 8) for n in shape]).astype(np.float32)
        noise = ndimage.zoom(noise, [n / m for n, m in zip(shape, noise.shape, strict=True)], order=1)
        if c == 0:
            yield 2 + noise
            continue
        centre, radius = rng.uniform(0.15, 0.85, 3), rng.uniform(0.15, 0.45, 3) * size
        away = np.sqrt(sum(((axis - m) / r) ** 2 for axis, m, r in zip(axes, centre, radius, strict=True)))
        voxels = float(np.mean(radius * shape))
        yield np.clip(2 * voxels * (1 - away), -8, 10) + noise


def labels(volume: Volume, tool: str, _: Path) -> Any:
    if tool == "ours":
        return volume.case().label_map()
    managers = (volume.plans, volume.configuration, volume.manager)
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        volume.logits, *managers, volume.properties, num_threads_torch=torch.get_num_threads()
    )


def counts(volume: Volume, tool: str, folder: Path) -> Any:
    """ECE and CECE of the volume."""
    reference = volume.reference
    if tool == "stock":
        from netcal.metrics import ECE

        export(volume, folder)
        p = np.load(folder / "case.npz")["probabilities"].reshape(volume.classes, -1)
        flat = reference.reshape(-1)
        classes = [ECE(15).measure(p[c], (flat == c).astype(int)) for c in range(len(p))]
        hit = p.argmax(axis=0) == flat
        return float(ECE(15).measure(p.max(axis=0), hit.astype(int))), float(np.mean(classes))
    case = volume.case()
    images = [LabelImage(folder, labels, Place(SPACING, {})) for labels in (reference, case.label_map())]
    parts = ((part.planes, part.probabilities) for part in case.parts())
    files = CaseFiles("case", folder, folder, None)
    found = score(files, volume.dataset, *images, Protocol(), parts).record["calibration"]["volume"]
    return found["ECE"], found["CECE"]


def export(volume: Volume, folder: Path) -> None:
    managers = (volume.configuration, volume.plans, volume.dataset.content)
    output = str(folder / "case")
    threads = torch.get_num_threads()
    export_prediction_from_logits(volume.logits, volume.properties, *managers, output, True, num_threads_torch=threads)


def compact(volume: Volume, tool: str, folder: Path) -> Any:
    """The labels."""
    if tool == "ours":
        made, _ = volume.prediction().write(folder, volume.dataset, SimpleITKIO, Wanted("compact"))
        return made
    export(volume, folder)
    return SimpleITKIO().read_seg(str(folder / "case.nii.gz"))[0][0].astype(np.uint8)


RUN: dict[str, Callable[[Volume, str, Path], Any]] = {"labels": labels, "counts": counts, "compact": compact}


def same(task: str, found: dict[str, Any], folders: dict[str, Path]) -> float:
    """The largest difference of both tools' results; labels must be the same."""
    ours, stock = found["ours"], found["stock"]
    if task == "counts":
        return float(np.abs(np.subtract(ours, stock)).max())
    if not np.array_equal(ours, stock):
        raise SystemExit(f"{np.count_nonzero(ours != stock)} labels are different")
    if task == "labels":
        return 0.0
    stored = ProbabilityFile(folders["ours"] / "case.nncp")
    theirs = np.load(folders["stock"] / "case.npz")["probabilities"]
    return max(float(np.abs(channel - other).max()) for channel, other in zip(stored.channels(), theirs, strict=True))


def take_times(work: Path, piece: str, rounds: int, threads: int) -> dict[str, Any]:
    """Both tools in turn."""
    torch.set_num_threads(threads)
    task, classes, size = piece.split("/")
    tools = TOOLS[:1] if f"{classes}/{size}" in WITHOUT_STOCK else TOOLS
    volume = Volume(work, int(classes), size)
    wall: dict[str, list[float]] = {tool: [] for tool in tools}
    cpu: dict[str, list[float]] = {tool: [] for tool in tools}
    written: dict[str, int] = {}
    differences = []
    with tempfile.TemporaryDirectory(dir=work) as root:
        folders = {tool: Path(root, tool) for tool in tools}
        for folder in folders.values():
            folder.mkdir()
        RUN[task](Volume(work, 14, "tiny"), "ours", folders["ours"])
        volume.logits, volume.reference  # noqa: B018
        for _ in range(rounds):
            found = {}
            for tool in tools:
                for left in folders[tool].iterdir():
                    left.unlink()
                begin, used = time.perf_counter(), time.process_time()
                found[tool] = RUN[task](volume, tool, folders[tool])
                wall[tool].append(time.perf_counter() - begin)
                cpu[tool].append(time.process_time() - used)
                written[tool] = sum(file.stat().st_size for file in folders[tool].iterdir())
            if len(tools) == 2:
                differences.append(same(task, found, folders))
    ratio = None
    if len(tools) == 2:
        ratio = statistics.median(b / a for a, b in zip(cpu["ours"], cpu["stock"], strict=True))
    return {
        "wall": {tool: statistics.median(values) for tool, values in wall.items()},
        "cpu": {tool: statistics.median(values) for tool, values in cpu.items()},
        "ratio": ratio,
        "wall_ratio": ratio and statistics.median(b / a for a, b in zip(wall["ours"], wall["stock"], strict=True)),
        "written": written,
        "difference": max(differences, default=None),
        "rounds": rounds,
        "threads": threads,
    }


def take_memory(work: Path, piece: str, tool: str) -> dict[str, float]:
    """Bytes of the logits, and what the tool needs beyond them."""
    torch.set_num_threads(1)
    task, classes, size = piece.split("/")
    volume = Volume(work, int(classes), size)
    with tempfile.TemporaryDirectory(dir=work) as root:
        RUN[task](Volume(work, 14, "tiny"), tool, Path(root))
        logits, _ = volume.logits, volume.reference
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far is what there is now
        before = _status("VmRSS")
        RUN[task](volume, tool, Path(root))
        return {"logits": logits.nbytes, "beyond": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def pieces() -> list[str]:
    """All there are."""
    at = [(14, "full"), (14, "half"), (61, "half"), (117, "half"), (61, "full"), (117, "full")]
    return [f"{task}/{classes}/{size}" for task in TASKS for classes, size in at]


def tables(kept: dict[str, dict]) -> str:
    """Markdown."""
    times = {name.removeprefix("time "): found for name, found in kept.items() if name.startswith("time ")}
    where = dict.fromkeys(f"{found['date']}; {found['machine']}" for found in kept.values())
    lines = [
        *where,
        "",
        "### Time",
        "",
        "| task | classes | image | threads | ours, CPU s | stock, CPU s | stock / ours | ours, s | stock, s | "
        "stock / ours | goal | largest difference | MB written, ours / stock | rounds |",
        "|---|" + "---|" * 13,
    ]
    for name, found in times.items():
        task, classes, size, threads = name.split("/")
        cells = [task, classes, "x".join(map(str, SHAPES[size])), threads]
        for clock, ratio in (("cpu", "ratio"), ("wall", "wall_ratio")):
            cells += [_seconds(found[clock].get(tool)) for tool in TOOLS]
            cells.append(f"{found[ratio]:.1f}" if found[ratio] else "")
        goal = GOALS.get(f"{task}/{classes}")
        cells += [str(goal or ""), "" if found["difference"] is None else f"{found['difference']:.1e}"]
        cells += [" / ".join(f"{found['written'][tool] / 1e6:.1f}" for tool in TOOLS if tool in found["written"])]
        lines.append(f"| {' | '.join([*cells, str(found['rounds'])])} |")
    lines += ["", "### Memory", ""]
    lines += ["| task | classes | image | logits, MB | ours beyond, MB | of the logits | stock beyond, MB |"]
    lines += ["|---|" + "---|" * 6]
    memory = [name.removeprefix("memory ") for name in kept if name.startswith("memory ") and name.endswith("/ours")]
    for name in memory:
        task, classes, size, _ = name.split("/")
        ours, stock = kept[f"memory {name}"], kept.get(f"memory {name.removesuffix('ours')}stock")
        cells = [task, classes, "x".join(map(str, SHAPES[size])), f"{ours['logits'] / 1e6:.0f}"]
        cells += [f"{ours['beyond'] / 1e6:.0f}", f"{100 * ours['beyond'] / ours['logits']:.0f} %"]
        cells.append(f"{stock['beyond'] / 1e6:.0f}" if stock else "not run")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--time", metavar="PIECE", nargs="+", choices=pieces(), default=[], help="TASK/CLASSES/SIZE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs="*", choices=pieces(), help="of these pieces, or of all")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="whose memory (default: both)")
    parser.add_argument("--child", nargs=2, metavar=("PIECE", "TOOL"), help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help="only make the logits")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(take_memory(args.work, *args.child)))
        return
    file = args.work / "results.json"

    def keep(name: str, found: dict[str, Any]) -> None:
        machine = f"{os.cpu_count()} cores of {platform.machine()}, no GPU"
        versions = installed_versions(("nnunetv2", "torch", "numpy", "scikit-image", "numba", "netcal"))
        found |= {
            "date": date.today().isoformat(),
            "machine": f"{machine}; " + ", ".join(map(" ".join, versions.items())),
        }
        print(name, json.dumps(found), flush=True)
        write_whole(file, json.dumps(kept() | {name: found}, indent=1))

    def kept() -> dict[str, dict]:
        return json.loads(file.read_text()) if file.exists() else {}

    if args.make:
        for piece in pieces():
            _, classes, size = piece.split("/")
            volume = Volume(args.work, int(classes), size)
            volume.logits, volume.reference  # noqa: B018
    for piece in args.time:
        keep(f"time {piece}/{args.threads}", take_times(args.work, piece, args.rounds, args.threads))
    if args.memory is not None:
        for piece in args.memory or pieces():
            for tool in args.tools if piece.partition("/")[2] not in WITHOUT_STOCK else TOOLS[:1]:
                command = [sys.executable, __file__, "-o", str(args.work), "--child", piece, tool]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                keep(f"memory {piece}/{tool}", json.loads(done.stdout.splitlines()[-1]))
    if args.table:
        write_between(args.table, MARKS, tables(kept()))


if __name__ == "__main__":
    main()
