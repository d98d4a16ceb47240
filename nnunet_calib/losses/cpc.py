"""Calibration by pairwise constraints.

    L = CE + discrimination_weight * D + exclusion_weight * E
    D = mean over voxels and classes c != y of log(1 + exp(z_c - z_y))
    E = mean over voxels of 1 / ((C - 1) (C - 2)) sum_{i, j != y} 1/2 log(1 + exp(z_j - z_i))

Cheng and Vasconcelos, Calibrating deep neural networks by pairwise constraints, CVPR 2022. D trains each pair of the
label and another class; E, whose sum runs over i = j too, keeps the other classes equally likely.
"""

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, softplus

from nnunet_calib.losses.base import (
    CalibrationLoss,
    at_target,
    masked_mean,
    masked_sum,
    number,
    sum_over_classes,
    voxel_count,
)


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

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        # Differences of log p are those of the logits, and log p is kept for the cross-entropy anyway.
        log_p = log_softmax(z, dim=1)
        log_p_y = at_target(log_p, target)

        def against_label(c: int, log_p_c: Tensor) -> Tensor:
            return masked_sum(torch.where(target == c, 0, softplus(log_p_c - log_p_y)), valid)

        others = max(z.shape[1] - 1, 1)
        return {
            "cross_entropy": masked_mean(-log_p_y, valid),
            "discrimination": sum_over_classes(against_label, log_p) / (voxel_count(target, valid) * others),
            "exclusion": _exclusion(log_p, target, valid),
        }

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return (
            parts["cross_entropy"]
            + self.discrimination_weight * parts["discrimination"]
            + self.exclusion_weight * parts["exclusion"]
        )


def _exclusion(z: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    others = z.shape[1] - 1
    if others < 2:
        return z.new_zeros(())
    pairs = _PairsOfOthers.apply(z, target, valid) / (voxel_count(target, valid) * others * (others - 1))
    equal = math.log(2) / 2 / (others - 1)  # the terms i = j
    return pairs + (equal if valid is None else equal * valid.any().to(z.dtype))


class _PairsOfOthers(torch.autograd.Function):
    """Sum over valid voxels and pairs i < j without the label of 1/2 log(1 + e^d) + 1/2 log(1 + e^-d), d = z_i - z_j.

    The gradient, 1/2 tanh(d / 2) for z_i and its negative for z_j, is summed in the same pass over the pairs, so that
    one tensor of the logits' size is kept where autograd would keep several for each of the C (C - 1) / 2 pairs.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        gradient = torch.zeros_like(z)
        total = z.new_zeros(())
        for i, j in combinations(range(z.shape[1]), 2):
            among = (target != i) & (target != j)
            if valid is not None:
                among &= valid
            d = z[:, i : i + 1] - z[:, j : j + 1]
            total += torch.where(among, softplus(d) - d / 2, 0).sum()
            slope = torch.where(among, torch.tanh(d / 2) / 2, 0)
            gradient[:, i : i + 1] += slope
            gradient[:, j : j + 1] -= slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None
