"""Every calibrator of a voxel's own probabilities, ours and fiducio's, cross-fitted on a network's validation cases.

    python scripts/evidence/peers.py PROTOCOL.json --data DATA -o WORK --training stock_1

Needs ``pip install fiducio`` (Apache-2.0). All are fitted to the same voxels, drawn at random from each case of the
other folds (``cmsop`` and ``cmsap`` choose their penalties on those too), and scored on whole volumes, as every row is.
CPU seconds are of one thread: the median fit of a fold, and all volumes' calibration and scoring less that of the raw
probabilities. ``local``, which sees neighbours, is left out.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from bench import Bench
from fiducio import ArgmaxPreservingMatrixScaling, OrderPreservingMatrixScaling
from penalties import FIT, drawn
from protocol import Protocol
from scores import read_lines, score_predictions, write_lines
from tables import MEASURES, RESULTS, measures

from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.folders.crossfit import NONE, fit_cases
from nnunet_calib.posthoc.maps.calibrator import Calibrator

OURS = "nnunet-calib"
METHODS = tuple(name for name in CALIBRATORS if name not in ("auto", "local"))
THEIRS = {"cmsop": OrderPreservingMatrixScaling, "cmsap": ArgmaxPreservingMatrixScaling}
OPTIMIZERS = ("adam", "lbfgs")  # the first is fiducio's default


class Fiducio(Calibrator):
    """One of fiducio's, as calibrators of this package are used."""

    key = "fiducio"
    keeps_labels = True

    def __init__(self, method: str, optimizer: str):
        super().__init__()
        self.theirs = THEIRS[method](input_type="logits", optimizer=optimizer)

    def fit(self, log_probabilities, target, valid=None, *, weights=None):
        self.channels = len(log_probabilities)
        self.theirs.fit(_rows(log_probabilities), torch.from_numpy(target.astype(np.int64)))
        return self

    def apply(self, log_probabilities):
        calibrated = self.theirs.transform(_rows(log_probabilities.reshape(self.channels, -1)))
        return calibrated.detach().numpy().T.astype(np.float64).reshape(log_probabilities.shape)

    # No file is written or read of them: they have no parameters to name or to check.
    def _names(self):
        return ()

    def _check_parameters(self, parameters, classes):
        pass

    def _check_works(self):
        pass


def _rows(z: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(z.T, dtype=np.float32))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--training", default="stock_1")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of ours alone; all other rows are kept")
    args = parser.parse_args()
    table = RESULTS / f"calibrators_{Protocol.read(args.protocol).name}.csv"
    others_lines = [line for line in read_lines(table) if line["of"] != OURS or line["method"] not in args.methods]
    alone = args.methods != METHODS
    torch.set_num_threads(1)
    protocol = Protocol.read(args.protocol)
    bench = Bench(protocol, args.data, args.work)
    training = protocol.training(args.training)
    predictions, references = bench.predictions(training, "validation"), bench.references("validation")
    makers = {(OURS, method): CALIBRATORS[method] for method in args.methods}
    makers |= {
        (f"fiducio {optimizer}", method): (lambda method=method, optimizer=optimizer: Fiducio(method, optimizer))
        for method in THEIRS
        for optimizer in OPTIMIZERS
        if not alone
    }
    voxels = drawn(predictions, references, FIT)
    lines, raw = [], 0.0
    for (of, method), make in {("", NONE): None, **makers}.items():
        calibrators, seconds = {}, []
        for fold in protocol.folds(list(voxels)):
            others = [voxels[name] for name in voxels if name not in fold]
            started = time.process_time()
            if make is not None:
                fitted = fit_cases(make(), [(z, y, np.ones(len(y))) for z, y in others])
                calibrators |= dict.fromkeys(fold, {method: fitted})
                seconds.append(time.process_time() - started)
            else:
                calibrators |= dict.fromkeys(fold, {})
        started = time.process_time()
        scored = score_predictions(predictions, references, calibrators)
        taken = time.process_time() - started
        own = [line for line in scored if line["method"] == method]
        raw = raw or taken
        means = dict(zip(MEASURES, np.mean([measures(line) for line in own], axis=0).tolist(), strict=True))
        fit = float(np.median(seconds)) if seconds else 0.0
        changed = sum(line["changed"] for line in own)
        kept = {name: means[name] for name in ("NLL volume", "ECE volume", "NLL foreground", "ECE foreground")}
        lines.append(
            {
                "training": args.training,
                "of": of,
                "method": method,
                "cases": len(own),
                **kept,
                "labels_changed": changed,
            }
            | {"fit_cpu_s": round(fit, 2), "apply_cpu_s": round(max(0.0, taken - 2 * raw), 1) if make else 0.0}
        )
        print(lines[-1], flush=True)
    if alone:
        lines = others_lines + lines[1:]
    place = [("", NONE), *((OURS, method) for method in METHODS)]
    lines.sort(key=lambda line: place.index((line["of"], line["method"])) if line["of"] in ("", OURS) else len(place))
    write_lines(table, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
