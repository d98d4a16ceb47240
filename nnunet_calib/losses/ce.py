"""Cross-entropy, the base of most calibration losses.

L = mean over voxels of -log p_y
"""

from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss, cross_entropy


class CrossEntropyLoss(CalibrationLoss):
    """Cross-entropy over the valid voxels."""

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        return {"cross_entropy": cross_entropy(z, target, valid)}
