"""Means over the sliding window's patches, weighted by nnU-Net's Gaussian, in little more memory than a patch's height.

nnU-Net moves its patch row by row along the first axis. Rows that no window reaches any more are finished, and leave:
to an ordinary tensor or, of large volumes, to a temporary file that is mapped when all are there.
"""

import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from nnunet_calib.data.errors import UsageError
from nnunet_calib.fewshot.network.branch import BranchFeatures
from nnunet_calib.fewshot.network.features import DecoderFeatures

HALF_ABOVE = 2 << 30
"""Bytes of a fold's projections above which they are accumulated in half precision, as nnU-Net's own logits are."""

ON_DISK_ABOVE = 1 << 30
"""Bytes of the projections of all folds above which finished rows lie on disk."""

Place = Sequence[slice | int]
"""Where a window lies in the padded volume; a number is a slice of a 2d model."""


class Windows:
    """What is gathered over the windows of one fold.

    Args:
        features: read from the network.
        places: of all windows in their order.
        shape: S of the volume.
        padded: the shape that nnU-Net pads it to.
        gaussian: nnU-Net's weights, float32 (*patch); on its device results are gathered.
        weight: W, float (R, F), if projections are wanted.
        voxels: int64 (N, 3), indices into S, if their features are wanted.
        folds: that projections are kept of at the same time.
    """

    def __init__(
        self,
        features: DecoderFeatures | BranchFeatures,
        places: Sequence[Place],
        shape: Sequence[int],
        padded: Sequence[int],
        gaussian: Tensor,
        weight: Tensor | None,
        voxels: Tensor | None,
        folds: int,
    ):
        self.features, self.patch, self.gaussian = features, tuple(gaussian.shape), gaussian
        self._places = iter(places)
        _, slicer = pad_nd_image(torch.empty((1, *shape), dtype=torch.uint8), self.patch, "constant", None, True, None)
        inside = slicer[1:]
        self._rows: _Rows | None = None
        self._sampled: Tensor | None = None
        with torch.inference_mode(False):
            if weight is not None:
                self._weight = weight.detach().float()
                self._shares = _Shares(places, gaussian)
                self._rows = _Rows(len(weight), places, padded, inside, gaussian.device, folds)
            if voxels is not None:
                offset = torch.tensor([part.start for part in inside])
                self._voxels = (voxels + offset).to(gaussian.device)
                self._sampled = torch.zeros((len(voxels), features.size), device=gaussian.device)
                self._sample_total = torch.zeros(len(voxels), device=gaussian.device)

    def add(self, stages: Sequence[Tensor]) -> None:
        """Add the stages of the next window."""
        place = next(self._places)
        if self._rows is not None:
            weight = self._weight.to(stages[0].device)
            part = self.features.project(stages, weight, self.patch)[0].to(self.gaussian.device)
            # Not divided by the sum of the weights in the end: near the volume's corners the Gaussian is so small that
            # half precision would lose what it is multiplied with.
            self._rows.add(place, part.mul_(self._shares.of(place)))
        if self._sampled is not None:
            chosen, local = self._within(place)
            if len(chosen):
                here = local.to(stages[0].device)
                part = self.features.at(stages, here, self.patch).to(self.gaussian.device)
                importance = self.gaussian[tuple(local.unbind(1))]
                self._sampled.index_add_(0, chosen, part * importance[:, None])
                self._sample_total.index_add_(0, chosen, importance)

    def projected(self) -> Tensor | None:
        """Projections (R, *S) on the CPU, when all windows were added; None if none are wanted."""
        return None if self._rows is None else self._rows.finish()

    def sampled(self) -> Tensor | None:
        """Features float32 (N, F) on the CPU, when all windows were added; None if none are wanted."""
        return None if self._sampled is None else self._sampled.div_(self._sample_total[:, None]).cpu()

    def _within(self, place: Place) -> tuple[Tensor, Tensor]:
        """Which sampled voxels lie in a window, and where in it."""
        inside = torch.ones(len(self._voxels), dtype=torch.bool, device=self._voxels.device)
        local = []
        for part, index in zip(place, self._voxels.unbind(1), strict=True):
            if isinstance(part, slice):
                inside &= (index >= part.start) & (index < part.stop)
                local.append(index - part.start)
            else:
                inside &= index == part
        chosen = inside.nonzero()[:, 0]
        return chosen, torch.stack(local, dim=1)[chosen]


