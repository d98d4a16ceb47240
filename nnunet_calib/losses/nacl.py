"""Neighbour-aware calibration.

    L = CE + weight * mean over voxels and classes of |q_c - z_c|,    q: nnunet_calib.losses.neighbours

Murugesan et al., Trust your neighbours: penalty-based constraints for model calibration, MICCAI 2023;
Neighbor-aware calibration of segmentation networks with penalty-based constraints, Medical Image Analysis 2025.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget
from nnunet_calib.losses.values import BORDERS, PRIORS, choice, number, odd
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term


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

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "penalty": self.weight}

    def _shared(self, batch: Batch) -> SoftTarget:
        return SoftTarget(batch.target, batch.valid, self.neighbourhood, batch.dtype)

    def _formula(self, v: Voxels, shared: SoftTarget) -> dict[str, Tensor]:
        if isinstance(v, Regions):
            inside = shared.rows(v.images, v.rows, range(1, 2))
            outside = shared.rows(v.images, v.rows, range(1))
            s_0, s_1 = (torch.zeros_like(v.z), v.z) if self.on == "logits" else ((-v.z).sigmoid(), v.p)
            penalty = (self._distance(s_0 - outside) + self._distance(s_1 - inside)) / 2
        else:
            q = shared.rows(v.images, v.rows, range(v.classes))
            penalty = self._distance((v.z if self.on == "logits" else v.p) - q).mean(dim=1, keepdim=True)
        return {"cross_entropy": -v.log_p_y, "penalty": penalty}

    def _terms(self, v: Voxels, shared: SoftTarget) -> dict[str, Term]:
        penalty = self._of_regions(v, shared) if isinstance(v, Regions) else self._of_labels(v, shared)
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
