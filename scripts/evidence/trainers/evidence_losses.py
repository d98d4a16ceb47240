"""Losses under trial, for trainers of the evidence harness. What wins on validation patients becomes an option.

``ForegroundDCALoss``: both means of DCA over the voxels that the label or the network calls a structure.
``MEEPDCALoss``: MEEP makes the wrong voxels doubtful, DCA holds the mean confidence at the accuracy meanwhile.
"""

import torch
from torch import Tensor

from nnunet_calib.losses import DCALoss, MEEPLoss
from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.voxelwise import Batch, Voxels, masked_sum


class ForegroundDCALoss(CalibrationLoss):
    """DCA over the foreground of label and network.

    Args:
        weight: of the distance of the mean confidence from the accuracy.
        multilabel: sigmoid regions are not supported.
    """

    def __init__(self, weight: float = 1.0, *, multilabel: bool = False):
        if multilabel:
            raise ValueError("this variant is for labels, not for regions")
        super().__init__(multilabel=multilabel)
        self.weight = weight

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "difference": self.weight}

    def _shared(self, batch: Batch):
        wrong, doubt, number = (
            torch.stack([of(v) for v in batch]).sum(dim=0)
            for of in (
                lambda v: wrong_voxels(v).sum(),
                lambda v: masked_sum(1 - v.log_p.amax(dim=1, keepdim=True).exp(), _foreground(v)),
                lambda v: _foreground(v).sum(),
            )
        )
        surplus, number = wrong.to(batch.exact) - doubt.to(batch.exact), number.to(batch.exact).clamp(min=1)
        weight = surplus.sign() * batch.voxel_count() / number
        return (surplus / number).to(batch.dtype), weight.to(batch.dtype)

    def _formula(self, v: Voxels, shared) -> dict[str, Tensor]:
        difference, weight = shared
        confidence = v.log_p.amax(dim=1, keepdim=True).exp()
        slope = weight * _foreground(v) * (confidence - confidence.detach())
        return {"cross_entropy": -v.log_p_y, "difference": difference.abs() + slope}


def _foreground(v: Voxels) -> Tensor:
    """Bool (b, 1, *s): a structure by the label or by the most likely class."""
    structure = (v.target > 0) | (v.z[:, :1] < v.z.amax(dim=1, keepdim=True))
    return structure if v.valid is None else structure & v.valid


class MEEPDCALoss(CalibrationLoss):
    """MEEP and DCA with one cross-entropy.

    Args:
        weight: of the entropy of wrong voxels.
        dca_weight: of the distance of the mean confidence from the accuracy.
        multilabel: sigmoid regions.
    """

    def __init__(self, weight: float = 0.3, dca_weight: float = 10.0, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.both = MEEPLoss(weight, multilabel=multilabel), DCALoss(dca_weight, multilabel=multilabel)

    def _merged(self, of) -> dict:
        meep, dca = self.both
        return of(meep, 0) | of(dca, 1)

    def _weights(self) -> dict[str, float]:
        return self._merged(lambda loss, _: loss._weights())

    def _shared(self, batch: Batch):
        return [loss._shared(batch) for loss in self.both]

    def _formula(self, v: Voxels, shared) -> dict[str, Tensor]:
        return self._merged(lambda loss, at: loss._formula(v, shared[at]))

    def _terms(self, v: Voxels, shared):
        return self._merged(lambda loss, at: loss._terms(v, shared[at]))
