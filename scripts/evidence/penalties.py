"""Penalties of ``cmsop`` and ``cmsap`` by cross-fitting on validation patients: held-out NLL, mean over cases.

    python scripts/evidence/penalties.py PROTOCOL.json --data DATA -o WORK

Voxels are drawn at random from each case, 4,000 to fit on and 20,000 others to score; folds are by patient.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
from bench import Bench
from protocol import Protocol
from scores import opened, write_lines
from tables import RESULTS

from nnunet_calib.data.images import read_labels
from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.folders.sampling import class_index, open_probabilities
from nnunet_calib.posthoc.maps.calibrator import log_probabilities

FIT, SCORE = 4_000, 20_000  # voxels of each case
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--trainings", nargs="+", default=["stock_1", "stock_2"])
    args = parser.parse_args()
    protocol = Protocol.read(args.protocol)
    bench, lines = Bench(protocol, args.data, args.work), []
    makers = {("temperature", "", ""): CALIBRATORS["temperature"]}
    for key, off, intercept in product(("cmsop", "cmsap"), PENALTIES, PENALTIES):
        makers[key, off, intercept] = lambda k=key, o=off, i=intercept: CALIBRATORS[k](off_diagonal=o, intercept=i)
    for name in args.trainings:
        predictions = bench.predictions(protocol.training(name), "validation")
        voxels = drawn(predictions, bench.references("validation"), FIT + SCORE)
        for (method, off, intercept), make in makers.items():
            nll = []
            for fold in protocol.folds(list(voxels)):
                others = [(z[:, :FIT], y[:FIT]) for case, (z, y) in voxels.items() if case not in fold]
                fitted = make().fit(*(np.concatenate(part, axis=-1) for part in zip(*others, strict=True)))
                for z, y in (voxels[case] for case in fold):
                    p = fitted.apply(z[:, FIT:])
                    nll.append(-float(np.log(p[y[FIT:], np.arange(SCORE)]).mean()))
            lines.append({"training": name, "method": method, "off_diagonal": off, "intercept": intercept})
            lines[-1] |= {"cases": len(nll), "NLL volume": float(np.mean(nll))}
            print(lines[-1], flush=True)
    write_lines(RESULTS / "calibrators_penalties.csv", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
