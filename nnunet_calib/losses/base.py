"""What all calibration losses share: the voxels that count, value and gradient in one pass, slab by slab."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_calib.losses.voxelwise import Batch, Term, Voxels, masked_sum

# As many logits are not all from 0 to 1 by chance.
_ENOUGH = 1000


class CalibrationLoss(nn.Module, ABC):
    """Base class of the losses: ``forward(logits, target, valid=None) -> scalar``.

    A loss is a weighted sum of means over voxels. A subclass writes `_formula`, the terms in every voxel, and
    `_weights`; what a voxel's term needs to know of the whole batch it finds in `_shared`. That is enough: autograd
    differentiates the formula. `_terms` may be overridden with slopes in closed form, which save time.

    The batch is read slab by slab: small enough for a CPU's cache, a few kernels on a GPU. Value and gradient are
    computed together, and the backward pass scales the gradient and gives it away: no other tensor of the logits' size
    is ever in memory. It can be done once a graph and not twice over: there are no second derivatives, and
    `torch.func` transforms and ``torch.compile(fullgraph=True)`` of the loss itself are not supported (nnU-Net compiles
    the network, not the loss).

    Computation is in float32 (float64 for float64 logits) with autocast off. Voxels outside ``valid`` change nothing,
    whatever they hold (NaN too), and get a gradient of exactly zero; no valid voxel gives 0 with a graph.
    No operation synchronises with the GPU, but for a look at the values of the first batch: see `forward`.

    Args:
        multilabel: logits are sigmoid regions. Each region is the two-class problem with logits (0, z), for which
            softmax is the sigmoid, and the loss is the label form on those ``B * R`` problems, in z alone.
    """

    in_rows = False
    """Slabs are rows of the first spatial axis (for losses that look at neighbours), otherwise any run of voxels."""

    def __init__(self, *, multilabel: bool = False):
        super().__init__()
        self.multilabel = multilabel
        self._checked = False  # the values of a first batch

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """Value of the loss.

        Args:
            logits: any float dtype, shape (B, C, *S), S of 2 or 3 axes.
            target: integer (B, 1, *S) with values 0 to C-1 where valid; with ``multilabel`` bool (B, C, *S).
            valid: bool (B, 1, *S), the voxels that count; None means all.

        Returns:
            Scalar, float32 (float64 for float64 logits).

        Raises:
            ValueError: a shape or dtype is not the one above; a valid label is not one of the C classes (on CPU; on a
                GPU in the first batch); the first batch's logits are a softmax, or sigmoid regions, already.
        """
        return self._means(logits, target, valid, (self._weights(),))[0]

    def parts(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Terms of the formula by name, without their weights; arguments and errors as in `forward`."""
        names = tuple(self._weights())
        means = self._means(logits, target, valid, tuple({name: 1.0} for name in names))
        return dict(zip(names, means.unbind(), strict=True))

    def observe(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Take note of a validation batch, where a loss has weights that follow the validation data.

        Args and errors are those of `forward`.
        """
        return None

    def update(self) -> None:
        """Set these weights from what was observed since the last call; every process of a group must call it."""
        return None

    @abstractmethod
    def _weights(self) -> dict[str, float]:
        """Weight of each term in the loss."""

    @abstractmethod
    def _formula(self, v: Voxels, shared: Any) -> dict[str, Tensor]:
        """The terms of the formula in each voxel of a slab, (b, 1, *s), in sigmoid regions (b, R, *s).

        Differentiable in ``v.z``, so nothing is written in place.
        """

    def _terms(self, v: Voxels, shared: Any) -> dict[str, Term]:
        """The same with their slopes d/dz: those of autograd, unless a loss has its own in closed form."""
        z = v.z = v.z.detach().requires_grad_()
        with torch.enable_grad():
            values = self._formula(v, shared)

        def slope_of(value: Tensor) -> Tensor:
            if not value.requires_grad:
                return torch.zeros_like(z)
            return torch.autograd.grad(value, z, torch.ones_like(value), retain_graph=True)[0].clone()

        return {name: Term(value.detach(), partial(slope_of, value)) for name, value in values.items()}

    def _shared(self, batch: Batch) -> Any:
        """What the terms of every slab need to know of the whole batch."""
        return None

    def _batch(self, logits: Tensor, target: Tensor, valid: Tensor | None) -> Batch:
        """The arguments of `forward`, checked."""
        check_shapes(logits, target, valid, self.multilabel)
        if not torch.compiler.is_compiling():
            # Reading a value waits for the GPU: there the first batch has to do.
            if not self.multilabel and (target.device.type == "cpu" or not self._checked):
                check_labels(target, valid, logits.shape[1])
            if not self._checked:
                check_logits(logits, self.multilabel)
            self._checked = True
        return Batch(logits, target, valid, self.multilabel, self.in_rows)

    def _means(
        self, logits: Tensor, target: Tensor, valid: Tensor | None, rows: tuple[dict[str, float], ...]
    ) -> Tensor:
        """One weighted sum of the terms' means for each of ``rows``, (K,)."""
        batch = self._batch(logits, target, valid)
        learning = torch.is_grad_enabled() and logits.requires_grad
        return _WeightedMeans.apply(logits, target, valid, self, batch, rows, learning)

    def _sums(self, batch: Batch, rows: tuple[dict[str, float], ...], learning: bool) -> tuple[Tensor, list[Tensor]]:
        """The weighted sums over voxels, (K,), and if ``learning`` their K gradients."""
        with torch.no_grad(), full_precision(batch.logits.device):
            shared = self._shared(batch)
            gradients = [torch.empty_like(batch.logits, dtype=batch.dtype) for _ in rows] if learning else []
            sums = []
            for v in batch:
                terms = self._terms(v, shared)
                values = {name: masked_sum(term.values, v.valid) for name, term in terms.items()}
                sums.append(torch.stack([_weighted_value(values, row) for row in rows]))
                for row, gradient in zip(rows, gradients, strict=False):
                    gradient[v.images, :, v.rows] = _weighted_slope(terms, row, v.valid)
            return torch.stack(sums).sum(dim=0), gradients


class _WeightedMeans(torch.autograd.Function):
    """Means of `CalibrationLoss._sums`, whose gradients the backward pass gives away."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        loss: CalibrationLoss,
        batch: Batch,
        rows: tuple[dict[str, float], ...],
        learning: bool,
    ) -> Tensor:
        sums, ctx.gradients = loss._sums(batch, rows, learning)
        ctx.save_for_backward(logits, target, valid)
        ctx.loss, ctx.rows, ctx.count = loss, rows, batch.voxel_count()
        return sums / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, valid = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, []
        if not gradients:  # a second time through a retained graph
            _, gradients = ctx.loss._sums(ctx.loss._batch(logits, target, valid), ctx.rows, True)
        # In place: a second tensor of the logits' size would cost more time than the arithmetic.
        first, *others = (scales / ctx.count).unbind()
        total = gradients.pop(0).mul_(first)
        for gradient, scale in zip(gradients, others, strict=True):
            total.addcmul_(gradient, scale)
        return total.view(logits.shape).to(logits.dtype), None, None, None, None, None, None


def _weighted_value(values: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([weight * values[name] for name, weight in weights.items()]).sum()


def _weighted_slope(terms: dict[str, Term], weights: dict[str, float], valid: Tensor | None) -> Tensor:
    (name, weight), *others = weights.items()
    total = terms[name].slope()
    if weight != 1:
        total.mul_(weight)
    for name, weight in others:
        total.add_(terms[name].slope(), alpha=weight)
    return total if valid is None else total.mul_(valid.to(total.dtype))


def full_precision(device: torch.device) -> AbstractContextManager:
    """Context without autocast on ``device``."""
    # Autocast would run relu, abs and subtraction in half precision; there is none to switch off on mps.
    return nullcontext() if device.type == "mps" else torch.autocast(device.type, enabled=False)


def check_shapes(logits: Tensor, target: Tensor, valid: Tensor | None, multilabel: bool) -> None:
    """Refuse what `CalibrationLoss.forward` does not take.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    if not logits.is_floating_point() or logits.ndim not in (4, 5):
        raise ValueError(f"logits must be float (B, C, *S) with 2 or 3 spatial axes, got {_describe(logits)}")
    batch, classes, *space = logits.shape
    wanted = (batch, classes if multilabel else 1, *space)
    if target.shape != wanted or target.is_floating_point() or multilabel != (target.dtype == torch.bool):
        kind = "bool" if multilabel else "integer"
        raise ValueError(f"target must be {kind} of shape {wanted}, got {_describe(target)}")
    if valid is not None and (valid.shape != (batch, 1, *space) or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool of shape {(batch, 1, *space)}, got {_describe(valid)}")


@torch.no_grad()
def check_labels(target: Tensor, valid: Tensor | None, classes: int) -> None:
    """Refuse labels (B, 1, *S) that are none of the classes; reads two values, which waits for a GPU.

    Raises:
        ValueError: a valid voxel has another label than 0 to ``classes`` - 1.
    """
    if target.numel() == 0:
        return
    known = target if valid is None else torch.where(valid, target, torch.zeros_like(target))
    least, largest = (int(value) for value in torch.aminmax(known))
    if least < 0 or largest >= classes:
        raise ValueError(
            f"target holds the label {least if least < 0 else largest}, but logits of {classes} classes know 0 to "
            f"{classes - 1}; leave voxels to be ignored out with valid="
        )


@torch.no_grad()
def check_logits(logits: Tensor, multilabel: bool) -> None:
    """Refuse what is a softmax or a sigmoid already; reads a few values, which waits for a GPU.

    Raises:
        ValueError: all values are from 0 to 1 and, but for ``multilabel``, sum to 1 over the classes.
    """
    if logits.numel() == 0 or (multilabel and logits.numel() < _ENOUGH) or logits.shape[1] < 2 - multilabel:
        return
    least, largest = (float(value) for value in torch.aminmax(logits))
    if not (0 <= least < largest <= 1):
        return
    if multilabel:
        raise ValueError("logits are all from 0 to 1, as after a sigmoid; pass the network's output before it")
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    if bool(((logits.float().sum(dim=1) - 1).abs() < tolerance).all()):
        raise ValueError("logits sum to 1 over the classes, as after a softmax; pass the network's output before it")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
