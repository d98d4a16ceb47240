"""What only a GPU can show, in one command of some minutes: the same numbers as on the processor, time and memory.

    python scripts/check_gpu.py -o gpu.json [--dataset 4] [--only PATTERN ...]
    python scripts/check_gpu.py -o cpu.json --device cpu --small          # shows that the script works

    loss ...        every loss, labels and regions: value and gradient are the processor's, to 1e-5 of the largest
                    number in float32, to 1e-3 in float16
    distances, calibration     the torch backends and numpy agree to 1e-6
    loss step ...   seconds and MiB of a loss at 2 x 14 x 128^3, beside torch's cross-entropy
    train ...       every trainer two epochs under mixed precision and compile, stopped after the first and continued:
                    losses are finite, the epoch and the loss' state are restored
    predict, evaluate          a trained network's predictions and their record are the processor's, as far as
                    `gpu_host` says
    step ...        seconds and MiB of every trainer's whole step at 2 x 14 x 128^3, and over the stock loss'
    train on 2 GPUs ...        two epochs of ``nnUNetv2_train -num_gpus 2``, where there are two

Every check is written to the JSON file as soon as it is done; the same command again goes on with those that are
missing or failed. Trainings are of the demo's phantom, or with ``--dataset`` of a data set that nnU-Net has
preprocessed (Hippocampus: 4). What they write lies beside the JSON file. On a processor time and memory are "not
measured", half precision is left out, and nothing is compiled. Exit code 1 when a check failed.
"""

import argparse
import fnmatch
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_host import Host
from torch import Tensor

from nnunet_calib.losses import LOSSES
from nnunet_calib.metrics import calibration_statistics, structure_distances
from nnunet_calib.training.trainers import TRAINERS

CASES = [*((key, {}) for key in LOSSES), ("meep", {"variant": "kl"}), ("ace", {"soft": True})]
FORMS = ("labels", "regions")
TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
METRICS_TOLERANCE = 1e-6
PREDICTS = "NACLTrainer"
POOLED = ("MEEPTrainer", "DCATrainer", "CRaCTrainer")
"""Trainers whose losses sum up over processes."""
CLASSES = 14
STEPS = 5
NOT_MEASURED = "not measured"


