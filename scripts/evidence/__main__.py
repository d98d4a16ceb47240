"""Evidence: train, predict and score what a protocol names, and keep the finished rows.

    python scripts/evidence run PROTOCOL.json --data DATA -o WORK [--jobs 2] [--only PATTERN]
    python scripts/evidence status PROTOCOL.json --data DATA -o WORK
    python scripts/evidence score PROTOCOL.json --data DATA -o WORK [--only PATTERN]
    python scripts/evidence shift PROTOCOL.json --data DATA -o WORK [--only PATTERN]
    python scripts/evidence test PROTOCOL.json --data DATA -o WORK [--only PATTERN]

``score`` works on what is predicted, beside a ``run`` that goes on, and writes the rows to docs/results. ``shift``
predicts the protocol's other data set with what is trained, and scores it with calibrators of the validation patients.
``test`` does so with the test cases, and refuses while ``test_is_open`` is false: choices come first.

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
from protocol import NEW, Protocol, Training, checksum
from scores import cross_fitted, read_lines, score_predictions, write_lines
from tables import RESULTS, Rows

from nnunet_calib.evaluation.protocol import Protocol as Options
from nnunet_calib.posthoc import Calibrator, load_calibrator
from nnunet_calib.posthoc.folders.check import check_folder
from nnunet_calib.posthoc.folders.fit import fit_folder
from nnunet_calib.training.settings import RESOLVED_KEY

CHECKS = RESULTS / "shift_check.csv"
"""What ``calibrate check`` says of the other data set."""


def run_all(bench: Bench, trainings: list[Training], jobs: int) -> int:
    """Train and predict in the order of the queue, each after the one it starts from; the number of failures."""
    ended = {training.name: Event() for training in trainings}

    def one(training: Training) -> bool:
        try:
            if training.start_name in ended:
                ended[training.start_name].wait()
            bench.train(training)
            bench.predict(training, "validation")
            print(f"done   {training.name}", flush=True)
            return True
        except (OSError, RuntimeError) as error:
            print(f"FAILED {training.name}: {error}", flush=True)
            return False
        finally:
            ended[training.name].set()

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, trainings)).count(False)


def sources(bench: Bench, training: Training, part: str) -> dict[str, str]:
    """What a row comes from: checksums of the network, its predictions and the references, settings, date, machine."""
    predictions, references = bench.predictions(training, part), bench.references(part)
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


def score_all(bench: Bench, trainings: list[Training], part: str) -> None:
    """Score every training that is predicted and was not scored from the same files, and write the tables.

    Probabilities take most of the room and may be deleted once they are scored; what is gone is not scored again.
    """
    protocol = bench.protocol.of_part(part)
    known = Rows(protocol).sources()
    for training in trainings:
        predictions, references = bench.predictions(training, part), bench.references(part)
        if not (predictions / "done").exists() or not any(predictions.glob("*.npz")):
            continue
        made_from = sources(bench, training, part)
        file = Rows(protocol).file(training.name)
        if file.exists() and known.get(training.name, {}).items() >= made_from.items():
            continue
        if part == "validation":
            calibrators = cross_fitted(bench.protocol, predictions, references)
        elif part == "test":
            calibrators = dict.fromkeys(cases_of(predictions), of_validation(bench, training))
        else:
            calibrators = of_both(bench, protocol, training)
        options = Options(nacl=bool(protocol.content.get("nacl")))
        write_lines(file, score_predictions(predictions, references, calibrators, options))
        known[training.name] = made_from
        Rows(protocol).write(known)
        print(f"scored {training.name} on {part}", flush=True)


def cases_of(predictions: Path) -> list[str]:
    """Names of the predicted cases."""
    return [file.name.removesuffix(".nii.gz") for file in sorted(predictions.glob("*.nii.gz"))]


def of_validation(bench: Bench, training: Training) -> dict[str, Calibrator]:
    """By method, what ``calibrate fit`` makes of all validation cases."""
    fitted = {}
    for method in bench.protocol.content["methods"]:
        folder = bench.work / "calibrators" / training.name / method
        validation = bench.predictions(training, "validation")
        fit_folder(validation, folder, bench.references("validation"), methods=[method])
        fitted[method] = load_calibrator(folder)
    return fitted


def of_both(bench: Bench, shifted: Protocol, training: Training) -> dict[str, dict[str, Calibrator]]:
    """Calibrators for every case of the other data set: from all validation patients, and from others of its own."""
    predictions = bench.predictions(training, "shift")
    own = cross_fitted(
        Protocol(shifted.file, shifted.content | {"methods": bench.protocol.content["methods"]}),
        predictions,
        bench.references("shift"),
    )
    fitted = of_validation(bench, training)
    checked = check_folder(bench.work / "calibrators" / training.name / "temperature", predictions)
    kept = {name: value for name, value in checked.items() if name not in ("cases", "without_probabilities")}
    kept |= {"cases": len(checked["cases"]), "unlike": sum(case["unlike"] for case in checked["cases"].values())}
    kept |= {"left_out": len(checked["left_out"]), "temperature": fitted["temperature"].parameters[0]["temperature"]}
    lines = [line for line in read_lines(CHECKS) if line["training"] != training.name]
    write_lines(CHECKS, [*lines, {"training": training.name, **kept}])
    return {case: {**fitted, **{f"{m}{NEW}": c for m, c in calibrators.items()}} for case, calibrators in own.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "status", "score", "shift", "test"))
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
        score_all(bench, trainings, "validation")
        return 0
    if args.verb in ("shift", "test"):
        if args.verb == "shift":
            bench.map_references()
        elif not protocol.content["test_is_open"]:
            parser.error(f"{args.protocol}: the test cases are closed; freeze the choices, then set test_is_open")
        for training in trainings:
            if (bench.predictions(training, "validation") / "done").exists():
                bench.predict(training, args.verb)
                score_all(bench, [training], args.verb)
        return 0
    bench.prepare()
    return min(1, run_all(bench, trainings, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
