"""From the records of cases to the summary of a folder."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnunet_calib import metrics
from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.evaluation import intervals
from nnunet_calib.evaluation.case import CaseResult

_INTERVAL_METRICS = ("Dice", "IoU", "HD", "HD95", "ASSD", "NSD")
_INTERVAL_SCORES = ("ECE", "CECE", "ACE", "MCE", "Brier", "NLL")


def summarise(results: Sequence[CaseResult], dataset: Dataset) -> dict[str, Any]:
    """Means, pooled calibration, counts of empty structures and intervals.

    ``mean`` and ``foreground_mean`` are nnU-Net's: the mean over cases that have the number, then the plain mean over
    structures, NaN if a structure is in no case at all. A missed structure makes its mean distance infinite;
    ``structures`` tells how many there are. The ``cases`` of a region's calibration are those with probabilities and
    a voxel in it.

    Args:
        results: of the cases, in the order they are to be listed; none is allowed.
        dataset: whose labels they have.
    """
    records = [result.record for result in results]
    mean = {key(s): _mean_of([r["metrics"][key(s)] for r in records]) for s in dataset.structures} if records else {}
    regions = list(dict.fromkeys(region for record in records for region in record["calibration"]))
    by_region = {region: [r["calibration"][region] for r in records if r["calibration"]] for region in regions}
    cases = {region: {"cases": sum(c["n"] > 0 for c in by_region[region])} for region in regions}
    channel_keys = [key(channel) for channel in dataset.channels]
    return {
        "foreground_mean": _foreground_mean(mean),
        "mean": mean,
        "structures": {
            key(s): {"name": dataset.names[key(s)], **_occurrence(records, key(s))} for s in dataset.structures
        },
        "calibration_mean": {region: _mean_of(by_region[region]) | cases[region] for region in regions},
        "calibration_pooled": {
            region: metrics.scores(pooled(results, region), channel_keys) | cases[region] for region in regions
        },
        "intervals": _intervals(records, mean, by_region),
        "metric_per_case": records,
    }


def pooled(results: Sequence[CaseResult], region: str) -> metrics.CalibrationStatistics:
    """The statistics of a region's voxels of all cases together."""
    return functools.reduce(operator.add, (r.statistics[region] for r in results if region in r.statistics))


def _mean_of(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each entry, nested entries included, over the dictionaries in which it is not NaN."""
    return {
        name: _mean_of([score[name] for score in scores])
        if isinstance(first, dict)
        else _nan_mean([score[name] for score in scores])
        for name, first in scores[0].items()
    }


def _nan_mean(values: list[float]) -> float:
    known = np.array(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else float("nan")


def _foreground_mean(mean: dict[str, dict[str, float]]) -> dict[str, float]:
    names = next(iter(mean.values()), {})
    return {name: float(np.mean([of_structure[name] for of_structure in mean.values()])) for name in names}


def _occurrence(records: list[dict[str, Any]], structure: str) -> dict[str, int]:
    """How often a structure is where."""
    present = [(r["metrics"][structure]["n_ref"] > 0, r["metrics"][structure]["n_pred"] > 0) for r in records]
    return {
        "cases": len(present),
        "in_both": present.count((True, True)),
        "missed": present.count((True, False)),
        "only_predicted": present.count((False, True)),
        "in_neither": present.count((False, False)),
    }


def _intervals(
    records: list[dict[str, Any]], mean: dict[str, dict[str, float]], by_region: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Bootstrap intervals of ``mean``, ``foreground_mean`` and ``calibration_mean``; none for a single case."""
    described: dict[str, Any] = {
        "method": "percentile bootstrap over cases",
        "level": intervals.LEVEL,
        "resamples": intervals.RESAMPLES,
        "seed": intervals.SEED,
    }
    if len(records) > 1:
        table = np.array(
            [[[r["metrics"][s][m] for m in _INTERVAL_METRICS] for s in mean] for r in records], dtype=float
        )
        means = intervals.resampled_means(table.reshape(len(records), -1)).reshape(-1, *table.shape[1:])
        described["foreground_mean"] = _named(_INTERVAL_METRICS, means.mean(axis=1))
        described["mean"] = {s: _named(_INTERVAL_METRICS, means[:, i]) for i, s in enumerate(mean)}
    described["calibration_mean"] = {
        region: _named(
            _INTERVAL_SCORES,
            intervals.resampled_means(np.array([[c[s] for s in _INTERVAL_SCORES] for c in calibrations], dtype=float)),
        )
        for region, calibrations in by_region.items()
        if len(calibrations) > 1
    }
    return described


def _named(names: Sequence[str], means: np.ndarray) -> dict[str, list[float]]:
    return {name: list(intervals.percentile_interval(means[:, i])) for i, name in enumerate(names)}
