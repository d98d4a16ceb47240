"""The warning of strange features: rare in volumes of the supports' kind, sure in others."""

import numpy as np
import pytest
import torch

from nnunet_calib.fewshot.structure.background import Background

F = 6


def volume(rng: np.random.Generator, off: float = 0.0) -> torch.Tensor:
    """Features (300, 6) of a volume: each has a mean and a spread of its own, as patients have."""
    mean, spread = rng.normal(0, 0.4, F) + off, np.exp(rng.normal(0, 0.15, F))
    return torch.from_numpy(rng.normal(mean, spread, (300, F)))


@pytest.mark.parametrize("k", [3, 5, 10])
def test_in_one_of_twenty_cases_of_the_same_distribution_it_fires(k):
    rng, fired, cases = np.random.default_rng(k), 0, 0
    for _ in range(120):
        background = Background.of([volume(rng) for _ in range(k)])
        for _ in range(5):
            fired += background.distance(volume(rng)) > background.limit
            cases += 1
    # 120 independent sets of supports: a binomial of 5 % would have a standard deviation of 0.9 % to 2 %
    assert fired / cases == pytest.approx(0.05, abs=0.035)


def test_with_two_supports_it_fires_seldom():
    rng = np.random.default_rng(2)
    fired = 0
    for _ in range(200):
        background = Background.of([volume(rng), volume(rng)])
        fired += background.distance(volume(rng)) > background.limit
    assert fired / 200 < 0.15


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_features_of_another_kind_are_told(k):
    rng = np.random.default_rng(k)
    background = Background.of([volume(rng) for _ in range(k)])
    assert background.distance(volume(rng, off=8.0)) > background.limit


def test_the_distance_of_a_volume_from_itself_is_0():
    one = volume(np.random.default_rng(0))
    assert Background.of([one]).distance(one) == pytest.approx(0, abs=1e-5)


def test_the_divergence_of_known_gaussians():
    """KL( N(1, 1) || N(0, 1) ) = 1/2 for each feature; the ridge of 5 % makes the variance 1.05."""
    rng = np.random.default_rng(0)
    at_0 = torch.from_numpy(rng.normal(0, 1, (200_000, F)))
    assert Background.of([at_0]).distance(at_0 + 1) == pytest.approx(0.5 / 1.05, rel=0.01)
