"""How far to trust the head, and how far the labels that registration carries.

    z(v) = a s(v) + b r(v) + c d(v) + e        s of the head, r and d of ``atlas``: log odds, and distance in mm

A weighted product of two opinions (logarithmic pooling; Genest and Zidek, Combining probability distributions,
Statistical Science 1986). a, b, c and e have the smallest NLL on supports that are predicted by the others, every
support counting the same, and are drawn to the default by as much as few supports can tell. a, b and c are not below 0.
The smallest NLL is not the largest Dice: these weights, the same with half the head, and the vote alone are tried, and
the largest mean Dice of left-out supports decides (``candidates``).

With one support nothing is left to predict. How exactly the base classes are carried to the query is known all the same
(``atlas.agreement``, g), and

    z(v) = a s(v) + (1 - a) g r(v),    a = 1 / (1 + g^3)

g r is the vote with the slope that the base classes have. The exponent was chosen on brains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.heads.base import bernoulli_entropy
from nnunet_calib.fewshot.structure.logistic import fit_logistic

_RIDGE = 0.05  # in units of the NLL of the structure's share, by supports


@dataclass(frozen=True)
class Trust:
    """Weights of the two opinions.

    Attributes:
        head: a.
        vote: b.
        distance: c, per mm.
        bias: e.
    """

    head: float = 0.5
    vote: float = 0.5
    distance: float = 0.0
    bias: float = 0.0

    def __call__(self, logit: Tensor, log_odds: Tensor, distance: Tensor) -> Tensor:
        """Z (N,) of s, r and d (N,)."""
        return self.head * logit + self.vote * log_odds + self.distance * distance + self.bias


def trust_of_one(agreement: float) -> Trust:
    """The trust with one support, from how exactly base classes are carried to the query."""
    head = 1 / (1 + agreement**3)
    return Trust(head, (1 - head) * agreement)


def candidates(learned: Trust) -> tuple[Trust, ...]:
    """What is tried on left-out supports."""
    return (Trust(0.0, 1.0), replace(learned, head=learned.head / 2), learned)


def fit_trust(
    logit: Tensor, log_odds: Tensor, distance: Tensor, target: Tensor, weight: Tensor, support: Tensor
) -> Trust:
    """The trust that left-out supports teach.

    Args:
        logit: float (N,), of a head that has not seen the voxel's volume.
        log_odds: float (N,), r, carried from the other supports.
        distance: float (N,), d, mm, likewise.
        target: bool (N,).
        weight: float (N,), voxels that each stands for.
        support: integer (N,), the volume that each comes from.
    """
    w = torch.zeros(len(weight), dtype=torch.float64)
    there = support.unique()
    for one in there:
        own = support == one
        w[own] = weight[own].double() / weight[own].double().sum() / len(there)
    start = Trust()
    centre = torch.tensor([start.head, start.vote, start.distance * _MM, start.bias], dtype=torch.float64)
    columns = [logit.double(), log_odds.double(), distance.double() / _MM, torch.ones(len(w), dtype=torch.float64)]
    ridge = torch.full((4,), _RIDGE * bernoulli_entropy(float(w[target].sum())) / len(there), dtype=torch.float64)
    used = torch.ones(4, dtype=torch.float64)
    while True:
        x = torch.stack(columns, dim=1) * used
        theta = fit_logistic(x, target, w, ridge, centre * used) * used
        negative = (theta[:3] < 0).nonzero()
        if not len(negative):
            break
        used[negative[0, 0]] = 0.0
    head, vote, per_unit, bias = theta.tolist()
    return Trust(head, vote, per_unit / _MM, bias)


_MM = 5.0  # unit of distances in the fit, so that all columns are of one size
