"""Difference between confidence and accuracy.

    L = CE + weight * |A - mean over voxels of max_c p_c|,    A = share of voxels whose most likely class is the label

Liang et al., Improved trainable calibration method for neural networks on medical imaging classification, BMVC 2020.
"""

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.processes import mean_over_processes
from nnunet_calib.losses.values import choice, number
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term, equal, masked_sum

_LEAST_VOXELS = 1e-6  # less than one voxel over any number of processes


class DCALoss(CalibrationLoss):
    """Cross-entropy plus the weighted distance of the mean confidence from the accuracy.

    Both are pooled over the batch (over regions too), in multi-GPU training over the batches of all processes. The
    accuracy has no gradient.

    Args:
        weight: of the distance.
        region: ``volume``: over all voxels, as published. ``foreground``: over those that the label or the most likely
            class calls a structure (a region: its own), so that the settled background has no part in the distance.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, weight: float = 10.0, region: str = "volume", *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)
        self.region = choice("region", region, ("volume", "foreground"))

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "difference": self.weight}

    def _shared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean confidence less accuracy, of all processes; and the slope that a voxel's confidence has in the loss."""
        wrong, doubt, inside = torch.stack([self._totals(v, batch.exact) for v in batch]).sum(dim=0).unbind()
        of = batch.valid_voxels().to(batch.exact) if self.region == "volume" else inside
        surplus, voxels = mean_over_processes(torch.stack([wrong - doubt, of])).unbind()
        voxels = voxels.clamp(min=_LEAST_VOXELS)
        # The base class divides by the voxels of this process.
        weight = surplus.sign() * batch.voxel_count() / voxels
        return (surplus / voxels).to(batch.dtype), weight.to(batch.dtype)

    def _totals(self, v: Voxels, exact: torch.dtype) -> Tensor:
        """Over what counts: wrong voxels, the sum of 1 - confidence and, of the foreground, the number of voxels."""
        counts = self._counting(v)
        doubt = masked_sum(1 - _log_confidence(v).exp(), counts)
        inside = doubt.new_zeros(()) if counts is None else counts.sum()
        return torch.stack([x.to(exact) for x in (wrong_voxels(v).sum(), doubt, inside)])

    def _counting(self, v: Voxels) -> Tensor | None:
        """Bool (b, 1, *s) or (b, R, *s), the voxels with a part in the distance; None: all. Every wrong one has one."""
        if self.region == "volume":
            return v.valid
        structure = v.z > 0 if isinstance(v, Regions) else v.z[:, :1] < v.z.amax(dim=1, keepdim=True)
        structure |= v.target > 0
        return structure if v.valid is None else structure & v.valid

    def _slopes(self, v: Voxels, sign: Tensor) -> Tensor:
        """Of the confidence of every voxel; the base class leaves out those that are not valid."""
        counts = None if self.region == "volume" else self._counting(v)
        return sign if counts is None else sign * counts

    def _formula(self, v: Voxels, shared: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        difference, sign = shared[0], self._slopes(v, shared[1])
        p_max = _log_confidence(v).exp()
        # Its value is known from the whole batch; what a voxel adds to it is its own confidence, with this sign.
        return {"cross_entropy": -v.log_p_y, "difference": difference.abs() + sign * (p_max - p_max.detach())}

    def _terms(self, v: Voxels, shared: tuple[Tensor, Tensor]) -> dict[str, Term]:
        difference, sign, confidence = shared[0], self._slopes(v, shared[1]), _log_confidence(v).exp()

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
