"""The three files of an evaluation: ``summary.json``, ``cases.csv`` and ``reliability.json``."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.evaluation.case import CaseResult
from nnunet_calib.metrics import Bins, CalibrationStatistics

RESULTS = ("summary.json", "cases.csv", "reliability.json")

_CASE_SCORES = ("ECE", "CECE", "ACE", "MCE", "Brier", "NLL")
_CLASS_SCORES = ("ECE", "ACE", "MCE", "Brier", "NLL")


def write_results(
    folder: Path, summary: dict[str, Any], results: Sequence[CaseResult], dataset: Dataset, bins: int
) -> None:
    """Write the three files, whole or not at all: the folder never holds files of two runs.

    Raises:
        InputError: one of them cannot be written.
    """
    texts = _summary_text(summary), _cases_text(results, dataset), _reliability_text(results, dataset, bins)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".results.") as fresh:
            for name, text in zip(RESULTS, texts, strict=True):
                write_whole(Path(fresh, name), text)
            for name in RESULTS:  # the last old one goes before the first new one comes
                (folder / name).unlink(missing_ok=True)
            for name in RESULTS:
                os.replace(Path(fresh, name), folder / name)
    except OSError as error:
        raise InputError(f"{folder}: the results cannot be written ({error.strerror})") from error


def _summary_text(summary: dict[str, Any]) -> str:
    """``summary.json``: valid JSON, non-finite numbers as the strings "inf", "-inf", "nan"."""
    return json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n"


def _cases_text(results: Sequence[CaseResult], dataset: Dataset) -> str:
    """``cases.csv``: a row per case and structure.

    Columns ``<region>_<score>`` are the case's (repeated in each of its rows), ``<region>_class_<score>`` the binary
    problem of the row's structure. Empty: no probabilities.
    """
    regions = list(dict.fromkeys(region for result in results for region in result.record["calibration"]))
    rows = [
        {"case": result.record["case"], "label": key(s), "name": dataset.names[key(s)]}
        | result.record["metrics"][key(s)]
        | {
            f"{region}_{score}": calibration[score]
            for region, calibration in result.record["calibration"].items()
            for score in _CASE_SCORES
        }
        | {
            f"{region}_class_{score}": calibration["classes"][key(s)][score]
            for region, calibration in result.record["calibration"].items()
            for score in _CLASS_SCORES
        }
        for result in results
        for s in dataset.structures
    ]
    names = ["case", "label", "name", *(results[0].record["metrics"][key(dataset.structures[0])] if results else ())]
    names += [f"{region}_{score}" for region in regions for score in _CASE_SCORES]
    names += [f"{region}_class_{score}" for region in regions for score in _CLASS_SCORES]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _reliability_text(results: Sequence[CaseResult], dataset: Dataset, bins: int) -> str:
    """``reliability.json``: the counts behind every calibration number, per case, region and class."""
    content = {
        "bins": bins,
        "classes": [key(channel) for channel in dataset.channels],
        "multilabel": dataset.has_regions,
        "cases": {
            result.record["case"]: {region: _as_lists(counted) for region, counted in result.statistics.items()}
            for result in results
            if result.statistics
        },
    }
    return json.dumps(content, allow_nan=False) + "\n"


def read_reliability(path: Path) -> dict[str, dict[str, CalibrationStatistics]]:
    """Read a ``reliability.json`` back: statistics by case and region, ready to be added up.

    Raises:
        InputError: the file cannot be read or is no ``reliability.json``.
    """
    content = read_json(path)
    try:
        return {
            case: {region: _from_lists(counted) for region, counted in regions.items()}
            for case, regions in content["cases"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a reliability.json of nnunet-calib evaluate") from error


def _as_lists(statistics: CalibrationStatistics) -> dict[str, Any]:
    return {
        "voxels": statistics.voxels,
        "classes": _bins_as_lists(statistics.classes),
        "squared_error": statistics.squared_error.tolist(),
        "log_loss": statistics.log_loss.tolist(),
        "top": None if statistics.top is None else _bins_as_lists(statistics.top),
    }


def _from_lists(content: dict[str, Any]) -> CalibrationStatistics:
    return CalibrationStatistics(
        content["voxels"],
        _bins_from_lists(content["classes"]),
        np.array(content["squared_error"]),
        np.array(content["log_loss"]),
        None if content["top"] is None else _bins_from_lists(content["top"]),
    )


def _bins_as_lists(bins: Bins) -> dict[str, list]:
    return {"n": bins.n.tolist(), "confidence": bins.confidence.tolist(), "correct": bins.correct.tolist()}


def _bins_from_lists(content: dict[str, list]) -> Bins:
    return Bins(
        np.array(content["n"], dtype=np.int64),
        np.array(content["confidence"], dtype=np.float64),
        np.array(content["correct"], dtype=np.int64),
    )


def _finite(value: Any) -> Any:
    """Non-finite numbers as strings, for JSON has none."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
