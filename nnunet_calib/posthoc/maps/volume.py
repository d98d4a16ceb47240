"""A calibrator on a whole volume, part after part."""

import itertools
from collections.abc import Iterator

import numpy as np

from nnunet_calib.posthoc.maps.calibrator import Calibrator

_SLAB = 1 << 18  # probabilities calibrated at once: all that is made of them stays in the processor's cache
_ROW = 1 << 15  # voxels at once, at most: what torch does to more it spreads over threads, which wait for each other
_TILE = 64  # voxels along each side, for methods that look around


def calibrate_case(calibrator: Calibrator, probabilities: np.ndarray) -> np.ndarray:
    """Calibrate all probabilities of a case, in parts, so that little more memory is needed than for the result.

    Args:
        calibrator: fitted.
        probabilities: float (C, z, y, x), values in [0, 1].

    Returns:
        The same shape and type.

    Raises:
        ValueError: another number of channels than the calibrator was fitted to.
    """
    calibrated = probabilities.copy()
    volume = taken_apart(calibrator, calibrated)
    for place, _, part in calibrated_parts(calibrator, volume):
        copy_into(part, volume[place])
    return calibrated


def taken_apart(calibrator: Calibrator, volume: np.ndarray) -> np.ndarray:
    """A volume (C, z, y, x), or rows of voxels (C, n) where each voxel is calibrated on its own; a view."""
    return volume if calibrator.margin else volume.reshape(len(volume), -1)


def calibrated_parts(
    calibrator: Calibrator, volume: np.ndarray
) -> Iterator[tuple[tuple[slice, ...], np.ndarray, np.ndarray]]:
    """Where a part of the volume lies, its probabilities (C, ...) float32 or float64, and what they become.

    Every part may be overwritten when it has come: neighbours are seen as they were.
    """
    source = volume.copy() if calibrator.margin else volume
    for outer, inner, target in _tiles(len(volume), volume.shape[1:], calibrator.margin):
        part = in_full(source[outer])
        yield target, part[inner], calibrator.calibrate(part, volume.dtype)[inner]


def in_full(part: np.ndarray) -> np.ndarray:
    """The part itself; of half precision, a copy in float32."""
    if part.dtype != np.float16:
        return part
    full = np.empty(part.shape, dtype=np.float32)
    copy_into(part, full)
    return full


def copy_into(source: np.ndarray, target: np.ndarray) -> None:
    """Copy (C, ...) into an array of perhaps another type; numpy converts half precision one value at a time."""
    if source.dtype != target.dtype and np.float16 in (source.dtype, target.dtype):
        import torch  # not before it is needed: a wrong folder is told at once

        for one, other in zip(source, target, strict=True):
            torch.from_numpy(other).copy_(torch.from_numpy(one))
    else:
        target[...] = source


def _tiles(channels: int, shape: tuple[int, ...], margin: int) -> Iterator[tuple[tuple[slice, ...], ...]]:
    """Boxes that cover a volume (C, ...): with their margin, the box within that, and where it lies in the volume."""
    size = (_TILE,) * 3 if margin else (min(_ROW, max(1, _SLAB // channels)),)
    every = slice(None)
    for corner in itertools.product(*(range(0, length, step) for length, step in zip(shape, size, strict=True))):
        sides = [(a, min(a + step, length), length) for a, step, length in zip(corner, size, shape, strict=True)]
        yield (
            (every, *(slice(max(0, a - margin), min(length, b + margin)) for a, b, length in sides)),
            (every, *(slice(min(a, margin), min(a, margin) + b - a) for a, b, _ in sides)),
            (every, *(slice(a, b) for a, b, _ in sides)),
        )
