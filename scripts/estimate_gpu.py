"""An ESTIMATE of what a step of each loss costs on a GPU, without one: kernels, bytes moved and peak of memory.

    python scripts/estimate_gpu.py [--shape 2x14x128x128x128] [--keep]

The step, forward and backward in float16 under autocast, runs on PyTorch's fake tensors (`fake_cuda`): every operation
counts as one kernel that reads its arguments and writes its results; the peak is that of the tensors alive at the same
time, beyond logits and target, the gradient included. No time is measured, and nothing of a GPU is: caches, kernels
inside an operation and the allocator are not known here. scripts/check_gpu.py measures.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from fake_cuda import CUDA, Cost, fake_cuda, gradients
from kept import FOLDER, write_csvs
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor
from torch.nn.functional import cross_entropy

from nnunet_calib.losses import LOSSES

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((key, {}) for key in LOSSES),
    ("meep", {"variant": "kl"}),
    ("nacl", {"prior": "gaussian"}),
    ("ace", {"soft": True}),
]


def cost_of(loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> Cost:
    """Of a step with labels in int16, as nnU-Net has them."""
    with fake_cuda(), torch.autocast("cuda"):
        logits = torch.empty(shape, dtype=torch.float16, device=CUDA).requires_grad_()
        target = torch.empty((shape[0], 1, *shape[2:]), dtype=torch.int16, device=CUDA)
        with Cost() as cost:
            cost.known(logits, target)
            gradients(loss(logits, target) * 2.0**16, logits)
    return cost


def tools() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses by name, torch's cross-entropy first."""
    dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False, "do_bg": False}
    named: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch cross_entropy": lambda z, y: cross_entropy(z, y[:, 0].long()),
        "nnU-Net Dice + CE": DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss),
    }
    for key, options in VARIANTS:
        label = ", ".join([key, *(f"{name} {value}" for name, value in options.items())])
        named[label] = LOSSES[key](**options)
    return named


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2x14x128x128x128")
    parser.add_argument("--only", nargs="+", help="losses of these names")
    parser.add_argument(
        "--keep", type=Path, nargs="?", const=FOLDER, help="write it as CSV, into docs/results or a folder"
    )
    args = parser.parse_args(words)
    shape = tuple(int(side) for side in args.shape.split("x"))
    measured = (
        f"ESTIMATE, {date.today()}, {' x '.join(map(str, shape))} in float16, torch {torch.__version__.split('+')[0]}"
    )
    lines = [
        "| loss | kernels | GiB read and written | peak MiB | x cross_entropy |",
        "|---|---|---|---|---|",
    ]
    yardstick = None
    for name, loss in tools().items():
        if args.only and name not in args.only and yardstick is not None:
            continue
        cost = cost_of(loss, shape)
        yardstick = yardstick or cost.peak
        lines.append(
            f"| {name} | {cost.kernels} | {cost.bytes / 2**30:.1f} | {cost.peak / 2**20:.0f} | "
            f"{cost.peak / yardstick:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(f"{measured}\n\n{text}")
    if args.keep:
        write_csvs("estimate_gpu", ("kernels",), text, args.keep, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
