"""Trust: the better of two opinions counts more, and few supports move little."""

import numpy as np
import pytest
import torch
from scipy import optimize

from nnunet_calib.fewshot.structure.trust import Trust, candidates, fit_trust, trust_of_one


def opinions(head_noise: float, vote_noise: float, n: int = 4000, supports: int = 3, seed: int = 0):
    """Log odds of a structure of 10 %, with noise; a distance that says nothing."""
    rng = np.random.default_rng(seed)
    target = rng.random(n) < 0.1
    sign = np.where(target, 1.0, -1.0)
    log_odds = [sign * 2 + rng.normal(0, noise, n) - 1 for noise in (head_noise, vote_noise)]
    arrays = (*log_odds, rng.normal(0, 5, n), target, np.ones(n), rng.integers(0, supports, n))
    return [torch.from_numpy(part.astype(np.float32) if part.dtype == float else part) for part in arrays]


def loss(theta, given) -> float:
    head, vote, distance, target, _, _ = (part.double().numpy() for part in given)
    z = theta[0] * head + theta[1] * vote + theta[2] * distance + theta[3]
    return float(np.logaddexp(0, np.where(target > 0, -z, z)).mean())


def test_the_better_opinion_counts_more():
    head_better, vote_better = fit_trust(*opinions(1, 4)), fit_trust(*opinions(4, 1))
    assert head_better.head > 2 * head_better.vote
    assert vote_better.vote > 2 * vote_better.head


def test_it_is_near_the_smallest_loss_where_voxels_are_many():
    given = opinions(2, 3)
    given[5] = torch.zeros_like(given[5])  # of one support: equal weights
    best = optimize.minimize(loss, [0.5, 0.5, 0.0, 0.0], (given,)).x
    found = fit_trust(*given)
    assert loss([found.head, found.vote, found.distance, found.bias], given) < loss(best, given) + 5e-3


def test_an_opinion_that_is_wrong_gets_no_negative_weight():
    given = opinions(1, 1)
    given[1] = -given[1]
    found = fit_trust(*given)
    assert found.vote == 0
    assert found.head > 0


def test_opinions_without_information_stay_near_the_default():
    given = opinions(1, 1)
    given[0], given[1], given[2] = (torch.zeros_like(part) for part in given[:3])
    found, start = fit_trust(*given), Trust()
    assert (found.head, found.vote) == pytest.approx((start.head, start.vote))


def test_it_is_the_formula():
    ones = torch.ones(3)
    assert Trust(2.0, 3.0, 0.5, -1.0)(ones, 2 * ones, 4 * ones).tolist() == [9.0] * 3


def test_one_support_is_trusted_as_base_classes_are_carried():
    # 1 / (1 + g^3): half and half where borders are off by a voxel, the vote where they lie closer
    assert trust_of_one(1.0) == Trust(0.5, 0.5)
    assert trust_of_one(2.0) == Trust(pytest.approx(1 / 9), pytest.approx(16 / 9))
    assert trust_of_one(0.1).head > 0.99


def test_the_vote_alone_and_half_the_head_are_tried():
    learned = Trust(0.6, 1.2, 0.1, -0.2)
    assert candidates(learned) == (Trust(0.0, 1.0), Trust(0.3, 1.2, 0.1, -0.2), learned)
