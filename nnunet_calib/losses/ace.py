"""Average calibration error as a loss (mL1-ACE).

    L = CE + weight * mean over images b and classes c of ACE_bc
    ACE_bc = mean over the bins of p_c that are not empty of |mean p_c - mean [y = c]|

Bin k of K is ((k - 1)/K, k/K], the first with 0. The soft form shares each voxel linearly between the two nearest bin
centres, so that the shares have a gradient too.

Barfoot et al., Average calibration error: a differentiable loss for improved reliability in image segmentation, MICCAI
2024; Average calibration losses for reliable uncertainty in medical image segmentation, 2025 (the soft form).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnunet_calib.losses.base import CalibrationLoss, count, flag, number
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term

# The authors' upper end, so that rounding leaves no probability outside.
_UPPER = 1 + torch.finfo(torch.float32).eps
_LEAST_SOFT_WEIGHT = 0.01
# Neighbours are mostly of one bin: summed in turn into this many copies, no addition waits for the one before.
_COPIES = 8


class Error(NamedTuple):
    """The calibration error, and what its slope d/dp is made of in each interval of p; A classes, J intervals."""

    mean: Tensor
    """Over images and classes."""
    slope: Tensor
    """(B, A, J)"""
    rise: Tensor | None
    """(B, A, J), of soft bins: what the slope changes by from the lower bin to the upper."""


class ACELoss(CalibrationLoss):
    """Cross-entropy plus the weighted calibration error of every class in every image.

    The bins are those of one image, so there is nothing to gather in multi-GPU training: averaging the gradients of
    the processes, as DistributedDataParallel does, is the mean over the images of all processes where each has as many.
    With uneven batches (nnU-Net gives the first processes one image more where the batch size does not divide) it is
    the mean over processes of their own means, so that an image of a small batch weighs more, as it does in the
    cross-entropy. An image without a valid voxel leaves its own process' mean only.

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

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "calibration_error": self.weight}

    def _formula(self, v: Voxels, shared: Error) -> dict[str, Tensor]:
        p = self._columns(v)
        gap = self._gaps(v)  # p_c - [y = c]
        k, share = self._interval(p)  # the bin of p_c; of soft bins the lower one, and the upper one's share
        k = k.long()
        # What a voxel adds to |mean p_c - mean [y = c]| of its bin: the sign and the bin's weight are in `slope`.
        slope = shared.slope[v.images].gather(2, k)
        if share is not None and shared.rise is not None:
            slope = slope + share * shared.rise[v.images].gather(2, k)
        error = (slope * gap).unflatten(1, (-1, v.target.shape[1])).sum(dim=1)
        return {"cross_entropy": -v.log_p_y, "calibration_error": shared.mean + error - error.detach()}

    @property
    def _rate(self) -> float:
        """Bins in a unit of probability."""
        return self.bins / _UPPER

    def _terms(self, v: Voxels, shared: Error) -> dict[str, Term]:
        def slope() -> Tensor:
            j, share = self._interval(self._columns(v))
            j = j.long()
            each = shared.slope[v.images].gather(2, j)
            if share is not None and shared.rise is not None:
                each.addcmul_(shared.rise[v.images].gather(2, j), share.add_(self._gaps(v), alpha=self._rate))
            if isinstance(v, Regions):  # d/dp of the second class, less that of the first
                outside, inside = each.split(v.z.shape[1], dim=1) if self.include_background else (0, each)
                return v.through_softmax((inside - outside) / 2)
            return v.through_softmax(each if self.include_background else pad(each, (0, 0, 1, 0)))

        error = shared.mean.expand(v.target.shape)
        return {"cross_entropy": cross_entropy_term(v), "calibration_error": Term(error, slope)}

    def _shared(self, batch: Batch) -> Error:
        weight, gap, present = self._in_bins(batch)
        least = _LEAST_SOFT_WEIGHT if self.soft else 1.0
        filled = weight >= least
        regions = batch.target.shape[1]
        images = filled.unflatten(1, (-1, regions)).any(dim=3).any(dim=1).sum().clamp(min=1)
        # What a bin's error counts for in the mean.
        share = 1 / (filled.sum(dim=2, keepdim=True).clamp(min=1) * images * (weight.shape[1] // regions))
        if self.ignore_absent_classes:
            share = share * present
        share = share * filled / weight.clamp(min=least)
        error = share * gap.abs()
        # Values and slopes are means over voxels for the base class.
        slope, fall = share * gap.sign() * batch.voxel_count(), error / weight.clamp(min=least) * batch.voxel_count()
        if not self.soft:
            return Error(error.sum().to(batch.dtype), slope.to(batch.dtype), None)
        lower, upper = _ends_twice(slope)
        lower_fall, upper_fall = _ends_twice(fall)
        first = lower - self._rate * (upper_fall - lower_fall)
        return Error(error.sum().to(batch.dtype), first.to(batch.dtype), (upper - lower).to(batch.dtype))

    def _in_bins(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Voxels and their gaps p - [y = c] in each bin, (B, A, bins), and which classes are there, (B, A, 1)."""
        regions = batch.target.shape[1]
        classes = 2 * regions if self.multilabel else batch.logits.shape[1]
        columns = classes if self.include_background else classes - regions
        shape = (len(batch.logits), columns, self.bins + self.soft)
        # Voxels and gaps, of soft bins those of the lower bin before those of the upper.
        sums = batch.logits.new_zeros((4 if self.soft else 2, *shape), dtype=batch.exact)
        members = batch.logits.new_zeros((*shape[:2], 1), dtype=batch.exact)
        for v in batch:
            counted = torch.ones_like(v.z[:, :1]) if v.valid is None else v.valid.to(v.z.dtype)
            j, share = self._interval(self._columns(v))
            gap = self._gaps(v) if v.valid is None else self._gaps(v) * counted
            values = [counted.expand_as(gap), gap]
            if share is not None:
                values = [side * value for value in values for side in (1 - share, share)]
            into = _spread(j, shape[2])
            for total, value in zip(sums, values, strict=True):
                total[v.images] += _scatter(into, value, shape[2])
            members[v.images] += self._members(v, counted, classes)[:, classes - columns :]
        if not self.soft:
            return sums[0], sums[1], members > 0
        return _into_bins(*sums[:2]), _into_bins(*sums[2:]), members > 0

    def _columns(self, v: Voxels) -> Tensor:
        """Probabilities of the classes that count, (b, A, n); of regions all outsides come before all insides."""
        if isinstance(v, Regions):
            return torch.cat([(-v.z).sigmoid(), v.p], dim=1) if self.include_background else v.p
        return v.p if self.include_background else v.p[:, 1:]

    def _gaps(self, v: Voxels) -> Tensor:
        """Gaps p - [y = c] of the same."""
        gap = v.minus_onehot(v.p)
        if isinstance(v, Regions):
            return torch.cat([-gap, gap], dim=1) if self.include_background else gap
        return gap if self.include_background else gap[:, 1:]

    @staticmethod
    def _members(v: Voxels, counted: Tensor, classes: int) -> Tensor:
        """Voxels of each class, (b, A, 1), the background included."""
        if isinstance(v, Regions):
            return torch.cat([(1 - v.target) * counted, v.target * counted], dim=1).sum(dim=2, keepdim=True)
        return _scatter(_spread(v.target.int(), classes), counted, classes).transpose(1, 2)

    def _interval(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """Number of the bin, int32; of soft bins that of the interval between centres, and the upper bin's share."""
        position = p * self._rate
        if not self.soft:
            return position.int().clamp_(0, self.bins - 1), None
        j = position.add_(0.5).int().clamp_(0, self.bins)  # not a number is of no interval
        return j, position.sub_(j)


def _spread(j: Tensor, intervals: int) -> Tensor:
    """Numbers ``j`` in the first of `_COPIES` tables of ``intervals`` to those in all of them in turn, int64."""
    copy = torch.arange(j.shape[2], dtype=j.dtype, device=j.device).remainder_(_COPIES)
    return (j + intervals * copy).long()


def _scatter(into: Tensor, values: Tensor, intervals: int) -> Tensor:
    """Sums of (b, A, n) ``values`` by interval, (b, A, intervals), for the places ``into`` that `_spread` gives."""
    sums = values.new_zeros((*values.shape[:2], _COPIES * intervals)).scatter_add_(2, into, values)
    return sums.unflatten(2, (_COPIES, intervals)).sum(dim=2)


def _into_bins(lower: Tensor, upper: Tensor) -> Tensor:
    """Sums of the K bins, (B, A, K), from the shares of both neighbours of K + 1 intervals.

    Beyond the outer centres there is but one neighbour.
    """
    bins = lower[:, :, 1:] + upper[:, :, :-1]
    bins[:, :, 0] += lower[:, :, 0]
    bins[:, :, -1] += upper[:, :, -1]
    return bins


def _ends_twice(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (B, A, K) of the bins to those of the lower and of the upper neighbour of the K + 1 intervals."""
    return torch.cat([values[:, :, :1], values], dim=2), torch.cat([values, values[:, :, -1:]], dim=2)
