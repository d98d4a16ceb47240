"""The three files of an evaluation: ``summary.json``, ``cases.csv`` and ``reliability.json``."""

import csv
import io
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import read_json
from nnunet_calib.metrics import CELLS, SCORES, Bins, CalibrationStatistics, empty_bins

RESULTS = ("summary.json", "cases.csv", "reliability.json")

LEFTOVERS = ".results."
"""How the names of folders begin that hold results not yet whole."""

_NON_FINITE = ("inf", "-inf", "nan")
_CASE_SCORES = SCORES
_CLASS_SCORES = ("ECE", "ACE", "MCE", "Brier", "NLL")


def write_results(
    folder: Path, summary: dict[str, Any], dataset: Dataset, bins: int, statistics: Iterable[tuple[str, str]]
) -> None:
    """Write the three files, whole or not at all: the folder never holds files of two runs.

    Args:
        folder: for the files.
        summary: of ``evaluate_folder``.
        dataset: whose labels the cases have.
        bins: of the statistics.
        statistics: case and what ``statistics_as_json`` made of it; read one at a time, for there may be many.

    Raises:
        InputError: one of them cannot be written.
    """
    texts = (
        _summary_text(summary),
        _cases_text(summary["metric_per_case"], dataset),
        _reliability_text(statistics, dataset, bins),
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=LEFTOVERS) as fresh:
            for name, text in zip(RESULTS, texts, strict=True):
                with open(Path(fresh, name), "w", encoding="utf-8", newline="") as stream:
                    stream.writelines(text)
            for name in RESULTS:  # the last old one goes before the first new one comes
                (folder / name).unlink(missing_ok=True)
            for name in RESULTS:
                os.replace(Path(fresh, name), folder / name)
    except OSError as error:
        raise InputError(f"{folder}: the results cannot be written ({error.strerror})") from error


def _summary_text(summary: dict[str, Any]) -> Iterator[str]:
    """``summary.json``: valid JSON, non-finite numbers as the strings "inf", "-inf", "nan"; a case at a time."""
    yield "{"
    for i, (name, entry) in enumerate(summary.items()):
        yield f"{',' if i else ''}\n  {json.dumps(name)}: "
        if isinstance(entry, list) and entry:
            for j, item in enumerate(entry):
                yield f"{',' if j else '['}\n{_indented(item, 4)}"
            yield "\n  ]"
        else:
            yield _indented(entry, 2).lstrip()
    yield "\n}\n"


def _indented(value: Any, by: int) -> str:
    return textwrap.indent(json.dumps(numbers_as_json(value), indent=2, allow_nan=False), " " * by)


def _cases_text(records: Sequence[dict[str, Any]], dataset: Dataset) -> Iterator[str]:
    """``cases.csv``: a row per case and structure.

    Columns ``<region>_<score>`` are the case's (repeated in each of its rows), ``<region>_class_<score>`` the binary
    problem of the row's structure. Empty: no probabilities. ``found_in`` says where the structure is: ``both``,
    ``reference`` (missed: its distances are infinite), ``prediction`` or ``neither``.
    """
    regions = list(dict.fromkeys(region for record in records for region in record["calibration"]))
    names = [
        "case",
        "label",
        "name",
        "found_in",
        *(records[0]["metrics"][key(dataset.structures[0])] if records else ()),
    ]
    names += [f"{region}_{score}" for region in regions for score in _CASE_SCORES]
    names += [f"{region}_class_{score}" for region in regions for score in _CLASS_SCORES]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerows(
            {"case": record["case"], "label": key(s), "name": dataset.names[key(s)]}
            | {"found_in": _found_in(record["metrics"][key(s)])}
            | record["metrics"][key(s)]
            | {
                f"{region}_{score}": calibration[score]
                for region, calibration in record["calibration"].items()
                for score in _CASE_SCORES
            }
            | {
                f"{region}_class_{score}": calibration["classes"][key(s)][score]
                for region, calibration in record["calibration"].items()
                for score in _CLASS_SCORES
            }
            for s in dataset.structures
        )
        yield text.getvalue()
        text.seek(text.truncate(0))
    yield text.getvalue()


def _found_in(scores: dict[str, float]) -> str:
    found = (scores["n_ref"] > 0, scores["n_pred"] > 0)
    names = {(True, True): "both", (True, False): "reference", (False, True): "prediction"}
    return names.get(found, "neither")


