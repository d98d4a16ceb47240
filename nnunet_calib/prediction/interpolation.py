"""Logits on the image's grid, some planes at a time: every value is the one that nnU-Net's export computes.

scipy adds up, for the eight neighbours of a voxel with the last axis fastest, ((v * w_z) * w_y) * w_x in float64, and
nnU-Net rounds the sum to the type of the logits, mostly float16. In float16 many sums lie halfway between two values,
where the last bit of float64 decides; so the same products are added in the same order here. Neighbours of weight 0 add
nothing and are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.metrics.backends import available
from nnunet_calib.prediction.grid import Axis

_DROPPED = 42  # bits of float64's fraction that float16 has not
_NORMAL = 2.0**-14  # below it float16 has a fixed step of 2^-24
_TO_STEP = 1.5 * 2.0**28  # added and taken away again, leaves multiples of 2^-24


def interpolate(
    logits: Tensor, axes: tuple[Axis, ...], start: int, stop: int, out: Tensor, backend: str = "auto"
) -> None:
    """Planes of the image's grid.

    Args:
        logits: float (C, z, y, x).
        axes: what each axis is interpolated from.
        start: first plane.
        stop: after the last plane.
        out: float32 (C, stop - start, Y, X), of any strides; takes the values that export has, which are rounded to
            the type of the logits.
        backend: "numba" (CPU and float16 only), "torch", or "auto" for the faster one.
    """
    loops = compiled_loops() if backend != "torch" and logits.device.type == "cpu" else None
    if loops is not None and logits.dtype == torch.float16:
        loops.interpolate(logits.numpy(), axes, start, stop, out.numpy())
        return
    for k in range(start, stop):
        for c in range(len(logits)):
            out[c, k - start] = _plane(logits[c], axes, k)


def interpolate_on(device: torch.device | str, logits: Tensor, axes: tuple[Axis, ...], start: int, stop: int) -> Tensor:
    """Planes of the image's grid, all classes of them at once, as a graphics card is fastest.

    Args:
        device: where they are made; the slices of the logits that they need are copied there.
        logits: float (C, z, y, x), on the CPU.
        axes: what each axis is interpolated from.
        start: first plane.
        stop: after the last plane.

    Returns:
        float32 (C, stop - start, Y, X) on the device, or float64 of float64 logits; the values of ``interpolate``.
    """
    z = axes[0]
    pairs = [(z.first[start:stop], z.before[start:stop]), (z.second[start:stop], z.after[start:stop])]
    pairs = [pair for pair in pairs if pair[1].any()]
    low, high = (int(of([index for index, _ in pairs])) for of in (np.min, np.max))
    slices = copied(logits[:, low : high + 1], device)
    sides = [_side(axis, slices.device) for axis in axes[1:]]

    def slabs() -> Iterator[Tensor]:
        for index, weights in pairs:
            place = torch.from_numpy(index - low).to(slices.device, torch.int64)
            weight = torch.from_numpy(weights).to(slices.device)[:, None, None]
            yield slices.index_select(1, place).double() * weight

    return rounded(_summed(slabs(), sides), logits.dtype)


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device."""
    return tensor.to(device)


@functools.cache
def compiled_loops() -> ModuleType | None:
    """``loops_numba`` where numba is installed (extra ``fast``)."""
    if available("auto") != "numba":
        return None
    from nnunet_calib.prediction import loops_numba

    return loops_numba


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values rounded to a type, in float32 or float64.

    torch goes from float64 to float16 by float32, which rounds twice.
    """
    if dtype != torch.float16:
        return values if dtype == torch.float64 else values.float()
    bits = values.view(torch.int64)
    half = (1 << (_DROPPED - 1)) - 1
    even = ((bits >> _DROPPED) & 1) + half
    normal = ((bits + even) & ~((1 << _DROPPED) - 1)).view(torch.float64)
    return torch.where(values.abs() < _NORMAL, (values + _TO_STEP) - _TO_STEP, normal).float()


def _plane(logits: Tensor, axes: tuple[Axis, ...], k: int) -> Tensor:
    """One plane (Y, X) of one class (z, y, x)."""
    z = axes[0]
    pairs = ((z.first[k], z.before[k]), (z.second[k], z.after[k]))
    slabs = (logits[int(source)].double() * float(weight) for source, weight in pairs if weight)
    return rounded(_summed(slabs, [_side(axis, logits.device) for axis in axes[1:]]), logits.dtype)


def _summed(slabs: Iterable[Tensor], sides: list[list[tuple[Tensor | None, Tensor]]]) -> Tensor:
    """Sum, in scipy's order, of slabs float64 (..., y, x) that are weighed along z, interpolated to (..., Y, X)."""
    total: Tensor | None = None
    for slab in slabs:
        for rows, row_weights in sides[0]:
            row = slab if rows is None else slab.index_select(-2, rows) * row_weights[:, None]
            for columns, column_weights in sides[1]:
                term = row if columns is None else row.index_select(-1, columns) * column_weights
                total = term if total is None else total + term
    assert total is not None
    return total


def _side(axis: Axis, device: torch.device) -> list[tuple[Tensor | None, Tensor]]:
    """Neighbours and their weights along an axis; None for an axis as it is."""
    if axis.is_plain:
        return [(None, torch.empty(0))]
    pairs = [(axis.first, axis.before), (axis.second, axis.after)]
    return [
        (torch.from_numpy(index).to(device, torch.int64), torch.from_numpy(weights).to(device))
        for index, weights in (pairs if axis.after.any() else pairs[:1])
    ]


def half_table() -> np.ndarray:
    """float64 (65536,): the value of every float16 by its bits."""
    with np.errstate(invalid="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
