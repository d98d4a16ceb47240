"""Explicit confidence penalty.

    L = CE - weight * H,    H = mean over voxels of -sum_c p_c log p_c

Pereyra et al., Regularizing neural networks by penalizing confident output distributions, ICLR workshops 2017.
"""

from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_calib.losses.base import (
    CalibrationLoss,
    at_target,
    flag,
    masked_mean,
    masked_sum,
    number,
    sum_over_classes,
    voxel_count,
)


class ECPLoss(CalibrationLoss):
    """Cross-entropy minus the weighted entropy of the prediction.

    Args:
        weight: of the entropy.
        class_mean: divide the entropy by the number of classes, as the code of MbLS and NACL does; False is the paper.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, weight: float = 0.1, class_mean: bool = False, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)
        self.class_mean = flag("class_mean", class_mean)

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        log_p = log_softmax(z, dim=1)
        entropy = mean_entropy(log_p, valid)
        return {
            "cross_entropy": masked_mean(-at_target(log_p, target), valid),
            "entropy": entropy / z.shape[1] if self.class_mean else entropy,
        }

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["cross_entropy"] - self.weight * parts["entropy"]


def mean_entropy(log_p: Tensor, among: Tensor | None) -> Tensor:
    """Mean Shannon entropy in nats of (B, C, *S) ``log_p`` over the voxels ``among`` (bool (B, 1, *S)); 0 if none."""
    total = sum_over_classes(lambda _, log_p_c: masked_sum(-log_p_c.exp() * log_p_c, among), log_p)
    return total / voxel_count(log_p, among)
