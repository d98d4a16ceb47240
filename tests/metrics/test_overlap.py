"""Overlap counts: literal values, and nnU-Net's own evaluator."""

import importlib.util
import math

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

from nnunet_calib.metrics import Overlap, calibration_scores, overlaps, structure_distances

REFERENCE = np.array([[0, 1, 1], [2, 2, 0]])
PREDICTION = np.array([[0, 1, 2], [2, 0, 0]])

with_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
every_backend = pytest.mark.parametrize("backend", ["numpy", pytest.param("numba", marks=with_numba), "torch"])


def test_counts_of_labels_and_of_a_region_that_overlaps_them():
    one, two, both = overlaps(REFERENCE, PREDICTION, [1, 2, (1, 2)])
    assert one == Overlap(1, 0, 1, 4)
    assert two == Overlap(1, 1, 1, 3)
    assert both == Overlap(3, 0, 1, 2)
    assert (one.dice, two.dice, both.dice) == (2 / 3, 0.5, 6 / 7)
    assert (one.iou, two.iou, both.iou) == (0.5, 1 / 3, 0.75)
    assert (two.in_reference, two.in_prediction) == (2, 2)


def test_voxels_that_are_not_valid_count_nowhere():
    valid = np.array([[True, True, False], [True, True, True]])
    assert overlaps(REFERENCE, PREDICTION, [2], valid) == [Overlap(1, 0, 1, 3)]


def test_a_structure_in_neither_map_has_no_dice():
    (absent,) = overlaps(REFERENCE, PREDICTION, [9])
    assert math.isnan(absent.dice)
    assert math.isnan(absent.iou)


def test_a_missed_structure_has_dice_zero():
    (missed,) = overlaps(REFERENCE, np.zeros_like(REFERENCE), [1])
    assert missed.dice == missed.iou == 0


@every_backend
@pytest.mark.parametrize("structures", [[1, 2, 300], [(1, 2), (2, 300), 300], [(2,), 1]])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_nnunet(structures, masked, backend):
    rng = np.random.default_rng(0)
    reference, prediction = np.repeat(rng.choice([0, 1, 2, 7, 300], (2, 5, 6, 7)), 30, axis=2).astype(np.uint16)
    valid = rng.random(reference.shape) < 0.7 if masked else None
    counted = overlaps(reference, prediction, structures, valid, backend=backend)
    for structure, ours in zip(structures, counted, strict=True):
        masks = (region_or_label_to_mask(labels, structure) for labels in (reference, prediction))
        tp, fp, fn, tn = compute_tp_fp_fn_tn(*masks, None if valid is None else ~valid)
        assert ours == Overlap(tp, fp, fn, tn)


def test_shapes_that_differ_and_negative_labels_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        overlaps(REFERENCE, PREDICTION[:1], [1])
    with pytest.raises(ValueError, match="negative"):
        overlaps(REFERENCE - 1, PREDICTION, [1])
    with pytest.raises(ValueError, match="integers, not float64"):
        overlaps(REFERENCE.astype(float), PREDICTION, [1])


@pytest.mark.parametrize("structure", [-1, (1, -2)])
def test_a_structure_with_a_negative_label_is_refused(structure):
    """As an index it would count from the end: another label's voxels."""
    with pytest.raises(ValueError, match=r"negative; a structure is .*-"):
        overlaps(REFERENCE, PREDICTION, [structure])
    with pytest.raises(ValueError, match="negative"):
        structure_distances(REFERENCE, PREDICTION, [structure], (1, 1))
    with pytest.raises(ValueError, match="negative"):
        calibration_scores(np.full((1, 2, 3), 0.5), REFERENCE, [structure], multilabel=True)


def test_bool_masks_are_label_1():
    """As indices they would select instead of count."""
    masks = np.array([True, False]), np.array([True, True])
    assert overlaps(*masks, [1]) == [Overlap(1, 1, 0, 0)]
    assert overlaps(REFERENCE == 2, PREDICTION == 2, [1, 0]) == [Overlap(1, 1, 1, 3), Overlap(3, 1, 1, 1)]


def test_relative_volume_error_has_a_sign_and_no_value_without_a_volume():
    grown, shrunk, made_up, absent = overlaps(
        np.array([1, 1, 0, 2, 2, 0]), np.array([1, 1, 1, 2, 0, 3]), [1, 2, 3, 4]
    )  # fmt: skip
    assert (grown.relative_volume_error, shrunk.relative_volume_error) == (0.5, -0.5)
    assert made_up.relative_volume_error == math.inf
    assert math.isnan(absent.relative_volume_error)


def test_background_can_be_a_structure():
    assert overlaps(REFERENCE, PREDICTION, [0, (0, 1)]) == [Overlap(2, 1, 0, 3), Overlap(3, 1, 1, 1)]
