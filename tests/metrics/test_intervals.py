"""Bootstrap intervals: against SciPy, theory and a literal jackknife, and with missing and infinite values."""

import time

import numpy as np
import pytest
from scipy import stats

from nnunet_calib.metrics.intervals import Bootstrap, acceleration, percentile_interval, resampled_means


def interval(values) -> list[float]:
    return Bootstrap.of_means(np.asarray(values, dtype=float)[:, None]).intervals()[0]


def skewed(cases: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, cases)


@pytest.mark.parametrize("seed", range(4))
def test_bca_is_scipys_within_resampling_noise(seed):
    values = skewed(40, seed)
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=seed).confidence_interval
    assert interval(values) == pytest.approx([theirs.low, theirs.high], abs=0.12 * (theirs.high - theirs.low))


def test_bca_is_scipys_on_the_same_samples():
    """SciPy's formula on our means: only its interpolation between neighbours differs."""
    values = skewed(30)
    means = np.sort(resampled_means(values[:, None])[:, 0])
    z_0 = stats.norm.ppf((np.sum(means < values.mean()) + np.sum(means <= values.mean())) / 2 / len(means))
    d = values - values.mean()
    a = np.sum(d**3) / (6 * np.sum(d**2) ** 1.5)
    z = z_0 + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(means, stats.norm.cdf(z_0 + z / (1 - a * z)))
    assert interval(values) == pytest.approx(expected, abs=0.02)


def test_acceleration_is_that_of_a_literal_jackknife():
    """Of a mean of means with gaps, each case left out in turn."""
    values = skewed(60).reshape(20, 3)
    values[::4, 1] = np.nan
    theta = [np.nanmean(np.delete(values, i, axis=0), axis=0).mean() for i in range(20)]
    d = np.mean(theta) - theta
    bootstrap = Bootstrap.of_means(values).mean_of_columns([[0, 1, 2]])
    assert bootstrap.estimate[0] == pytest.approx(np.nanmean(values, axis=0).mean(), rel=1e-14)
    assert bootstrap.left_out[:, 0] == pytest.approx(theta, rel=1e-13)
    assert acceleration(bootstrap.left_out[:, 0]) == pytest.approx(np.sum(d**3) / (6 * np.sum(d**2) ** 1.5), rel=1e-9)


def test_it_covers_a_skewed_mean_better_than_percentiles():
    """200 sets of 20 values from exp(N(0, 1)), mean exp(1/2): BCa misses less often on the far side."""
    covered = {"BCa": 0, "percentile": 0}
    sets = np.random.default_rng(1).lognormal(0, 1, (20, 200))
    bootstrap = Bootstrap.of_means(sets)
    for column, (low, high) in enumerate(bootstrap.intervals()):
        covered["BCa"] += low <= np.exp(0.5) <= high
        low, high = percentile_interval(bootstrap.resampled[:, column])
        covered["percentile"] += low <= np.exp(0.5) <= high
    assert covered["BCa"] > covered["percentile"]
    assert covered["BCa"] >= 0.84 * 200


def test_width_is_that_of_the_normal_mean():
    """400 standard normal values: the 95 % interval of the mean is about +-1.96 / sqrt(400)."""
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_constants_have_no_width_whatever_their_sums_round_to():
    assert interval([0.1] * 7) == [0.1, 0.1]
    assert interval([np.nan, 0.3, 0.3, np.nan]) == [0.3, 0.3]


def test_another_unit_is_the_same_interval_whatever_its_sums_round_to():
    """Of four cases many samples have the mean of all: whether a sum rounds below it must not matter."""
    for values in np.random.default_rng(1).integers(0, 9, (40, 4)):
        assert interval(values * 0.1 + 0.3) == pytest.approx(np.multiply(interval(values), 0.1) + 0.3, abs=1e-9)


def test_fewer_than_two_cases_have_no_interval():
    for values in ([np.nan] * 3, [np.nan, 2.0, np.nan], [2.0]):
        assert np.isnan(interval(values)).all()


def test_a_missed_structure_makes_the_upper_end_infinite():
    """Of ten cases one is infinite: a sample is without it with probability .9^10 = .35."""
    assert interval([1.0] * 9 + [np.inf]) == [1.0, np.inf]
    assert interval([np.inf] * 3) == [np.inf, np.inf]


def test_an_infinite_structure_leaves_the_others_their_intervals():
    values = np.stack([skewed(12), skewed(12, 1)], axis=1)
    alone = Bootstrap.of_means(values).intervals()
    values[3, 1] = np.inf
    assert Bootstrap.of_means(values).intervals()[0] == alone[0]


def test_all_columns_come_from_the_same_samples():
    values = skewed(15)
    means = resampled_means(np.stack([values, 2 * values], axis=1))
    assert means[:, 1] == pytest.approx(2 * means[:, 0], rel=1e-12)


def test_two_hundred_numbers_of_a_thousand_cases_take_seconds():
    values = np.random.default_rng(0).random((1000, 200))
    begin = time.process_time()
    Bootstrap.of_means(values).intervals()
    assert time.process_time() - begin < 10
