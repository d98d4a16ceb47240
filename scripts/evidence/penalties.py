"""Penalties of ``cmsop`` and ``cmsap`` by cross-fitting on validation patients: held-out NLL, mean over cases.

    python scripts/evidence/penalties.py PROTOCOL.json --data DATA -o WORK
    python scripts/evidence/penalties.py PROTOCOL.json --data DATA -o WORK --fiducio

Voxels are drawn at random from each case, 4,000 to fit on and 20,000 others to score; folds are by patient. A row is
a set of penalties that ``choices`` offers, or what cross-fitting inside the other folds chooses of them, as
``calibrate fit`` does. ``--fiducio`` (``pip install fiducio``) fits that package's two maps to the same voxels instead,
by Adam, its default, and by L-BFGS. Rows of other trainings, and of the other kind, are kept.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from bench import Bench
from protocol import Protocol
from scores import opened, read_lines, write_lines
from tables import RESULTS

from nnunet_calib.data.images import read_labels
from nnunet_calib.metrics import smallest_probability
from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.folders.crossfit import fit_cases
from nnunet_calib.posthoc.folders.sampling import class_index, open_probabilities
from nnunet_calib.posthoc.maps.calibrator import Calibrator, log_probabilities

FIT, SCORE = 4_000, 20_000  # voxels of each case
TABLE = RESULTS / "calibrators_penalties.csv"
CHOSEN = "chosen"


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


Voxels = Sequence[tuple[np.ndarray, np.ndarray]]


def _at_once(make: Callable[[], Calibrator], voxels: Voxels) -> Calibrator:
    return make().fit(*(np.concatenate(part, axis=-1) for part in zip(*voxels, strict=True)))


def _by_cases(make: Callable[[], Calibrator], voxels: Voxels) -> Calibrator:
    return fit_cases(make(), [(z, y, np.ones(len(y))) for z, y in voxels])


def _ours() -> dict[tuple[str, str, str], Callable[[Voxels], Calibrator]]:
    """By whose it is, method and penalties, what fits one."""
    makers = {("", "temperature", ""): partial(_at_once, CALIBRATORS["temperature"])}
    for key in ("cmsop", "cmsap"):
        for choice in CALIBRATORS[key]().choices(cases=99, channels=3):
            about = f"{choice.off_diagonal:g}, {choice.intercept:g}, {choice.spread:g}"
            makers["", key, about] = partial(_at_once, partial(copy.deepcopy, choice))
        makers["", key, CHOSEN] = partial(_by_cases, CALIBRATORS[key])
    return makers


def _of_fiducio() -> dict[tuple[str, str, str], Callable[[Voxels], Calibrator]]:
    from peers import OPTIMIZERS, THEIRS, Fiducio

    return {
        (f"fiducio {by}", key, ""): partial(_at_once, partial(Fiducio, key, by)) for key in THEIRS for by in OPTIMIZERS
    }


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
    data = protocol.name
    lines = [
        line
        for line in read_lines(TABLE)
        if line["data"] != data
        or line["training"] not in args.trainings
        or line["of"].startswith("fiducio") != args.fiducio
    ]
    for name in args.trainings:
        predictions = bench.predictions(protocol.training(name), "validation")
        voxels = drawn(predictions, bench.references("validation"), FIT + SCORE)
        for (of, method, penalties), fit in makers.items():
            nll = []
            for fold in protocol.folds(list(voxels)):
                fitted = fit([(z[:, :FIT], y[:FIT]) for case, (z, y) in voxels.items() if case not in fold])
                for z, y in (voxels[case] for case in fold):
                    p = fitted.apply(z[:, FIT:])[y[FIT:], np.arange(SCORE)]
                    nll.append(-float(np.log(np.maximum(p, smallest_probability(np.dtype(np.float32)))).mean()))
            lines.append({"data": data, "training": name, "of": of, "method": method})
            lines[-1] |= {"penalties": penalties, "cases": len(nll), "NLL volume": float(np.mean(nll))}
            print(lines[-1], flush=True)
    write_lines(TABLE, sorted(lines, key=lambda line: (line["data"], line["training"], bool(line["of"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
