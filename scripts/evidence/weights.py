"""Fits that count every case the same, and fits that count every voxel the same: held-out scores, mean over cases.

    python scripts/evidence/weights.py PROTOCOL.json --data DATA -o WORK

Both are fitted to the same sampled voxels of the other folds' patients, and scored on the samples of the fold's own.
``by`` is what counts the same: ``case`` is what ``calibrate fit`` does.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench import Bench
from protocol import Protocol
from scores import opened, write_lines
from tables import RESULTS

from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.folders.crossfit import SCORES, estimates, fit_samples
from nnunet_calib.posthoc.folders.fit import auto_methods
from nnunet_calib.posthoc.folders.sampling import CaseSample, sample_case

REGIONS = ("volume", "foreground")


def pooled(samples: list[CaseSample]) -> CaseSample:
    """All cases as one, in which every voxel counts the same."""
    parts = {name: [getattr(sample, name) for sample in samples] for name in ("index", "weights")}
    return replace(
        samples[0],
        **{name: np.concatenate(arrays) for name, arrays in parts.items()},
        probabilities=np.concatenate([sample.probabilities for sample in samples], axis=1),
        target=np.concatenate([sample.target for sample in samples], axis=-1),
        regions={name: np.concatenate([s.regions[name] for s in samples]) for name in samples[0].regions},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--trainings", nargs="+", default=["stock_1", "stock_2", "meep_1", "meep_2"])
    args = parser.parse_args()
    protocol = Protocol.read(args.protocol)
    bench, lines = Bench(protocol, args.data, args.work), []
    for name in args.trainings:
        predictions = bench.predictions(protocol.training(name), "validation")
        dataset, cases, reader = opened(predictions, bench.references("validation"))
        samples = {files.name: sample_case(files, dataset, reader) for files in cases}
        for method in auto_methods("volume", keep_labels=False):
            for by in ("case", "voxel"):
                found: dict[str, list] = {region: [] for region in REGIONS}
                for fold in protocol.folds(list(samples)):
                    others = [sample for case, sample in samples.items() if case not in fold]
                    given = others if by == "case" else [pooled(others)]
                    fitted = fit_samples(CALIBRATORS[method](multilabel=dataset.has_regions), given, "volume")
                    for case in fold:
                        p = fitted.apply(samples[case].log_probabilities(multilabel=dataset.has_regions))
                        for region, values in found.items():
                            values.append(estimates(p, samples[case], region, dataset.has_regions))
                means = {
                    f"{score} {region}": float(mean)
                    for region, values in found.items()
                    for score, mean in zip(SCORES, np.mean(values, axis=0), strict=True)
                    if score in ("NLL", "ECE")
                }
                lines.append({"training": name, "method": method, "by": by, "cases": len(samples), **means})
                print(lines[-1], flush=True)
    write_lines(RESULTS / "calibrators_weights.csv", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
