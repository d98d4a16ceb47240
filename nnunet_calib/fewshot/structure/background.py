"""Are the features of a query like those of the supports? Another modality or contrast moves all of them.

    d = KL( N(m_q, S_q) || N(m, S) ) / F,    over a random sample of the query and the background of the supports

in nats per feature: 0 for the same distribution. How far one volume is from others of its kind, the supports tell: each
is held against the rest. A Gaussian of the features, as in Lee et al., A simple unified framework for detecting
out-of-distribution samples and adversarial attacks, NeurIPS 2018, but of the volume and not of one voxel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VOXELS = 2000
"""Drawn from a query."""

_SHRINKAGE = 0.05  # of the mean variance, added to each: directions without variance in few volumes say nothing
_BEYOND = 3.0  # times the largest distance between supports
_LEAST = 0.05
_ALONE = 0.1  # assumed with one support


@dataclass(frozen=True)
class Background:
    """Where the supports' background lies in the space of features.

    Attributes:
        mean: float32 (F,), m.
        factor: float32 (F, F), lower triangular, L of S = L L'.
        limit: distances above are told to the user.
    """

    mean: Tensor
    factor: Tensor
    limit: float

    @classmethod
    def of(cls, features: Tensor, weight: Tensor, support: Tensor) -> "Background":
        """From sampled background voxels.

        Args:
            features: float (N, F).
            weight: float (N,), voxels that each stands for.
            support: integer (N,).

        Returns:
            With a limit of three times the largest distance of a support from the others.
        """
        distances = []
        numbers = support.unique()
        for one in numbers if len(numbers) > 1 else ():
            own = support == one
            others = cls(*_gaussian(features[~own], _shares(weight[~own], support[~own])), 0.0)
            distances.append(others.distance(features[own], weight[own]))
        mean, factor = _gaussian(features, _shares(weight, support))
        limit = max(_LEAST, _BEYOND * max(distances)) if distances else _ALONE
        return cls(mean.float(), factor.float(), limit)

    def distance(self, features: Tensor, weight: Tensor | None = None) -> float:
        """D of a volume from its sampled voxels, float (N, F), and what each stands for."""
        share = torch.ones(len(features), dtype=torch.float64) if weight is None else weight.double()
        mean, factor = _gaussian(features, share / share.sum())
        ours = self.factor.double()
        spread = torch.linalg.solve_triangular(ours, factor, upper=False).square().sum()
        away = torch.linalg.solve_triangular(ours, (mean - self.mean.double())[:, None], upper=False).square().sum()
        logarithm = 2 * (ours.diagonal().log().sum() - factor.diagonal().log().sum())
        size = len(mean)
        return float((spread + away - size + logarithm) / (2 * size))


def _shares(weight: Tensor, support: Tensor) -> Tensor:
    """Weights of sum 1 by which every support counts the same, float64 (N,)."""
    share = torch.zeros(len(weight), dtype=torch.float64)
    numbers = support.unique()
    for one in numbers:
        own = support == one
        share[own] = weight[own].double() / weight[own].double().sum() / len(numbers)
    return share


def _gaussian(features: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance, float64."""
    f = features.double()
    mean = share @ f
    away = f - mean
    covariance = (away * share[:, None]).T @ away
    ridge = _SHRINKAGE * covariance.diagonal().mean().clamp_min(1e-12)
    return mean, torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean), dtype=torch.float64))
