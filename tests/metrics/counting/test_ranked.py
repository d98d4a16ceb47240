"""Adaptive ECE and AURC from the histogram of confidences, against sorting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netcal.metrics import ECE

from nnunet_calib.metrics import (
    CELLS,
    Bins,
    adaptive_calibration_error,
    area_under_risk_coverage,
    calibration_scores,
    confidence_cell,
)

from ...folders import ambiguous


def histogram(confidence: np.ndarray, correct: np.ndarray) -> Bins:
    cell = confidence_cell(1 - confidence.astype(np.float64))
    return Bins(
        np.bincount(cell, minlength=CELLS),
        np.bincount(cell, weights=confidence, minlength=CELLS),
        np.bincount(cell[correct], minlength=CELLS),
    )


def sorted_adaptive(confidence, correct, bins=15):
    """Literal equal-mass bins; n is a multiple of ``bins``."""
    order = np.argsort(confidence)
    gaps = (confidence[order].astype(np.float64) - correct[order]).reshape(bins, -1)
    return np.abs(gaps.mean(axis=1)).mean()


def sorted_aurc(confidence, correct):
    errors = np.cumsum(~correct[np.argsort(-confidence, kind="stable")])
    return (errors / np.arange(1, errors.size + 1)).mean()


def realistic(voxels: int):
    """Confidences of an overconfident network: most next to 1, errors where it is unsure."""
    rng = np.random.default_rng(3)
    logit = rng.normal(5, 3, voxels)
    confidence = (1 / (1 + np.exp(-np.abs(logit)))).astype(np.float32)
    return confidence, rng.random(voxels) < 1 / (1 + np.exp(-0.7 * np.abs(logit)))


def test_agree_with_sorting_on_realistic_confidences():
    confidence, correct = realistic(300_000)
    cells = histogram(confidence, correct)
    assert adaptive_calibration_error(cells) == pytest.approx(sorted_adaptive(confidence, correct), abs=2e-5)
    assert area_under_risk_coverage(cells) == pytest.approx(sorted_aurc(confidence, correct), abs=2e-5)


def test_agrees_with_netcal_equal_mass():
    confidence, correct = realistic(300_000)
    theirs = ECE(15, equal_intervals=False).measure(confidence.astype(np.float64), correct.astype(int))
    assert adaptive_calibration_error(histogram(confidence, correct)) == pytest.approx(theirs, abs=1e-4)


def over_random_orders(confidence, correct, orders=20):
    """Means of the two numbers over orders of the voxels, for those that are equally confident."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(confidence.size) for _ in range(orders)]
    adaptive = [sorted_adaptive(confidence[order], correct[order]) for order in shuffled]
    return np.mean(adaptive), np.mean([sorted_aurc(confidence[order], correct[order]) for order in shuffled])


def test_saturated_confidences_are_split_as_a_random_order_would():
    """A third of the voxels have p = 1."""
    confidence, correct = realistic(150_000)
    confidence[::3] = 1
    cells, (adaptive, risk) = histogram(confidence, correct), over_random_orders(confidence, correct)
    assert adaptive_calibration_error(cells) == pytest.approx(adaptive, abs=1e-4)
    assert area_under_risk_coverage(cells) == pytest.approx(risk, abs=1e-4)


def test_on_probabilities_of_a_volume():
    labels, p = ambiguous(0, (30, 40, 50))
    ours = calibration_scores(p, labels)
    adaptive, risk = over_random_orders(p.max(axis=0).reshape(-1), (p.argmax(axis=0) == labels).reshape(-1))
    assert ours["AdaptiveECE"] == pytest.approx(adaptive, abs=1e-4)
    assert ours["AURC"] == pytest.approx(risk, abs=1e-4)


def test_aurc_by_hand():
    """Right at .9, wrong at .8, right at .7, wrong at .6: (0/1 + 1/2 + 1/3 + 2/4) / 4."""
    cells = histogram(np.array([0.6, 0.9, 0.7, 0.8]), np.array([False, True, True, False]))
    assert area_under_risk_coverage(cells) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4, abs=1e-12)


def test_aurc_of_equal_confidences_is_the_error_rate():
    cells = histogram(np.full(10, 0.75), np.arange(10) < 7)
    assert area_under_risk_coverage(cells) == pytest.approx(0.3, abs=1e-12)


def test_adaptive_ece_by_hand():
    """Two bins of two: |(1 + 0) - (.6 + .7)| + |(1 + 0) - (.8 + .9)| over 4."""
    cells = histogram(np.array([0.6, 0.9, 0.7, 0.8]), np.array([False, True, True, False]))
    assert adaptive_calibration_error(cells, 2) == pytest.approx((0.3 + 0.7) / 4, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_cells_follow_the_order_of_confidence(doubts):
    cell = confidence_cell(np.sort(np.array(doubts, dtype=np.float32)))
    assert (np.diff(cell) >= 0).all()
    assert 0 <= cell.min() <= cell.max() < CELLS


def test_certainty_has_a_cell_of_its_own():
    assert confidence_cell(np.array([0.0, 2.0**-30, 2.0**-24, 1.0])).tolist() == [0, 1, 1, CELLS - 1]


def test_no_voxels_have_no_score():
    none = histogram(np.zeros(0), np.zeros(0, dtype=bool))
    assert np.isnan(adaptive_calibration_error(none))
    assert np.isnan(area_under_risk_coverage(none))
