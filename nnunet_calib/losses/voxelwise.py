"""A batch slab by slab, what a loss reads off a slab, and its terms."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

# Elements of a slab: on CPU a core's cache; on GPU enough to fill it (an estimate, not measured), and the dozen tensors
# of a slab's size that a loss makes stay small beside the logits.
_SLAB_ON_CPU = 2**17
_SLAB_ON_GPU = 2**21


class Term(NamedTuple):
    """Values of a term in each voxel, (b, 1, *s), and the function that makes their slope d/dz, (b, C, *s).

    In sigmoid regions both are (b, R, *s). The slope is asked for once at most, and the caller may write into it.
    """

    values: Tensor
    slope: Callable[[], Tensor]


class Voxels:
    """A slab: logits z (b, C, *s), int64 target and bool valid (b, 1, *s); z and target are 0 where not valid.

    ``images`` and ``rows`` say which part of the batch it is.
    """

    def __init__(self, z: Tensor, target: Tensor, valid: Tensor | None, images: slice, rows: slice):
        self.z = z if valid is None else torch.where(valid, z, 0)
        self.target = self._as_index(target if valid is None else torch.where(valid, target, 0))
        self.valid = valid
        self.images, self.rows = images, rows

    @staticmethod
    def _as_index(target: Tensor) -> Tensor:
        return target.long()

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.z.shape[1]

    @cached_property
    def log_p(self) -> Tensor:
        """Logarithm of the softmax, (b, C, *s)."""
        return log_softmax(self.z, dim=1)

    @cached_property
    def log_p_y(self) -> Tensor:
        """Logarithm of the label's probability, (b, 1, *s)."""
        return at_target(self.log_p, self.target)

    @cached_property
    def p(self) -> Tensor:
        """Softmax, (b, C, *s)."""
        return self.log_p.exp()

    def minus_onehot(self, values: Tensor) -> Tensor:
        """``values`` - [y = c], (b, C, *s)."""
        return values.scatter_add(1, self.target, values.new_full((), -1).expand_as(self.target))

    def through_softmax(self, slope: Tensor) -> Tensor:
        """d/dz of what has the slope d/dp = ``slope``."""
        slope = slope * self.p
        return slope.addcmul_(self.p, slope.sum(dim=1, keepdim=True), value=-1)


class Regions(Voxels):
    """A slab of sigmoid regions, each the two-class problem with logits (0, z): z and p are those of the second class.

    All tensors are (b, R, *s), ``target`` is 1 in the region and 0 outside.
    """

    def _as_index(self, target: Tensor) -> Tensor:  # type: ignore[override]
        return target.to(self.z.dtype)

    @property
    def classes(self) -> int:
        """Each region is a problem of two classes."""
        return 2

    def soft_cross_entropy(self, q: Tensor | float) -> Tensor:
        """-q log p - (1 - q) log(1 - p) = log(1 + e^z) - q z, without cancellation."""
        if self.z.requires_grad:  # for autograd, to which relu and abs have no slope at 0
            return q * softplus(-self.z, threshold=40) + (1 - q) * softplus(self.z, threshold=40)
        return (self.z.relu() - q * self.z).sub_(logsigmoid(self.z.abs()))

    @cached_property
    def log_p_y(self) -> Tensor:
        """Logarithm of the label's probability."""
        return -self.soft_cross_entropy(self.target)

    @cached_property
    def p(self) -> Tensor:
        """Probability of the region."""
        return self.z.sigmoid()

    def minus_onehot(self, values: Tensor) -> Tensor:
        """``values`` - [in the region]."""
        return values - self.target

    def through_softmax(self, slope: Tensor) -> Tensor:
        """d/dz of what has the slopes d/dp = ``slope`` in the region's class and -``slope`` in the other."""
        return 2 * slope * self.p * (1 - self.p)


def cross_entropy_term(v: Voxels) -> Term:
    """-log p_y."""
    return Term(-v.log_p_y, lambda: v.minus_onehot(v.p))


class Batch:
    """The arguments of a loss, cut into slabs; iterating gives `Voxels`, or `Regions` with ``multilabel``.

    Args:
        logits, target, valid: those of `CalibrationLoss.forward`.
        multilabel: the channels are sigmoid regions.
        in_rows: keep the spatial axes and cut along the first; False cuts anywhere.
    """

    def __init__(self, logits: Tensor, target: Tensor, valid: Tensor | None, multilabel: bool, in_rows: bool):
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        # There is no double precision on mps.
        self.exact = torch.float32 if logits.device.type == "mps" else torch.float64
        self._kind = Regions if multilabel else Voxels
        if not in_rows:
            logits, target = logits.flatten(2), target.flatten(2)
            valid = None if valid is None else valid.flatten(2)
        self.logits, self.target, self.valid = logits.detach(), target, valid

    def voxel_count(self) -> Tensor:
        """Number of valid voxels, of all regions, at least 1, in the loss' precision."""
        return self.valid_voxels().clamp(min=1).to(self.dtype)

    def valid_voxels(self) -> Tensor:
        """Number of valid voxels, of all regions, int64."""
        if self.valid is None:
            return torch.full((), self.target.numel(), device=self.target.device)
        return self.valid.sum() * self.target.shape[1]

    def __iter__(self) -> Iterator[Voxels]:
        batch, channels, length = self.logits.shape[:3]
        row = channels * self.logits[0, 0, 0].numel()
        size = _SLAB_ON_CPU * torch.get_num_threads() if self.logits.device.type == "cpu" else _SLAB_ON_GPU
        if batch * length * row <= size:
            yield self._slab(slice(0, batch), slice(0, length))
            return
        step = -(-length // -(-length * row // size))
        for image in range(batch):
            for start in range(0, length, step):
                yield self._slab(slice(image, image + 1), slice(start, min(start + step, length)))

    def _slab(self, images: slice, rows: slice) -> Voxels:
        z, target = self.logits[images, :, rows], self.target[images, :, rows]
        valid = None if self.valid is None else self.valid[images, :, rows]
        return self._kind(z.to(self.dtype).contiguous(), target, valid, images, rows)


def at_target(values: Tensor, target: Tensor) -> Tensor:
    """``values`` of the target class, (B, C, *S) and (B, 1, *S) to (B, 1, *S)."""
    return values.gather(1, target)


def masked_sum(values: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of (B, 1, *S) ``values`` over the valid voxels."""
    return values.sum() if valid is None else torch.where(valid, values, 0).sum()


def equal(values: Tensor, candidates: Tensor) -> Tensor:
    """1 where equal, else 0, in the type of ``values``: several times as fast on CPU as a result in bool."""
    return torch.eq(values, candidates, out=values.new_empty(0))
