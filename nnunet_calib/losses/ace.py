"""Average calibration error as a loss (mL1-ACE).

    L = CE + weight * mean over images b and classes c of ACE_bc
    ACE_bc = mean over the bins of p_c that are not empty of |mean p_c - mean [y = c]|

Bin k of K is ((k - 1)/K, k/K], the first with 0. The soft form shares each voxel linearly between the two nearest bin
centres, so that the shares have a gradient too.

Barfoot et al., Average calibration error: a differentiable loss for improved reliability in image segmentation, MICCAI
2024; Average calibration losses for reliable uncertainty in medical image segmentation, 2025 (the soft form).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from nnunet_calib.losses.base import CalibrationLoss, at_target, count, flag, masked_mean, number

# The authors' upper end, so that rounding leaves no probability outside.
_UPPER = 1 + torch.finfo(torch.float32).eps
_LEAST_SOFT_WEIGHT = 0.01


class ACELoss(CalibrationLoss):
    """Cross-entropy plus the weighted calibration error of every class in every image.

    The bins are those of one image, so there is nothing to gather in multi-GPU training: averaging the gradients of
    the ranks, as DistributedDataParallel does, is the mean over the images of all ranks.

    Args:
        weight: of the calibration error.
        bins: number of equal bins of [0, 1].
        soft: share each voxel between two bins. Bins with a weight below 0.01 voxels count as empty.
        ignore_absent_classes: the error of a class that is absent from the image's labels is 0; it still counts in
            the mean, as for the authors.
        include_background: the mean runs over class 0 too; for regions over "not the region" as well.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        bins: int = 20,
        soft: bool = False,
        ignore_absent_classes: bool = True,
        include_background: bool = True,
        *,
        multilabel: bool = False,
    ):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)
        self.bins = count("bins", bins)
        self.soft = flag("soft", soft)
        self.ignore_absent_classes = flag("ignore_absent_classes", ignore_absent_classes)
        self.include_background = flag("include_background", include_background)

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        log_p = log_softmax(z, dim=1)
        # Bin numbers and shares are computed again in the backward pass: kept, they would be several times the logits.
        error = checkpoint(self._mean_error, log_p, target, valid, use_reentrant=False, preserve_rng_state=False)
        return {"cross_entropy": masked_mean(-at_target(log_p, target), valid), "calibration_error": error}

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["cross_entropy"] + self.weight * parts["calibration_error"]

    def _mean_error(self, log_p: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        first = 0 if self.include_background else 1
        p = log_p[:, first:].exp().flatten(2)
        classes = torch.arange(first, log_p.shape[1], device=p.device).view(1, -1, 1)
        member = target.flatten(2) == classes
        counted = torch.ones_like(p[:, :1]) if valid is None else valid.flatten(2).to(p.dtype)

        gap, weight = self._sums(p, (p - member.to(p.dtype)) * counted, counted)
        least = _LEAST_SOFT_WEIGHT if self.soft else 1.0
        filled = weight >= least
        error = torch.where(filled, gap.abs(), 0) / weight.clamp(min=least)
        error = error.sum(dim=2) / filled.sum(dim=2).clamp(min=1)
        if self.ignore_absent_classes:
            error = error * (member & (counted > 0)).any(dim=2)
        images = filled.flatten(1).any(dim=1).sum().clamp(min=1)
        return error.sum() / (images * error.shape[1])

    def _sums(self, p: Tensor, gap: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of ``gap`` and ``counted`` in each bin, (B, C, bins), for (B, C, N) ``p`` and ``gap``."""
        if not self.soft:
            edges = torch.linspace(0, _UPPER, self.bins + 1, dtype=p.dtype, device=p.device)
            k = torch.bucketize(p.detach(), edges[1:])
            # In float32 a count would stop at 2^24.
            return self._scatter(k, gap), self._scatter(k, counted.long().expand_as(p)).to(p.dtype)
        position = (p * (self.bins / _UPPER) - 0.5).clamp(0, self.bins - 1)  # in units of bins, from the first centre
        k = position.detach().long()
        share = position - k
        above = (k + 1).clamp(max=self.bins - 1)
        return (
            self._scatter(k, (1 - share) * gap) + self._scatter(above, share * gap),
            self._scatter(k, (1 - share) * counted) + self._scatter(above, share * counted),
        )

    def _scatter(self, k: Tensor, values: Tensor) -> Tensor:
        """Sums of (B, C, N) ``values`` by their bin ``k``."""
        return values.new_zeros((*values.shape[:2], self.bins)).scatter_add(2, k, values)
