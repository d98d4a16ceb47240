"""Compare methods on the same cases: every structure, region and metric, with what can and cannot be concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from nnunet_calib.data.errors import UsageError, unknown
from nnunet_calib.metrics import SCORES
from nnunet_calib.report.groups import Groups, by_unit, no_groups
from nnunet_calib.report.runs import Run, check_comparable, common_cases, methods_of
from nnunet_calib.report.statistics import LEVEL, Paired, Ranks, Spread, holm, paired, ranks, smallest_p, spreads

METRICS = ("Dice", "NSD", "HD95", "ECE", "CECE", "NLL")
"""Compared unless said otherwise, if the runs have them."""

FOREGROUND = "foreground"
"""Of overlap and distances: a case's plain mean over its structures. Also a region of calibration."""

SMALL = 50
"""Fewer cases than that get a warning: t and BCa intervals of skewed numbers begin to differ."""

_ALIASES = {"DSC": "Dice"}
_USUAL = {key: alias for alias, key in _ALIASES.items()}
_HIGHER = ("Dice", "IoU", "NSD")
_LOWER = ("HD", "ASSD", "MASD", "FP", "FN")
"""Beginnings of the names of overlap and distances that have a direction; volumes, counts and RVE have none."""
_SECONDARY_FLIPS = 1999


def usual_name(metric: str) -> str:
    """``DSC`` for ``Dice``; others are called what they are called in the files."""
    return _USUAL.get(metric, metric)


@dataclass(frozen=True)
class MethodResult:
    """What one method scored at one endpoint.

    Attributes:
        spread: over cases (or patients).
        absent: cases (or patients) without a value: the structure in neither, no probabilities, or no voxel.
        missed: structures of the reference that the prediction lacks entirely; None for calibration.
        spurious: structures of the prediction that the reference lacks entirely; None for calibration.
        trainings: mean of each training, over its own cases.
        trainings_sd: of these means; NaN for a single training.
    """

    spread: Spread
    absent: int
    missed: int | None
    spurious: int | None
    trainings: list[float]
    trainings_sd: float


@dataclass(frozen=True)
class Difference:
    """Method minus baseline at one endpoint.

    Attributes:
        method: the one compared.
        baseline: what it is compared with.
        paired: the statistics.
        unpaired: cases that only one of the two has a value for: left out of the difference.
        wilcoxon_holm: adjusted over the endpoint's family.
        permutation_holm: likewise.
    """

    method: str
    baseline: str
    paired: Paired
    unpaired: int
    wilcoxon_holm: float = float("nan")
    permutation_holm: float = float("nan")

    @property
    def shown(self) -> bool:
        """The signed-rank test, which knows missed structures too, holds after Holm."""
        return self.wilcoxon_holm <= LEVEL

    @property
    def same(self) -> bool:
        """Every pair has the same value, as with a calibrator that keeps the labels."""
        return self.paired.n > 0 and self.paired.mean == self.paired.sd == 0 == self.paired.infinite


