"""Margin-based label smoothing.

    L = CE + weight * mean over voxels and classes of max(0, max_k z_k - z_c - margin)

Liu et al., The devil is in the margin: margin-based label smoothing for network calibration, CVPR 2022;
Murugesan et al., Calibrating segmentation networks with margin-based label smoothing, Medical Image Analysis 2023.
"""

from typing import Any

from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.values import choice, number
from nnunet_calib.losses.voxelwise import Regions, Term, Voxels, cross_entropy_term, equal


class MbLSLoss(CalibrationLoss):
    """Cross-entropy plus a penalty on logit distances beyond a margin.

    Args:
        margin: logit distance that costs nothing.
        weight: of the penalty.
        penalty: "l1", or "l2" for the square of the hinge (the paper's). The authors' file for l2 squares before the
            hinge, so that it pulls every distance towards the margin, zero ones too; that is not offered.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, margin: float = 5.0, weight: float = 0.1, penalty: str = "l1", *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.margin = number("margin", margin)
        self.weight = number("weight", weight)
        self.penalty = choice("penalty", penalty, ("l1", "l2"))

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "margin": self.weight}

    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        # The only distance between the logits (0, z) of a region is |z|, that of one of its two classes.
        distance = v.z.abs() if isinstance(v, Regions) else v.z.amax(dim=1, keepdim=True) - v.z
        hinge = (distance - self.margin).relu()
        cost = hinge if self.penalty == "l1" else hinge.square()
        return {
            "cross_entropy": -v.log_p_y,
            "margin": cost / 2 if isinstance(v, Regions) else cost.mean(dim=1, keepdim=True),
        }

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        z_max = None if isinstance(v, Regions) else v.z.amax(dim=1, keepdim=True)
        # The only distance between the logits (0, z) of a region is |z|.
        distance = v.z.abs() if z_max is None else z_max - v.z
        hinge = distance.sub_(self.margin).relu_()
        cost = hinge if self.penalty == "l1" else hinge.square()

        def slope() -> Tensor:
            pull = (hinge.sign() if self.penalty == "l1" else 2 * hinge).div_(v.classes)
            if z_max is None:
                return pull.mul_(v.z.sign())
            largest = equal(v.z, z_max)
            share = pull.sum(dim=1, keepdim=True) / largest.sum(dim=1, keepdim=True)
            return largest.mul_(share).sub_(pull)

        mean = cost / 2 if z_max is None else cost.mean(dim=1, keepdim=True)
        return {"cross_entropy": cross_entropy_term(v), "margin": Term(mean, slope)}
