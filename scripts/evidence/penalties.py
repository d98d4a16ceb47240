"""Penalties of ``cmsop`` and ``cmsap`` by cross-fitting on validation patients: held-out NLL, mean over cases.

    python scripts/evidence/penalties.py PROTOCOL.json --data DATA -o WORK
    python scripts/evidence/penalties.py PROTOCOL.json --data DATA -o WORK --fiducio

Voxels are drawn at random from each case, 4,000 to fit on and 20,000 others to score; folds are by patient. The penalty
of the offsets is that of what a gap owes to other classes' gaps. ``--fiducio`` (``pip install fiducio``) fits that
package's two maps to the same voxels instead, by L-BFGS; rows of the other kind are kept.
"""

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from bench import Bench
from protocol import Protocol
from scores import opened, read_lines, write_lines
from tables import RESULTS

from nnunet_calib.data.images import read_labels
from nnunet_calib.metrics import smallest_probability
from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.folders.sampling import class_index, open_probabilities
from nnunet_calib.posthoc.maps.calibrator import log_probabilities

FIT, SCORE = 4_000, 20_000  # voxels of each case
TABLE, FIDUCIO = RESULTS / "calibrators_penalties.csv", "fiducio lbfgs"
PENALTIES = (1e-4, 1e-2, 1e-1, 1.0, 1e3)


def drawn(predictions: Path, references: Path, voxels: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By case, log probabilities (C, n) and classes (n,) of voxels drawn at random."""
    dataset, cases, reader = opened(predictions, references)
    rng, found = np.random.default_rng(0), {}
    for files in cases:
        reference = read_labels(files.reference, reader, dataset.labels).labels
        stored = open_probabilities(files, dataset, read_labels(files.prediction, reader, dataset.labels))
        index = rng.choice(reference.size, voxels, replace=False)
        z = log_probabilities(stored.whole().reshape(len(dataset.channels), -1)[:, index])
        found[files.name] = (z, class_index(reference.reshape(-1)[index], dataset))
    return found


def _ours() -> dict:
    """By method and penalty, what makes one."""
    makers = {("temperature", ""): CALIBRATORS["temperature"]}
    for key, penalty in product(("cmsop", "cmsap"), PENALTIES):
        makers[key, penalty] = partial(CALIBRATORS[key], off_diagonal=penalty, intercept=penalty)
    return makers


def _of_fiducio() -> dict:
    from peers import THEIRS, Fiducio

    return {(key, ""): partial(Fiducio, key, "lbfgs") for key in THEIRS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--trainings", nargs="+", default=["stock_1", "stock_2", "meep_1", "meep_2"])
    parser.add_argument("--fiducio", action="store_true")
    args = parser.parse_args()
    protocol = Protocol.read(args.protocol)
    bench = Bench(protocol, args.data, args.work)
    makers = _of_fiducio() if args.fiducio else _ours()
    lines = [line for line in read_lines(TABLE) if (line["of"] == FIDUCIO) != args.fiducio]
    for name in args.trainings:
        predictions = bench.predictions(protocol.training(name), "validation")
        voxels = drawn(predictions, bench.references("validation"), FIT + SCORE)
        for (method, penalty), make in makers.items():
            nll = []
            for fold in protocol.folds(list(voxels)):
                others = [(z[:, :FIT], y[:FIT]) for case, (z, y) in voxels.items() if case not in fold]
                fitted = make().fit(*(np.concatenate(part, axis=-1) for part in zip(*others, strict=True)))
                for z, y in (voxels[case] for case in fold):
                    p = fitted.apply(z[:, FIT:])[y[FIT:], np.arange(SCORE)]
                    nll.append(-float(np.log(np.maximum(p, smallest_probability(np.dtype(np.float32)))).mean()))
            lines.append({"training": name, "of": FIDUCIO if args.fiducio else "", "method": method})
            lines[-1] |= {"penalty": penalty, "cases": len(nll), "NLL volume": float(np.mean(nll))}
            print(lines[-1], flush=True)
    write_lines(TABLE, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
