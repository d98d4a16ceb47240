"""Time and memory of the losses, forward and backward, side by side with their peers and with textbook versions.

    pip install "nnunet-calib[bench]"
    python scripts/benchmark_losses.py -o WORK [--only PATTERN ...] [--rounds 1] [--keep]

Every tool runs in a process of its own with one CPU thread (``--threads``), so that peaks of memory are its own: the
extra MiB are those beyond logits and target, the logits' gradient included. A process runs the tool on a small image,
then once for the peak of memory, then for the clock, in turn with the yardstick and, where it has one to beat, with
ours: on a shared machine seconds drift, ratios of neighbours in time hold. Figures are medians. CPU: float32 and
seconds of the processor. CUDA, where there is one: float16 under autocast, as nnU-Net trains. Yardsticks: torch's
cross_entropy and, for regions, binary_cross_entropy_with_logits. The textbook versions have a dense one-hot and, for
neighbours, an unfolded window; where that would take more than ``--memory`` GB they are skipped, and the row says so.

WORK keeps every finished row: a table can be collected bit by bit, with ``--only`` and several starts.

    python scripts/benchmark_losses.py --against FOLDER [--shape 2x14x64x64x64] [--repeats 9]

compares with another checkout of this package: both versions of a loss are timed in turn in one process, and the table
has the medians of their ratios.

Whole training steps: scripts/benchmark_trainers.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kept import write_csvs
from torch import Tensor
from torch.nn import functional

SHAPES = [(2, 3, 128, 128, 128), (2, 14, 128, 128, 128), (2, 61, 96, 96, 96), (2, 14, 64, 64, 64)]
KEYS = ("ce", "focal", "flsd", "ecp", "ls", "svls", "mbls", "nacl", "meep", "cpc", "crac", "ace", "dca")
DEVICES = ("cpu", "cuda")
YARDSTICK = {"labels": "torch cross_entropy", "regions": "torch binary_cross_entropy_with_logits"}
# Tensors of the logits' size that an unfolded window of 27 voxels takes: itself, weighed, and a few more.
UNFOLDED = {"textbook svls": 60, "textbook nacl": 32}
Function = Callable[[Tensor, Tensor], Tensor]


# --- tools: classes, form -> function of logits and target (B, 1, *S), for regions bool (B, R, *S) ------------------


def ours(key: str, form: str = "labels", **options: Any) -> Callable[[int], Function]:
    def build(classes: int) -> Function:
        from nnunet_calib.losses import LOSSES

        return LOSSES[key](**options, multilabel=form == "regions")

    return build


def stock(form: str = "labels") -> Callable[[int], Function]:
    """nnU-Net's own loss, with its defaults."""

    def build(classes: int) -> Function:
        from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False}
        if form == "regions":
            loss = DC_and_BCE_loss({}, {**dice, "do_bg": True}, dice_class=MemoryEfficientSoftDiceLoss)
            return lambda z, y: loss(z, y.to(z.dtype))
        return DC_and_CE_loss({**dice, "do_bg": False}, {}, dice_class=MemoryEfficientSoftDiceLoss)

    return build


def monai_nacl(classes: int) -> Function:
    from monai.losses import NACLLoss

    loss = NACLLoss(classes=classes, dim=3)
    return lambda z, y: loss(z, y[:, 0])


def monai_focal(classes: int) -> Function:
    from monai.losses import FocalLoss

    return FocalLoss(to_onehot_y=True, use_softmax=True, gamma=3.0)


def one_hot(y: Tensor, classes: int) -> Tensor:
    return functional.one_hot(y[:, 0], classes).movedim(-1, 1).float()


def neighbours(onehot: Tensor) -> Tensor:
    """The 27 voxels around each, (B, C, *S, 27)."""
    padded = functional.pad(onehot, (1,) * 6, mode="replicate")
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).flatten(-3)


def textbook_cross_entropy(p: Tensor, onehot: Tensor) -> Tensor:
    return -(onehot * torch.log(p)).sum(dim=1).mean()


def textbook(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[int], Function]:
    """A loss of logits, softmax and one-hot labels."""
    return lambda classes: lambda z, y: formula(z.float(), z.float().softmax(dim=1), one_hot(y, classes))


