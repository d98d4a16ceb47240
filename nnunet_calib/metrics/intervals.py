"""How far a mean over cases would move with other cases: bootstrap confidence intervals.

    BCa    [theta*(alpha_1), theta*(alpha_2)],  quantiles of the means of resampled cases, at
           alpha_1,2 = Phi(z_0 + (z_0 + z) / (1 - a (z_0 + z))),  z = -+1.96
           z_0 = Phi^-1(share of theta* below theta, ties counting half)
           a = sum_i d_i^3 / (6 (sum_i d_i^2)^(3/2)),  d_i = mean of theta_(.) - theta_(i), theta_(i) without case i

Efron, Better bootstrap confidence intervals, JASA 82, 1987; Efron and Tibshirani, An introduction to the bootstrap,
1993, equations 14.9 to 14.15. Quantiles are order statistics, the outer one of two neighbours: between a number and inf
there is nothing to interpolate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0

_AT_ONCE = 250  # resamples drawn at once: 10,000 cases take 20 MB
_TIE = 1e-9  # of the means' range: less is the order of summation, which is another on other machines


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of a set of cases, of samples drawn from it, and of the set without each case in turn.

    Attributes:
        estimate: float64 (numbers,), of all cases.
        resampled: float64 (RESAMPLES, numbers); a row is one sample of cases. NaN: it has no value.
        left_out: float64 (cases, numbers): without that case. NaN: no case that has the number is left.
        known: int64 (numbers,): how many cases have the number.
    """

    estimate: np.ndarray
    resampled: np.ndarray
    left_out: np.ndarray
    known: np.ndarray

    @classmethod
    def of_means(cls, values: np.ndarray) -> Bootstrap:
        """Means over cases.

        Args:
            values: float (cases, numbers). NaN: the number does not exist for that case and is left out; inf is kept.
        """
        return cls(
            _means(np.ones((1, len(values))), values)[0],
            resampled_means(values),
            _means_without_each(values),
            np.count_nonzero(~np.isnan(values), axis=0),
        )

    def mean_of_columns(self, groups: Sequence[Sequence[int]]) -> Bootstrap:
        """The plain mean of each group of columns, NaN where one of them is."""
        estimate, resampled, left_out = (
            np.stack([part[..., list(group)].mean(axis=-1) for group in groups], axis=-1)
            for part in (self.estimate, self.resampled, self.left_out)
        )
        return Bootstrap(estimate, resampled, left_out, np.array([self.known[list(group)].max() for group in groups]))

    def intervals(self) -> list[list[float]]:
        """``[low, high]`` of every number: BCa.

        An infinite mean has neither bias nor acceleration: its interval is the percentile one, from the order
        statistics of finite and infinite means. Constant values give a point. NaN: fewer than two cases have the
        number.
        """
        return [list(self._interval(column)) for column in range(len(self.estimate))]

    def _interval(self, column: int) -> tuple[float, float]:
        estimate = self.estimate[column]
        means, left_out = (part[~np.isnan(part)] for part in (self.resampled[:, column], self.left_out[:, column]))
        if np.isnan(estimate) or self.known[column] < 2:
            return float("nan"), float("nan")
        if not (np.isfinite(estimate) and np.isfinite(left_out).all()):
            return percentile_interval(means)
        tie = _TIE * np.ptp(means)
        below = (np.count_nonzero(means < estimate - tie) + np.count_nonzero(means <= estimate + tie)) / 2
        # all samples on one side is taken for half a sample on the other: z_0 stays finite
        z_0 = ndtri(np.clip(below, 0.5, len(means) - 0.5) / len(means))
        shifted = z_0 + ndtri(np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        # |a| <= 1/6 and |z_0 + z| < 6: the denominator is positive
        low, high = ndtr(z_0 + shifted / (1 - acceleration(left_out) * shifted))
        return _between(means, low, high)


def acceleration(left_out: np.ndarray) -> float:
    """``a`` of BCa, from a statistic without each case in turn, float (cases,); 0 if they are all the same."""
    d = left_out.mean() - left_out
    spread = np.sum(d**2) ** 1.5
    return float(np.sum(d**3) / (6 * spread)) if spread > 0 else 0.0


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of bootstrap samples of cases.

    Args:
        values: float (cases, numbers). NaN: the number does not exist for that case and is left out; inf is kept.

    Returns:
        float64 (resamples, numbers); all columns of a row come from the same sample of cases.
    """
    rng, cases = np.random.default_rng(SEED), len(values)
    chances = np.full(cases, 1 / cases)
    return np.concatenate(
        [
            _means(rng.multinomial(cases, chances, size=min(_AT_ONCE, RESAMPLES - done)).astype(np.float64), values)
            for done in range(0, RESAMPLES, _AT_ONCE)
        ]
    )


def percentile_interval(means: np.ndarray) -> tuple[float, float]:
    """The central interval of one column of ``resampled_means``; NaN if no sample has a value."""
    known = means[~np.isnan(means)]
    if not known.size:
        return float("nan"), float("nan")
    return _between(known, (1 - LEVEL) / 2, (1 + LEVEL) / 2)


def _between(means: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The means at two quantiles; where one lies between two means, the outer of them."""
    last = len(means) - 1
    first, second = int(np.floor(low * last)), int(np.ceil(high * last))
    ordered = np.partition(means, (first, second))
    return float(ordered[first]), float(ordered[second])


def _means(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of samples in which case i comes ``counts[:, i]`` times; (samples, numbers)."""
    center, deviations, exists, infinite = _parts(values)
    count = counts @ exists
    means = np.full(count.shape, np.nan)
    np.divide(counts @ deviations, count, out=means, where=count > 0)
    means += center
    means[counts @ infinite > 0] = np.inf
    return means


def _means_without_each(values: np.ndarray) -> np.ndarray:
    """Row i: the means without case i; of a number that the case does not have, that of all cases."""
    center, deviations, exists, infinite = _parts(values)
    count = exists.sum(axis=0) - exists
    means = np.full(values.shape, np.nan)
    np.divide(deviations.sum(axis=0) - deviations, count, out=means, where=count > 0)
    means += center
    means[infinite.sum(axis=0) - infinite > 0] = np.inf
    return means


def _parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A finite value of each column, all relative to it (a constant column then has exact means), and two masks."""
    finite = np.isfinite(values)
    first = np.take_along_axis(values, finite.argmax(axis=0)[None], axis=0)[0]
    center = np.where(finite.any(axis=0), first, 0.0)
    deviations = np.where(finite, values - center, 0.0)
    return center, deviations, (~np.isnan(values)).astype(np.float64), np.isposinf(values).astype(np.float64)
