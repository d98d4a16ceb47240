"""From the records of cases to the summary of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_calib import metrics
from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.metrics import intervals


def summarise(
    records: Sequence[dict[str, Any]], pooled: Mapping[str, metrics.CalibrationStatistics], dataset: Dataset
) -> dict[str, Any]:
    """Means, pooled calibration, counts of empty structures and intervals.

    ``mean`` and ``foreground_mean`` are nnU-Net's: the mean over cases that have the number, then the plain mean over
    structures, NaN if a structure is in no case at all. A missed structure makes its mean distance infinite;
    ``structures`` tells how many there are, ``mean_in_both`` has the mean distances over the ``cases`` in which
    reference and prediction both have the structure, and ``median`` the medians over all cases, missed ones included
    as infinite. The ``cases`` of a region's calibration are those with probabilities and
    a voxel in it.

    Args:
        records: of the cases, in the order they are to be listed; none is allowed.
        pooled: by region, the sum of the statistics of the cases that have it.
        dataset: whose labels they have.
    """
    mean = {key(s): _mean_of([r["metrics"][key(s)] for r in records]) for s in dataset.structures} if records else {}
    regions = list(dict.fromkeys(region for record in records for region in record["calibration"]))
    by_region = {region: [r["calibration"][region] for r in records if r["calibration"]] for region in regions}
    cases = {region: {"cases": sum(c["n"] > 0 for c in by_region[region])} for region in regions}
    channel_keys = [key(channel) for channel in dataset.channels]
    return {
        "foreground_mean": _foreground_mean(mean),
        "mean": mean,
        "mean_in_both": {key(s): _distances_in_both(records, key(s)) for s in dataset.structures} if records else {},
        "median": {key(s): _median_of([r["metrics"][key(s)] for r in records]) for s in dataset.structures}
        if records
        else {},
        "structures": {
            key(s): {"name": dataset.names[key(s)], **_occurrence(records, key(s))} for s in dataset.structures
        },
        "calibration_mean": {region: _mean_of(by_region[region]) | cases[region] for region in regions},
        "calibration_pooled": {
            region: metrics.scores(pooled[region], channel_keys) | cases[region] for region in regions
        },
        **({"nacl": _mean_of([record["nacl"] for record in records])} if records and "nacl" in records[0] else {}),
        "intervals": _intervals(records),
        "metric_per_case": list(records),
    }


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


def _median_of(scores: list[dict[str, float]]) -> dict[str, float]:
    """Median of each entry over the dictionaries in which it is not NaN; of two in the middle the mean."""
    found = {}
    for name in scores[0]:
        known = sorted(score[name] for score in scores if not np.isnan(score[name]))
        middle = (known[(len(known) - 1) // 2], known[len(known) // 2]) if known else (np.nan, np.nan)
        found[name] = float(middle[0] if middle[0] == middle[1] else (middle[0] + middle[1]) / 2)
    return found


def _distances_in_both(records: Sequence[dict[str, Any]], structure: str) -> dict[str, float]:
    """Mean distances of a structure over the cases that have it in reference and prediction, and how many those are."""
    scores = [r["metrics"][structure] for r in records]
    both = [score for score in scores if score["n_ref"] > 0 and score["n_pred"] > 0]
    distances = [name for name in scores[0] if name.startswith(("HD", "ASSD", "MASD"))]
    return {name: _nan_mean([score[name] for score in both]) for name in distances} | {"cases": len(both)}


def _foreground_mean(mean: dict[str, dict[str, float]]) -> dict[str, float]:
    names = next(iter(mean.values()), {})
    return {name: float(np.mean([of_structure[name] for of_structure in mean.values()])) for name in names}


def _occurrence(records: Sequence[dict[str, Any]], structure: str) -> dict[str, int]:
    """How often a structure is where."""
    present = [(r["metrics"][structure]["n_ref"] > 0, r["metrics"][structure]["n_pred"] > 0) for r in records]
    return {
        "cases": len(present),
        "in_both": present.count((True, True)),
        "missed": present.count((True, False)),
        "only_predicted": present.count((False, True)),
        "in_neither": present.count((False, False)),
    }


def _intervals(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bootstrap intervals of all means, from one set of samples of the cases; none for a single case."""
    described: dict[str, Any] = {
        "method": "BCa bootstrap over cases; percentile where a mean is infinite; nan where fewer than 2 cases have it",
        "level": intervals.LEVEL,
        "resamples": intervals.RESAMPLES,
        "seed": intervals.SEED,
    }
    if len(records) < 2:
        return described
    rows = [dict(_flat({"mean": r["metrics"], "calibration_mean": r["calibration"]})) for r in records]
    paths = list(dict.fromkeys(path for row in rows for path in row))
    table = np.array([[row.get(path, np.nan) for path in paths] for row in rows], dtype=np.float64)
    means = intervals.Bootstrap.of_means(table)
    by_metric: dict[str, list[int]] = {}
    for column, (of, *_, metric) in enumerate(paths):
        if of == "mean":
            by_metric.setdefault(metric, []).append(column)
    foreground = means.mean_of_columns(list(by_metric.values()))
    found = [*zip([("foreground_mean", m) for m in by_metric], foreground.intervals(), strict=True)]
    for path, interval in [*found, *zip(paths, means.intervals(), strict=True)]:
        place = described
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = interval
    return described


def _flat(entry: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of a nested dictionary, each with the keys that lead to it."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value
