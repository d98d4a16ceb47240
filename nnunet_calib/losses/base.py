"""What all calibration losses share: float32, the voxels that count, sigmoid regions as two-class problems."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint


class CalibrationLoss(nn.Module):
    """Base class of the losses: ``forward(logits, target, valid=None) -> scalar``.

    A subclass writes `_parts`, the terms of its formula by name, and where the loss is not their plain sum, `_total`;
    or it is a `nnunet_calib.losses.voxelwise.VoxelwiseLoss`.

    Computation is in float32 (float64 for float64 logits) with autocast off. Voxels outside ``valid`` change nothing,
    whatever they hold (NaN too), and get a gradient of exactly zero; no valid voxel gives 0 with a graph.
    No operation synchronises with the GPU.

    Args:
        multilabel: logits are sigmoid regions. Each region is the two-class problem with logits (0, z), for which
            softmax is the sigmoid, and the loss is the label form on those ``B * R`` problems.
    """

    def __init__(self, *, multilabel: bool = False):
        super().__init__()
        self.multilabel = multilabel

    def forward(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """Value of the loss.

        Args:
            logits: any float dtype, shape (B, C, *S), S of 2 or 3 axes.
            target: integer (B, 1, *S) with values 0 to C-1 where valid; with ``multilabel`` bool (B, C, *S).
            valid: bool (B, 1, *S), the voxels that count; None means all.

        Returns:
            Scalar, float32 (float64 for float64 logits).

        Raises:
            ValueError: a shape or dtype is not the one above.
        """
        with full_precision(logits.device):
            return self._total(self.parts(logits, target, valid))

    def parts(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Terms of the formula by name, without their weights; arguments and errors as in `forward`."""
        with full_precision(logits.device):
            return self._parts(*self._prepare(logits, target, valid))

    def _prepare(self, logits: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Arguments of `forward` as `_parts` gets them."""
        check_shapes(logits, target, valid, self.multilabel)
        z = logits if logits.dtype == torch.float64 else logits.float()
        if self.multilabel:
            z, target, valid = _two_class_problems(z, target, valid)
        if valid is not None:
            z = torch.where(valid, z, 0)
            target = torch.where(valid, target, 0)
        return z, target.long(), valid

    def observe(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Take note of a validation batch, where a loss has weights that follow the validation data.

        Args and errors are those of `forward`.
        """
        return None

    def update(self) -> None:
        """Set these weights from what was observed since the last call; every process of a group must call it."""
        return None

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """Terms for logits z (B, C, *S), int64 target (B, 1, *S); both 0 where not valid."""
        raise NotImplementedError

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.stack(tuple(parts.values())).sum()


def at_target(values: Tensor, target: Tensor) -> Tensor:
    """``values`` of the target class, (B, C, *S) and (B, 1, *S) to (B, 1, *S)."""
    return values.gather(1, target)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, 1, *S) ``values`` over the valid voxels; 0 with a graph if there is none."""
    return masked_sum(values, valid) / voxel_count(values, valid)


def voxel_count(values: Tensor, valid: Tensor | None) -> Tensor | int:
    """Number of valid voxels of (B, C, *S) ``values``, at least 1."""
    return values[:, 0].numel() if valid is None else valid.sum().clamp(min=1)


def masked_sum(values: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of (B, 1, *S) ``values`` over the valid voxels."""
    return values.sum() if valid is None else torch.where(valid, values, 0).sum()


def cross_entropy(z: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid voxels of -log p_y."""
    return masked_mean(-at_target(log_softmax(z, dim=1), target), valid)


def sum_over_classes(term: Callable[[int, Tensor], Tensor], values: Tensor) -> Tensor:
    """``sum_c term(c, values_c)`` with values_c (B, 1, *S), one class in memory at a time.

    The intermediates of a class are computed again in the backward pass instead of being kept: what would be one or
    more tensors of the logits' size is one of a single class.
    """
    terms = [
        checkpoint(term, c, channel.unsqueeze(1), use_reentrant=False, preserve_rng_state=False)
        for c, channel in enumerate(values.unbind(1))
    ]
    return torch.stack(terms).sum(dim=0)


def equal(values: Tensor, candidates: Tensor) -> Tensor:
    """1 where equal, else 0, in the type of ``values``: several times as fast on CPU as a result in bool."""
    return torch.eq(values, candidates, out=values.new_empty(0))


def number(name: str, value: float, minimum: float = 0.0, maximum: float = float("inf")) -> float:
    """``value`` as a float.

    Raises:
        ValueError: not a finite number within [minimum, maximum].
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or value > sys.float_info.max:
        allowed = f"of at least {minimum:g}" if maximum == float("inf") else f"from {minimum:g} to {maximum:g}"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return float(value)


def count(name: str, value: int) -> int:
    """``value`` if it is a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def flag(name: str, value: bool) -> bool:
    """``value`` if it is a bool.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def full_precision(device: torch.device) -> AbstractContextManager:
    """Context without autocast on ``device``."""
    # Autocast would run relu, abs and subtraction in half precision; there is none to switch off on mps.
    return nullcontext() if device.type == "mps" else torch.autocast(device.type, enabled=False)


def _two_class_problems(z: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    regions, space = z.shape[1], z.shape[2:]
    z = z.reshape(-1, 1, *space)
    if valid is not None:
        valid = valid.expand(-1, regions, *space).reshape(-1, 1, *space)
    return torch.cat([torch.zeros_like(z), z], dim=1), target.reshape(-1, 1, *space), valid


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


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
