"""Difference between confidence and accuracy.

    L = CE + weight * |A - mean over voxels of max_c p_c|,    A = share of voxels whose most likely class is the label

Liang et al., Improved trainable calibration method for neural networks on medical imaging classification, BMVC 2020.
"""

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss, number
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term, equal, masked_sum


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

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "difference": self.weight}

    def _shared(self, batch: Batch) -> Tensor:
        """Mean confidence less accuracy."""
        wrong, doubt = zip(
            *((wrong_voxels(v).sum(), masked_sum(1 - _log_confidence(v).exp(), v.valid)) for v in batch), strict=True
        )
        return (torch.stack(wrong).sum() - torch.stack(doubt).sum()) / batch.voxel_count()

    def _terms(self, v: Voxels, shared: Tensor) -> dict[str, Term]:
        sign, confidence = shared.sign(), _log_confidence(v).exp()

        def slope() -> Tensor:
            if isinstance(v, Regions):
                return v.z.sign().mul_(confidence).mul_(1 - confidence).mul_(sign)
            most_likely = equal(v.z, v.z.amax(dim=1, keepdim=True))
            share = confidence * sign
            return most_likely.mul_(share / most_likely.sum(dim=1, keepdim=True)).addcmul_(v.p, share, value=-1)

        return {
            "cross_entropy": cross_entropy_term(v),
            "difference": Term(shared.abs().expand_as(confidence), slope),
        }


def _log_confidence(v: Voxels) -> Tensor:
    """Logarithm of max_c p_c, (b, 1, *s), in sigmoid regions (b, R, *s)."""
    if isinstance(v, Regions):
        return -v.soft_cross_entropy((v.z > 0).to(v.z.dtype))
    return v.log_p.amax(dim=1, keepdim=True)
