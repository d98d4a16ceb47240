"""Class-conditional calibrators, ours and fiducio's (Apache-2.0, ``pip install fiducio``), on one set of voxels.

    python scripts/compare_fiducio.py [--csv docs/results/calibrators_simulated.csv]
    python scripts/compare_fiducio.py --slices 100 [--csv docs/results/calibrators_volume.csv]

A network that is too sure, by a temperature and offsets of its own for every predicted class; 60,000 voxels to fit
on, 60,000 others to score; one thread, CPU seconds. fiducio with its defaults (Adam), and with its L-BFGS.

With ``--slices`` the 14-class calibrators are applied to so many slices of 512 x 512 instead, each in a process of its
own, of one thread, that reads its calibrator and float32 probabilities from files: CPU seconds of applying alone, and
the largest memory of the process. ``--only NAME`` runs those of that package.
"""

import argparse
import csv
import multiprocessing
import pickle
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fiducio import ArgmaxPreservingMatrixScaling, OrderPreservingMatrixScaling

from nnunet_calib.metrics import BINS, Bins, bin_index, expected_calibration_error
from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.maps.calibrator import log_softmax, softmax
from nnunet_calib.posthoc.maps.volume import calibrate_case

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


def applied(calibrator: Path, volume: Path) -> dict[str, float]:
    """CPU seconds and memory of applying one, in a new process; voxels with another predicted class."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_apply, (calibrator, volume))


def _apply(calibrator: Path, volume: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    fitted, p = pickle.loads(calibrator.read_bytes()), np.load(volume)
    start = time.process_time()
    if hasattr(fitted, "transform"):
        with torch.no_grad():
            logits = torch.from_numpy(p).log_()[None]  # (1, C, z, y, x), in the place of the probabilities
            calibrated = fitted.transform(logits)[0].numpy()
    else:
        calibrated = calibrate_case(fitted, p)
    seconds = time.process_time() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    before = np.load(volume, mmap_mode="r")
    changed = 0
    for z in range(p.shape[1]):
        top = np.take_along_axis(calibrated[:, z], before[:, z].argmax(axis=0)[None], axis=0)[0]
        changed += int((top < calibrated[:, z].max(axis=0)).sum())
    return {"apply_cpu_s": round(seconds, 2), "memory_gb": round(most, 2), "labels_changed": changed}


def on_a_volume(slices: int, only: str) -> list[dict]:
    """Rows of ``--slices``."""
    z, y = simulated(14, 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        volume, kept = Path(folder) / "volume.npy", Path(folder) / "calibrator"
        shape = (14, slices, 512, 512)
        p = np.lib.format.open_memmap(volume, "w+", np.float32, shape)
        for part in range(slices):
            p[:, part] = np.resize(softmax(np.roll(z, part, axis=1)), (14, 512 * 512)).reshape(14, 512, 512)
        p.flush()
        for of, key in ((of, key) for of in ("nnunet-calib", "fiducio") for key in THEIRS):
            if only not in of:
                continue
            if of == "fiducio":
                fitted = THEIRS[key](input_type="logits", optimizer="lbfgs")
                fitted.fit(torch.from_numpy(z.T.astype(np.float32)), torch.from_numpy(y))
            else:
                fitted = CALIBRATORS[key]().fit(z, y)
            kept.write_bytes(pickle.dumps(fitted))
            rows.append({"of": of, "method": key, "volume": "x".join(map(str, shape)), **applied(kept, volume)})
            print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--slices", type=int, help="of a volume that calibrators are applied to")
    parser.add_argument("--only", default="", help="with --slices: nnunet-calib or fiducio")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = on_a_volume(args.slices, args.only) if args.slices else on_voxels()
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


def on_voxels() -> list[dict]:
    """Rows of simulated voxels."""
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
    return rows


if __name__ == "__main__":
    sys.exit(main())
