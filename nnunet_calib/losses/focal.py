"""Focal losses.

    FL    = mean over voxels of -(1 - p_y)^gamma log p_y
    FLSD  = the same with gamma(p_y): 5 where p_y < 0.2, 3 where 0.2 <= p_y < 0.5, gamma elsewhere

Lin et al., Focal loss for dense object detection, ICCV 2017 (FL).
Mukhoti et al., Calibrating deep neural networks using focal loss, NeurIPS 2020 (FLSD; gamma = 3 is FLSD-53).
"""

from typing import Any

import torch
from torch import Tensor

from nnunet_calib.losses.base import number
from nnunet_calib.losses.voxelwise import Term, Voxels, VoxelwiseLoss


class FocalLoss(VoxelwiseLoss):
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

    def _exponent(self, log_p: Tensor) -> Tensor | float:
        return self.gamma

    def _weights(self) -> dict[str, float]:
        return {"focal": 1.0}

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        log_p = v.log_p_y
        p, gamma = log_p.exp(), self._exponent(log_p)
        # 1 - p without cancellation; the floor keeps the slope finite at p = 1 for gamma < 1.
        q = (-torch.expm1(log_p)).clamp(min=torch.finfo(p.dtype).tiny)
        power = q**gamma

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

    def _exponent(self, log_p: Tensor) -> Tensor:
        p = log_p.exp()
        return torch.where(p < 0.2, 5.0, torch.where(p < 0.5, 3.0, self.gamma))
