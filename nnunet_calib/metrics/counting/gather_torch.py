"""Counting with torch, on the processor or a graphics card: the same sums, a channel at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from nnunet_calib.metrics.counting.bins import Bins
from nnunet_calib.metrics.counting.gather import Tally, Volume, checked_channels
from nnunet_calib.metrics.counting.rules import Rules, bin_index, check_probabilities, confidence_cell, region_decision

_SLAB = 1 << 22  # voxels counted at once: the float64 copies stay small beside the volume, launches few


def gather_on(
    device: str, channels: Iterable[Any], volume: Volume, bins: int, threshold: float
) -> tuple[Tally, np.ndarray | None]:
    """The sums of a volume, and its top label unless multilabel; channels are arrays or tensors.

    Counts are int64 and sums float64 everywhere.
    """
    tally, counting = Tally(volume, bins, threshold), _Counting(torch.device(device), volume)
    largest = top = None
    for c, channel in enumerate(checked_channels(channels, volume)):
        p = torch.as_tensor(channel, device=counting.device)
        rules = Rules.of(_numpy_type(p), bins, threshold, torch)
        counting.add_problem(tally, c, p, rules)
        if not volume.multilabel:
            if largest is None or top is None:
                largest, top = torch.full_like(p, -1), torch.zeros(volume.size, dtype=torch.int16, device=p.device)
            larger = p > largest
            top.masked_fill_(larger, c)
            largest = torch.where(larger, p, largest)
    if largest is None or top is None:
        return tally, None
    counting.add_top(tally, largest, top, bins)
    kept = top.cpu().numpy().astype(np.min_scalar_type(volume.classes))
    return tally, kept.reshape(volume.shape)


class _Counting:
    """The volume's maps on the device, and how a slab is counted against them."""

    def __init__(self, device: torch.device, volume: Volume):
        self.device, self._volume = device, volume
        self._code = torch.from_numpy(volume.code).to(device)

    def add_problem(self, tally: Tally, c: int, p: torch.Tensor, rules: Rules) -> None:
        """Count the binary problem of class or region ``c``: p is flat, of the stored type."""
        for part, inside in self._slabs():
            truth, value = self._volume.truth(c, part)
            y = (self._on_device(truth) == value)[inside]
            code, one = self._code[part][inside].long(), p[part][inside].double()
            check_probabilities(one)
            index = rules.bin(one)
            _count(tally.classes, c, code, index, one, y)
            small = rules.negligible(one)
            _count(tally.negligible, c, code[small], index[small], one[small], y[small])
            tally.squared_error[c] += _sum_by(code, (one - y.double()).square(), self._volume.codes)
            tally.log_loss[c] += _sum_by(code[y], rules.log_loss(one[y]), self._volume.codes)
            if self._volume.multilabel:
                tally.log_loss[c] += _sum_by(code[~y], rules.log_loss_outside(one[~y]), self._volume.codes)
                _count(tally.ranked, c, code, *region_decision(one, y, torch))

    def add_top(self, tally: Tally, largest: torch.Tensor, top: torch.Tensor, bins: int) -> None:
        """Count the top label."""
        for part, inside in self._slabs():
            truth, _ = self._volume.truth(0, part)
            hit = (self._on_device(truth) == top[part])[inside]
            code, one = self._code[part][inside].long(), largest[part][inside].double()
            _count(tally.top, ..., code, bin_index(one, bins, torch), one, hit)
            _count(tally.ranked, ..., code, confidence_cell(1 - one, torch), one, hit)

    def _slabs(self):
        for start in range(0, self._volume.size, _SLAB):
            part = slice(start, min(start + _SLAB, self._volume.size))
            yield part, self._code[part] != 0

    def _on_device(self, truth: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(truth.astype(np.int32)).to(self.device)


def _count(
    bins: Bins, problem: Any, code: torch.Tensor, index: torch.Tensor, confidence: torch.Tensor, correct: torch.Tensor
) -> None:
    """Add voxels to the bins (codes, B) of one binary problem."""
    shape = bins.n[problem].shape
    cell, size = code * shape[1] + index, shape[0] * shape[1]
    bins.n[problem] += torch.bincount(cell, minlength=size).cpu().numpy().reshape(shape)
    sums = torch.bincount(cell, weights=confidence, minlength=size)
    bins.confidence[problem] += sums.cpu().numpy().reshape(shape)
    bins.correct[problem] += torch.bincount(cell[correct], minlength=size).cpu().numpy().reshape(shape)


def _sum_by(code: torch.Tensor, values: torch.Tensor, codes: int) -> np.ndarray:
    return torch.bincount(code, weights=values, minlength=codes).cpu().numpy()


def _numpy_type(p: torch.Tensor) -> np.dtype:
    return torch.empty(0, dtype=p.dtype).numpy().dtype
