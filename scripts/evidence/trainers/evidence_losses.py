"""Penalties under trial, for trainers of the evidence harness. What wins on validation patients becomes an option.

    L = CE + weight * (mean over M of d + mean over W of d [+ mean over S of d]),   d = mean over classes of |q_c - z_c|

NACL's distance with groups of voxels that weigh the same, however few they are: W, whose most likely class is wrong;
M, the others in whose neighbourhood labels differ; S, the settled rest. In the published form one mean over all voxels
is mostly one over S, whose logits it pulls to 1 and 0: background that was right to be sure becomes less so.
"""

import torch
from torch import Tensor

from nnunet_calib.losses import NACLLoss
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.voxelwise import Batch, Regions, Voxels


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
