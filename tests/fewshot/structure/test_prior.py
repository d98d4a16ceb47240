"""The volume prior: what is expected of a query, and where the cut goes."""

import numpy as np
import pytest

from nnunet_calib.fewshot.structure.prior import (
    Places,
    SizePrior,
    VolumeCurve,
    operating_shift,
    presence_limit,
    presence_score,
)


def logits(n=20_000, seed=0, mean=-4.0):
    return np.random.default_rng(seed).normal(mean, 2, n).astype(np.float32)


def test_the_curve_is_the_volume_above_each_cut():
    s = logits()
    curve = VolumeCurve().add(s[:5000], 2.5).add(s[5000:], 2.5)
    for cut in (-8, -3.2, 0, 1.7):
        assert curve.above(cut) == pytest.approx(2.5 * (s > cut).sum(), rel=0.01, abs=10)
    for volume in (100, 5000, 30_000):
        assert curve.above(curve.cut_for(volume)) == pytest.approx(volume, rel=1e-6)
    assert curve.cut_for(1e9) <= s.min()


def test_voxels_that_stand_for_many_count_as_many():
    s = logits()
    weight = np.random.default_rng(1).integers(1, 5, s.size)
    curve = VolumeCurve().add(s, weight * 0.5)
    assert curve.above(0.0) == pytest.approx(0.5 * weight[s > 0].sum(), rel=0.01)


def test_infinite_logits_are_counted():
    assert VolumeCurve().add(np.array([np.inf, -np.inf, 0.5]), 1.0).above(0.0) == pytest.approx(2)


@pytest.mark.parametrize("off", [0.72, 0.9, 1.0, 1.2, 1.4])
def test_the_cut_stays_within_the_margin(off):
    curve = VolumeCurve().add(logits(), 1.0)
    assert operating_shift(curve, curve.above(0.0) / off, margin=0.3) == 0


@pytest.mark.parametrize("off", [0.02, 0.3, 0.69, 1.45, 3, 10])
def test_outside_the_margin_the_cut_moves_to_its_edge(off):
    """(V* - V) / max(V, V*) is 0.3 either way."""
    s = logits(n=200_000)
    curve = VolumeCurve().add(s, 1.0)
    expected = curve.above(0.0) / off
    shift = operating_shift(curve, expected, margin=0.3)
    volume = (s + shift > 0).sum()
    assert abs(expected - volume) / max(expected, volume) == pytest.approx(0.3, abs=0.01)
    assert (shift > 0) == (off < 1)


def test_without_margin_the_volume_is_met():
    s = logits()
    shift = operating_shift(VolumeCurve().add(s, 1.0), 1234.0, margin=0)
    assert (s + shift > 0).sum() == pytest.approx(1234, rel=0.01)


def test_an_empty_prediction_is_brought_back():
    """Natural shares of a small organ: no voxel above 0."""
    s = logits(mean=-30)
    shift = operating_shift(VolumeCurve().add(s, 1.0), 500.0)
    assert (s + shift > 0).sum() == pytest.approx(350, rel=0.02)


def test_the_expected_volume_is_the_supports_geometric_mean():
    prior = SizePrior.of([1000, 4000, 10], [True, True, False], [{}, {}, {}])
    assert prior.volume == pytest.approx(2000)
    assert prior.spread == pytest.approx(np.std(np.log([1000, 4000]), ddof=1))
    assert prior.supports == 2
    assert prior.expected({}) == pytest.approx(2000)
    assert prior.expected({}, share_in_view=0.25) == pytest.approx(500)


def test_a_structure_cut_in_all_supports_gives_no_prior():
    assert SizePrior.of([1000], [False], [{}]) is None


def test_a_larger_body_has_a_larger_structure():
    prior = SizePrior.of([1000, 1000], [True, True], [{1: 100, 2: 50, 3: 7}, {1: 400, 2: 50}])
    assert prior.body == pytest.approx({1: 200, 2: 50, 3: 7})
    assert prior.body_ratio({1: 240, 2: 55, 3: 7 * 1.2}) == pytest.approx(1.2)
    assert prior.body_ratio({9: 1}) == 1
    assert prior.expected({1: 20_000}) == pytest.approx(1500), "a base class gone wrong has a limited say"


def test_the_share_in_view():
    u = np.random.default_rng(0).uniform([0.2, 0.4, 0.4], [0.6, 0.5, 0.5], (5000, 3))
    places = Places.of(u, np.ones(5000))
    assert places.share_inside(np.zeros(3), np.ones(3)) == 1
    assert places.share_inside(np.array([0.4, 0, 0]), np.ones(3)) == pytest.approx(0.5, abs=0.07)
    assert places.share_inside(np.array([0.7, 0, 0]), np.ones(3)) == 0
    assert places.reach(np.array([[0.15, 0.45, 0.45], [0.05, 0.45, 0.45], [0.4, 0.45, 0.75]])).tolist() == [1, 0, 0]


def test_places_stand_for_the_weights():
    u = np.stack([np.array([0.1, 0.9]), np.zeros(2), np.zeros(2)], axis=1)
    places = Places.of(u, np.array([1.0, 4.0]))
    assert places.share_inside(np.array([0.5, 0, 0]), np.ones(3)) == pytest.approx(0.8, abs=0.06)


def test_an_absent_structure_is_told_from_a_present_one():
    """Log odds of background alone, against those with a structure of 800 voxels among them."""
    rng = np.random.default_rng(0)

    def score(structure):
        s = np.concatenate([rng.normal(-9, 2, 100_000), rng.normal(3, 2, structure)])
        return presence_score(VolumeCurve().add(s, 1.0), 800.0)

    supports = [score(rng.integers(500, 1200)) for _ in range(4)]
    limit = presence_limit(supports)
    assert all(score(n) > limit for n in (500, 800, 1300))
    assert score(0) < limit


def test_the_size_does_not_force_a_structure_that_is_absent():
    curve = VolumeCurve().add(logits(mean=-12), 1.0)
    assert operating_shift(curve, 800.0, present=False) == 0
    assert operating_shift(curve, 800.0) > 0
    large = VolumeCurve().add(logits(), 1.0)
    assert operating_shift(large, 10.0, present=False) == operating_shift(large, 10.0) < 0


def test_presence_is_judged_more_mildly_with_fewer_supports():
    limits = [presence_limit([-1.0] * k) for k in (1, 2, 5)]
    assert limits == sorted(limits)
    assert presence_limit([30.0, 30.0]) == 0, "what is found by itself is present"
