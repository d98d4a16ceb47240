"""Focal losses.

    FL    = mean over voxels of -(1 - p_y)^gamma log p_y
    FLSD  = the same with gamma(p_y): 5 where p_y < 0.2, 3 where 0.2 <= p_y < 0.5, gamma elsewhere

Lin et al., Focal loss for dense object detection, ICCV 2017 (FL).
Mukhoti et al., Calibrating deep neural networks using focal loss, NeurIPS 2020 (FLSD; gamma = 3 is FLSD-53).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_calib.losses.base import CalibrationLoss, at_target, masked_mean, number


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

    def _exponent(self, log_p: Tensor) -> Tensor | float:
        return self.gamma

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        log_p = at_target(log_softmax(z, dim=1), target)
        # 1 - p without cancellation; the floor keeps the gradient finite at p = 1 for gamma < 1.
        q = -torch.expm1(log_p)
        q = q.clamp(min=torch.finfo(q.dtype).tiny)
        return {"focal": masked_mean(-(q ** self._exponent(log_p)) * log_p, valid)}


class FLSDLoss(FocalLoss):
    """Focal loss with a sample-dependent gamma: stronger where the true class is unlikely.

    Args:
        gamma: exponent where p_y >= 0.5.
        multilabel: sigmoid regions.

    Raises:
        ValueError: gamma is negative or not a number.
    """

    def _exponent(self, log_p: Tensor) -> Tensor:
        p = log_p.detach().exp()
        return torch.where(p < 0.2, 5.0, torch.where(p < 0.5, 3.0, self.gamma))
