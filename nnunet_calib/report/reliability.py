"""Bin counts of a method's cases, read from ``reliability.json``: what diagrams and curves are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import read_json
from nnunet_calib.metrics import CELLS, Bins, empty_bins
from nnunet_calib.report.runs import Run

TOP = "top label"


@dataclass(frozen=True)
class Reliability:
    """Counts of one method in one region; several trainings of a case are added up.

    Attributes:
        cases: that have a voxel in the region.
        problems: by name, ``Bins`` (cases, B): ``top label`` (softmax models) and every class or region by its key.
        ranked: ``Bins`` (CELLS,) of all cases together, by falling confidence; of regions, all their decisions.
    """

    cases: list[str]
    problems: dict[str, Bins]
    ranked: Bins


def read_reliabilities(runs: Sequence[Run], cases: Sequence[str]) -> dict[str, Reliability]:
    """By region, the counts of some cases of a method.

    Args:
        runs: the trainings of one method.
        cases: those that count.

    Returns:
        Empty where the runs have no probabilities.

    Raises:
        InputError: a file that cannot be used.
    """
    counted: dict[str, dict[str, dict[str, Bins]]] = {}
    ranked: dict[str, Bins] = {}
    wanted = set(cases)
    for run in runs:
        path = run.folder / "reliability.json"
        if not path.is_file() or not run.regions:
            continue
        content = read_json(path)
        try:
            keys = [str(key) for key in content["classes"]]
            for case, regions in content["cases"].items():
                for region, entry in regions.items():
                    if case not in wanted or not entry["voxels"]:
                        continue
                    problems = counted.setdefault(region, {}).setdefault(case, {})
                    for name, bins in _problems(entry, keys):
                        problems[name] = problems[name] + bins if name in problems else bins
                    _add_ranked(ranked.setdefault(region, empty_bins(CELLS)), entry["ranked"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a reliability.json of nnunet-calib evaluate; evaluate again") from error
    return {
        region: Reliability(
            sorted(by_case),
            {
                name: _stacked([by_case[case][name] for case in sorted(by_case)])
                for name in next(iter(by_case.values()))
            },
            ranked[region],
        )
        for region, by_case in counted.items()
    }


def _problems(entry: dict[str, Any], keys: Sequence[str]) -> list[tuple[str, Bins]]:
    classes = _bins(entry["classes"])
    if len(classes) != len(keys):
        raise ValueError
    top = [] if entry["top"] is None else [(TOP, _bins(entry["top"]))]
    return [*top, *((key, classes[c]) for c, key in enumerate(keys))]


def _bins(content: dict[str, Any]) -> Bins:
    return Bins(
        np.array(content["n"], dtype=np.int64),
        np.array(content["confidence"], dtype=np.float64),
        np.array(content["correct"], dtype=np.int64),
    )


def _add_ranked(total: Bins, entry: dict[str, Any]) -> None:
    cell = np.array(entry["cell"], dtype=np.intp) % CELLS  # regions lie one after the other
    np.add.at(total.n, cell, np.array(entry["n"], dtype=np.int64))
    np.add.at(total.confidence, cell, np.array(entry["confidence"], dtype=np.float64))
    np.add.at(total.correct, cell, np.array(entry["correct"], dtype=np.int64))


def _stacked(bins: Sequence[Bins]) -> Bins:
    return Bins(*(np.stack([getattr(of, part) for of in bins]) for part in ("n", "confidence", "correct")))


def risk_coverage(ranked: Bins) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and risk, float (cells,): the error rate of the voxels kept, when the least confident go first."""
    n, wrong = np.cumsum(ranked.n), np.cumsum(ranked.n - ranked.correct)
    filled = ranked.n > 0
    return n[filled] / max(n[-1], 1), wrong[filled] / n[filled]


def case_risk_coverage(confidence: np.ndarray, risk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and mean risk over cases, float (cases,), the most confident first; NaN cases are left out."""
    known = ~(np.isnan(confidence) | np.isnan(risk))
    order = np.argsort(-confidence[known], kind="stable")
    kept = np.arange(1, known.sum() + 1)
    return kept / max(len(kept), 1), np.cumsum(risk[known][order]) / kept