def arrays(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, blocky target and mask on the processor, the logits already rounded to ``dtype``."""
    random = torch.Generator().manual_seed(0)
    batch, classes, *space = shape
    z = torch.randn(shape, generator=random).mul_(3).to(dtype)
    channels, highest = (classes, 2) if form == "regions" else (1, classes)
    blocks = torch.randint(0, highest, (batch, channels, *(-(-side // 4) for side in space)), generator=random)
    y = torch.nn.functional.interpolate(blocks.float(), size=space, mode="nearest").long()
    return z, y.bool() if form == "regions" else y, torch.rand((batch, 1, *space), generator=random) > 0.2


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, over the largest number."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def loss_agrees(device: str, side: int, key: str, options: dict, form: str, dtype: str) -> dict:
    """Value and gradient on the device against the processor's in float32, of the same rounded logits."""
    z, y, valid = arrays(form, (2, 4, side, side, side), getattr(torch, dtype))
    found = []
    for where, kind in ((device, z.dtype), ("cpu", torch.float32)):
        logits = z.to(where, kind).requires_grad_()
        with torch.autocast(where, dtype=torch.float16, enabled=where == "cuda" and kind == torch.float16):
            value = LOSSES[key](**options, multilabel=form == "regions")(logits, y.to(where), valid.to(where))
        # GradScaler's scale: gradients of a mean over many voxels are 0 in float16 without one.
        (gradient,) = torch.autograd.grad(value * 2.0**12, logits)
        found.append((value, gradient))
    (value, gradient), (expected, expected_gradient) = found
    errors = {"value": apart(value, expected), "gradient": apart(gradient, expected_gradient)}
    return {**errors, "passed": max(errors.values()) <= TOLERANCE[dtype]}


def loss_costs(device: str, side: int, key: str, options: dict) -> dict:
    """Seconds and MiB beyond logits and target of one step in float16, and over those of torch's cross-entropy."""
    z, y, _ = arrays("labels", (2, CLASSES, side, side, side), torch.float16 if device == "cuda" else torch.float32)
    z, y = z.to(device).requires_grad_(), y.to(device)
    loss = LOSSES[key](**options)
    rivals: list[Callable[[], Tensor]] = [
        lambda: loss(z, y),
        lambda: torch.nn.functional.cross_entropy(z.float(), y[:, 0]),
    ]
    seconds: list[list[float]] = [[], []]
    extra = [0.0, 0.0]
    for turn in range(STEPS + 1 if device == "cuda" else 1):
        for number, rival in enumerate(rivals):
            z.grad = None
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            (rival() * 2.0**12).backward()
            if device == "cuda":
                torch.cuda.synchronize()
                extra[number] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if turn > 0:
                seconds[number].append(time.perf_counter() - began)
    finite = bool(z.grad is not None and z.grad.isfinite().all())
    if device != "cuda":
        return dict.fromkeys(("seconds", "times_cross_entropy", "mib", "mib_cross_entropy"), NOT_MEASURED) | {
            "passed": finite
        }
    ours, theirs = (statistics.median(each) for each in seconds)
    figures = {"seconds": ours, "times_cross_entropy": ours / theirs, "mib": extra[0], "mib_cross_entropy": extra[1]}
    return {**figures, "passed": finite}


def volume(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label map, prediction and softmax of four classes."""
    logits, label, _ = arrays("labels", (1, 4, side, side, side), torch.float32)
    reference = label[0, 0].numpy()
    p = (logits + 4 * torch.nn.functional.one_hot(label[:, 0], 4).movedim(-1, 1)).softmax(dim=1)[0]
    return reference, p.argmax(dim=0).numpy(), p.numpy()


def distances_agree(device: str, side: int) -> dict:
    reference, prediction, _ = volume(side)
    measure = partial(structure_distances, reference, prediction, [1, 2, 3], (2.0, 1.0, 1.0))
    pairs = zip(measure(backend="torch", device=device), measure(backend="numpy"), strict=True)
    error = max(
        apart(torch.from_numpy(np.sort(ours.both)), torch.from_numpy(np.sort(theirs.both)))
        for a, b in pairs
        for ours, theirs in [(_Both(a), _Both(b))]
    )
    return {"error": error, "passed": error <= METRICS_TOLERANCE}


class _Both:
    """The distances of both directions of a `SurfaceDistances`."""

    def __init__(self, distances: object):
        arrays_of = [value for value in vars(distances).values() if isinstance(value, np.ndarray)]
        self.both = np.concatenate([each.ravel() for each in arrays_of])


def calibration_agrees(device: str, side: int) -> dict:
    reference, _, p = volume(side)
    masks = {"volume": np.ones(reference.shape, bool), "foreground": reference > 0}
    gather = partial(calibration_statistics, p, reference, [0, 1, 2, 3], masks)
    ours, _ = gather(backend="torch", device=device)
    theirs, _ = gather(backend="numpy")
    error = max(
        apart(torch.from_numpy(np.asarray(getattr(ours[m].classes, s), dtype=np.float64)),
              torch.from_numpy(np.asarray(getattr(theirs[m].classes, s), dtype=np.float64)))
        for m in masks for s in ("n", "confidence", "correct")
    )  # fmt: skip
    return {"error": error, "passed": error <= METRICS_TOLERANCE}


def checks(host: Host, side: int) -> dict[str, Callable[[], dict]]:
    """All checks by name, in their order: predictions need a trained network."""
    device, small = host.device, min(side, 32)
    named: dict[str, Callable[[], dict]] = {}
    labels = {"-".join([key, *(f"{name}={value}" for name, value in options.items())]): (key, options)
              for key, options in CASES}  # fmt: skip
    for label, (key, options) in labels.items():
        for form in FORMS:
            for dtype in TOLERANCE if device == "cuda" else ("float32",):
                named[f"loss {label} {form} {dtype}"] = partial(loss_agrees, device, small, key, options, form, dtype)
    named["distances"] = partial(distances_agree, device, small)
    named["calibration"] = partial(calibration_agrees, device, small)
    for label, (key, options) in labels.items():
        named[f"loss step {label}"] = partial(loss_costs, device, side, key, options)
    for name in TRAINERS:
        named[f"train {name}"] = partial(host.train, name)
    named["predict"] = partial(host.predict, PREDICTS)
    named["evaluate"] = host.evaluate
    for name in TRAINERS:
        named[f"step {name}"] = partial(host.step, name, side, CLASSES, STEPS)
    for name in POOLED:
        named[f"train on 2 GPUs {name}"] = partial(host.train_on_two, name)
    return named


def over_stock(results: dict[str, dict]) -> None:
    """Write beside the figures of a trainer's step how many times the stock loss' they are."""
    stock = results.get("step StockTrainer", {})
    for name, result in results.items():
        for key in ("seconds", "mib"):
            if name.startswith("step ") and all(isinstance(each.get(key), float) for each in (result, stock)):
                result[f"{key}_over_stock"] = result[key] / stock[key]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="file", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--small", action="store_true", help="patches and networks for a processor")
    parser.add_argument("--dataset", metavar="ID", help="number of a preprocessed data set to train on")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="checks of these names (*, ?)")
    args = parser.parse_args(words)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small shows that the script works")
    side = 8 if args.small else 128
    made_on = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"no GPU: {NOT_MEASURED}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "patch": [2, CLASSES, side, side, side],
        "dataset": args.dataset or "phantom",
    }
    kept = json.loads(args.file.read_text(encoding="utf-8")) if args.file.exists() else {}
    results = kept.get("checks", {}) if kept.get("made_on") == made_on else {}
    host = Host(args.file.resolve().with_suffix(".work"), device, args.dataset, args.small)
    for name, check in checks(host, side).items():
        if results.get(name, {}).get("passed") or not any(fnmatch.fnmatch(name, pattern) for pattern in args.only):
            continue
        began = time.perf_counter()
        try:
            result = check()
        except (Exception, SystemExit) as error:  # one that fails must not hide the others
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:300]}
        results[name] = result | {"took": round(time.perf_counter() - began, 1)}
        print(name, results[name], flush=True)
        over_stock(results)
        part = args.file.with_suffix(".part")
        part.write_text(json.dumps({"made_on": made_on, "checks": results}, indent=1), encoding="utf-8")
        os.replace(part, args.file)
    failed = [name for name, result in results.items() if not result["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} checks passed on {made_on['device']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
