"""Bootstrap intervals: against theory, and with missing and infinite values."""

import numpy as np
import pytest

from nnunet_calib.evaluation.intervals import percentile_interval, resampled_means


def test_width_is_that_of_the_normal_mean():
    """400 standard normal values: the 95 % interval of the mean is about +-1.96 / sqrt(400)."""
    values = np.random.default_rng(0).normal(size=(400, 1))
    low, high = percentile_interval(resampled_means(values)[:, 0])
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_constants_have_no_width_and_missing_values_are_left_out():
    values = np.array([[2.0, np.nan], [2.0, 3.0], [2.0, 3.0], [2.0, np.nan]])
    means = resampled_means(values)
    assert percentile_interval(means[:, 0]) == (2.0, 2.0)
    assert percentile_interval(means[:, 1]) == (3.0, 3.0)


def test_nothing_known_is_nan():
    assert np.isnan(percentile_interval(resampled_means(np.full((3, 1), np.nan))[:, 0])).all()


def test_a_missed_structure_makes_the_upper_end_infinite():
    values = np.array([[1.0]] * 9 + [[np.inf]])
    low, high = percentile_interval(resampled_means(values)[:, 0])
    assert low == 1.0
    assert high == np.inf
