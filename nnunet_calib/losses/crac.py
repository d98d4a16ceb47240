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

from nnunet_calib.losses.base import CalibrationLoss, full_precision
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget
from nnunet_calib.losses.values import choice, count, number, odd
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term, masked_sum


def penalty(z: Tensor, q: Tensor, at_boundary: Tensor, margin: float, multipliers: Tensor, rho: Tensor) -> Tensor:
    """Mean over classes c and regions r of [x in r] (lambda_rc h + rho_rc / 2 h^2) in each voxel x, (b, 1, ...).

    z and q are (b, C, ...), ``at_boundary`` is bool (b, 1, ...); lambda and rho are (2, C), of boundary and inside.
    """
    (lambda_1, lambda_2), (rho_1, rho_2) = (each.view(2, 1, -1, *[1] * (z.ndim - 2)) for each in (multipliers, rho))
    lambda_rc, rho_rc = torch.where(at_boundary, lambda_1, lambda_2), torch.where(at_boundary, rho_1, rho_2)
    h = torch.where(at_boundary, (q - z).abs(), (margin * q - z).abs())
    return (lambda_rc * h + rho_rc / 2 * h**2).mean(dim=1, keepdim=True) / 2  # one of the two r is empty


_FIRST_MULTIPLIER = 1e-6
_LARGEST_MULTIPLIER = 1e6
_FALL = 0.9
# Below it lies every share of a window that holds a voxel of another label, above it what rounding leaves of 1.
_ONE_LABEL = 1 - 1e-5
_STATE = ("multipliers", "rho", "previous", "updates")