@dataclass(frozen=True)
class Endpoint:
    """One metric in one place.

    Attributes:
        metric: such as ``Dice`` or ``ECE``.
        place: key of a structure, ``foreground``, or a region.
        name: of the place, to read.
        calibration: whether it is a number of probabilities.
        higher_is_better: else lower.
        primary: belongs to the declared family; the rest is secondary, a family of its own.
        methods: by name.
        differences: from the baseline (or between all).
        ranks: None for a single method.
        values: float64 (units, methods), what all was computed from; not written to files.
    """

    metric: str
    place: str
    name: str
    calibration: bool
    higher_is_better: bool
    primary: bool
    methods: dict[str, MethodResult]
    differences: list[Difference]
    ranks: Ranks | None
    values: np.ndarray

    @property
    def term(self) -> str:
        """The metric's usual name: the files say ``Dice`` as nnU-Net's do, readers DSC."""
        return usual_name(self.metric)

    def best(self) -> list[str]:
        """Names of the methods with a value, the best mean first: over the units that all have, if there are any."""
        known = ~np.isnan(self.values)
        names = [name for name, some in zip(self.methods, known.any(axis=0), strict=True) if some]
        values = self.values[:, known.any(axis=0)]
        in_all = values[~np.isnan(values).any(axis=1)]
        means = dict(zip(names, in_all.mean(axis=0) if len(in_all) else np.nanmean(values, axis=0), strict=True))
        return sorted(names, key=lambda name: means[name], reverse=self.higher_is_better)


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        methods: trainings by name.
        baseline: the method that others are compared with.
        cases: compared, sorted.
        left_out: cases that not every method has.
        groups: units and subgroups.
        units: names of the rows of ``Endpoint.values``.
        region: of the primary calibration endpoints.
        endpoints: primary ones first.
        notes: what may be meant, such as versions that differ.
        warnings: what limits the conclusions.
    """

    methods: dict[str, list[Run]]
    baseline: str
    cases: list[str]
    left_out: list[str]
    groups: Groups
    units: list[str]
    region: str
    endpoints: list[Endpoint]
    notes: list[str]
    warnings: list[str]

    def endpoint(self, metric: str, place: str) -> Endpoint | None:
        """The one of that metric and place, if it was compared."""
        return next((e for e in self.endpoints if (e.metric, e.place) == (metric, place)), None)

    @property
    def primary(self) -> list[Endpoint]:
        """The endpoints of the declared family."""
        return [endpoint for endpoint in self.endpoints if endpoint.primary]


def compare(
    runs: Sequence[Run],
    *,
    metrics: Sequence[str] | None = None,
    region: str = FOREGROUND,
    baseline: str | None = None,
    all_pairs: bool = False,
    common: bool = False,
    groups: Groups | None = None,
) -> Comparison:
    """Compare methods, paired by case.

    The declared family, over which Holm's correction runs, are the metrics asked for (overlap and distances as a case's
    mean over structures, calibration in ``region``) times the comparisons with the baseline. Single structures and
    other regions are a second family.

    Args:
        runs: from ``parse_runs``; those with the same name are trainings of one method: a case's value is their mean.
        metrics: names as in ``summary.json``; None: those of ``METRICS`` that all runs have.
        region: of the primary calibration endpoints.
        baseline: name of a method; None: the first.
        all_pairs: compare every two methods.
        common: compare the cases that all methods have, instead of refusing if there are others.
        groups: of the cases; None: every case is a unit.

    Raises:
        UsageError: runs that are not comparable, or a metric, region or baseline that is not there.
    """
    methods = methods_of(runs)
    baseline = next(iter(methods)) if baseline is None else baseline
    if baseline not in methods:
        raise UsageError(unknown("run", baseline, methods))
    cases, left_out = common_cases(methods, common)
    notes = check_comparable(runs, cases)
    groups = no_groups(cases) if groups is None else groups
    units = [groups.unit[case] for case in cases]
    pairs = [*combinations(methods, 2)] if all_pairs else [(baseline, name) for name in methods if name != baseline]
    endpoints = _described(methods, cases, units, _specifications(runs, cases, metrics, region))
    endpoints = _compared(endpoints, pairs, methods)
    comparison = Comparison(
        methods, baseline, cases, left_out, groups, list(dict.fromkeys(units)), region, endpoints, notes, []
    )
    return replace(comparison, warnings=_warnings(comparison))


def _specifications(
    runs: Sequence[Run], cases: Sequence[str], metrics: Sequence[str] | None, region: str
) -> list[tuple[str, str, str, bool, bool]]:
    """Metric, place, its name, calibration and primary of every endpoint; the primary ones first."""
    records = [run.records[case] for run in runs for case in cases if case in run.records]
    overlap = _shared([set(scores) for record in records for scores in record["metrics"].values()])
    regions = _in_all([run.regions for run in runs])
    asked = [_ALIASES.get(name, name) for name in (METRICS if metrics is None else metrics)]
    for name in asked:
        if name in overlap and not name.startswith((*_HIGHER, *_LOWER)):
            directed = ", ".join(sorted(known for known in overlap if known.startswith((*_HIGHER, *_LOWER))))
            raise UsageError(f"{name} is neither better when it is higher nor when it is lower; compare {directed}")
        known: set[str] = {*overlap, *(SCORES if regions else ())}
        if name in known or metrics is None:
            continue
        if name in SCORES:
            raise UsageError(
                f"{name} needs probabilities, and not every run has them (predict with --save_probabilities)"
            )
        raise UsageError(unknown("metric", name, sorted(known, key=str.lower)))
    if regions and region not in regions:
        raise UsageError(unknown("region", region, regions))
    structures = runs[0].structures
    found: list[tuple[str, str, str, bool, bool]] = []
    for name in dict.fromkeys(asked):
        if name in overlap:
            found.append((name, FOREGROUND, "mean of structures", False, True))
            if len(structures) > 1:
                found += [(name, key, of, False, False) for key, of in structures.items()]
            else:
                found[-1] = (name, FOREGROUND, next(iter(structures.values())), False, True)
        elif regions and name in SCORES:
            found += [(name, of, of.replace("_", " "), True, of == region) for of in regions]
    if not found:
        raise UsageError("the runs have no metric in common")
    return sorted(found, key=lambda spec: not spec[-1])


def _shared(sets: Sequence[set[str]]) -> set[str]:
    return set.intersection(*sets) if sets else set()


def _in_all(lists: Sequence[Sequence[str]]) -> list[str]:
    return [entry for entry in lists[0] if all(entry in others for others in lists)]


def _described(
    methods: Mapping[str, Sequence[Run]],
    cases: Sequence[str],
    units: Sequence[str],
    specifications: Sequence[tuple[str, str, str, bool, bool]],
) -> list[Endpoint]:
    """The endpoints, method by method; the differences follow."""
    by_training = [
        {name: [_values(run, cases, metric, place, calibration) for run in of] for name, of in methods.items()}
        for metric, place, _, calibration, _ in specifications
    ]
    tables = [np.stack([by_unit(_mean(trainings), units) for trainings in of.values()], axis=1) for of in by_training]
    higher = [metric.partition("@")[0] in _HIGHER for metric, *_ in specifications]
    spread = iter(spreads(np.concatenate(tables, axis=1)))
    ranked = ranks(tables, higher) if len(methods) > 1 else [None] * len(tables)
    endpoints = []
    for (metric, place, name, calibration, primary), of, table, best_is_high, order in zip(
        specifications, by_training, tables, higher, ranked, strict=True
    ):
        results = {}
        for (method, trainings), column in zip(of.items(), table.T, strict=True):
            means = [float(t[~np.isnan(t)].mean()) if (~np.isnan(t)).any() else float("nan") for t in trainings]
            missed, spurious = (None, None) if calibration else _empty(methods[method], cases, place)
            with np.errstate(invalid="ignore"):
                deviation = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
            results[method] = MethodResult(
                next(spread), int(np.isnan(column).sum()), missed, spurious, means, deviation
            )
        endpoints.append(Endpoint(metric, place, name, calibration, best_is_high, primary, results, [], order, table))
    return endpoints


def _values(run: Run, cases: Sequence[str], metric: str, place: str, calibration: bool) -> np.ndarray:
    """Float64 (cases,); NaN for a case that the run does not have."""
    if calibration or place != FOREGROUND:
        return np.array([run.value(case, metric, place, calibration) for case in cases])
    by_structure = [[run.value(case, metric, key, False) for key in run.structures] for case in cases]
    return _mean(np.array(by_structure).T)


def _mean(values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Over the first axis, of what is not NaN; inf is kept."""
    table = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(table)
    count = known.sum(axis=0)
    total = np.where(known, table, 0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _empty(runs: Sequence[Run], cases: Sequence[str], place: str) -> tuple[int, int]:
    """How often a structure is missed, and how often only predicted."""
    missed = spurious = 0
    for run in runs:
        for case in cases:
            for key, scores in run.records.get(case, {}).get("metrics", {}).items():
                if place in (key, FOREGROUND):
                    missed += scores["n_ref"] > 0 and scores["n_pred"] == 0
                    spurious += scores["n_ref"] == 0 and scores["n_pred"] > 0
    return missed, spurious


def _compared(
    endpoints: Sequence[Endpoint], pairs: Sequence[tuple[str, str]], methods: Mapping[str, Sequence[Run]]
) -> list[Endpoint]:
    """With differences, each family corrected by itself."""
    order = list(methods)
    done: list[Endpoint] = []
    for primary in (True, False):
        family = [endpoint for endpoint in endpoints if endpoint.primary == primary]
        columns = [
            _difference(endpoint.values[:, order.index(name)], endpoint.values[:, order.index(base)])
            for endpoint in family
            for base, name in pairs
        ]
        if not columns:
            done += family
            continue
        higher = [endpoint.higher_is_better for endpoint in family for _ in pairs]
        table = np.stack(columns, axis=1)
        statistics = paired(table, higher) if primary else paired(table, higher, _SECONDARY_FLIPS)
        adjusted = zip(
            holm([of.wilcoxon_p for of in statistics]), holm([of.permutation_p for of in statistics]), strict=True
        )
        found = iter(zip(statistics, adjusted, strict=True))
        for endpoint in family:
            differences = []
            for base, name in pairs:
                of, (wilcoxon, permutation) = next(found)
                absent = np.isnan(endpoint.values[:, [order.index(base), order.index(name)]])
                unpaired = int((absent[:, 0] != absent[:, 1]).sum())
                differences.append(Difference(name, base, of, unpaired, wilcoxon, permutation))
            done.append(replace(endpoint, differences=differences))
    return done


def _difference(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """``values - baseline``; 0 where both are infinite."""
    both = np.isinf(values) & np.isinf(baseline)
    with np.errstate(invalid="ignore"):
        return np.where(both, 0.0, values - baseline)


def _warnings(comparison: Comparison) -> list[str]:
    """What limits the conclusions, a sentence each."""
    found: list[str] = []
    n, unit = len(comparison.units), comparison.groups.unit_name
    primary = comparison.primary
    if comparison.left_out:
        found.append(
            f"{len(comparison.left_out)} cases are left out, for not every run has them: {_some(comparison.left_out)}."
        )
    for name, trainings in comparison.methods.items():
        for case in dict.fromkeys(case for run in trainings for case in run.failed):
            found.append(f"{name}: case {case} failed ({next(r.failed[case] for r in trainings if case in r.failed)}).")
    if n < SMALL:
        found.append(
            f"{n} {unit}s: below {SMALL}, BCa intervals and those of skewed metrics may be too narrow, and only "
            "large differences can be found."
        )
    tests = sum(len(endpoint.differences) for endpoint in primary)
    if tests and smallest_p(n) * tests > LEVEL:
        found.append(
            f"With {n} {unit}s and {tests} tests the smallest possible p after Holm is "
            f"{min(1.0, smallest_p(n) * tests):.2g}: no difference can be shown at {LEVEL:g}. Declare fewer metrics "
            "(--metrics)."
        )
    for endpoint in comparison.endpoints:
        for name, result in endpoint.methods.items():
            if result.spread.infinite:
                found.append(
                    f"{name}: {result.spread.infinite} of {result.spread.n} {unit}s have an infinite {endpoint.term} "
                    f"({endpoint.name}), so its mean is infinite; intervals are of the others, ranks and Wilcoxon "
                    "of all."
                )
        unpaired = max((difference.unpaired for difference in endpoint.differences), default=0)
        if unpaired:
            found.append(
                f"{endpoint.term} ({endpoint.name}): up to {unpaired} {unit}s have a value in one run only and "
                "are left out."
            )
    if len(comparison.methods) > 1 and all(len(trainings) == 1 for trainings in comparison.methods.values()):
        found.append(
            "One training a method: intervals and tests say how these networks do on other cases, not how the method "
            "does when trained again. Give several trainings under one name to see that spread."
        )
    for endpoint in primary:
        for difference in endpoint.differences:
            between = np.nanmax(
                [endpoint.methods[m].trainings_sd for m in (difference.method, difference.baseline)] + [-1]
            )
            if between > abs(difference.paired.mean):
                found.append(
                    f"{endpoint.term}: the difference of {difference.method} from {difference.baseline} "
                    f"({difference.paired.mean:+.3g}) is smaller than the spread between trainings (SD {between:.3g})."
                )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
