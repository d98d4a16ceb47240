"""Soft targets from a voxel's neighbourhood, by separable filters, one class at a time.

    mean:      q_c(x) = share of class c among the voxels of the window around x
    gaussian:  q_c(x) = 1/2 [y(x) = c] + 1/2 (Gaussian-weighted mean of [y = c] over the other voxels of the window)

The second is the filter of SVLS (Islam and Glocker, IPMI 2021), which NACL's authors use too. Voxels that do not count
(``valid`` False) are left out of the means. Beyond the image edge, by ``border``:

    "replicate"   a voxel outside is a copy of the nearest voxel inside, its validity included
    "background"  a voxel outside is class 0 (NACL's authors; their gaussian replicates, with another centre weight
                  for kernels above 3)
    "zero"        a voxel outside is of no class, so the q_c sum to less than 1 (MONAI; its gaussian is a plain one
                  whose size follows from sigma)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BORDERS = ("replicate", "background", "zero")
PRIORS = ("mean", "gaussian")
_SMALLEST_SIGMA = 0.3


class Neighbourhood:
    """The window: its size per axis, weights and border rule.

    Args:
        kernel_size: odd number of voxels, or one for each spatial axis.
        prior: "mean" or "gaussian".
        sigma: of the Gaussian, in voxels.
        border: "replicate", "background" or "zero".

    Raises:
        ValueError: a kernel size is not odd and positive, or sigma so small that float32 would lose the neighbours.
    """

    def __init__(self, kernel_size: int | Sequence[int], prior: str, sigma: float = 1.0, border: str = "replicate"):
        sizes = kernel_size if isinstance(kernel_size, (list, tuple)) else [kernel_size]
        if not sizes or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 or k % 2 == 0 for k in sizes):
            raise ValueError(f"kernel_size must be a positive odd integer or one for each axis, got {kernel_size!r}")
        if prior == "gaussian" and border != "zero" and sigma < _SMALLEST_SIGMA:
            raise ValueError(f"sigma must be at least {_SMALLEST_SIGMA} voxels, got {sigma!r}")
        self.kernel_size = kernel_size
        self.prior = prior
        self.sigma = sigma
        self.border = border

    def taps(self, axes: int) -> list[list[float]]:
        """One-dimensional filter weights for each of the ``axes`` spatial axes.

        Raises:
            ValueError: there are more or fewer kernel sizes than axes.
        """
        sizes = [self.kernel_size] * axes if isinstance(self.kernel_size, int) else list(self.kernel_size)
        if len(sizes) != axes:
            raise ValueError(f"kernel_size {self.kernel_size!r} does not fit images of {axes} axes")
        if self.prior == "mean":
            return [[1 / size] * size for size in sizes]
        if self.border == "zero":
            return [_integrated_gaussian(self.sigma)] * axes
        return [_sampled_gaussian(size, self.sigma) for size in sizes]


class SoftTarget:
    """Soft target q of one batch; `channel` gives one class.

    Args:
        target: integer (B, 1, *S), 0 where not valid.
        valid: bool (B, 1, *S) or None.
        neighbourhood: the window.
        dtype: of the result.
    """

    def __init__(self, target: Tensor, valid: Tensor | None, neighbourhood: Neighbourhood, dtype: torch.dtype):
        self._target, self._valid, self._dtype = target, valid, dtype
        self._taps = neighbourhood.taps(target.ndim - 2)
        self._background = neighbourhood.border == "background" and neighbourhood.prior == "mean"
        # The filter of SVLS replicates for the authors of both papers.
        self._plain = neighbourhood.prior == "mean" or neighbourhood.border == "zero"
        self._replicate = neighbourhood.border == "replicate" or not self._plain
        centre = math.prod(taps[len(taps) // 2] for taps in self._taps)
        self._centre = centre
        self._centre_share = 0.5
        if neighbourhood.border == "background":
            # The authors take the neighbours' sum at index [1, 1, ..], which is the centre only of a kernel of 3.
            neighbour_sum = 1 - math.prod(taps[min(1, len(taps) - 1)] for taps in self._taps)
            self._centre_share = neighbour_sum / (neighbour_sum + 1 - centre) if centre < 1 else 1.0
        # Weight of the window's voxels that do not count; the same for every class.
        self._invalid_weight = None if valid is None else self._filter(~valid)

    def channel(self, c: int) -> Tensor:
        """q_c, (B, 1, *S); without meaning at voxels that are not valid."""
        with torch.no_grad():
            member = self._target == c
            if self._valid is not None:
                member = member & self._valid
            weight = self._filter(member)
            if self._plain:
                if self._background and c == 0:
                    weight += 1 - self._filter(torch.ones_like(member))
                return weight if self._invalid_weight is None else weight / (1 - self._invalid_weight).clamp(min=1e-6)
            return self._blend(member, weight)

    def _blend(self, member: Tensor, weight: Tensor) -> Tensor:
        """Centre and the mean of the valid neighbours; the centre alone where there is none."""
        centre = member.to(self._dtype)
        total = torch.full_like(weight, 1 - self._centre)
        if self._invalid_weight is not None:
            total -= self._invalid_weight
        neighbours = (weight - self._centre * centre) / total.clamp(min=1e-6)
        neighbours = torch.where(total > 1e-6, neighbours, centre)
        return self._centre_share * centre + (1 - self._centre_share) * neighbours

    def _filter(self, member: Tensor) -> Tensor:
        out = member.to(self._dtype)
        for axis, taps in enumerate(self._taps, start=2):
            out = _filter_axis(out, taps, axis, self._replicate)
        return out


def _filter_axis(values: Tensor, taps: list[float], axis: int, replicate: bool) -> Tensor:
    """One-dimensional correlation along ``axis`` by shifted adds; autocast would run a conv in half precision."""
    radius, size = len(taps) // 2, values.shape[axis]
    shape = list(values.shape)
    shape[axis] = radius
    if replicate:
        before, after = values.narrow(axis, 0, 1).expand(shape), values.narrow(axis, size - 1, 1).expand(shape)
    else:
        before = after = values.new_zeros(shape)
    padded = torch.cat([before, values, after], dim=axis)
    out = taps[0] * padded.narrow(axis, 0, size)
    for i, tap in enumerate(taps[1:], start=1):
        out.add_(padded.narrow(axis, i, size), alpha=tap)
    return out


def _sampled_gaussian(size: int, sigma: float) -> list[float]:
    weights = [math.exp(-(((i - size // 2) / sigma) ** 2) / 2) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def _integrated_gaussian(sigma: float) -> list[float]:
    """Weights of MONAI's GaussianFilter: the density integrated over each voxel, cut at 4 sigma."""
    tail = int(max(sigma, 0.5) * 4 + 0.5)
    scale = 1 / (math.sqrt(2) * sigma)
    return [0.5 * (math.erf(scale * (i + 0.5)) - math.erf(scale * (i - 0.5))) for i in range(-tail, tail + 1)]
