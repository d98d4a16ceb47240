"""Neighbour-aware calibration.

    L = CE + weight * mean over voxels and classes of |q_c - z_c|,    q: nnunet_calib.losses.neighbours
    balanced:  L = CE + weight * (mean over W + mean over M of the mean over classes of |q_c - z_c|)

Murugesan et al., Trust your neighbours: penalty-based constraints for model calibration, MICCAI 2023;
Neighbor-aware calibration of segmentation networks with penalty-based constraints, Medical Image Analysis 2025.

In the published form one mean over all voxels is mostly one over the settled ones, whose neighbourhood is of one class
and right: their logits are pulled to 1 and 0, so background that was rightly sure becomes less so. ``balanced``, an
option of this package, leaves them out: W are the voxels whose most likely class is wrong, M the others whose
neighbourhood holds more than one class; each has a mean of its own, however few they are, over the batch of all
processes (docs/results/trainers.md).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.meep import wrong_voxels
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget
from nnunet_calib.losses.processes import mean_over_processes
from nnunet_calib.losses.values import BORDERS, PRIORS, choice, flag, number, odd
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term

_ONE_CLASS = 1 - 1e-4  # a share above this is of a neighbourhood of one class
_LEAST_VOXELS = 1e-6  # less than one voxel over any number of processes


class _Shared(NamedTuple):
    """Of a batch: the soft target, and slab by slab what each voxel weighs, if not all the same."""

    q: SoftTarget
    weights: Iterator[Tensor] | None


class NACLLoss(CalibrationLoss):
    """Cross-entropy plus the distance of the logits from the classes' shares in the neighbourhood.

    Args:
        weight: of the penalty.
        kernel_size: odd number of voxels, or one for each spatial axis (anisotropic data: ``(1, 3, 3)``).
        penalty: "l1" or "l2".
        on: "logits" (the paper's tables) or "probabilities".
        prior: "mean" or "gaussian" (the filter of SVLS).
        sigma: of the gaussian prior, in voxels.
        border: "replicate"; "background" is the authors' rule, "zero" is MONAI's. Patches have borders on every side,
            where the authors' rule calls the outside background.
        balanced: wrong voxels and mixed neighbourhoods with a mean of their own, the settled rest left out; of sigmoid
            regions in each region, pooled over regions.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    in_rows = True

    def __init__(
        self,
        weight: float = 0.1,
        kernel_size: int | Sequence[int] = 3,
        penalty: str = "l1",
        on: str = "logits",
        prior: str = "mean",
        sigma: float = 1.0,
        border: str = "replicate",
        balanced: bool = False,
        *,
        multilabel: bool = False,
    ):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)
        self.penalty = choice("penalty", penalty, ("l1", "l2"))
        self.on = choice("on", on, ("logits", "probabilities"))
        self.neighbourhood = Neighbourhood(
            odd("kernel_size", kernel_size),
            choice("prior", prior, PRIORS),
            number("sigma", sigma, minimum=0.05),
            choice("border", border, BORDERS),
        )
        self.balanced = flag("balanced", balanced)

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "penalty": self.weight}

    def _shared(self, batch: Batch) -> _Shared:
        q = SoftTarget(batch.target, batch.valid, self.neighbourhood, batch.dtype)
        return _Shared(q, self._balance(batch, q) if self.balanced else None)

    def _balance(self, batch: Batch, q: SoftTarget) -> Iterator[Tensor]:
        """What a voxel weighs: all voxels over those of its group, 0 if it is settled."""
        groups = [_groups(v, q) for v in batch]
        numbers = mean_over_processes(torch.stack([group.flatten(1).sum(dim=1) for group in groups]).sum(dim=0))
        # An empty group has no part. With several processes a mean can be a fraction of a voxel.
        each = batch.voxel_count() * (numbers > 0) / numbers.clamp(min=_LEAST_VOXELS)
        wrong, mixed = each.to(batch.dtype).unbind()
        return (group[0] * wrong + group[1] * mixed for group in groups)

    def _formula(self, v: Voxels, shared: _Shared) -> dict[str, Tensor]:
        if isinstance(v, Regions):
            inside = shared.q.rows(v.images, v.rows, range(1, 2))
            outside = shared.q.rows(v.images, v.rows, range(1))
            s_0, s_1 = (torch.zeros_like(v.z), v.z) if self.on == "logits" else ((-v.z).sigmoid(), v.p)
            penalty = (self._distance(s_0 - outside) + self._distance(s_1 - inside)) / 2
        else:
            q = shared.q.rows(v.images, v.rows, range(v.classes))
            penalty = self._distance((v.z if self.on == "logits" else v.p) - q).mean(dim=1, keepdim=True)
        if shared.weights is not None:
            penalty = next(shared.weights) * penalty
        return {"cross_entropy": -v.log_p_y, "penalty": penalty}

    def _terms(self, v: Voxels, shared: _Shared) -> dict[str, Term]:
        penalty = self._of_regions(v, shared.q) if isinstance(v, Regions) else self._of_labels(v, shared.q)
        if shared.weights is not None:
            weight, all_the_same = next(shared.weights), penalty
            penalty = Term(weight * all_the_same.values, lambda: all_the_same.slope().mul_(weight))
        return {"cross_entropy": cross_entropy_term(v), "penalty": penalty}

    def _of_labels(self, v: Voxels, q: SoftTarget) -> Term:
        s = v.z if self.on == "logits" else v.p
        difference = s - q.rows(v.images, v.rows, range(v.classes))

        def slope() -> Tensor:
            pull = self._pull(difference).div_(v.classes)
            return pull if self.on == "logits" else v.through_softmax(pull)

        return Term(self._distance(difference).mean(dim=1, keepdim=True), slope)

    def _of_regions(self, v: Regions, q: SoftTarget) -> Term:
        inside = q.rows(v.images, v.rows, range(1, 2))
        outside = 1 - inside if q.sums_to_one else q.rows(v.images, v.rows, range(1))
        if self.on == "logits":  # (0, z)
            first, second = outside, v.z - inside
        else:
            first, second = 1 - v.p - outside, v.p - inside

        def slope() -> Tensor:
            if self.on == "logits":
                return self._pull(second).div_(2)
            return v.through_softmax((self._pull(second) - self._pull(first)).div_(4))

        return Term((self._distance(first) + self._distance(second)).div_(2), slope)

    def _distance(self, difference: Tensor) -> Tensor:
        return difference.abs() if self.penalty == "l1" else difference.square()

    def _pull(self, difference: Tensor) -> Tensor:
        return difference.sign() if self.penalty == "l1" else 2 * difference


def _groups(v: Voxels, q: SoftTarget) -> Tensor:
    """Valid voxels that are wrong, and the others of a mixed neighbourhood: bool (2, b, 1 or R regions, *s)."""
    if isinstance(v, Regions):
        inside = q.rows(v.images, v.rows, range(1, 2))
        outside = 1 - inside if q.sums_to_one else q.rows(v.images, v.rows, range(1))
        largest, total = torch.maximum(inside, outside), inside + outside
    else:
        shares = q.rows(v.images, v.rows, range(v.classes))
        largest, total = shares.amax(dim=1, keepdim=True), shares.sum(dim=1, keepdim=True)
    wrong = wrong_voxels(v)
    mixed = (largest < _ONE_CLASS * total) & ~wrong  # beyond the border voxels may be of no class
    return torch.stack([wrong, mixed if v.valid is None else mixed & v.valid])
