"""Difference between confidence and accuracy.

    L = CE + weight * |A - mean over voxels of max_c p_c|,    A = share of voxels whose most likely class is the label

Liang et al., Improved trainable calibration method for neural networks on medical imaging classification, BMVC 2020.
"""

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.processes import mean_over_processes
from nnunet_calib.losses.values import number
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term, equal, masked_sum

_LEAST_VOXELS = 1e-6  # less than one voxel over any number of processes


class DCALoss(CalibrationLoss):
    """Cross-entropy plus the weighted distance of the mean confidence from the accuracy.

    Both are pooled over the batch (over regions too), in multi-GPU training over the batches of all processes. The
    accuracy has no gradient.

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

    def _shared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean confidence less accuracy, of all processes; and the slope that a voxel's confidence has in the loss."""
        wrong, doubt = zip(
            *((wrong_voxels(v).sum(), masked_sum(1 - _log_confidence(v).exp(), v.valid)) for v in batch), strict=True
        )
        surplus = torch.stack(wrong).sum().to(batch.exact) - torch.stack(doubt).sum().to(batch.exact)
        surplus, voxels = mean_over_processes(torch.stack([surplus, batch.valid_voxels().to(batch.exact)])).unbind()
        voxels = voxels.clamp(min=_LEAST_VOXELS)
        # The base class divides by the voxels of this process.
        weight = surplus.sign() * batch.voxel_count() / voxels
        return (surplus / voxels).to(batch.dtype), weight.to(batch.dtype)

    def _formula(self, v: Voxels, shared: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        difference, sign = shared
        p_max = _log_confidence(v).exp()
        # Its value is known from the whole batch; what a voxel adds to it is its own confidence, with this sign.
        return {"cross_entropy": -v.log_p_y, "difference": difference.abs() + sign * (p_max - p_max.detach())}

    def _terms(self, v: Voxels, shared: tuple[Tensor, Tensor]) -> dict[str, Term]:
        (difference, sign), confidence = shared, _log_confidence(v).exp()

        def slope() -> Tensor:
            if isinstance(v, Regions):
                return v.z.sign().mul_(confidence).mul_(1 - confidence).mul_(sign)
            most_likely = equal(v.z, v.z.amax(dim=1, keepdim=True))
            share = confidence * sign
            return most_likely.mul_(share / most_likely.sum(dim=1, keepdim=True)).addcmul_(v.p, share, value=-1)

        return {
            "cross_entropy": cross_entropy_term(v),
            "difference": Term(difference.abs().expand_as(confidence), slope),
        }


def _log_confidence(v: Voxels) -> Tensor:
    """Logarithm of max_c p_c, (b, 1, *s), in sigmoid regions (b, R, *s)."""
    if isinstance(v, Regions):
        return -v.soft_cross_entropy((v.z > 0).to(v.z.dtype))
    return v.log_p.amax(dim=1, keepdim=True)
