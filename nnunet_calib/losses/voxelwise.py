"""Losses that are means over voxels: value and gradient in one pass over the logits, slab by slab."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, logsigmoid

from nnunet_calib.losses.base import CalibrationLoss, at_target, check_shapes, full_precision, masked_sum

# Elements of a slab: on CPU a core's cache, on GPU few kernels to start and little memory.
_SLAB_ON_CPU = 2**17
_SLAB_ON_GPU = 2**24


class Term(NamedTuple):
    """Values of a term in each voxel, (b, 1, *s), and the function that makes their slope d/dz, (b, C, *s).

    In sigmoid regions both are (b, R, *s).
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
    """The arguments of a voxelwise loss, cut into slabs; iterating gives `Voxels`, or `Regions` with ``multilabel``.

    Args:
        logits, target, valid: those of `CalibrationLoss.forward`.
        multilabel: the channels are sigmoid regions.
        in_rows: keep the spatial axes and cut along the first; False cuts anywhere.
    """

    def __init__(self, logits: Tensor, target: Tensor, valid: Tensor | None, multilabel: bool, in_rows: bool):
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        self._kind = Regions if multilabel else Voxels
        if not in_rows:
            logits, target = logits.flatten(2), target.flatten(2)
            valid = None if valid is None else valid.flatten(2)
        self.logits, self.target, self.valid = logits.detach(), target, valid

    def voxel_count(self) -> Tensor:
        """Number of valid voxels, of all regions, at least 1."""
        if self.valid is None:
            return torch.full((), self.target.numel(), dtype=self.dtype, device=self.target.device)
        return (self.valid.sum() * self.target.shape[1]).clamp(min=1).to(self.dtype)

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


class VoxelwiseLoss(CalibrationLoss, ABC):
    """Base class of the losses that are a weighted sum of means over voxels, with slopes in closed form.

    A subclass writes `_terms`, each term with its slope, and `_weights`. The batch is read once, slab by slab: small
    enough for a CPU's cache, a few kernels on a GPU. Value and gradient are computed together, so that the backward
    pass only scales the gradient, the one tensor of the logits' size that is kept, and nothing else of that size is
    ever in memory. Sigmoid regions have the two-class formula in z alone.
    """

    in_rows = False
    """Slabs are rows of the first spatial axis (for losses that look at neighbours), otherwise any run of voxels."""

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """See `CalibrationLoss.forward`."""
        return self._means(logits, target, valid, (self._weights(),))[0]

    def parts(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """See `CalibrationLoss.parts`."""
        names = tuple(self._weights())
        means = self._means(logits, target, valid, tuple({name: 1.0} for name in names))
        return dict(zip(names, means.unbind(), strict=True))

    @abstractmethod
    def _weights(self) -> dict[str, float]:
        """Weight of each term in the loss."""

    @abstractmethod
    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        """The terms of the formula in a slab."""

    def _shared(self, batch: Batch) -> Any:
        """What the terms of every slab need to know of the whole batch."""
        return None

    def _means(
        self, logits: Tensor, target: Tensor, valid: Tensor | None, rows: tuple[dict[str, float], ...]
    ) -> Tensor:
        check_shapes(logits, target, valid, self.multilabel)
        learning = torch.is_grad_enabled() and logits.requires_grad
        with full_precision(logits.device):
            return _WeightedMeans.apply(logits, self, target, valid, rows, learning)


class _WeightedMeans(torch.autograd.Function):
    """One weighted sum of the terms' means for each of ``rows``, (K,); the logits' gradients are computed with them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        loss: VoxelwiseLoss,
        target: Tensor,
        valid: Tensor | None,
        rows: tuple[dict[str, float], ...],
        learning: bool,
    ) -> Tensor:
        batch = Batch(logits, target, valid, loss.multilabel, loss.in_rows)
        shared = loss._shared(batch)
        gradients = [torch.empty_like(batch.logits, dtype=batch.dtype) for _ in rows] if learning else []
        sums = []
        for v in batch:
            terms = loss._terms(v, shared)
            values = {name: masked_sum(term.values, v.valid) for name, term in terms.items()}
            sums.append(torch.stack([_weighted_value(values, row) for row in rows]))
            for row, gradient in zip(rows, gradients, strict=False):
                gradient[v.images, :, v.rows] = _weighted_slope(terms, row, v.valid)
        count = batch.voxel_count()
        ctx.save_for_backward(count, *gradients)
        ctx.logits = logits.shape, logits.dtype
        return torch.stack(sums).sum(dim=0) / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        count, *gradients = ctx.saved_tensors
        shape, dtype = ctx.logits
        first, *others = (scales / count).unbind()
        total = gradients[0] * first
        for gradient, scale in zip(gradients[1:], others, strict=True):
            total.addcmul_(gradient, scale)
        return total.view(shape).to(dtype), None, None, None, None, None


def _weighted_value(values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([weight * values[name] for name, weight in weights.items()]).sum()


def _weighted_slope(terms: dict[str, Term], weights: dict[str, float], valid: Tensor | None) -> Tensor:
    (name, weight), *others = weights.items()
    total = terms[name].slope().mul_(weight)
    for name, weight in others:
        total.add_(terms[name].slope(), alpha=weight)
    return total if valid is None else total.mul_(valid.to(total.dtype))
