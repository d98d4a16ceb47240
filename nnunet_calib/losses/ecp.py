"""Explicit confidence penalty.

    L = CE - weight * H,    H = mean over voxels of -sum_c p_c log p_c

Pereyra et al., Regularizing neural networks by penalizing confident output distributions, ICLR workshops 2017.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.values import flag, number
from nnunet_calib.losses.voxelwise import Regions, Term, Voxels, cross_entropy_term


class ECPLoss(CalibrationLoss):
    """Cross-entropy minus the weighted entropy of the prediction.

    Args:
        weight: of the entropy.
        class_mean: divide the entropy by the number of classes, as the code of MbLS and NACL does; False is the paper.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, weight: float = 0.1, class_mean: bool = False, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)
        self.class_mean = flag("class_mean", class_mean)

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "entropy": -self.weight}

    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        return {"cross_entropy": -v.log_p_y, "entropy": entropy(v) / (v.classes if self.class_mean else 1)}

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        return {"cross_entropy": cross_entropy_term(v), "entropy": entropy_term(v, v.classes if self.class_mean else 1)}


def entropy(v: Voxels) -> Tensor:
    """H = -sum_c p_c log p_c, in nats."""
    if isinstance(v, Regions):
        return -(v.p * logsigmoid(v.z) + (-v.z).sigmoid() * logsigmoid(-v.z))
    return -(v.p * v.log_p).sum(dim=1, keepdim=True)


def entropy_term(v: Voxels, divisor: int = 1) -> Term:
    """Shannon entropy in nats, H = -sum_c p_c log p_c, over ``divisor``."""
    if isinstance(v, Regions):  # log(1 + e^-|z|) + |z| / (1 + e^|z|), without cancellation
        size = v.z.abs()
        return Term(
            (size * (-size).sigmoid() - logsigmoid(size)) / divisor,
            lambda: v.p * (v.p - 1) * v.z / divisor,
        )
    h = entropy(v) / divisor

    def slope() -> Tensor:  # -p_c (log p_c + H)
        return (v.log_p / divisor).add_(h).mul_(v.p).neg_()

    return Term(h, slope)
