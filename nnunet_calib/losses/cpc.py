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
from torch.nn.functional import softplus

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.values import number
from nnunet_calib.losses.voxelwise import Regions, Term, Voxels, at_target, cross_entropy_term


def discrimination(v: Voxels) -> Tensor:
    """D in each voxel, (b, 1, *s)."""
    C, z, z_y = v.classes, v.z, at_target(v.z, v.target)
    return (_is_not_label(v) * softplus(z - z_y)).sum(dim=1, keepdim=True) / (C - 1)


def exclusion(v: Voxels) -> Tensor:
    """E in each voxel, (b, 1, *s)."""
    C, z, other = v.classes, v.z, _is_not_label(v)
    z_i, z_j = z[:, :, None], z[:, None]
    pairs = other[:, :, None] * other[:, None] * softplus(z_j - z_i) / 2  # (b, i, j, *s)
    return pairs.sum(dim=(1, 2))[:, None] / ((C - 1) * (C - 2))


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

    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        if isinstance(v, Regions) or v.classes < 3:  # one pair: y and the other class
            pair = -v.log_p_y
            return {"cross_entropy": pair, "discrimination": pair, "exclusion": torch.zeros_like(pair)}
        return {"cross_entropy": -v.log_p_y, "discrimination": discrimination(v), "exclusion": exclusion(v)}

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        return {
            "cross_entropy": cross_entropy_term(v),
            "discrimination": _discrimination_term(v),
            "exclusion": _exclusion_term(v),
        }


def _is_not_label(v: Voxels) -> Tensor:
    """[c != y], (b, C, *s)."""
    return 1 + v.minus_onehot(torch.zeros_like(v.z))


# The same with slopes in closed form, each pair once.
# A product of more numbers from [1/2, 1] could leave float32.
_FACTORS = 120


def _discrimination_term(v: Voxels) -> Term:
    if isinstance(v, Regions):  # the pair of the label and the other class is all there is
        return cross_entropy_term(v)
    d = v.z - at_target(v.z, v.target)
    s = d.sigmoid()
    others = max(v.classes - 1, 1)
    rest = _log_of_product(_products((s - 0.5).abs_().add_(0.5)), v.classes)
    # The label against itself has added log 2.
    values = (d.relu_().sum(dim=1, keepdim=True) - rest - math.log(2)) / others

    def slope() -> Tensor:  # s_c, and of the label minus their sum
        return s.scatter_add(1, v.target, -s.sum(dim=1, keepdim=True)).div_(others)

    return Term(values, slope)


def _exclusion_term(v: Voxels) -> Term:
    """Pairs of the other classes, each once: log(1 + e^d) - d / 2 = |d| / 2 - log(1/2 + |t|), t = tanh(d / 2) / 2.

    Its slopes are t and -t. Pairs of classes the same distance k apart, around the circle, are taken together.
    """
    others = v.classes - 1
    if isinstance(v, Regions) or others < 2:
        return Term(torch.zeros_like(v.log_p_y), lambda: torch.zeros_like(v.z))
    # The last class takes the label's place, and its slopes take the way back.
    z = v.z.scatter(1, v.target, v.z[:, -1:])[:, :others]
    circle = torch.cat([z, z[:, : others // 2]], dim=1)
    pull, total, products = torch.zeros_like(circle), torch.zeros_like(v.log_p_y), []
    for k in range(1, others // 2 + 1):
        pairs = others if 2 * k < others else k  # opposite classes meet once
        d = circle.narrow(1, k, pairs) - z.narrow(1, 0, pairs)
        t = d.sigmoid().sub_(0.5)
        pull.narrow(1, k, pairs).add_(t)
        pull.narrow(1, 0, pairs).sub_(t)
        total.add_(d.abs_().sum(dim=1, keepdim=True), alpha=0.5)
        products += _products(t.abs_().add_(0.5))
    total.sub_(_log_of_product(products, others))
    pairs = others * (others - 1)
    equal = math.log(2) / 2 / (others - 1)  # the terms i = j

    def slope() -> Tensor:
        slopes = torch.zeros_like(v.z)
        slopes[:, :others] = pull[:, :others]
        slopes[:, : others // 2].add_(pull[:, others:])
        slopes[:, -1:] = at_target(slopes, v.target)
        return slopes.scatter_(1, v.target, 0.0).div_(pairs)

    return Term(total.div_(pairs).add_(equal), slope)


# Logarithms of products, one for many classes: log1p, and softplus with it, would take most of the time.


def _products(values: Tensor) -> list[Tensor]:
    """Products over the classes, (b, c, *s) to some (b, 1, *s), of numbers from [1/2, 1]."""
    return [part.prod(dim=1, keepdim=True) for part in values.split(_FACTORS, dim=1)]


def _log_of_product(products: list[Tensor], factors: int) -> Tensor:
    """Logarithm of the product of `_products`, each of ``factors`` numbers or fewer, (b, 1, *s)."""
    together = max(_FACTORS // factors, 1)
    logs = [part.prod(dim=1, keepdim=True).log_() for part in torch.cat(products, dim=1).split(together, dim=1)]
    return torch.stack(logs).sum(dim=0)