class CRaCLoss(CalibrationLoss):
    """Cross-entropy plus constraints on the logits that tighten where the validation data violate them.

    The schedule takes no part in `forward`: call `observe` with each validation batch and `update` once an epoch. Its
    state is in ``state_dict`` from the first call on. Sigmoid regions share the multipliers of their two classes.

    Args:
        margin: what the logit of the label is to be inside a structure; 5 is the authors' example, 1 stands in their
            configuration file.
        kernel_size: odd number of voxels, or one for each spatial axis (anisotropic data: ``(1, 3, 3)``).
        border: "replicate"; "background" is the authors' rule: beyond the image all is class 0.
        rho: first penalty weight; the authors have 0.1 in their example and 1 in their configuration file.
        rho_growth: factor by which a penalty weight grows.
        rho_every: epochs from one growth to the next.
        rho_max: largest penalty weight.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    in_rows = True

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
            odd("kernel_size", kernel_size), "mean", border=choice("border", border, ("replicate", "background"))
        )
        self.rho_first = number("rho", rho, minimum=1e-6)
        self.rho_growth = number("rho_growth", rho_growth, minimum=1.0)
        self.rho_every = count("rho_every", rho_every)
        self.rho_max = number("rho_max", rho_max, minimum=rho)
        for name in _STATE:
            self.register_buffer(name, None)
        self.register_buffer("_violations", None, persistent=False)
        self.register_buffer("_voxels", None, persistent=False)

    def observe(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Add the violations in a validation batch to those of the epoch; arguments and errors as in `forward`."""
        with torch.no_grad(), full_precision(logits.device):
            batch = self._batch(logits, target, valid)
            shared = self._shared(batch)
            for v in batch:
                boundary, distances = self._distances(v, shared)
                for region, members in enumerate((boundary, 1 - boundary)):
                    for classes, d in distances:
                        for c, h in zip(classes, (d.abs() * members).split(_channels(v), dim=1), strict=True):
                            self._violations[region, c] += masked_sum(h, v.valid)
            self._voxels += batch.valid_voxels()

    def update(self) -> None:
        """Set the multipliers and penalty weights from the batches observed since the last call, of all processes.

        Without a valid voxel nothing changes.
        """
        if self._voxels is None:
            return
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self._violations)
            distributed.all_reduce(self._voxels)
        # Without a question to the device, so that it is not waited for.
        seen = self._voxels > 0
        mean = (self._violations / self._voxels.clamp(min=1)).float()
        raised = (self.multipliers + self.rho * mean).clamp(_FIRST_MULTIPLIER, _LARGEST_MULTIPLIER)
        self.multipliers = torch.where(seen, raised, self.multipliers)
        self.updates = self.updates + seen
        due = seen & (self.updates > 1) & (self.updates % self.rho_every == 0)
        grown = (self.rho * self.rho_growth).clamp(max=self.rho_max)
        self.rho = torch.where(due & (mean > _FALL * self.previous), grown, self.rho)
        self.previous = torch.where(seen, mean, self.previous)
        self._violations = torch.zeros_like(self._violations)
        self._voxels = torch.zeros_like(self._voxels)

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "penalty": 1.0}

    def _shared(self, batch: Batch) -> SoftTarget:
        self._start(batch)
        return SoftTarget(batch.target, batch.valid, self.neighbourhood, batch.dtype)

    def _formula(self, v: Voxels, shared: SoftTarget) -> dict[str, Tensor]:
        q = shared.rows(v.images, v.rows, range(1, 2) if isinstance(v, Regions) else range(v.classes))
        # Classes along axis 1, the problems (of label maps one, of regions each) along axis 2.
        if isinstance(v, Regions):
            z, q = torch.stack([torch.zeros_like(v.z), v.z], dim=1), torch.stack([1 - q, q], dim=1)
        else:
            z, q = v.z.unsqueeze(2), q.unsqueeze(2)
        at_boundary = _boundary(q.amax(dim=1, keepdim=True)) > 0
        multipliers, rho = self.multipliers.to(z.dtype), self.rho.to(z.dtype)
        constraints = penalty(z, q, at_boundary, self.margin, multipliers, rho)
        return {"cross_entropy": -v.log_p_y, "penalty": constraints.squeeze(1)}

    def _terms(self, v: Voxels, shared: SoftTarget) -> dict[str, Term]:
        boundary, distances = self._distances(v, shared)
        costs = []
        for classes, d in distances:
            # Over 2 C constraints, as the authors have them: one of the two regions is empty in each voxel.
            multipliers, rho = (
                _by_region(state[:, classes.start : classes.stop].to(d.dtype) / (2 * v.classes), boundary)
                for state in (self.multipliers, self.rho)
            )
            pull = d.sign().mul_(multipliers)
            slope = torch.addcmul(pull, rho, d)
            costs.append(pull.add_(slope).mul_(d).unflatten(1, (-1, _channels(v))).sum(dim=1) / 2)
        return {"cross_entropy": cross_entropy_term(v), "penalty": Term(sum(costs[1:], costs[0]), lambda: slope)}

    def _distances(self, v: Voxels, shared: SoftTarget) -> tuple[Tensor, list[tuple[range, Tensor]]]:
        """1 at the boundary and 0 inside, (b, 1, *s); and z_c less its target for some classes at a time, (b, c, *s).

        In sigmoid regions, whose logits are (0, z), it is one class at a time, all (b, R, *s), that of z the last.
        """
        if isinstance(v, Regions):
            q = shared.rows(v.images, v.rows, range(1, 2))
            boundary = _boundary(torch.maximum(q, 1 - q))
        else:
            q = shared.rows(v.images, v.rows, range(v.classes))
            boundary = _boundary(q.amax(dim=1, keepdim=True))
        scale = self.margin + (1 - self.margin) * boundary  # inside, q is the label's one-hot vector
        d = torch.addcmul(v.z, q, scale, value=-1)
        if isinstance(v, Regions):
            return boundary, [(range(1), (q - 1) * scale), (range(1, 2), d)]
        return boundary, [(range(v.classes), d)]

    def _start(self, batch: Batch) -> None:
        """Set up the state for the classes of the first batch; later ones must have as many."""
        z = batch.logits
        shape = (2, 2 if self.multilabel else z.shape[1])
        if self.multipliers is None:
            self.multipliers = z.new_full(shape, _FIRST_MULTIPLIER, dtype=torch.float32)
            self.rho = z.new_full(shape, self.rho_first, dtype=torch.float32)
            self.previous = z.new_zeros(shape, dtype=torch.float32)
            self.updates = z.new_zeros((), dtype=torch.int64)
        if self.multipliers.shape != shape:
            raise ValueError(f"the multipliers are those of {self.multipliers.shape[1]} classes, not of {shape[1]}")
        if self._voxels is None:
            self._violations = z.new_zeros(shape, dtype=batch.exact)
            self._voxels = z.new_zeros((), dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A loss that saw no logits yet does not know the shapes.
        for name in _STATE:
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else value.clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _channels(v: Voxels) -> int:
    """Channels of a class in a slab."""
    return v.z.shape[1] if isinstance(v, Regions) else 1


def _boundary(largest_share: Tensor) -> Tensor:
    """1 where the window holds more than one label, else 0, from the share of its most frequent one."""
    return torch.lt(largest_share, _ONE_LABEL, out=largest_share.new_empty(0))


def _by_region(state: Tensor, boundary: Tensor) -> Tensor:
    """Values (2, c) of boundary and inside in each voxel."""
    at_boundary, inside = state.view(2, -1, *[1] * (boundary.ndim - 2))
    return ((at_boundary - inside) * boundary).add_(inside)
