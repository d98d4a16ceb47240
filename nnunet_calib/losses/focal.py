"""Focal losses.

    FL    = mean over voxels of -(1 - p_y)^gamma log p_y
    FLSD  = the same with gamma(p_y): 5 where p_y < 0.2, 3 where 0.2 <= p_y < 0.5, gamma elsewhere

Lin et al., Focal loss for dense object detection, ICCV 2017 (FL).
Mukhoti et al., Calibrating deep neural networks using focal loss, NeurIPS 2020 (FLSD; gamma = 3 is FLSD-53).
"""

from typing import Any

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.values import number
from nnunet_calib.losses.voxelwise import Term, Voxels


class FocalLoss(CalibrationLoss):
    """Focal loss; replaces the cross-entropy.

    Args:
        gamma: 0 is the cross-entropy; larger values weigh confident voxels less.
        multilabel: sigmoid regions.

    Raises:
        ValueError: gamma is negative or not a number.
    """

    def __init__(self, gamma: float = 3.0, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.gamma = number("gamma", gamma)

    def _power(self, p: Tensor, q: Tensor) -> tuple[Tensor | float, Tensor]:
        """Exponent gamma(p) and q^gamma."""
        return self.gamma, q**self.gamma

    def _weights(self) -> dict[str, float]:
        return {"focal": 1.0}

    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        log_p = v.log_p_y
        q = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return {"focal": -(q ** self._gamma(log_p.detach().exp())) * log_p}

    def _gamma(self, p: Tensor) -> Tensor | float:
        return self.gamma

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        log_p = v.log_p_y
        p = log_p.exp()
        # 1 - p without cancellation; the floor keeps the slope finite at p = 1 for gamma < 1.
        q = (-torch.expm1(log_p)).clamp(min=torch.finfo(p.dtype).tiny)
        gamma, power = self._power(p, q)

        def slope() -> Tensor:  # d/dz log p_y is [y = c] - p_c
            return v.minus_onehot(v.p).mul_(power - gamma * (power / q) * p * log_p)

        return {"focal": Term(-power * log_p, slope)}


class FLSDLoss(FocalLoss):
    """Focal loss with a sample-dependent gamma: stronger where the true class is unlikely.

    Args:
        gamma: exponent where p_y >= 0.5.
        multilabel: sigmoid regions.

    Raises:
        ValueError: gamma is negative or not a number.
    """

    def _gamma(self, p: Tensor) -> Tensor:
        return torch.where(p < 0.2, 5.0, torch.where(p < 0.5, 3.0, self.gamma)).to(p.dtype)

    def _power(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        # Sums with 0 and 1: on CPU a power with a tensor of exponents, and a choice by bools, take ten times as long.
        unlikely, rare = (torch.lt(p, limit, out=p.new_empty(0)) for limit in (0.5, 0.2))
        gamma = self.gamma + (3 - self.gamma) * unlikely + 2 * rare
        cube, power = q**3, q**self.gamma
        return gamma, power + (cube - power) * unlikely + (cube * q * q - cube) * rare
