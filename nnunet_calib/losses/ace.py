"""Average calibration error as a loss (mL1-ACE).

    L = CE + weight * mean over images b and classes c of ACE_bc
    ACE_bc = mean over the bins k that are not empty of |confidence - accuracy|
    confidence = mean of p_c, accuracy = share of y = c; both over the voxels of image b whose p_c is in bin k

Bin k of K is ((k - 1)/K, k/K], the first with 0. The soft form shares each voxel linearly between the two nearest bin
centres, so that the shares have a gradient too.

Barfoot et al., Average calibration error: a differentiable loss for improved reliability in image segmentation, MICCAI
2024; Average calibration losses for reliable uncertainty in medical image segmentation, 2025 (the soft form).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.values import count, flag, number
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term


def calibration_error(n: Tensor, gap: Tensor, present: Tensor, least: float) -> Tensor:
    """Mean over images b and classes c of ACE_bc.

    Args:
        n: voxels in each bin k, (B, C, K).
        gap: their sum of p_c - [y = c]; over n, it is confidence - accuracy.
        present: 0 for classes whose ACE_bc is 0 because no voxel has their label, (B, C).
        least: with fewer voxels a bin is empty.
    """
    filled = n >= least
    difference = (gap / n.clamp(min=least)).abs()  # |confidence - accuracy|
    ACE = present * (filled * difference).sum(dim=2) / filled.sum(dim=2).clamp(min=1)
    images = filled.any(dim=2).any(dim=1).sum()  # those with a valid voxel
    return ACE.sum() / (images.clamp(min=1) * ACE.shape[1])


# The authors' upper end, so that rounding leaves no probability outside.
_UPPER = 1 + torch.finfo(torch.float32).eps
_LEAST_SOFT_WEIGHT = 0.01
# Neighbours are mostly of one bin: summed in turn into this many copies, no addition waits for the one before.
_COPIES = 8


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

    def _shared(self, batch: Batch) -> "Error":
        n, gap, present = self._in_bins(batch)
        n, gap = n.requires_grad_(), gap.requires_grad_()
        with torch.enable_grad():
            error = calibration_error(
                n,
                gap,
                present if self.ignore_absent_classes else torch.ones_like(present),
                _LEAST_SOFT_WEIGHT if self.soft else 1.0,
            )
        slopes = torch.autograd.grad(error, (n, gap))
        # The base class takes means over voxels, of values and slopes.
        of_n, of_gap = ((slope * batch.voxel_count()).to(batch.dtype) for slope in slopes)
        return Error(error.detach().to(batch.dtype), of_n, of_gap, self._rate)

    def _formula(self, v: Voxels, shared: "Error") -> dict[str, Tensor]:
        # The error of the whole batch is known. A voxel changes it by what it adds to n and gap of its bins.
        p, gap = self._columns(v), self._gaps(v)
        k, upper = self._interval(p)
        k = k.long()
        if upper is None:  # it adds 1 to n, a constant
            adds = shared.of_gap[v.images].gather(2, k) * gap
        else:
            (n_lower, n_upper), (gap_lower, gap_upper) = (
                (side[v.images].gather(2, k) for side in _ends_twice(slope)) for slope in (shared.of_n, shared.of_gap)
            )
            adds = (1 - upper) * (n_lower + gap_lower * gap) + upper * (n_upper + gap_upper * gap)
        error = adds.unflatten(1, (-1, v.target.shape[1])).sum(dim=1)
        return {"cross_entropy": -v.log_p_y, "calibration_error": shared.mean + error - error.detach()}

    def _terms(self, v: Voxels, shared: "Error") -> dict[str, Term]:
        def slope() -> Tensor:
            j, share = self._interval(self._columns(v))
            j = j.long()
            if share is None:
                each = shared.of_gap[v.images].gather(2, j)
            else:
                first, rise = (table[v.images].gather(2, j) for table in shared.of_soft_p)
                each = first.addcmul_(rise, share.add_(self._gaps(v), alpha=self._rate))
            if isinstance(v, Regions):  # d/dp of the second class, less that of the first
                outside, inside = each.split(v.z.shape[1], dim=1) if self.include_background else (0, each)
                return v.through_softmax((inside - outside) / 2)
            return v.through_softmax(each if self.include_background else pad(each, (0, 0, 1, 0)))

        error = shared.mean.expand(v.target.shape)
        return {"cross_entropy": cross_entropy_term(v), "calibration_error": Term(error, slope)}

    @property
    def _rate(self) -> float:
        """Bins in a unit of probability."""
        return self.bins / _UPPER

    def _in_bins(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Voxels and their gaps p - [y = c] in each bin, (B, A, bins), and 1 for the classes that are there, (B, A)."""
        regions = batch.target.shape[1]
        classes = 2 * regions if self.multilabel else batch.logits.shape[1]
        columns = classes if self.include_background else classes - regions
        shape = (len(batch.logits), columns, self.bins + self.soft)
        # Voxels and gaps, of soft bins those of the lower bin before those of the upper.
        sums = batch.logits.new_zeros((4 if self.soft else 2, *shape), dtype=batch.exact)
        members = batch.logits.new_zeros(shape[:2], dtype=batch.exact)
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
        present = (members > 0).to(batch.exact)
        if not self.soft:
            return sums[0], sums[1], present
        return _into_bins(*sums[:2]), _into_bins(*sums[2:]), present

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
        """Voxels of each class, (b, A), the background included."""
        if isinstance(v, Regions):
            return torch.cat([(1 - v.target) * counted, v.target * counted], dim=1).sum(dim=2)
        return _scatter(_spread(v.target.int(), classes), counted, classes)[:, 0]

    def _interval(self, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """Number of the bin, int32; of soft bins that of the interval between centres, and the upper bin's share."""
        position = p * self._rate
        if not self.soft:
            return position.int().clamp_(0, self.bins - 1), None
        j = position.add_(0.5).int().clamp_(0, self.bins)  # not a number is of no interval
        return j, position.sub_(j)


@dataclass
class Error:
    """The calibration error of a batch and its slopes; A classes, K bins."""

    mean: Tensor
    """Over images and classes."""
    of_n: Tensor
    """d/dn of a bin, (B, A, K)."""
    of_gap: Tensor
    """d/dgap, (B, A, K)."""
    rate: float
    """Bins in a unit of probability."""

    @cached_property
    def of_soft_p(self) -> tuple[Tensor, Tensor]:
        """What the slope d/dp is made of between two centres, (B, A, K + 1): at the lower one, and its rise.

        Of the derivative of the sum in `ACELoss._formula`; the rise is weighed with ``upper + rate gap``.
        """
        (n_lower, n_upper), (gap_lower, gap_upper) = _ends_twice(self.of_n), _ends_twice(self.of_gap)
        return gap_lower + self.rate * (n_upper - n_lower), gap_upper - gap_lower


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
