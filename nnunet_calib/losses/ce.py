"""Cross-entropy, the base of most calibration losses.

L = mean over voxels of -log p_y
"""

from typing import Any

from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.voxelwise import Term, Voxels, cross_entropy_term


class CrossEntropyLoss(CalibrationLoss):
    """Cross-entropy over the valid voxels."""

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0}

    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        return {"cross_entropy": -v.log_p_y}

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        return {"cross_entropy": cross_entropy_term(v)}
