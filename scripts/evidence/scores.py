"""Scores of a training's predictions case by case: raw, and with calibrators that were fitted to other patients.

The patients are dealt into folds (``Protocol.folds``). Each fold's cases are calibrated by what was fitted to the
others, so no case has a part in its own calibrator. Fitting, applying and scoring are the package's own. A row file is
a CSV with a line for every calibrator and case; tables and pages are made from nothing else.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from protocol import Protocol, checksum

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import Dataset, key, read_dataset
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.images import choose_reader, read_labels
from nnunet_calib.evaluation.case import read_reference, score
from nnunet_calib.evaluation.protocol import Protocol as Options
from nnunet_calib.posthoc import CALIBRATORS, Calibrator
from nnunet_calib.posthoc.folders.apply import calibrate_file
from nnunet_calib.posthoc.folders.crossfit import NONE, fit_samples
from nnunet_calib.posthoc.folders.sampling import open_probabilities, sample_case
from nnunet_calib.report.runs import Run

REGION = "volume"  # calibrators are fitted to all voxels
OVERLAP = ("Dice", "HD95", "n_ref", "n_pred")
CALIBRATION = ("ECE", "CECE", "NLL", "Brier")
REGIONS = ("volume", "foreground", "reference_foreground")
FIRST = ("method", "case", "changed")
"""First columns of a row file: calibrator, case, and how many voxels have another label than the network's."""


def score_predictions(
    protocol: Protocol, predictions: Path, references: Path, fitted: Mapping[str, Calibrator] | None = None
) -> list[dict]:
    """Lines of a row file.

    Args:
        protocol: names the calibrators, and deals the folds.
        predictions: label maps and probabilities.
        references: label maps of the same names.
        fitted: calibrators by method that were fitted to other data; None: cross-fitted here.
    """
    dataset = read_dataset(predictions / "dataset.json", predictions / "plans.json")
    cases = pair_cases(references, predictions, dataset.file_ending, chill=True)
    reader = choose_reader(dataset, [files.reference for files in cases])
    if fitted is None:
        calibrators = _cross_fitted(protocol, cases, dataset, reader)
    else:
        calibrators = {files.name: fitted for files in cases}
    lines = []
    for files in cases:
        reference = read_reference(files.reference, dataset, reader)
        prediction = read_labels(files.prediction, reader, dataset.labels)
        stored = open_probabilities(files, dataset, prediction)
        for method in (NONE, *protocol.content["methods"]):
            labels = prediction.labels.copy()
            if method == NONE:
                whole = stored.whole()
            else:
                calibrator = calibrators[files.name][method]
                whole = calibrate_file(calibrator, stored, dataset, None if calibrator.keeps_labels else labels)
            decided = replace(prediction, labels=labels)
            record = score(files, dataset, reference, decided, Options(), [(slice(None), whole)]).record
            changed = int(np.count_nonzero(labels != prediction.labels))
            lines.append({"method": method, "case": files.name, "changed": changed, **_numbers(record, dataset)})
    return lines


def _cross_fitted(
    protocol: Protocol, cases: list[CaseFiles], dataset: Dataset, reader: type
) -> dict[str, dict[str, Calibrator]]:
    """By case and method, the calibrator that was fitted to the other folds."""
    samples = {files.name: sample_case(files, dataset, reader) for files in cases}
    found = {}
    for fold in protocol.folds(list(samples)):
        others = [sample for name, sample in samples.items() if name not in fold]
        fitted = {
            method: fit_samples(CALIBRATORS[method](multilabel=dataset.has_regions), others, REGION)
            for method in protocol.content["methods"]
        }
        found |= dict.fromkeys(fold, fitted)
    return found


def _numbers(record: dict, dataset: Dataset) -> dict[str, float]:
    """The numbers of a case that are kept, by column."""
    kept = {}
    for structure in map(key, dataset.structures):
        kept |= {f"{metric} {structure}": record["metrics"][structure][metric] for metric in OVERLAP}
    for region in REGIONS:
        kept |= {f"{metric} {region}": record["calibration"][region][metric] for metric in CALIBRATION}
    return kept


def write_lines(file: Path, lines: Iterable[Mapping]) -> None:
    """Write a CSV file whole; numbers with five digits that count."""
    lines = list(lines)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, lines[0], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, stream.getvalue())


def read_lines(file: Path) -> list[dict[str, str]]:
    """Lines of a CSV file; none if it is not there."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def called(label: str, method: str) -> str:
    """What a training with a calibrator is called in tables: ``stock+isotonic``; raw: ``stock``."""
    return label if method == NONE else f"{label}+{method}"


def runs_of(file: Path, label: str) -> Iterator[Run]:
    """A row file as what ``compare`` takes: a run for every calibrator."""
    lines = read_lines(file)
    for method in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == method]
        structures = [column.partition(" ")[2] for column in own[0] if column.startswith("Dice ")]
        records = {
            line["case"]: {
                "metrics": {s: {m: float(line[f"{m} {s}"]) for m in OVERLAP} for s in structures},
                "calibration": {r: {m: float(line[f"{m} {r}"]) for m in CALIBRATION} for r in REGIONS},
                "reference_file": line["case"],
                "changed": int(line["changed"]),
            }
            for line in own
        }
        names = dict(zip(structures, structures, strict=True))
        yield Run(called(label, method), file, records, names, {}, {}, {}, checksum(file))