class _Shares:
    """What share each window has in the means of its voxels: its Gaussian, divided by the sum of all windows' there.

    Window by window: of the whole volume, the sums alone would be a float32 for each voxel.
    """

    def __init__(self, places: Sequence[Place], gaussian: Tensor):
        self._gaussian = gaussian
        # nnU-Net's windows are all combinations of starts along the axes.
        self._starts = [sorted(set(along)) for along in zip(*map(_starts, places), strict=True)]

    def of(self, place: Place) -> Tensor:
        """Of one window, float32 (*patch)."""
        total = torch.zeros_like(self._gaussian)
        near = [
            [other - own for other in starts if abs(other - own) < size]
            for starts, own, size in zip(self._starts, _starts(place), total.shape, strict=True)
        ]
        for away in itertools.product(*near):
            here = tuple(slice(max(0, a), size + min(0, a)) for a, size in zip(away, total.shape, strict=True))
            there = tuple(slice(max(0, -a), size + min(0, -a)) for a, size in zip(away, total.shape, strict=True))
            total[here] += self._gaussian[there]
        return torch.div(self._gaussian, total, out=total)


def _starts(place: Place) -> list[int]:
    return [part.start for part in place if isinstance(part, slice)]


class _Rows:
    """Sums (R, *S) of parts of windows, of which only the rows that windows still reach are held."""

    def __init__(
        self,
        channels: int,
        places: Sequence[Place],
        padded: Sequence[int],
        inside: Sequence[slice],
        device: torch.device,
        folds: int,
    ):
        spans = [_span(place) for place in places]
        # Of each window, where it or any after it begins: rows before are finished.
        begins = list(itertools.accumulate((start for start, _ in reversed(spans)), min))[::-1]
        height = max(stop - begin for (_, stop), begin in zip(spans, begins, strict=True))
        size = 4 * channels * math.prod(padded)
        kind = torch.float16 if size > HALF_ABOVE else torch.float32
        self._begins: Iterator[int] = iter(begins)
        self._held = torch.zeros((channels, height, *padded[1:]), dtype=kind, device=device)
        self._first = 0  # row of the padded volume that the held ones begin with
        self._inside = inside
        shape = (channels, *(part.stop - part.start for part in inside))
        self._kept = _File(shape, kind) if size * folds > ON_DISK_ABOVE else _Memory(shape, kind)

    def add(self, place: Place, part: Tensor) -> None:
        self._finish_before(next(self._begins))
        (start, stop), rest = _span(place), place[1:]
        rows: slice | int = start - self._first
        if isinstance(place[0], slice):
            rows = slice(start - self._first, stop - self._first)
        self._held[tuple([slice(None), rows, *rest])] += part

    def finish(self) -> Tensor:
        self._finish_before(self._first + self._held.shape[1])
        return self._kept.tensor()

    def _finish_before(self, row: int) -> None:
        """Rows before this one leave, and those that are held move up."""
        leaving, held = row - self._first, self._held
        if leaving <= 0:
            return
        rows, *others = self._inside
        low, high = max(self._first, rows.start), min(row, rows.stop)
        if low < high:
            done = held[tuple([slice(None), slice(low - self._first, high - self._first), *others])]
            self._kept.write(low - rows.start, done.cpu())
        for i in range(held.shape[1]):
            held[:, i] = held[:, i + leaving] if i + leaving < held.shape[1] else 0
        self._first = row


def _span(place: Place) -> tuple[int, int]:
    """First row of a window, and the one after its last."""
    first = place[0]
    return (first.start, first.stop) if isinstance(first, slice) else (first, first + 1)


class _Memory:
    """Rows in a tensor."""

    def __init__(self, shape: tuple[int, ...], kind: torch.dtype):
        self._tensor = torch.empty(shape, dtype=kind)

    def write(self, first: int, rows: Tensor) -> None:
        self._tensor[:, first : first + rows.shape[1]] = rows

    def tensor(self) -> Tensor:
        return self._tensor


class _File:
    """Rows in a file that goes when the tensor that is mapped to it goes."""

    def __init__(self, shape: tuple[int, ...], kind: torch.dtype):
        self._shape, self._kind = shape, torch.empty(0, dtype=kind).numpy().dtype
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, first: int, rows: Tensor) -> None:
        plane = math.prod(self._shape[2:]) * self._kind.itemsize
        try:
            for channel, values in enumerate(rows.numpy()):
                self._file.seek((channel * self._shape[1] + first) * plane)
                self._file.write(values.tobytes())
            self._file.flush()
        except OSError as error:
            size = math.prod(self._shape) * self._kind.itemsize / 1e9
            raise UsageError(
                f"{tempfile.gettempdir()}: {error.strerror}; a volume of this size takes {size:.1f} GB there for each "
                "fold; name a larger folder in the variable TMPDIR"
            ) from error

    def tensor(self) -> Tensor:
        mapped = np.memmap(self._file, self._kind, "r+", shape=self._shape)
        self._file.close()
        return torch.from_numpy(mapped)
