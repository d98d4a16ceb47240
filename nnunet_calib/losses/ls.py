"""Label smoothing.

    L = (1 - alpha) CE + alpha * mean over voxels and classes of -log p_c

Szegedy et al., Rethinking the Inception architecture, CVPR 2016. Equal to
``torch.nn.CrossEntropyLoss(label_smoothing=alpha)``.
"""

from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_calib.losses.base import CalibrationLoss, at_target, masked_mean, number


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

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        log_p = log_softmax(z, dim=1)
        return {
            "cross_entropy": masked_mean(-at_target(log_p, target), valid),
            "uniform": masked_mean(-log_p.mean(dim=1, keepdim=True), valid),
        }

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return (1 - self.alpha) * parts["cross_entropy"] + self.alpha * parts["uniform"]
