"""Spatially varying label smoothing.

    L = mean over voxels of -sum_c q_c log p_c,    q: "gaussian" of nnunet_calib.losses.neighbours

Islam and Glocker, Spatially varying label smoothing, IPMI 2021. For a kernel of 3 the paper's filter is exactly this q.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_calib.losses.base import CalibrationLoss, masked_sum, number, sum_over_classes, voxel_count
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget


class SVLSLoss(CalibrationLoss):
    """Cross-entropy with targets that are soft at the borders of structures.

    Args:
        sigma: of the Gaussian, in voxels; how the neighbours' half is shared among them.
        kernel_size: odd number of voxels, or one for each spatial axis (anisotropic data: ``(1, 3, 3)``).
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, sigma: float = 2.0, kernel_size: int | Sequence[int] = 3, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.neighbourhood = Neighbourhood(kernel_size, "gaussian", number("sigma", sigma))

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        q = SoftTarget(target, valid, self.neighbourhood, z.dtype)
        log_p = log_softmax(z, dim=1)
        total = sum_over_classes(lambda c, log_p_c: masked_sum(-q.channel(c) * log_p_c, valid), log_p)
        return {"soft_cross_entropy": total / voxel_count(target, valid)}
