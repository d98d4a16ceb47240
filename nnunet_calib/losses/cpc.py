"""Calibration by pairwise constraints.

    L = CE + discrimination_weight * D + exclusion_weight * E
    D = mean over voxels and classes c != y of log(1 + exp(z_c - z_y))
    E = mean over voxels of 1 / ((C - 1) (C - 2)) sum_{i, j != y} 1/2 log(1 + exp(z_j - z_i))

Cheng and Vasconcelos, Calibrating deep neural networks by pairwise constraints, CVPR 2022. D trains each pair of the
label and another class; E, whose sum runs over i = j too, keeps the other classes equally likely.
"""

import math
from typing import Any

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss, number
from nnunet_calib.losses.voxelwise import Regions, Term, Voxels, at_target, cross_entropy_term

# A product of more numbers from [1/2, 1] could leave float32.
_FACTORS = 64


class CPCLoss(CalibrationLoss):
    """Cross-entropy plus the constraints on pairs of logits; with two classes there is nothing to exclude and E is 0.

    Args:
        discrimination_weight: of D, the pairs with the label.
        exclusion_weight: of E, the pairs without it.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, discrimination_weight: float = 0.1, exclusion_weight: float = 1.0, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.discrimination_weight = number("discrimination_weight", discrimination_weight)
        self.exclusion_weight = number("exclusion_weight", exclusion_weight)

    def _weights(self) -> dict[str, float]:
        return {
            "cross_entropy": 1.0,
            "discrimination": self.discrimination_weight,
            "exclusion": self.exclusion_weight,
        }

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        return {
            "cross_entropy": cross_entropy_term(v),
            "discrimination": _discrimination_term(v),
            "exclusion": _exclusion_term(v),
        }


def _discrimination_term(v: Voxels) -> Term:
    if isinstance(v, Regions):  # the pair of the label and the other class is all there is
        return cross_entropy_term(v)
    d = v.z - at_target(v.z, v.target)
    s = d.sigmoid()
    others = max(v.classes - 1, 1)
    # The label against itself has added log 2.
    values = (d.relu_().sum(dim=1, keepdim=True) + _log_of_rest(s) - math.log(2)) / others

    def slope() -> Tensor:  # s_c, and of the label minus their sum
        return s.scatter_add(1, v.target, -s.sum(dim=1, keepdim=True)).div_(others)

    return Term(values, slope)


def _exclusion_term(v: Voxels) -> Term:
    """Pairs i < j of the other classes: log(1 + e^d) - d / 2 with the slopes s - 1/2 and 1/2 - s, s = sigmoid(d)."""
    others = v.classes - 1
    if isinstance(v, Regions) or others < 2:
        return Term(torch.zeros_like(v.log_p_y), lambda: torch.zeros_like(v.z))
    # The last class takes the label's place, and its slopes take the way back.
    z = v.z.scatter(1, v.target, v.z[:, -1:])
    total, pull = torch.zeros_like(v.log_p_y), torch.zeros_like(z)
    for i in range(others - 1):
        d = z[:, i : i + 1] - z[:, i + 1 : others]
        s = d.sigmoid()
        pull[:, i : i + 1] += s.sum(dim=1, keepdim=True) - (others - 1 - i) / 2
        pull[:, i + 1 : others] -= s
        pull[:, i + 1 : others] += 0.5
        total += (d.abs_().sum(dim=1, keepdim=True) / 2).add_(_log_of_rest(s))
    pull[:, -1:] = at_target(pull, v.target)
    pull.scatter_(1, v.target, 0.0)
    pairs = others * (others - 1)
    equal = math.log(2) / 2 / (others - 1)  # the terms i = j
    return Term(total / pairs + equal, lambda: pull / pairs)


def _log_of_rest(s: Tensor) -> Tensor:
    """Sum over classes of log(1 + e^-|d|) = -log max(s, 1 - s) for s = sigmoid(d), (b, c, *s) to (b, 1, *s).

    One logarithm for many classes: log1p, and softplus with it, would take most of the time.
    """
    larger = (s - 0.5).abs_().add_(0.5)
    logs = [part.prod(dim=1, keepdim=True).log_() for part in larger.split(_FACTORS, dim=1)]
    return -torch.stack(logs).sum(dim=0)
