"""Evidence: train, predict and score what a protocol names, and keep the finished rows.

    python scripts/evidence run PROTOCOL.json --data DATA -o WORK [--jobs 2] [--only PATTERN]
    python scripts/evidence status PROTOCOL.json --data DATA -o WORK
    python scripts/evidence score PROTOCOL.json --data DATA -o WORK [--only PATTERN]

``score`` works on what is predicted, beside a ``run`` that goes on, and writes the rows to docs/results.

DATA holds the data set in nnU-Net's raw format. Unattended and resumable: what is finished in WORK is not done again,
an interrupted training goes on from its last checkpoint, and one that fails does not end the others. Trainings have to
be run from a checkout that stays as it is: every process imports the package anew.
"""

import argparse
import fnmatch
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from threading import Event

import torch
from bench import Bench
from protocol import Protocol, Training, checksum
from scores import score_predictions, write_lines
from tables import Rows

from nnunet_calib.training.settings import RESOLVED_KEY


def run_all(bench: Bench, trainings: list[Training], jobs: int) -> int:
    """Train and predict in the order of the queue, each after the one it starts from; the number of failures."""
    ended = {training.name: Event() for training in trainings}

    def one(training: Training) -> bool:
        try:
            if training.start_name in ended:
                ended[training.start_name].wait()
            bench.train(training)
            bench.predict(training, "validation")
            if bench.protocol.content["test_is_open"]:
                bench.predict(training, "test")
            print(f"done   {training.name}", flush=True)
            return True
        except (OSError, RuntimeError) as error:
            print(f"FAILED {training.name}: {error}", flush=True)
            return False
        finally:
            ended[training.name].set()

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, trainings)).count(False)


def sources(bench: Bench, training: Training) -> dict[str, str]:
    """What a row comes from: checksums of the network, its predictions and the references, settings, date, machine."""
    predictions, references = bench.predictions(training, "validation"), bench.references("validation")
    labels = sorted(predictions.glob("*.nii.gz"))
    probabilities = sorted(predictions.glob("*.npz"))
    settings = json.loads((bench.model(training) / "plans.json").read_text())[RESOLVED_KEY]
    return {
        "checkpoint": checksum(bench.model(training) / "fold_0" / "checkpoint_final.pth"),
        "predictions": checksum(*labels, *probabilities),
        "references": checksum(*(references / file.name for file in labels)),
        "settings": json.dumps(settings, sort_keys=True),
        "date": date.fromtimestamp((predictions / "done").stat().st_mtime).isoformat(),
        "machine": bench.machine.read_text(),
    }


def score_all(bench: Bench, trainings: list[Training]) -> None:
    """Score every training that is predicted and was not scored from the same files, and write the tables.

    Probabilities take most of the room and may be deleted once they are scored; what is gone is not scored again.
    """
    rows = Rows(bench.protocol)
    known = rows.sources()
    for training in trainings:
        predictions = bench.predictions(training, "validation")
        if not (predictions / "done").exists() or not any(predictions.glob("*.npz")):
            continue
        made_from = sources(bench, training)
        if rows.file(training.name).exists() and known.get(training.name, {}).items() >= made_from.items():
            continue
        lines = score_predictions(bench.protocol, predictions, bench.references("validation"))
        write_lines(rows.file(training.name), lines)
        known[training.name] = made_from
        Rows(bench.protocol).write(known)
        print(f"scored {training.name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "status", "score"))
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side (CPU: one thread each)")
    parser.add_argument("--only", default="*", help="names of trainings, a shell pattern")
    args = parser.parse_args()
    protocol = Protocol.read(args.protocol)
    bench = Bench(protocol, args.data, args.work, "cuda" if torch.cuda.is_available() else "cpu")
    trainings = [training for training in protocol.trainings if fnmatch.fnmatch(training.name, args.only)]
    if args.verb == "status":
        for training in trainings:
            trained = (bench.model(training) / "fold_0" / "checkpoint_final.pth").exists()
            predicted = (bench.predictions(training, "validation") / "done").exists()
            scored = Rows(protocol).file(training.name).exists()
            state = "scored" if scored else "predicted" if predicted else "trained" if trained else "-"
            print(f"{training.name:32} {state}")
        return 0
    if args.verb == "score":
        score_all(bench, trainings)
        return 0
    bench.prepare()
    return min(1, run_all(bench, trainings, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
