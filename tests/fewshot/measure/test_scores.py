"""Numbers of a novel map, against closed forms."""

import math

import numpy as np
import pytest

from nnunet_calib.fewshot.measure.scores import (
    NUMBERS,
    base_dice,
    calibrated_foreground_ece,
    mean_dice,
    novel_scores,
    oracle_recalibration,
    summarise,
)

SPACING = (2.0, 1.0, 1.0)


def maps():
    """4 x 4 x 4, the structure in 8 voxels; the map has 8 of 16 at 0.8 and is 0.1 elsewhere."""
    reference = np.zeros((4, 4, 4), dtype=bool)
    reference[1:3, 1:3, 1:3] = True
    probability = np.full(reference.shape, 0.1)
    probability[1:3, 1:3, :] = 0.8
    return probability, reference


def test_overlap_distance_and_calibration_of_a_map_that_is_too_large():
    scores = novel_scores(*maps(), SPACING)
    assert scores.keys() == set(NUMBERS)
    assert scores["Dice"] == pytest.approx(2 * 8 / (8 + 16))
    assert scores["HD95"] == pytest.approx(1)  # one voxel of 1 mm along x on each side
    # foreground: 16 voxels of confidence 0.8, half of them right
    assert scores["ECE_foreground"] == pytest.approx(0.3)
    assert scores["NLL_foreground"] == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    assert scores["Brier_foreground"] == pytest.approx(2 * (0.2**2 + 0.8**2) / 2)
    # volume: besides these, 48 of confidence 0.9, all right
    assert scores["ECE_volume"] == pytest.approx((16 * 0.3 + 48 * 0.1) / 64)


def test_voxels_that_are_not_scored_change_nothing():
    probability, reference = maps()
    counted = np.zeros(reference.shape, dtype=bool)
    counted[1:3] = True
    spoiled = np.where(counted, probability, 0.99)
    assert novel_scores(spoiled, reference, SPACING, counted=counted) == pytest.approx(
        novel_scores(probability, reference, SPACING, counted=counted)
    )


def test_the_decision_may_differ_from_the_half():
    probability, reference = maps()
    assert novel_scores(probability, reference, SPACING, segmentation=reference)["Dice"] == 1


def test_a_structure_that_is_missed_has_dice_0_and_no_finite_distance():
    probability, reference = maps()
    scores = novel_scores(probability * 0, reference, SPACING)
    assert (scores["Dice"], scores["HD95"]) == (0, math.inf)


def test_base_dice_leaves_out_what_is_nowhere():
    reference = np.array([[0, 1, 1, 2]])
    dice = base_dice(reference, np.array([[0, 1, 0, 2]]), [1, 2, 3, (1, 2)])
    assert dice["1"] == pytest.approx(2 / 3)
    assert dice["2"] == 1
    assert math.isnan(dice["3"])
    assert dice["(1, 2)"] == pytest.approx(4 / 5)
    assert mean_dice({"1": 0.5, "2": float("nan")}) == 0.5


def record(k, dice, hd95=1.0):
    numbers = dict.fromkeys(NUMBERS, 0.5) | {"Dice": dice, "HD95": hd95}
    return {"k": k, **numbers, "base_before": 0.9, "base_after": 0.8}


def test_pairs_are_summarised_by_group():
    records = [record(1, d / 10, math.inf if d == 0 else 1.0) for d in range(10)] + [record(3, 0.7)]
    one, three = summarise(records, ["k"])
    assert (one["k"], one["pairs"], one["missed"]) == (1, 10, 1)
    assert one["Dice"] == pytest.approx(0.45)
    assert one["Dice_worst_tenth"] == 0
    assert one["HD95"] == math.inf
    assert one["HD95_median"] == 1
    assert three["Dice"] == pytest.approx(0.7)


def test_a_calibrated_map_has_the_ece_in_the_foreground_that_is_foretold():
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 2.0, size=(60, 60, 60))
    drawn = [novel_scores(p, rng.random(p.shape) < p, SPACING, p > 0.4)["ECE_foreground"] for _ in range(3)]
    assert calibrated_foreground_ece(p, p > 0.4) == pytest.approx(np.mean(drawn), abs=0.005)
    assert calibrated_foreground_ece(p, p > 0.4) > 0.1


def test_a_sure_map_is_foretold_no_error():
    assert calibrated_foreground_ece(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_the_oracle_is_the_best_monotone_recalibration():
    # by hand: p 0.1 has 1 of 4, 0.4 and 0.6 violate the order (1 of 2, 0 of 2: pooled 1 of 4), 0.9 has 2 of 2
    p = np.repeat([0.1, 0.4, 0.6, 0.9], [4, 2, 2, 2])
    y = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 1], dtype=bool)
    found = oracle_recalibration(p, y)
    assert found["Brier_volume_oracle"] == pytest.approx(2 * 2 * (0.75**2 + 3 * 0.25**2) / 10)
    assert found["NLL_volume_oracle"] == pytest.approx(-2 * (np.log(0.25) + 3 * np.log(0.75)) / 10)
    other = oracle_recalibration(p**3 / 2, y)  # the same order
    assert other == pytest.approx(found)
    assert np.isnan(oracle_recalibration(p[:0], y[:0])["NLL_volume_oracle"])
