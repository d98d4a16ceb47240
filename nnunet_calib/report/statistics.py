"""Statistics of per-case values: intervals, paired tests, ranks. Pure functions on arrays, a column a comparison.

All take cases along the first axis; where cases are not independent (several scans of a patient), give patients.

    t interval     mean -+ t_{n-1} s / sqrt(n)
    BCa            ``metrics.intervals``
    effect size    d_z = mean(d) / sd(d) of the paired differences d (Cohen 1988); P(better) = share of cases with
                   d > 0, ties counting half
    Wilcoxon       signed ranks of d, zeros left out (Wilcoxon 1945), as scipy; an infinite difference has the top rank
    sign flips     share of |sum_i s_i d_i| >= |sum_i d_i| over signs s_i = -+1, exchangeable under the null hypothesis
                   that d is symmetric about 0 (Fisher 1935); all 2^n signs where they are few, else drawn
                   with (1 + hits) / (1 + draws), which is a valid p (Phipson and Smyth 2010)
    Holm           p_(i) max-accumulated (m - i + 1) p_(i) (Holm 1979)
    false claim    P(T_{n-1} > |mean| sqrt(n) / s), the one-sided paired t: the probability that the method that looks
                   better is not, before which all true differences were equally likely (Christodoulou et al.,
                   arXiv 2505.04720)
    cases needed   the smallest n at which a two-sided paired t test finds d_z with power 0.8 (noncentral t; Cohen 1988)
    ranks          of the means (aggregate, then rank), and of the mean of each case's ranks (rank, then aggregate);
                   Maier-Hein et al., Nature Communications 2018; bootstrapped over cases (Wiesenfarth et al. 2021)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nnunet_calib.metrics import intervals

LEVEL = 0.05
"""Two-sided level of tests."""

POWER = 0.8
FLIPS = 9999
SEED = 0
MOST_CASES = 100_000
"""``cases_needed`` beyond it is infinite: nobody has so many."""

_AT_ONCE = 2000  # flips multiplied together


@dataclass(frozen=True)
class Spread:
    """Values of one method over cases.

    Attributes:
        n: cases that have a value; ``infinite`` of them are inf (a missed structure's distance).
        infinite: see ``n``.
        mean: inf if one of the values is.
        finite_mean: of the finite values alone.
        sd: of the finite values, n - 1; NaN for fewer than two.
        quartiles: first, median and third of all values, inf included, as order statistics interpolated linearly.
        t_interval: of ``finite_mean``, 95 %.
        bca_interval: likewise, BCa.
    """

    n: int
    infinite: int
    mean: float
    finite_mean: float
    sd: float
    quartiles: tuple[float, float, float]
    t_interval: tuple[float, float]
    bca_interval: tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """Method minus baseline, over the cases that both have.

    Attributes:
        n: pairs whose difference is finite; a pair of two infinite values is a tie, d = 0.
        infinite: further pairs in which one value is inf: they count in ``wilcoxon_p`` and ``better`` alone.
        mean: of the differences.
        sd: of the differences; NaN for fewer than two.
        t_interval: 95 %, of ``mean``.
        bca_interval: 95 %, of ``mean``.
        d_z: ``mean / sd``.
        better: share of pairs in which the method is better than the baseline, ties counting half.
        t_p: two-sided paired t test.
        wilcoxon_p: two-sided.
        permutation_p: two-sided, by sign flips.
        false_claim: probability that the one that looks better is not.
        cases_needed: to show such a difference; inf beyond ``MOST_CASES``.
    """

    n: int
    infinite: int
    mean: float
    sd: float
    t_interval: tuple[float, float]
    bca_interval: tuple[float, float]
    d_z: float
    better: float
    t_p: float
    wilcoxon_p: float
    permutation_p: float
    false_claim: float
    cases_needed: float


@dataclass(frozen=True)
class Ranks:
    """Ranks of methods, 1 the best, ties sharing their mean rank.

    Attributes:
        n: cases that all methods have.
        of_means: rank of each method's mean (aggregate, then rank).
        of_ranks: rank of each method's mean rank over cases (rank, then aggregate).
        mean_rank: that mean rank.
        distribution: float (methods, methods): share of bootstrap samples of cases in which method i has rank k + 1 by
            its mean; a shared rank counts in equal parts for the places shared.
    """

    n: int
    of_means: list[float]
    of_ranks: list[float]
    mean_rank: list[float]
    distribution: list[list[float]]


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of finite values (n,); NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + intervals.LEVEL) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def spreads(values: np.ndarray) -> list[Spread]:
    """Of every column of float (cases, columns); NaN: the case has no value."""
    finite = np.where(np.isfinite(values), values, np.nan)
    bca = intervals.Bootstrap.of_means(finite).intervals() if len(values) else []
    return [_spread(column[~np.isnan(column)], (low, high)) for column, (low, high) in zip(values.T, bca, strict=True)]


def paired(differences: np.ndarray, higher_is_better: Sequence[bool], flips: int = FLIPS) -> list[Paired]:
    """Of every column of differences method - baseline.

    Args:
        differences: float (cases, columns). NaN: no pair; +-inf: one of the two is infinite; 0 if both are.
        higher_is_better: by column.
        flips: draws of the permutation test.
    """
    finite = np.where(np.isfinite(differences), differences, np.nan)
    bca = intervals.Bootstrap.of_means(finite).intervals() if len(finite) else []
    permuted = sign_flip_p(np.nan_to_num(finite), flips)
    return [
        _paired(column[~np.isnan(column)], higher, (low, high), float(p))
        for column, higher, (low, high), p in zip(differences.T, higher_is_better, bca, permuted, strict=True)
    ]


def sign_flip_p(differences: np.ndarray, flips: int = FLIPS, seed: int = SEED) -> np.ndarray:
    """Two-sided p of the sign-flip permutation test of each column.

    Args:
        differences: finite float (cases, columns); 0 is a case without a say.
        flips: draws; all 2^cases signs are taken instead if they are no more than that.
        seed: of the draws.

    Returns:
        float64 (columns,), in (0, 1].
    """
    cases, columns = differences.shape
    scale = np.abs(differences).sum(axis=0)
    parts = np.divide(differences, scale, out=np.zeros_like(differences, dtype=np.float64), where=scale > 0)
    if 2**cases - 1 <= flips:
        signs = 1 - 2.0 * ((np.arange(2**cases)[:, None] >> np.arange(cases)) & 1)
        return (np.abs(signs @ parts) >= np.abs(parts.sum(axis=0)) - 1e-12).mean(axis=0)
    parts = parts.astype(np.float32)
    seen = np.abs(parts.sum(axis=0)) - 1e-6  # what differs by rounding only is a tie
    rng, hits = np.random.default_rng(seed), np.zeros(columns)
    for done in range(0, flips, _AT_ONCE):
        drawn = rng.integers(0, 2, (min(_AT_ONCE, flips - done), cases), dtype=np.int8)
        hits += (np.abs((1 - 2 * drawn).astype(np.float32) @ parts) >= seen).sum(axis=0)
    return (1 + hits) / (1 + flips)


def smallest_p(cases: int, flips: int = FLIPS) -> float:
    """The smallest two-sided p that ``cases`` pairs can give by sign flips or signed ranks."""
    return max(2.0 ** (1 - min(cases, 1000)), 1 / (1 + flips) if 2.0**cases - 1 > flips else 0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of a family of tests, in their order; NaN (no test) stays and does not count as one."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]  # NaN comes last
    raised = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    adjusted[order] = np.minimum(raised, 1)
    return adjusted.tolist()


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided signed-rank test of (cases,), infinite differences included; 1 if all are 0, NaN for no case."""
    if not differences.size:
        return float("nan")
    if not differences.any():
        return 1.0
    magnitude = np.abs(differences)
    ranks = stats.rankdata(magnitude)  # scipy computes with the values: ranks with their signs are as good
    return float(stats.wilcoxon(np.where(magnitude > 0, ranks, 0) * np.sign(differences)).pvalue)


def false_claim(differences: np.ndarray) -> float:
    """Probability that the sign of the mean of finite differences (cases,) is wrong; 0.5 if they are all 0."""
    n = len(differences)
    if n < 2:
        return float("nan")
    mean, sd = differences.mean(), differences.std(ddof=1)
    if sd == 0:
        return 0.5 if mean == 0 else 0.0
    return float(stats.t.sf(abs(mean) * np.sqrt(n) / sd, n - 1))


def cases_needed(d_z: float, power: float = POWER, level: float = LEVEL) -> float:
    """The smallest number of pairs at which a two-sided paired t test finds the effect ``d_z`` with this power."""
    if not np.isfinite(d_z) or d_z == 0:
        return float("nan") if np.isnan(d_z) else (2.0 if d_z else float("inf"))
    low, high = 2, 2
    while _power(d_z, high, level) < power:
        low, high = high, 2 * high
        if high > MOST_CASES:
            return float("inf")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(d_z, middle, level) >= power else (middle + 1, high)
    return float(high)


def ranks(tables: Sequence[np.ndarray], higher_is_better: Sequence[bool]) -> list[Ranks]:
    """Of the methods in each float (cases, methods); cases that a method has no value for are left out, inf is kept.

    Tables without such cases share one set of samples.
    """
    costs = [-table if higher else table for table, higher in zip(tables, higher_is_better, strict=True)]
    costs = [cost[~np.isnan(cost).any(axis=1)] for cost in costs]
    means: dict[int, np.ndarray] = {}
    for n in {len(cost) for cost in costs} - {0}:  # drawing samples takes longer than their means
        together = [i for i, cost in enumerate(costs) if len(cost) == n]
        drawn = intervals.resampled_means(np.concatenate([costs[i] for i in together], axis=1))
        parts = np.split(drawn, np.cumsum([costs[i].shape[1] for i in together])[:-1], axis=1)
        means |= dict(zip(together, parts, strict=True))
    return [_ranks(cost, means.get(i)) for i, cost in enumerate(costs)]


def _ranks(cost: np.ndarray, means: np.ndarray | None) -> Ranks:
    n, methods = cost.shape
    if means is None:
        nothing = [float("nan")] * methods
        return Ranks(0, nothing, nothing, nothing, [nothing] * methods)
    by_case = stats.rankdata(cost, axis=1)
    return Ranks(
        n,
        stats.rankdata(np.round(cost.mean(axis=0), 12)).tolist(),
        stats.rankdata(np.round(by_case.mean(axis=0), 12)).tolist(),
        by_case.mean(axis=0).tolist(),
        _places(np.round(means, 12)).mean(axis=0).tolist(),
    )


def _places(costs: np.ndarray) -> np.ndarray:
    """(samples, methods) to (samples, methods, places): 1 at a method's place, shared by methods that are equal."""
    methods = costs.shape[1]
    lowest = stats.rankdata(costs, method="min", axis=1).astype(int)
    highest = stats.rankdata(costs, method="max", axis=1).astype(int)
    place = np.arange(1, methods + 1)
    within = (place >= lowest[..., None]) & (place <= highest[..., None])
    return within / within.sum(axis=-1, keepdims=True)


def _spread(values: np.ndarray, bca: tuple[float, float]) -> Spread:
    finite = values[np.isfinite(values)]
    quartiles = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf") if np.isinf(values).any() else None
    if quartiles is None:
        quartiles = np.quantile(values, [0.25, 0.5, 0.75]) if values.size else np.full(3, np.nan)
    first, median, third = map(float, quartiles)
    return Spread(
        len(values),
        len(values) - len(finite),
        float(values.mean()) if values.size else float("nan"),
        float(finite.mean()) if finite.size else float("nan"),
        float(finite.std(ddof=1)) if len(finite) > 1 else float("nan"),
        (first, median, third),
        t_interval(finite),
        bca,
    )


def _paired(differences: np.ndarray, higher_is_better: bool, bca: tuple[float, float], permuted: float) -> Paired:
    finite = differences[np.isfinite(differences)]
    n = len(finite)
    mean = float(finite.mean()) if n else float("nan")
    sd = float(finite.std(ddof=1)) if n > 1 else float("nan")
    d_z = float("nan") if n < 2 else (0.0 if mean == 0 else mean / sd if sd else float(np.copysign(np.inf, mean)))
    wins = differences > 0 if higher_is_better else differences < 0
    better = float((wins + 0.5 * (differences == 0)).mean()) if differences.size else float("nan")
    t_p = float("nan") if n < 2 else min(1.0, 2 * false_claim(finite))
    return Paired(
        n,
        len(differences) - n,
        mean,
        sd,
        t_interval(finite),
        bca,
        d_z,
        better,
        t_p,
        wilcoxon_p(differences),
        permuted if n else float("nan"),
        false_claim(finite),
        cases_needed(d_z),
    )


def _power(d_z: float, n: int, level: float) -> float:
    """Of the two-sided paired t test."""
    critical, shift = stats.t.ppf(1 - level / 2, n - 1), abs(d_z) * np.sqrt(n)
    if shift > 38:  # scipy's noncentral t gives up far out, where power is 1
        return 1.0
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift))
