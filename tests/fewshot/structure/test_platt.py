"""Probabilities from left-out supports: known truths recovered, and less sure where the head is too sure."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import logit as log_odds

from nnunet_calib.fewshot.structure.heads import LinearHead
from nnunet_calib.fewshot.structure.platt import PlattScaling, best_threshold, fit_platt, out_of_fold


def drawn(logit, seed=0):
    return torch.rand(len(logit), generator=torch.Generator().manual_seed(seed)) < logit.sigmoid()


def ece(p, y):
    """Of the structure's probability, 15 bins; the textbook's loop."""
    error = 0.0
    for k in range(15):
        inside = (p >= k / 15) & ((p < (k + 1) / 15) | (k == 14))
        if inside.any():
            error += abs(float(y[inside].float().mean() - p[inside].mean())) * float(inside.float().mean())
    return error


def test_slope_and_bias_are_recovered():
    g = torch.Generator().manual_seed(0)
    s = torch.randn(60_000, generator=g, dtype=torch.float64) * 3
    y = drawn(0.6 * s - 0.8, 1)
    found = fit_platt(s, y, torch.ones(len(s)), torch.arange(len(s)) % 3)
    assert (found.slope, found.bias) == (pytest.approx(0.6, abs=0.02), pytest.approx(-0.8, abs=0.04))
    assert found.threshold == pytest.approx(1 / (1 + np.exp(-found.bias)))
    assert found.probability(torch.zeros(1)).item() == pytest.approx(found.threshold)


def test_supports_count_the_same_whatever_their_size():
    s = torch.randn(40_000, generator=torch.Generator().manual_seed(2))
    support = (torch.arange(40_000) >= 20_000).long()
    y = torch.where(support == 0, drawn(s + 1, 3), drawn(s - 1, 4))
    for weight in (torch.ones(40_000), torch.where(support == 0, 1.0, 500.0)):
        assert fit_platt(s, y, weight, support).bias == pytest.approx(0, abs=0.05)


def test_voxels_without_weight_change_nothing():
    s = torch.randn(4000, generator=torch.Generator().manual_seed(2))
    y, support = drawn(s), torch.zeros(4000)
    inside = torch.arange(4000) < 2000
    all_of_half = fit_platt(s[inside], y[inside], torch.ones(2000), support[inside])
    assert fit_platt(s, y, inside.float(), support).slope == pytest.approx(all_of_half.slope, rel=1e-6)


def test_logits_that_point_the_wrong_way_stay_as_they_are():
    s = torch.linspace(-3, 3, 1000)
    assert fit_platt(s, s < 0, torch.ones(1000), torch.zeros(1000)) == PlattScaling()


def test_what_is_no_calibration_is_refused():
    for slope, bias in ((0, 0), (-1, 0), (float("inf"), 0), (1, float("nan"))):
        with pytest.raises(ValueError, match="slope above 0"):
            PlattScaling(slope, bias)


def volumes(supports, n=700, features=60, seed=0):
    """Overlapping classes in many dimensions, each volume a little off: a head fitted to few is too sure."""
    g = torch.Generator().manual_seed(seed)
    support = torch.arange(supports).repeat_interleave(n)
    target = torch.rand(len(support), generator=g) < 0.3
    off = 0.3 * torch.randn(supports, features, generator=g)
    f = torch.randn(len(support), features, generator=g) + 0.25 * target[:, None] * torch.ones(features) / 2
    f = f + off[support]
    position, ones = torch.rand(len(support), 3, generator=g), torch.ones(len(support))
    return f, target, ones, position, ones[:, None], support


def test_leaving_a_support_out_brings_the_ece_to_the_floor():
    """The floor: the largest ECE of 20 draws from probabilities that are right."""
    parts = volumes(5)
    fit = partial(LinearHead.fit, ridge=1e-6, foreground=0.0)
    logit = out_of_fold(fit, *parts)
    _, y, weight, _, _, support = parts
    calibration = fit_platt(logit, y, weight, support)
    assert calibration.slope < 0.95
    head = fit(*parts)
    f, truth, _, position, ones, _ = volumes(40, seed=7)
    s = head(f, position, ones)
    p = calibration.probability(s)
    floor = max(ece(p, drawn(torch.logit(p.double()), seed)) for seed in range(20))
    raw = ece(s.sigmoid(), truth)
    assert ece(p, truth) < floor + 0.015
    assert raw > 2 * ece(p, truth)


def test_a_left_out_support_is_predicted_by_the_others():
    parts = volumes(3, n=200)
    logit = out_of_fold(LinearHead.fit, *parts)
    others = parts[5] != 1
    head = LinearHead.fit(*(part[others] for part in parts))
    f, _, _, position, ones, _ = parts
    torch.testing.assert_close(logit[~others], head(f, position, ones)[~others])


def test_one_support_cannot_be_left_out():
    with pytest.raises(ValueError, match="two supports"):
        out_of_fold(LinearHead.fit, *volumes(1))


def test_the_threshold_is_that_of_the_largest_expected_dice():
    p = np.random.default_rng(0).beta(0.3, 1.5, size=5000)
    candidates = np.arange(250, 1000) / 1000
    dice = [2 * p[p > t].sum() / ((p > t).sum() + p.sum()) for t in candidates]
    best = max(dice)
    found = best_threshold(log_odds(p))
    assert 2 * p[p > found].sum() / ((p > found).sum() + p.sum()) == pytest.approx(best, abs=1e-4)
    assert found == pytest.approx(best / 2, abs=0.01)  # Lipton et al., theorem 1


def test_a_sure_map_is_cut_at_one_half_at_most_and_an_empty_one_at_a_quarter_at_least():
    assert best_threshold(log_odds(np.repeat([0.001, 0.999], 100))) <= 0.5
    assert best_threshold(log_odds(np.full(100, 0.01))) == 0.25


def test_a_head_that_is_nowhere_sure_is_cut_where_the_volume_prior_cuts():
    weak = np.concatenate([np.full(100, 0.1), np.full(10_000, 0.001)])
    assert best_threshold(log_odds(weak)) == 0.25
    low = PlattScaling(2.0, float(log_odds(0.08)))
    assert best_threshold((log_odds(weak) - low.bias) / low.slope, low) < 0.1


def test_weights_stand_for_voxels():
    generator = np.random.default_rng(0)
    s, weight = generator.normal(-2, 2, 500), generator.integers(1, 5, 500)
    assert best_threshold(s, weight=weight) == best_threshold(np.repeat(s, weight))


def test_without_a_fit_the_volume_prior_cuts():
    s = np.linspace(-6, 1, 100)
    assert PlattScaling().cut(s) == 0.5
    assert PlattScaling(0.9).cut(s) == best_threshold(s, PlattScaling(0.9)) < 0.5
