"""Label smoothing.

    L = (1 - alpha) CE + alpha * mean over voxels and classes of -log p_c

Szegedy et al., Rethinking the Inception architecture, CVPR 2016. Equal to
``torch.nn.CrossEntropyLoss(label_smoothing=alpha)``.
"""

from typing import Any

from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.values import number
from nnunet_calib.losses.voxelwise import Regions, Term, Voxels, cross_entropy_term


class LabelSmoothingLoss(CalibrationLoss):
    """Cross-entropy with the share ``alpha`` of each label spread evenly over all classes.

    Args:
        alpha: 0 is the cross-entropy, 1 ignores the labels.
        multilabel: sigmoid regions.

    Raises:
        ValueError: alpha is outside [0, 1].
    """

    def __init__(self, alpha: float = 0.1, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.alpha = number("alpha", alpha, maximum=1.0)

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1 - self.alpha, "uniform": self.alpha}

    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        return {"cross_entropy": -v.log_p_y, "uniform": uniform(v)}

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        return {"cross_entropy": cross_entropy_term(v), "uniform": uniform_term(v)}


def uniform(v: Voxels) -> Tensor:
    """Mean over classes of -log p_c."""
    return v.soft_cross_entropy(0.5) if isinstance(v, Regions) else -v.log_p.mean(dim=1, keepdim=True)


def uniform_term(v: Voxels) -> Term:
    """The same with its slope."""
    return Term(uniform(v), lambda: v.p - 1 / v.classes)
