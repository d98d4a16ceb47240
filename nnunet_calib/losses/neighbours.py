"""Soft targets from a voxel's neighbourhood, by separable filters, part by part.

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
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnunet_calib.losses.voxelwise import equal

_SMALLEST_SIGMA = 0.3
# Labels of voxels that are left out of the means, and of voxels that count and belong to no class.
_IGNORED, _NO_CLASS = -1, -2
# Weights below this are what rounding leaves of none.
_LEAST = 1e-6


class Neighbourhood:
    """The window: its size per axis, weights and border rule.

    Args:
        kernel_size: odd number of voxels, or one for each spatial axis.
        prior: one of `nnunet_calib.losses.values.PRIORS`.
        sigma: of the Gaussian, in voxels.
        border: one of `nnunet_calib.losses.values.BORDERS`.

    Raises:
        ValueError: sigma is so small that float32 would lose the neighbours.
    """

    def __init__(self, kernel_size: int | Sequence[int], prior: str, sigma: float = 1.0, border: str = "replicate"):
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
    """Soft target q of one batch, computed where it is asked for: one class, or all classes in some rows.

    Args:
        target: integer (B, 1, *S); or bool regions (B, R, *S).
        valid: bool (B, 1, *S) or None.
        neighbourhood: the window.
        dtype: of the result.
    """

    def __init__(self, target: Tensor, valid: Tensor | None, neighbourhood: Neighbourhood, dtype: torch.dtype):
        taps = neighbourhood.taps(target.ndim - 2)
        self._target, self._valid, self._dtype = target, valid, dtype
        # Weights are in units of the centre's, so that those of a mean are whole numbers: added as such.
        self._taps = [[tap / line[len(line) // 2] for tap in line] for line in taps]
        self._window = 1 / math.prod(line[len(line) // 2] for line in taps)
        # What a Gaussian has beyond its last tap counts as a window's voxel of no class.
        self._cut = self._window - math.prod(sum(line) for line in self._taps)
        self._radii = [len(line) // 2 for line in taps]
        # The filter of SVLS has a rule of its own for the centre, and replicates for the authors of both papers.
        self._blends = neighbourhood.prior == "gaussian" and neighbourhood.border != "zero"
        self._centre_share = 0.5
        if neighbourhood.border == "background":
            # The authors take the neighbours' sum at index [1, 1, ..], which is the centre only of a kernel of 3.
            neighbour_sum = 1 - math.prod(line[min(1, len(line) - 1)] for line in taps)
            total = neighbour_sum + 1 - 1 / self._window
            self._centre_share = neighbour_sum / total if self._window > 1 else 1.0
        replicate = neighbourhood.border == "replicate" or self._blends
        self._beyond = None if replicate else {"background": 0, "zero": _NO_CLASS}[neighbourhood.border]
        self.sums_to_one = self._beyond != _NO_CLASS
        """The q_c of a voxel sum to 1."""

    def channel(self, c: int) -> Tensor:
        """q_c, (B, 1, *S); without meaning at voxels that are not valid."""
        return self._shares(self._all_labels, range(c, c + 1))

    def rows(self, images: slice, rows: slice, classes: range) -> Tensor:
        """The q of these classes in some images and rows of the first spatial axis, (b, C, *s).

        With regions for a target ``classes`` is ``range(1, 2)``, or ``range(1)`` for outside; the result is (b, R, *s).
        """
        return self._shares(self._labels(images, rows), classes)

    @cached_property
    def _all_labels(self) -> Tensor:
        return self._labels(slice(None), slice(0, self._target.shape[2]))

    def _labels(self, images: slice, rows: slice) -> Tensor:
        """Labels of these rows and of a margin as deep as the window's radius, the ignored ones marked."""
        radius = self._radii[0]
        start, stop = max(rows.start - radius, 0), min(rows.stop + radius, self._target.shape[2])
        labels = self._target[images, :, start:stop].to(torch.int16)
        if self._valid is not None:
            labels = torch.where(self._valid[images, :, start:stop], labels, _IGNORED)
        missing = (radius - rows.start + start, radius - stop + rows.stop)
        return _pad(labels, [missing, *((radius, radius) for radius in self._radii[1:])], self._beyond)

    @torch.no_grad()
    def _shares(self, labels: Tensor, classes: range) -> Tensor:
        candidates = torch.arange(classes.start, classes.stop, dtype=labels.dtype, device=labels.device)
        member = equal(labels, candidates.view(1, -1, *[1] * (labels.ndim - 2)))
        weight = self._weight(member)
        total = weight.new_full((), self._window)
        if self._valid is not None:
            # Not the window less the ignored: where few are valid, the difference would be of large numbers.
            total = self._weight(1 - equal(labels, labels.new_full((), _IGNORED))) + self._cut
        if not self._blends:
            return weight.div_(total.clamp(min=_LEAST))
        for axis, radius in enumerate(self._radii, start=2):
            member = member.narrow(axis, radius, member.shape[axis] - 2 * radius)
        return self._blend(member, weight, total - 1)

    def _blend(self, centre: Tensor, weight: Tensor, others: Tensor) -> Tensor:
        """The centre and the mean of the valid neighbours, of weight ``others``; the centre alone if none is valid."""
        share = torch.where(others > _LEAST, (1 - self._centre_share) / others.clamp(min=_LEAST), 0)
        rest = torch.where(others > _LEAST, others.new_full((), self._centre_share), 1)
        centre = centre.to(self._dtype)
        return weight.sub_(centre).mul_(share).addcmul_(centre, rest)

    def _weight(self, member: Tensor) -> Tensor:
        """Weight of the window's members; the outermost voxels, a radius deep, are only neighbours."""
        for axis, (taps, radius) in enumerate(zip(self._taps, self._radii, strict=True), start=2):
            size = member.shape[axis] - 2 * radius
            counts = not member.is_floating_point() and all(tap == 1 for tap in taps)
            out = member.narrow(axis, radius, size)
            for i, tap in enumerate(taps[:radius]):
                pair = member.narrow(axis, i, size) + member.narrow(axis, 2 * radius - i, size)
                out = pair.add_(out) if counts else torch.add(out.to(self._dtype), pair.to(self._dtype), alpha=tap)
            member = out
        return member.to(self._dtype)


def _pad(labels: Tensor, margins: list[tuple[int, int]], value: int | None) -> Tensor:
    """``labels`` with voxels before and after along each axis that hold ``value``; None: copies of the nearest one."""
    if value is not None:
        return pad(labels, [side for margin in reversed(margins) for side in margin], value=value)
    for axis, (before, after) in enumerate(margins, start=2):
        first, last = labels.narrow(axis, 0, 1), labels.narrow(axis, labels.shape[axis] - 1, 1)
        labels = torch.cat([first] * before + [labels] + [last] * after, dim=axis)
    return labels


def _sampled_gaussian(size: int, sigma: float) -> list[float]:
    weights = [math.exp(-(((i - size // 2) / sigma) ** 2) / 2) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def _integrated_gaussian(sigma: float) -> list[float]:
    """Weights of MONAI's GaussianFilter: the density integrated over each voxel, cut at 4 sigma."""
    tail = int(max(sigma, 0.5) * 4 + 0.5)
    scale = 1 / (math.sqrt(2) * sigma)
    return [0.5 * (math.erf(scale * (i + 0.5)) - math.erf(scale * (i - 0.5))) for i in range(-tail, tail + 1)]
