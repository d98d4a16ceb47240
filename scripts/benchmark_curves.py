"""What the curves of a training cost: counting an epoch's validation patches, and writing and drawing the curves.

    python scripts/benchmark_curves.py [--device cuda] [--side 64] [--features 16 32 64 128]

Random patches of a small network, batch 2; seconds of the processor (CUDA: of the clock), medians. Counting is done for
each of nnU-Net's 50 validation batches; the file and the picture are those of a training of 1000 epochs, at its end.
Over an epoch of nnU-Net: 250 steps and 50 validation batches.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from benchmark_trainers import batch, build, step_time
from gpu_host import CONFIGURATION, Host, network
from nnunetv2.utilities.helpers import dummy_context

from nnunet_calib.data.files import read_json
from nnunet_calib.training.curves import ValidationCounts, append, draw

EPOCHS, STEPS, VALIDATIONS = 1000, 250, 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    clock = time.perf_counter if args.device == "cuda" else time.process_time

    def seconds(work: Callable[[], object]) -> float:
        found = []
        for _ in range(args.turns + 1):
            began = clock()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            found.append(clock() - began)
        return statistics.median(found[1:])

    with tempfile.TemporaryDirectory() as work:
        host = Host(Path(work), args.device, None, small=True)
        with host.folders() as (folder, plans):
            plans["configurations"][CONFIGURATION] |= network(args.features, [args.side] * 3)
            device = torch.device(args.device)
            trainer = build("MEEPTrainer", plans, read_json(folder / "dataset.json"), CONFIGURATION, device)
            step, _ = step_time(trainer, args.turns)
            given = batch(trainer, 0)
            counts, logits = ValidationCounts(), None
            autocast = torch.autocast("cuda") if args.device == "cuda" else dummy_context()
            with torch.no_grad(), autocast:
                logits = trainer.network(given["data"].to(device))[0]
                validation = seconds(lambda: trainer.validation_step(given))
                target = given["target"][0].to(device)
                counting = seconds(lambda: counts.add(logits, target, None, False))
            values = {name: 0.1 for name in ("ECE", "CECE", "loss/cross_entropy", "loss/doubt", "share")}
            rows = [{"epoch": epoch, **values} for epoch in range(EPOCHS)]
            curves = Path(work)
            append(curves, 0, values)
            (curves / "calibration_curves.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
            writing = seconds(lambda: append(curves, EPOCHS - 1, values))
            drawing = seconds(lambda: draw(curves, rows))
    epoch = STEPS * step + VALIDATIONS * validation
    curve = VALIDATIONS * counting + writing + drawing
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{date.today()}, {where}, torch {torch.__version__.split('+')[0]}, patch {args.side}^3, batch 2")
    print(f"step {step:.4f} s, validation batch {validation:.4f} s, of it counting {counting:.4f} s")
    print(f"at {EPOCHS} epochs: writing {writing:.4f} s, drawing {drawing:.3f} s")
    print(f"curves: {curve:.2f} s of an epoch of {epoch:.1f} s, {100 * curve / epoch:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
