"""Losses under trial, for trainers of the evidence harness. What wins on validation patients becomes an option.

``BalancedNACLLoss``:

    L = CE + weight * (mean over M of d + mean over W of d [+ mean over S of d]),   d = mean over classes of |q_c - z_c|

NACL's distance with groups of voxels that weigh the same, however few they are: W, whose most likely class is wrong;
M, the others in whose neighbourhood labels differ; S, the settled rest. In the published form one mean over all voxels
is mostly one over S, whose logits it pulls to 1 and 0: background that was right to be sure becomes less so.

``ForegroundDCALoss``: both means of DCA over the voxels that the label or the network calls a structure.
``MEEPDCALoss``: MEEP makes the wrong voxels doubtful, DCA holds the mean confidence at the accuracy meanwhile.
"""

import torch
from torch import Tensor

from nnunet_calib.losses import DCALoss, MEEPLoss, NACLLoss
from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.voxelwise import Batch, Regions, Voxels, masked_sum


class BalancedNACLLoss(NACLLoss):
    """NACL with a mean of its own for mixed, wrong and settled voxels.

    Args:
        weight: of the sum of the means.
        settled: whether the settled voxels have a part in it.
        multilabel: sigmoid regions are not supported.
    """

    def __init__(self, weight: float = 0.03, settled: bool = False, *, multilabel: bool = False):
        if multilabel:
            raise ValueError("this variant is for labels, not for regions")
        super().__init__(weight=weight)
        self.settled = settled

    def _groups(self, v: Voxels, shared) -> list[Tensor]:
        """Bool (b, 1, *s), disjoint: wrong, mixed and, if it has a part, settled voxels."""
        q = shared.rows(v.images, v.rows, range(v.classes))
        wrong = wrong_voxels(v)
        valid = torch.ones_like(wrong) if v.valid is None else v.valid
        mixed = (q.amax(dim=1, keepdim=True) < 1 - 1e-4) & ~wrong & valid
        return [wrong, mixed, *([~wrong & ~mixed & valid] if self.settled else [])]

    def _shared(self, batch: Batch):
        shares = super()._shared(batch)
        numbers = torch.stack([torch.stack([g.sum() for g in self._groups(v, shares)]) for v in batch]).sum(dim=0)
        # Means over all voxels are taken later: a voxel of a group counts as many as there are for each of the group.
        return shares, (batch.voxel_count() * (numbers > 0) / numbers.clamp(min=1)).to(batch.dtype)

    def _formula(self, v: Voxels, shared) -> dict[str, Tensor]:
        assert not isinstance(v, Regions)
        shares, weights = shared
        groups = self._groups(v, shares)
        weight = torch.stack([w * group for w, group in zip(weights, groups, strict=True)]).sum(dim=0)
        terms = super()._formula(v, shares)
        return terms | {"penalty": weight * terms["penalty"]}

    def _terms(self, v: Voxels, shared):
        return super(NACLLoss, self)._terms(v, shared)  # autograd differentiates the formula


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
