"""Are the features of a query like those of the supports? Another modality or contrast moves all of them.

    d(query) = mean over its voxels of  (f - m)' S^-1 (f - m) / F

with mean m and covariance S of the supports' background: 1 for voxels drawn from there. Lee et al., A simple unified
framework for detecting out-of-distribution samples, NeurIPS 2018, with one Gaussian.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VOXELS = 2000
"""Drawn from a query."""

_SHRINKAGE = 0.05  # of the mean variance, added to each: directions in which few volumes do not vary say nothing
_LEAST = 2.0
_BEYOND = 1.5  # times what the supports are from each other


@dataclass(frozen=True)
class Background:
    """Where the supports' background lies in the space of features.

    Attributes:
        mean: float32 (F,), m.
        whitening: float32 (F, F), L^-1 of S = L L'.
        limit: distances above are told to the user.
    """

    mean: Tensor
    whitening: Tensor
    limit: float

    @classmethod
    def of(cls, features: Tensor, weight: Tensor, support: Tensor) -> "Background":
        """From sampled background voxels.

        Args:
            features: float32 (N, F).
            weight: float (N,), voxels that each stands for.
            support: integer (N,); with two supports or more the limit is 1.5 times the largest distance of one from
                the others, and at least 2.
        """
        distances = []
        numbers = support.unique()
        for one in numbers if len(numbers) > 1 else ():
            own = support == one
            others = cls._gaussian(features[~own], weight[~own], support[~own])
            distances.append(others.distance(features[own], weight[own]))
        made = cls._gaussian(features, weight, support)
        return cls(made.mean, made.whitening, max(_LEAST, _BEYOND * max(distances, default=0.0)))

    def distance(self, features: Tensor, weight: Tensor | None = None) -> float:
        """D of features (N, F)."""
        squared = ((features - self.mean) @ self.whitening.T).square().mean(dim=1).double()
        share = torch.full_like(squared, 1 / len(squared)) if weight is None else weight.double() / weight.sum()
        return float(share @ squared)

    @classmethod
    def _gaussian(cls, features: Tensor, weight: Tensor, support: Tensor) -> "Background":
        f = features.double()
        share = torch.zeros(len(f), dtype=torch.float64)
        numbers: Sequence[Tensor] = list(support.unique())
        for one in numbers:
            own = support == one
            share[own] = weight[own].double() / weight[own].double().sum() / len(numbers)
        mean = share @ f
        away = f - mean
        covariance = (away * share[:, None]).T @ away
        ridge = _SHRINKAGE * covariance.diagonal().mean().clamp_min(1e-12)
        lower = torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean), dtype=torch.float64))
        whitening = torch.linalg.solve_triangular(lower, torch.eye(len(mean), dtype=torch.float64), upper=False)
        return cls(mean.float(), whitening.float(), 0.0)
