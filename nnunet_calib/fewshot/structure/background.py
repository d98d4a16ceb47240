"""Are the features of a query like those of the supports? Another modality or contrast moves all of them.

    d(q) = mean_j KL( N(m_q, S_q) || N(m_j, S_j) ) / F,    over voxels drawn evenly from the query and from support j

in nats per feature. How far one volume is from others of its kind the supports tell, each held against the rest. With
a_i the part of log d that volume i brings, the log distances y_i of k supports spread by (k - 2) / (k - 1) of the
spread of a, so that a new volume of their kind is above

    exp( mean y + t_{0.95, k-1} sd(y) (k - 1) / (k - 2) sqrt(1 + 1/k) )

in 5 % of cases (a prediction interval, one-sided). Two supports have one distance and tell no spread, one has none:
then the limit is an assumption. Gaussians of features: Lee et al., A simple unified framework for detecting
out-of-distribution samples and adversarial attacks, NeurIPS 2018, but of the volume and not of one voxel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

FIRES = 0.05
"""Share of volumes of the supports' kind that lie above the limit."""

_SHRINKAGE = 0.05  # of the mean variance, added to each: directions without variance in few volumes say nothing
_SPREAD = 0.4  # of log d, assumed with two supports
_LEAST_SPREAD = 0.05  # supports that are copies of each other say nothing of others
_ALONE = 1.0  # nats per feature, assumed with one support: only another modality is that far


@dataclass(frozen=True)
class Background:
    """Where the volumes of the supports lie in the space of features.

    Attributes:
        mean: float32 (k, F), m of each.
        factor: float32 (k, F, F), lower triangular, L of S = L L'.
        limit: distances above are told to the user.
    """

    mean: Tensor
    factor: Tensor
    limit: float

    @classmethod
    def of(cls, volumes: Sequence[Tensor]) -> "Background":
        """From features float (N, F) of voxels drawn evenly from each support."""
        gaussians = [_gaussian(features) for features in volumes]
        k = len(gaussians)
        limit = _ALONE
        if k > 1:
            apart = np.array([[_divergence(one, other) for other in gaussians] for one in gaussians])
            logs = np.log(np.maximum(apart.sum(axis=1) / (k - 1), 1e-9))  # of itself a volume is 0 away
            spread = max(float(logs.std(ddof=1)) * (k - 1) / (k - 2), _LEAST_SPREAD) if k > 2 else _SPREAD
            beyond = stats.t.ppf(1 - FIRES, k - 1) if k > 2 else stats.norm.ppf(1 - FIRES)
            limit = float(np.exp(logs.mean() + beyond * spread * np.sqrt(1 + 1 / k)))
        mean, factor = (torch.stack(parts).float() for parts in zip(*gaussians, strict=True))
        return cls(mean, factor, limit)

    def distance(self, features: Tensor) -> float:
        """D of a volume from the features float (N, F) of voxels drawn evenly from it."""
        own = _gaussian(features)
        each = zip(self.mean.double(), self.factor.double(), strict=True)
        return float(np.mean([_divergence(own, theirs) for theirs in each]))


def _divergence(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """KL( one || other ) / F of two Gaussians, each as mean and Cholesky factor."""
    (mean, factor), (to_mean, to_factor) = one, other
    spread = torch.linalg.solve_triangular(to_factor, factor, upper=False).square().sum()
    away = torch.linalg.solve_triangular(to_factor, (mean - to_mean)[:, None], upper=False).square().sum()
    logarithm = 2 * (to_factor.diagonal().log().sum() - factor.diagonal().log().sum())
    size = len(mean)
    return float((spread + away - size + logarithm) / (2 * size))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance, float64."""
    f = features.double()
    mean = f.mean(dim=0)
    away = f - mean
    covariance = away.T @ away / len(f)
    ridge = _SHRINKAGE * covariance.diagonal().mean().clamp_min(1e-12)
    return mean, torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean), dtype=torch.float64))