def textbook_focal(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    return -(onehot * (1 - p) ** 3 * torch.log(p)).sum(dim=1).mean()


def textbook_ecp(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    return textbook_cross_entropy(p, onehot) + 0.1 * (p * torch.log(p)).sum(dim=1).mean()


def textbook_ls(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    return textbook_cross_entropy(p, 0.9 * onehot + 0.1 / onehot.shape[1])


def textbook_svls(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    steps = torch.arange(-1.0, 2.0, device=z.device) ** 2
    kernel = torch.exp(-(steps[:, None, None] + steps[:, None] + steps) / 8).flatten()
    kernel[13] = 0
    kernel = kernel / kernel.sum() / 2
    kernel[13] = 0.5
    return textbook_cross_entropy(p, (neighbours(onehot) * kernel).sum(dim=-1))


def textbook_mbls(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    distance = z.max(dim=1, keepdim=True).values.repeat(1, z.shape[1], 1, 1, 1) - z
    return textbook_cross_entropy(p, onehot) + 0.1 * functional.relu(distance - 5).mean()


def textbook_nacl(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    return textbook_cross_entropy(p, onehot) + 0.1 * (neighbours(onehot).mean(dim=-1) - z).abs().mean()


def textbook_meep(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    entropy = -(p * torch.log(p)).sum(dim=1)
    return textbook_cross_entropy(p, onehot) - 0.3 * entropy[p.argmax(dim=1) != onehot.argmax(dim=1)].mean()


def textbook_dca(z: Tensor, p: Tensor, onehot: Tensor) -> Tensor:
    confidence, prediction = p.max(dim=1)
    accuracy = (prediction == onehot.argmax(dim=1)).float().mean()
    return textbook_cross_entropy(p, onehot) + 10 * (accuracy - confidence.mean()).abs()


TOOLS: dict[str, dict[str, Callable[[int], Function]]] = {
    "labels": {
        YARDSTICK["labels"]: lambda classes: lambda z, y: functional.cross_entropy(z, y[:, 0]),
        "nnU-Net Dice + CE": stock(),
        **{f"ours {key}": ours(key) for key in KEYS},
        "ours nacl, gaussian": ours("nacl", prior="gaussian"),
        "ours ace, soft": ours("ace", soft=True),
        "MONAI nacl": monai_nacl,
        "MONAI focal": monai_focal,
        "textbook ce": textbook(lambda z, p, onehot: textbook_cross_entropy(p, onehot)),
        "textbook focal": textbook(textbook_focal),
        "textbook ecp": textbook(textbook_ecp),
        "textbook ls": textbook(textbook_ls),
        "textbook svls": textbook(textbook_svls),
        "textbook mbls": textbook(textbook_mbls),
        "textbook nacl": textbook(textbook_nacl),
        "textbook meep": textbook(textbook_meep),
        "textbook dca": textbook(textbook_dca),
    },
    "regions": {
        YARDSTICK["regions"]: lambda classes: (
            lambda z, y: functional.binary_cross_entropy_with_logits(z, y.to(z.dtype))
        ),
        "nnU-Net Dice + BCE": stock("regions"),
        **{f"ours {key}": ours(key, "regions") for key in KEYS},
    },
}


# --- the clock -----------------------------------------------------------------------------------------------------


def arrays(shape: tuple[int, ...], form: str, device: str) -> tuple[Tensor, Tensor]:
    """Random logits and target, made without temporaries on CPU: they would hide a part of the peak."""
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    z = torch.empty(shape, dtype=dtype, device=device).normal_(0, 3).requires_grad_(False)
    if form == "regions":
        return z.requires_grad_(), torch.empty(shape, dtype=torch.bool, device=device).random_(0, 2)
    return z.requires_grad_(), torch.empty((shape[0], 1, *shape[2:]), dtype=torch.int64, device=device).random_(
        0, shape[1]
    )


def rival(form: str, tool: str) -> str | None:
    """The tool of ours that a peer's time is compared to."""
    name = f"ours {tool.split()[-1]}"
    return name if not tool.startswith("ours") and name in TOOLS[form] else None


def run_task(name: str, repeats: int, threads: int) -> dict[str, float]:
    """One process' figures: MiB beyond logits and target in the first step; then medians over ``repeats`` turns.

    ``ratio``: seconds over the yardstick's; ``to_ours``: over those of our version, if there is one.
    """
    device, shape_text, form, tool = name.split("|")
    shape = tuple(int(side) for side in shape_text.split("x"))
    torch.set_num_threads(threads)
    ours_is = rival(form, tool)
    names = [tool, YARDSTICK[form], *([ours_is] if ours_is else [])]
    functions = [TOOLS[form][each](shape[1]) for each in names]

    def step(function: Function, z: Tensor, y: Tensor) -> None:
        z.grad = None
        with torch.autocast("cuda", torch.float16) if device == "cuda" else nullcontext():
            loss = function(z, y)
        # The scale is GradScaler's; without one the gradients of a mean over millions of voxels are 0 in float16.
        (loss * 2.0**16 if device == "cuda" else loss).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    clock = time.perf_counter if device == "cuda" else time.process_time
    for function in functions:
        step(function, *arrays((*shape[:2], 8, 8, 8), form, device))
    given = arrays(shape, form, device)
    before = peak(device)
    step(functions[0], *given)
    extra = peak(device) - before
    for function in functions[1:]:
        step(function, *given)
    turns = []
    for turn in range(repeats):
        seconds = [0.0] * len(functions)
        for i in range(len(functions)):
            place = (turn + i) % len(functions)  # each is the first one at times: the memory it finds differs
            began = clock()
            step(functions[place], *given)
            seconds[place] = clock() - began
        turns.append(seconds)
    figures = {"mib": extra, "seconds": statistics.median(turn[0] for turn in turns)}
    for key, place in (("ratio", 1), ("to_ours", 2)):
        if place < len(functions):
            figures[key] = statistics.median(turn[0] / turn[place] for turn in turns)
    return figures


def peak(device: str) -> float:
    """Largest memory of this process so far, MiB: resident, or allocated on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(names: list[str], args: argparse.Namespace) -> dict[str, list[dict]]:
    """All runs of all tools, kept in WORK: a second start goes on."""
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "runs.json"
    runs: dict[str, list[dict]] = json.loads(file.read_text()) if file.exists() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    options = ["--repeats", str(args.repeats), "--threads", str(args.threads)]
    for turn in range(args.rounds):
        for name in names:
            done = runs.setdefault(name, [])
            if len(done) > turn or (done and ("failed" in done[0] or done[0]["seconds"] > args.patience)):
                continue
            needed = gigabytes(name)
            if needed > args.memory:
                done.append({"failed": f"skipped: needs about {needed:.0f} GB"})
                continue
            words = [sys.executable, __file__, "-o", str(args.work), *options, "--task", name]
            child = subprocess.run(words, capture_output=True, text=True, env=environment)
            if child.returncode:
                lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}, out of memory?"]
                done.append({"failed": f"failed: {lines[-1][:100]}"})
            else:
                done.append(json.loads(child.stdout.splitlines()[-1]))
            print(f"{turn + 1}/{args.rounds} {name}: {done[-1]}", flush=True)
            file.write_text(json.dumps(runs))
    return runs


def gigabytes(name: str) -> float:
    """What a textbook version with an unfolded window takes; 0 for the others."""
    _, shape, _, tool = name.split("|")
    return UNFOLDED.get(tool, 0) * math.prod(int(side) for side in shape.split("x")) * 4e-9


def losses_of(checkout: Path) -> dict[str, Any]:
    """`LOSSES` of another checkout of this package, beside ours."""
    ours_are = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "nnunet_calib"}
    sys.path.insert(0, str(checkout))
    try:
        theirs = importlib.import_module("nnunet_calib.losses")
        if not Path(theirs.__file__ or "").is_relative_to(checkout):
            sys.exit(f"{checkout} is no checkout of nnunet-calib")
        return theirs.LOSSES
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.split(".")[0] == "nnunet_calib"]:
            del sys.modules[name]
        sys.modules.update(ours_are)


def compare_versions(checkout: Path, shape: tuple[int, ...], repeats: int, threads: int) -> str:
    """Markdown: seconds of the processor a step, ours and the other's, and the median of their ratios."""
    from nnunet_calib.losses import LOSSES

    torch.set_num_threads(threads)
    before, lines = losses_of(checkout.resolve()), ["| loss | before s | now s | now / before |", "|---|---|---|---|"]
    variants: list[tuple[str, dict[str, Any]]] = [(key, {}) for key in KEYS]
    for key, options in [
        *variants,
        ("nacl", {"prior": "gaussian"}),
        ("ace", {"soft": True}),
        ("meep", {"variant": "kl"}),
    ]:
        rivals = [versions[key](**options) for versions in (before, LOSSES)]
        z, y = arrays(shape, "labels", "cpu")
        turns = []
        for turn in range(repeats + 1):
            seconds = [0.0, 0.0]
            for place in (turn % 2, 1 - turn % 2):
                z.grad = None
                began = time.process_time()
                rivals[place](z, y).backward()
                seconds[place] = time.process_time() - began
            turns.append(seconds)
        old, new = (statistics.median(turn[place] for turn in turns[1:]) for place in (0, 1))
        ratio = statistics.median(new / old for old, new in turns[1:])
        label = " ".join([key, *map(str, options.values())])
        lines.append(f"| {label} | {old:.4f} | {new:.4f} | {ratio:.3f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


# --- tables --------------------------------------------------------------------------------------------------------


def median(done: list[dict], key: str) -> float | None:
    """Over the rounds; None if none has the figure."""
    values = [run[key] for run in done if key in run]
    return statistics.median(values) if values else None


def cells(runs: dict[str, list[dict]], name: str, yardstick: str) -> list[str]:
    """Seconds, their ratio, MiB, their ratio."""
    done = runs.get(name, [])
    if not done or "failed" in done[0]:
        return [done[0]["failed"] if done else "not measured", "", "", ""]
    mib, other = median(done, "mib"), median(runs.get(yardstick, []), "mib")
    return [
        f"{median(done, 'seconds'):.3f}",
        f"{median(done, 'ratio'):.2f}",
        f"{mib:.0f}",
        f"{mib / other:.2f}" if other else "",
    ]


def peer_cells(runs: dict[str, list[dict]], peer: str, own: str) -> list[str]:
    """Time and memory of a peer over ours, of one device and shape."""
    done, ours_done = runs.get(peer, []), runs.get(own, [])
    if done and "failed" in done[0]:
        return [done[0]["failed"]] * 2
    times, mib, own_mib = median(done, "to_ours"), median(done, "mib"), median(ours_done, "mib")
    return [
        "not measured" if times is None else f"{times:.1f}",
        "not measured" if mib is None or not own_mib else f"{mib / own_mib:.1f}",
    ]


def tables(runs: dict[str, list[dict]], shapes: list[str]) -> str:
    """Markdown, one table a form and shape, then ours against MONAI's and the textbook's."""
    devices = [device for device in DEVICES if any(name.startswith(f"{device}|") for name in runs)]
    text = []
    for form, tools in TOOLS.items():
        for shape in shapes:
            if not any(runs.get(f"{device}|{shape}|{form}|{tool}") for device in devices for tool in tools):
                text += [f"{form}, {shape.replace('x', ' x ')}: not measured.", ""]
                continue
            text += [f"### {form}, {shape.replace('x', ' x ')}", "", "| loss |"]
            text[-1] += "".join(
                f" {device.upper()} s | time x yardstick | extra MiB | memory x yardstick |" for device in devices
            )
            text += ["|---" * (1 + 4 * len(devices)) + "|"]
            missing = []
            for tool in tools:
                starts = [f"{device}|{shape}|{form}" for device in devices]
                if not any(runs.get(f"{start}|{tool}") for start in starts):
                    missing.append(tool)
                    continue
                row = [cell for s in starts for cell in cells(runs, f"{s}|{tool}", f"{s}|{YARDSTICK[form]}")]
                text.append(f"| {' | '.join([tool, *row])} |")
            text += ["", f"Not measured: {', '.join(missing)}.", ""] if missing else [""]
    text += ["### peers over ours: times the time, times the memory", "", "| loss | peer | shape |"]
    text[-1] += "".join(f" {device.upper()} time | {device.upper()} memory |" for device in devices)
    text += ["|---" * (3 + 2 * len(devices)) + "|"]
    for key in KEYS:
        for peer in (f"MONAI {key}", f"textbook {key}"):
            for shape in shapes if peer in TOOLS["labels"] else ():
                row = [key, peer.split()[0], shape.replace("x", " x ")]
                for device in devices:
                    start = f"{device}|{shape}|labels"
                    row += peer_cells(runs, f"{start}|{peer}", f"{start}|ours {key}")
                if any(cell != "not measured" for cell in row[3:]):
                    text.append(f"| {' | '.join(row)} |")
    if "cuda" not in devices:
        text += ["", "CUDA: not measured."]
    return "\n".join(text) + "\n"


def machine(threads: int) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "monai", "nnunetv2"))
    return f"{date.today()}; {threads} of {os.cpu_count()} cores of {platform.machine()}, {gpu}; {packages}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, help="folder for the runs")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout to compare with")
    parser.add_argument("--shape", default="2x14x64x64x64", help="of the comparison with it")
    parser.add_argument("--only", nargs="+", default=["*"], help="tasks device|shape|form|tool to run, shell patterns")
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' sides, where memory is short")
    parser.add_argument("--rounds", type=int, default=1, help="processes a tool")
    parser.add_argument("--repeats", type=int, default=5, help="turns a process times")
    parser.add_argument("--memory", type=float, default=10, help="GB a textbook version may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=10, help="a tool that needs more seconds a step runs once")
    parser.add_argument("--keep", action="store_true", help="write the tables of all finished runs into docs/results")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(run_task(args.task, args.repeats, args.threads)))
        return 0
    if args.against:
        shape = tuple(int(side) for side in args.shape.split("x"))
        print(f"{machine(args.threads)}\n\n{compare_versions(args.against, shape, args.repeats, args.threads)}")
        return 0
    if not args.work:
        parser.error("-o is needed")
    shapes = [
        "x".join(map(str, (*shape[:2], *(max(8, round(side * args.scale)) for side in shape[2:])))) for shape in SHAPES
    ]
    devices = DEVICES if torch.cuda.is_available() else DEVICES[:1]
    names = [f"{device}|{shape}|{form}|{tool}" for device in devices for shape in shapes for form, tools in
             TOOLS.items() for tool in tools]  # fmt: skip
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
    runs = measure(chosen, args)
    text = tables(runs, shapes)
    print(text)
    if args.keep:
        write_csvs("benchmark_losses", ("steps", "peers"), text, measured=machine(args.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
