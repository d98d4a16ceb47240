"""Scores of a training's predictions case by case: raw, and with calibrators that were fitted to other patients.

The patients are dealt into folds (``Protocol.folds``). Each fold's cases are calibrated by what was fitted to the
others, so no case has a part in its own calibrator. Fitting, applying and scoring are the package's own. A row file is
a CSV with a line for every calibrator and case; tables and pages are made from nothing else.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from protocol import Protocol

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import Dataset, find_model_file, key, read_dataset, require_dataset_json
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.images import choose_reader, read_labels
from nnunet_calib.evaluation.case import read_reference, score
from nnunet_calib.evaluation.protocol import Protocol as Options
from nnunet_calib.posthoc import CALIBRATORS, Calibrator
from nnunet_calib.posthoc.folders.apply import calibrate_file
from nnunet_calib.posthoc.folders.crossfit import NONE, fit_samples
from nnunet_calib.posthoc.folders.sampling import open_probabilities, sample_case

REGION = "volume"  # calibrators are fitted to all voxels
OVERLAP = ("Dice", "HD95", "n_ref", "n_pred")
CALIBRATION = ("ECE", "CECE", "NLL", "Brier")
REGIONS = ("volume", "foreground", "reference_foreground")
PAPERS = ("DSC", "HD", "ECE", "CECE")  # of the NACL code
FIRST = ("method", "case", "changed")
"""First columns of a row file: calibrator, case, and how many voxels have another label than the network's."""


def score_predictions(
    predictions: Path,
    references: Path,
    calibrators: Mapping[str, Mapping[str, Calibrator]],
    options: Options | None = None,
) -> list[dict]:
    """Lines of a row file.

    Args:
        predictions: label maps and probabilities.
        references: label maps of the same names.
        calibrators: by case and by name.
        options: of the evaluation.
    """
    options = options or Options()
    dataset, cases, reader = opened(predictions, references)
    lines = []
    for files in cases:
        reference = read_reference(files.reference, dataset, reader)
        prediction = read_labels(files.prediction, reader, dataset.labels)
        stored = open_probabilities(files, dataset, prediction)
        for method, calibrator in {NONE: None, **calibrators[files.name]}.items():
            labels = prediction.labels.copy()
            if calibrator is None:
                whole = stored.whole()
            else:
                whole = calibrate_file(calibrator, stored, dataset, None if calibrator.keeps_labels else labels)
            decided = replace(prediction, labels=labels)
            again = iter(whole) if options.nacl else None
            record = score(files, dataset, reference, decided, options, [(slice(None), whole)], channels=again).record
            changed = int(np.count_nonzero(labels != prediction.labels))
            lines.append({"method": method, "case": files.name, "changed": changed, **_numbers(record, dataset)})
    return lines


def cross_fitted(protocol: Protocol, predictions: Path, references: Path) -> dict[str, dict[str, Calibrator]]:
    """By case and method, the calibrator that was fitted to the other folds."""
    dataset, cases, reader = opened(predictions, references)
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


def opened(predictions: Path, references: Path) -> tuple[Dataset, list[CaseFiles], type[BaseReaderWriter]]:
    """Labels, cases and reader of a folder."""
    dataset = read_dataset(require_dataset_json(predictions, references), find_model_file("plans.json", predictions))
    cases = pair_cases(references, predictions, dataset.file_ending, chill=True)
    return dataset, cases, choose_reader(dataset)


def _numbers(record: dict, dataset: Dataset) -> dict[str, float]:
    """The numbers of a case that are kept, by column."""
    kept = {}
    for structure in map(key, dataset.structures):
        kept |= {f"{metric} {structure}": record["metrics"][structure][metric] for metric in OVERLAP}
    for region in REGIONS:
        kept |= {f"{metric} {region}": record["calibration"][region][metric] for metric in CALIBRATION}
    return kept | {f"{metric} nacl": record["nacl"][metric] for metric in PAPERS if "nacl" in record}


def write_lines(file: Path, lines: Iterable[Mapping]) -> None:
    """Write a CSV file whole, as ``as_csv``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, as_csv(list(lines)))


def as_csv(lines: list[Mapping]) -> str:
    """A CSV table; numbers with five digits that count."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, lines[0], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()})
    return stream.getvalue()


def read_lines(file: Path) -> list[dict[str, str]]:
    """Lines of a CSV file; none if it is not there."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def called(label: str, method: str) -> str:
    """What a training with a calibrator is called in tables: ``stock+isotonic``; raw: ``stock``."""
    return label if method == NONE else f"{label}+{method}"