def _reliability_text(statistics: Iterable[tuple[str, str]], dataset: Dataset, bins: int) -> Iterator[str]:
    """``reliability.json``: the counts behind every calibration number, per case, region and class."""
    head = {"bins": bins, "classes": [key(channel) for channel in dataset.channels], "multilabel": dataset.has_regions}
    yield json.dumps(head, allow_nan=False).removesuffix("}") + ', "cases": {'
    for i, (case, text) in enumerate(statistics):
        yield f"{', ' if i else ''}{json.dumps(case)}: {text}"
    yield "}}\n"


def read_reliability(path: Path) -> dict[str, dict[str, CalibrationStatistics]]:
    """Read a ``reliability.json`` back: statistics by case and region, ready to be added up.

    Raises:
        InputError: the file cannot be read or is no ``reliability.json``.
    """
    content = read_json(path)
    try:
        return {case: statistics_from_json(regions) for case, regions in content["cases"].items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a reliability.json of nnunet-calib evaluate") from error


def statistics_as_json(statistics: dict[str, CalibrationStatistics]) -> str:
    """A case's entry in ``reliability.json``."""
    return json.dumps({region: _as_lists(counted) for region, counted in statistics.items()}, allow_nan=False)


def statistics_from_json(regions: dict[str, Any]) -> dict[str, CalibrationStatistics]:
    """The statistics of an entry in ``reliability.json``.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is none.
    """
    return {region: _from_lists(counted) for region, counted in regions.items()}


def _as_lists(statistics: CalibrationStatistics) -> dict[str, Any]:
    return {
        "voxels": statistics.voxels,
        "classes": _bins_as_lists(statistics.classes),
        "squared_error": statistics.squared_error.tolist(),
        "log_loss": statistics.log_loss.tolist(),
        "top": None if statistics.top is None else _bins_as_lists(statistics.top),
        "threshold": statistics.threshold,
        "negligible": _bins_as_lists(statistics.negligible),
        "ranked": _filled_as_lists(statistics.ranked),
    }


def _from_lists(content: dict[str, Any]) -> CalibrationStatistics:
    classes = _bins_from_lists(content["classes"])
    return CalibrationStatistics(
        content["voxels"],
        classes,
        np.array(content["squared_error"], dtype=np.float64),
        np.array(content["log_loss"], dtype=np.float64),
        None if content["top"] is None else _bins_from_lists(content["top"]),
        _bins_from_lists(content["negligible"]),
        _filled_from_lists(content["ranked"], (CELLS,) if content["top"] is not None else (len(classes), CELLS)),
        float(content["threshold"]),
    )


def _bins_as_lists(bins: Bins) -> dict[str, list]:
    return {"n": bins.n.tolist(), "confidence": bins.confidence.tolist(), "correct": bins.correct.tolist()}


def _bins_from_lists(content: dict[str, list]) -> Bins:
    return Bins(
        np.array(content["n"], dtype=np.int64),
        np.array(content["confidence"], dtype=np.float64),
        np.array(content["correct"], dtype=np.int64),
    )


def _filled_as_lists(bins: Bins) -> dict[str, list]:
    """Only the bins that hold a voxel, with their place in the flat array."""
    filled = np.flatnonzero(bins.n)
    parts = {"n": bins.n, "confidence": bins.confidence, "correct": bins.correct}
    return {"cell": filled.tolist()} | {name: part.reshape(-1)[filled].tolist() for name, part in parts.items()}


def _filled_from_lists(content: dict[str, list], shape: tuple[int, ...]) -> Bins:
    bins, filled = empty_bins(*shape), np.array(content["cell"], dtype=np.intp)
    bins.n.reshape(-1)[filled] = content["n"]
    bins.confidence.reshape(-1)[filled] = content["confidence"]
    bins.correct.reshape(-1)[filled] = content["correct"]
    return bins


def numbers_as_json(value: Any) -> Any:
    """Non-finite numbers as strings, for JSON has none."""
    if isinstance(value, dict):
        return {name: numbers_as_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers_as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def numbers_from_json(value: Any) -> Any:
    """Undo ``numbers_as_json`` in dictionaries that hold numbers only."""
    if isinstance(value, dict):
        return {name: numbers_from_json(entry) for name, entry in value.items()}
    return float(value) if value in _NON_FINITE else value
