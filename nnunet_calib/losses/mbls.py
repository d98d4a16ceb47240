"""Margin-based label smoothing.

    L = CE + weight * mean over voxels and classes of max(0, max_k z_k - z_c - margin)

Liu et al., The devil is in the margin: margin-based label smoothing for network calibration, CVPR 2022;
Murugesan et al., Calibrating segmentation networks with margin-based label smoothing, Medical Image Analysis 2023.
"""

from torch import Tensor
from torch.nn.functional import relu

from nnunet_calib.losses.base import (
    CalibrationLoss,
    choice,
    cross_entropy,
    masked_sum,
    number,
    sum_over_classes,
    voxel_count,
)


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

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        z_max = z.amax(dim=1, keepdim=True)

        def excess(_: int, z_c: Tensor) -> Tensor:
            hinge = relu(z_max - z_c - self.margin)
            return masked_sum(hinge if self.penalty == "l1" else hinge.square(), valid)

        return {
            "cross_entropy": cross_entropy(z, target, valid),
            "margin": sum_over_classes(excess, z) / (voxel_count(target, valid) * z.shape[1]),
        }

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["cross_entropy"] + self.weight * parts["margin"]
