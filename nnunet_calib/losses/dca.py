"""Difference between confidence and accuracy.

    L = CE + weight * |A - mean over voxels of max_c p_c|,    A = share of voxels whose most likely class is the label

Liang et al., Improved trainable calibration method for neural networks on medical imaging classification, BMVC 2020.
"""

from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_calib.losses.base import CalibrationLoss, at_target, masked_mean, number


class DCALoss(CalibrationLoss):
    """Cross-entropy plus the weighted distance of the mean confidence from the accuracy.

    Both are pooled over the batch (over regions too), in multi-GPU training over the rank's own batch. The accuracy has
    no gradient.

    Args:
        weight: of the distance.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, weight: float = 10.0, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        log_p = log_softmax(z, dim=1)
        confidence, prediction = log_p.max(dim=1, keepdim=True)
        accuracy = masked_mean((prediction == target).to(z.dtype), valid)
        return {
            "cross_entropy": masked_mean(-at_target(log_p, target), valid),
            "difference": (accuracy - masked_mean(confidence.exp(), valid)).abs(),
        }

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["cross_entropy"] + self.weight * parts["difference"]
