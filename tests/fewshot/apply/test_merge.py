"""Novel structures among base classes: what wins where, and base classes that stay as they are."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from nnunet_calib.fewshot.apply.merge import merge_labels, merge_probabilities


def test_probabilities_are_the_softmax_of_base_logits_and_novel_log_odds():
    rng = np.random.default_rng(0)
    z, s = rng.normal(0, 3, (4, 200)), rng.normal(-2, 3, (2, 200))
    merged = merge_probabilities(softmax(z, axis=0), 1 / (1 + np.exp(-s)))
    expected = softmax(np.concatenate([log_softmax(z, axis=0), s]), axis=0)
    np.testing.assert_allclose(merged, expected, atol=1e-6)
    np.testing.assert_allclose(merged.sum(axis=0), 1, atol=1e-6)


def test_one_structure_keeps_its_calibrated_probability():
    base, p = np.array([[0.7], [0.3]]), np.array([[0.2]])
    np.testing.assert_allclose(merge_probabilities(base, p)[:, 0], [0.56, 0.24, 0.2], atol=1e-7)


def test_certainty_is_no_division_by_zero():
    merged = merge_probabilities(np.array([[0.9], [0.1]]), np.array([[1.0]]))
    np.testing.assert_allclose(merged[:, 0], [0, 0, 1], atol=1e-7)


def test_many_certain_structures_share_the_voxel():
    merged = merge_probabilities(np.array([[0.9], [0.1]]), np.ones((6, 1), dtype=np.float32))
    np.testing.assert_allclose(merged[:, 0], [0, 0, *[1 / 6] * 6], atol=1e-7)


def test_regions_do_not_compete():
    base, p = np.array([[0.9], [0.8]]), np.array([[0.6]])
    np.testing.assert_allclose(merge_probabilities(base, p, regions=True)[:, 0], [0.9, 0.8, 0.6], atol=1e-7)


CASES = [  # base label, its probability, probability of the structure, what comes out
    (0, 0.9, 0.6, 7),  # background gives way
    (0, 0.9, 0.4, 0),  # below the threshold
    (1, 0.55, 0.6, 7),  # surer than the base class
    (1, 0.95, 0.6, 1),  # less sure
    (2, 0.95, 0.6, 7),  # a class that the structure lies inside of
    (2, 0.95, 0.4, 2),
]


@pytest.mark.parametrize(("label", "confidence", "p", "expected"), CASES)
def test_what_wins(label, confidence, p, expected):
    merged = merge_labels(np.array([label]), np.array([confidence]), np.array([[p]]), [7], [0.5], [{2}])
    assert merged.tolist() == [expected]


def test_the_threshold_is_the_calibrations():
    args = np.array([0]), np.array([0.8]), np.array([[0.3]]), [7]
    assert merge_labels(*args, [0.2]).tolist() == [7]
    assert merge_labels(*args, [0.5]).tolist() == [0]


def test_of_two_structures_the_more_probable():
    base = np.zeros(3, dtype=np.uint8)
    p = np.array([[0.6, 0.9, 0.2], [0.7, 0.8, 0.1]])
    assert merge_labels(base, np.ones(3), p, [5, 300], [0.5, 0.5]).tolist() == [300, 5, 0]


def test_an_absent_structure_leaves_the_base_labels_alone():
    base = np.random.default_rng(0).integers(0, 4, (6, 7, 8)).astype(np.uint8)
    merged = merge_labels(base, np.full(base.shape, 0.5), np.zeros((1, 6, 7, 8)), [4], [0.5])
    assert merged.dtype == base.dtype
    assert np.array_equal(merged, base)
