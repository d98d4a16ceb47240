"""Class-conditional calibrators, ours and fiducio's (Apache-2.0, ``pip install fiducio``), on one set of voxels.

    python scripts/compare_fiducio.py [--csv docs/results/calibrators_simulated.csv]

A network that is too sure, by a temperature and offsets of its own for every predicted class; 60,000 voxels to fit
on, 60,000 others to score; one thread, CPU seconds. fiducio with its defaults (Adam), and with its L-BFGS.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fiducio import ArgmaxPreservingMatrixScaling, OrderPreservingMatrixScaling

from nnunet_calib.metrics import BINS, Bins, bin_index, expected_calibration_error
from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.maps.calibrator import log_softmax, softmax

VOXELS = 60_000
THEIRS = {"cmsop": OrderPreservingMatrixScaling, "cmsap": ArgmaxPreservingMatrixScaling}


def simulated(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities (C, N) and the classes that were drawn."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1, (classes, VOXELS))
    z[0] += 4
    inside = np.flatnonzero(rng.uniform(size=VOXELS) < 0.15)
    z[rng.integers(1, classes, inside.size), inside] += 6 * rng.uniform(size=inside.size)
    z *= 3
    offset = np.random.default_rng(7).normal(0, 1, (classes, classes))
    temperature = np.random.default_rng(8).uniform(1.5, 4, classes)
    top = z.argmax(axis=0)
    p = softmax(z / temperature[top] + offset[:, top])
    return log_softmax(z), (p.cumsum(axis=0) < rng.uniform(size=VOXELS)).sum(axis=0)


def scores(p: np.ndarray, z: np.ndarray, y: np.ndarray) -> dict[str, float]:
    top, confidence = p.argmax(axis=0), p.max(axis=0)
    cell = bin_index(confidence)
    counts = (np.bincount(cell, part, BINS) for part in (np.ones(y.size), confidence, (top == y).astype(float)))
    before = np.take_along_axis(p, z.argmax(axis=0)[None], axis=0)[0]
    nll = -float(np.log(p[y, np.arange(y.size)]).mean())
    ece = float(expected_calibration_error(Bins(*counts)))
    return {"NLL": round(nll, 5), "ECE": round(ece, 5), "labels_changed": int((before < confidence).sum())}


def timed(work) -> tuple:
    start = time.process_time()
    return work(), round(time.process_time() - start, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for classes in (4, 14):
        z, y = simulated(classes, 0)
        new, reference = simulated(classes, 1)
        tensors = [torch.from_numpy(part.T.astype(np.float32)) for part in (z, new)]

        def add(of: str, method: str, p: np.ndarray, fit: float = 0.0, apply: float = 0.0) -> None:
            row = {"classes": classes, "of": of, "method": method, **scores(p, new, reference)}  # noqa: B023
            rows.append(row | {"fit_cpu_s": fit, "apply_cpu_s": apply})
            print(rows[-1], flush=True)

        add("", "none", softmax(new))
        for key in ("temperature", *THEIRS):
            ours, fit = timed(lambda key=key, z=z, y=y: CALIBRATORS[key]().fit(z, y))
            p, apply = timed(lambda ours=ours, new=new: ours.apply(new))
            add("nnunet-calib", key, p, fit, apply)
        for key, make in THEIRS.items():
            for optimizer in ("adam", "lbfgs"):
                theirs = make(input_type="logits", optimizer=optimizer)
                _, fit = timed(lambda theirs=theirs, t=tensors, y=y: theirs.fit(t[0], torch.from_numpy(y)))
                p, apply = timed(lambda theirs=theirs, t=tensors: theirs.transform(t[1]))
                add(f"fiducio {optimizer}", key, p.detach().numpy().T.astype(np.float64), fit, apply)
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
