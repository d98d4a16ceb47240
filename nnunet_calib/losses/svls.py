"""Spatially varying label smoothing.

    L = mean over voxels of -sum_c q_c log p_c,    q: "gaussian" of nnunet_calib.losses.neighbours

Islam and Glocker, Spatially varying label smoothing, IPMI 2021. For a kernel of 3 the paper's filter is exactly this q.
"""

from collections.abc import Sequence

from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget
from nnunet_calib.losses.values import number, odd
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels


class SVLSLoss(CalibrationLoss):
    """Cross-entropy with targets that are soft at the borders of structures.

    Args:
        sigma: of the Gaussian, in voxels; how the neighbours' half is shared among them. The default 2 is that of the
            comparison tables of later papers; the authors' own code has 1.
        kernel_size: odd number of voxels, or one for each spatial axis (anisotropic data: ``(1, 3, 3)``).
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    in_rows = True

    def __init__(self, sigma: float = 2.0, kernel_size: int | Sequence[int] = 3, *, multilabel: bool = False):
        super().__init__(multilabel=multilabel)
        self.neighbourhood = Neighbourhood(odd("kernel_size", kernel_size), "gaussian", number("sigma", sigma))

    def _weights(self) -> dict[str, float]:
        return {"soft_cross_entropy": 1.0}

    def _shared(self, batch: Batch) -> SoftTarget:
        return SoftTarget(batch.target, batch.valid, self.neighbourhood, batch.dtype)

    def _formula(self, v: Voxels, shared: SoftTarget) -> dict[str, Tensor]:
        if isinstance(v, Regions):
            return {"soft_cross_entropy": v.soft_cross_entropy(shared.rows(v.images, v.rows, range(1, 2)))}
        q = shared.rows(v.images, v.rows, range(v.classes))
        return {"soft_cross_entropy": -(q * v.log_p).sum(dim=1, keepdim=True)}

    def _terms(self, v: Voxels, shared: SoftTarget) -> dict[str, Term]:
        q = shared.rows(v.images, v.rows, range(1, 2) if isinstance(v, Regions) else range(v.classes))
        values = v.soft_cross_entropy(q) if isinstance(v, Regions) else -(q * v.log_p).sum(dim=1, keepdim=True)
        return {"soft_cross_entropy": Term(values, lambda: v.p - q)}
