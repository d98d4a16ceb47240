"""Class- and region-adaptive constraints.

    L = CE + mean over voxels x, classes c and regions r of [x in r] (lambda_rc h + rho_rc / 2 h^2)
    h = |q_c - z_c| at the boundary,  |margin q_c - z_c| inside

q is the "mean" of `nnunet_calib.losses.neighbours`; a voxel is inside where its window holds one label. The regions r
are these two. lambda and rho are the multipliers and penalty weights of an augmented Lagrangian (its function "PHR",
which for h >= 0 is the one above). With h_rc the mean over all validation voxels of [x in r] h, they become each epoch

    lambda_rc <- lambda_rc + rho_rc h_rc
    rho_rc    <- growth rho_rc    every few epochs, where h_rc did not fall by a tenth since the epoch before

Murugesan et al., Class and region-adaptive constraints for network calibration, MICCAI 2024.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from nnunet_calib.losses.base import (
    CalibrationLoss,
    choice,
    count,
    cross_entropy,
    full_precision,
    masked_sum,
    number,
    sum_over_classes,
    voxel_count,
)
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget

_FIRST_MULTIPLIER = 1e-6
_LARGEST_MULTIPLIER = 1e6
_FALL = 0.9
_STATE = ("multipliers", "rho", "previous", "updates")


class CRaCLoss(CalibrationLoss):
    """Cross-entropy plus constraints on the logits that tighten where the validation data violate them.

    The schedule takes no part in `forward`: call `observe` with each validation batch and `update` once an epoch. Its
    state is in ``state_dict`` from the first call on. Sigmoid regions share the multipliers of their two classes.

    Args:
        margin: what the logit of the label is to be inside a structure.
        kernel_size: odd number of voxels, or one for each spatial axis (anisotropic data: ``(1, 3, 3)``).
        border: "replicate"; "background" is the authors' rule: beyond the image all is class 0.
        rho: first penalty weight.
        rho_growth: factor by which a penalty weight grows.
        rho_every: epochs from one growth to the next.
        rho_max: largest penalty weight.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    # None before the first logits, whose classes and device they have.
    multipliers: Tensor
    """The lambda, float32 (2, C): boundary and inside."""
    rho: Tensor
    """Penalty weights, float32 (2, C)."""
    previous: Tensor
    """The h_rc of the epoch before, float32 (2, C)."""
    updates: Tensor
    """Number of epochs in the schedule, int64."""
    _violations: Tensor
    _voxels: Tensor

    def __init__(
        self,
        margin: float = 5.0,
        kernel_size: int | Sequence[int] = 3,
        border: str = "replicate",
        rho: float = 0.1,
        rho_growth: float = 1.2,
        rho_every: int = 10,
        rho_max: float = 10.0,
        *,
        multilabel: bool = False,
    ):
        super().__init__(multilabel=multilabel)
        self.margin = number("margin", margin)
        self.neighbourhood = Neighbourhood(
            kernel_size, "mean", border=choice("border", border, ("replicate", "background"))
        )
        self.rho_first = number("rho", rho, minimum=1e-6)
        self.rho_growth = number("rho_growth", rho_growth, minimum=1.0)
        self.rho_every = count("rho_every", rho_every)
        self.rho_max = number("rho_max", rho_max, minimum=self.rho_first)
        for name in _STATE:
            self.register_buffer(name, None)
        self.register_buffer("_violations", None, persistent=False)
        self.register_buffer("_voxels", None, persistent=False)

    def observe(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Add the violations in a validation batch to those of the epoch; arguments and errors as in `forward`."""
        with torch.no_grad(), full_precision(logits.device):
            z, target, valid = self._prepare(logits, target, valid)
            self._start(z)
            constraint = _Constraint(target, valid, self.neighbourhood, self.margin, z.dtype)
            for c, z_c in enumerate(z.split(1, dim=1)):
                h = constraint.violation(c, z_c)
                for region, members in enumerate((constraint.boundary, ~constraint.boundary)):
                    self._violations[region, c] += masked_sum(torch.where(members, h, 0), valid)
            self._voxels += target.numel() if valid is None else valid.sum()

    def update(self) -> None:
        """Set the multipliers and penalty weights from the batches observed since the last call, of all processes.

        Without a valid voxel nothing changes.
        """
        if self._voxels is None:
            return
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._violations)
            distributed.all_reduce(self._voxels)
        if self._voxels > 0:
            mean = (self._violations / self._voxels).float()
            self.multipliers = (self.multipliers + self.rho * mean).clamp(_FIRST_MULTIPLIER, _LARGEST_MULTIPLIER)
            self.updates = self.updates + 1
            if self.updates > 1 and self.updates % self.rho_every == 0:
                grown = (self.rho * self.rho_growth).clamp(max=self.rho_max)
                self.rho = torch.where(mean > _FALL * self.previous, grown, self.rho)
            self.previous = mean
        self._violations = torch.zeros_like(self._violations)
        self._voxels = torch.zeros_like(self._voxels)

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        self._start(z)
        constraint = _Constraint(target, valid, self.neighbourhood, self.margin, z.dtype)
        multipliers, rho = self.multipliers.to(z.dtype), self.rho.to(z.dtype)

        def penalty(c: int, z_c: Tensor) -> Tensor:
            h = constraint.violation(c, z_c)
            slope = torch.where(constraint.boundary, multipliers[0, c], multipliers[1, c])
            curvature = torch.where(constraint.boundary, rho[0, c], rho[1, c])
            return masked_sum((slope + curvature / 2 * h) * h, valid)

        return {
            "cross_entropy": cross_entropy(z, target, valid),
            # Over 2 C constraints, as the authors have them: one of the two regions is empty in each voxel.
            "penalty": sum_over_classes(penalty, z) / (voxel_count(target, valid) * 2 * z.shape[1]),
        }

    def _start(self, z: Tensor) -> None:
        """Set up the state for logits ``z``, the first ones; later ones must have as many classes."""
        shape = (2, z.shape[1])
        if self.multipliers is None:
            self.multipliers = z.new_full(shape, _FIRST_MULTIPLIER, dtype=torch.float32)
            self.rho = z.new_full(shape, self.rho_first, dtype=torch.float32)
            self.previous = z.new_zeros(shape, dtype=torch.float32)
            self.updates = z.new_zeros((), dtype=torch.int64)
        if self.multipliers.shape != shape:
            raise ValueError(f"the multipliers are those of {self.multipliers.shape[1]} classes, not of {shape[1]}")
        if self._voxels is None:
            # There is no double precision on mps.
            exact = torch.float32 if z.device.type == "mps" else torch.float64
            self._violations = z.new_zeros(shape, dtype=exact)
            self._voxels = z.new_zeros((), dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A loss that saw no logits yet does not know the shapes.
        for name in _STATE:
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else value.clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Constraint:
    """Targets of the logits in one batch."""

    def __init__(self, target: Tensor, valid: Tensor | None, window: Neighbourhood, margin: float, dtype: torch.dtype):
        self.boundary = _boundary(target, valid, window)
        self._q = SoftTarget(target, valid, window, dtype)
        # Inside, q is the label's one-hot vector.
        self._scale = torch.where(self.boundary, 1.0, margin).to(dtype)

    def violation(self, c: int, z_c: Tensor) -> Tensor:
        """The h of class c, (B, 1, *S)."""
        return (self._scale * self._q.channel(c) - z_c).abs()


def _boundary(target: Tensor, valid: Tensor | None, window: Neighbourhood) -> Tensor:
    """Voxels whose window holds more than one label, bool (B, 1, *S); without meaning where not valid."""
    labels = target.to(torch.int32)
    return _window_max(labels, valid, window) != -_window_max(-labels, valid, window)


def _window_max(labels: Tensor, valid: Tensor | None, window: Neighbourhood) -> Tensor:
    """Largest label among the valid voxels of the window around each voxel."""
    smallest = torch.iinfo(labels.dtype).min
    outside = 0 if window.border == "background" else smallest
    if valid is not None:
        labels = torch.where(valid, labels, smallest)
    for axis, taps in enumerate(window.taps(labels.ndim - 2), start=2):
        size, shape = labels.shape[axis], list(labels.shape)
        shape[axis] = len(taps) // 2
        beyond = labels.new_full(shape, outside)
        padded = torch.cat([beyond, labels, beyond], dim=axis)
        for i in range(len(taps)):
            labels = torch.maximum(labels, padded.narrow(axis, i, size))
    return labels
