"""A volume as registration sees it: its image and the base model's labels on a grid that is fine enough, no finer.

The grid R spans the same field of view as the base model's grid S, and has at most half a million voxels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import ndimage

from nnunet_calib.fewshot.volume.files import Volume
from nnunet_calib.fewshot.volume.scan import Scan

MOST_VOXELS = 500_000
"""Of the grid that volumes are registered on; larger ones are made coarser."""

_BRIGHTEST = 60_000.0  # that float16 can hold
_PLATEAU = 0.01  # share of voxels of exactly 0 that are no chance
_DARK = 0.5  # percentile of the rest


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A volume as registration sees it, on a grid R over the same field of view as the base model's grid S.

    Attributes:
        image: float32 (*R), the first channel.
        base: uint8 or uint16 (*R), the base model's labels: a start is found from them.
        spacing: mm between voxels of R.
    """

    image: np.ndarray
    base: np.ndarray
    spacing: tuple[float, float, float]

    @classmethod
    def of(cls, volume: Volume, scan: Scan) -> Anatomy:
        """From a preprocessed case and what the base model sees in it."""
        return cls.of_arrays(volume.image[0], scan.base, volume.spacing)

    @classmethod
    def of_arrays(cls, image: np.ndarray, base: np.ndarray, spacing: Sequence[float]) -> Anatomy:
        """From an image float (*S) and the base model's labels integer (*S)."""
        shape = coarser(image.shape, spacing)
        size = [step * voxels for step, voxels in zip(spacing, image.shape, strict=True)]
        first, second, third = (mm / voxels for mm, voxels in zip(size, shape, strict=True))
        base = base if base.dtype in (np.uint8, np.uint16) else base.astype(np.uint16)
        # as a task file keeps it, so that a support is the same volume when it is read from there
        small = on_grid(_outlined(np.nan_to_num(image)), shape).clip(-_BRIGHTEST, _BRIGHTEST).astype(np.float16)
        return cls(small.astype(np.float32), nearest_on_grid(base, shape), (first, second, third))

    @property
    def shape(self) -> tuple[int, ...]:
        """R."""
        return self.image.shape

    @property
    def size(self) -> np.ndarray:
        """Mm from edge to edge along the axes, float64 (3,)."""
        return np.multiply(self.spacing, self.shape)

    @cached_property
    def digest(self) -> str:
        """Of all that a registration depends on."""
        found = hashlib.sha256(repr((self.shape, [round(float(step), 9) for step in self.spacing])).encode())
        for part in (self.image.astype(np.float32), self.base.astype(np.uint16)):
            found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()


def coarser(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """Shape of the grid that a volume is registered on: fine axes are made coarser until it has few enough voxels."""
    sizes = np.multiply(shape, spacing)
    low, high = min(spacing), float(sizes.max())
    if np.prod(shape, dtype=np.float64) <= MOST_VOXELS:
        return tuple(shape)
    for _ in range(60):  # bisection
        step = (low + high) / 2
        voxels = np.ceil(sizes / np.maximum(spacing, step)).clip(min=1)
        low, high = (low, step) if voxels.prod() <= MOST_VOXELS else (step, high)
    return tuple(int(n) for n in np.ceil(sizes / np.maximum(spacing, high)).clip(min=1))


def on_grid(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A map on a grid of another shape over the same field of view, linear; smoothed before where that is coarser."""
    ratios = [old / new for old, new in zip(array.shape, shape, strict=True)]
    array = np.asarray(array, dtype=np.float32)
    if max(ratios) > 1:
        array = ndimage.gaussian_filter(array, [0.4 * max(ratio - 1, 0) for ratio in ratios], mode="nearest")
    if tuple(shape) == array.shape:
        return array
    tensor = torch.from_numpy(np.ascontiguousarray(array))[None, None]
    return torch.nn.functional.interpolate(tensor, size=tuple(shape), mode="trilinear")[0, 0].numpy()


def nearest_on_grid(labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Labels on a grid of another shape over the same field of view."""
    index = [
        ((np.arange(new) + 0.5) * old / new).astype(np.int64).clip(max=old - 1)
        for old, new in zip(labels.shape, shape, strict=True)
    ]
    return labels[np.ix_(*index)]


def _outlined(image: np.ndarray) -> np.ndarray:
    """With what nnU-Net masks out as dark as the darkest.

    It sets that to 0, which is the mean of the rest: a skull-stripped brain would have no outline.
    """
    outside = image == 0
    if outside.all() or np.count_nonzero(outside) < _PLATEAU * image.size:
        return image
    return np.where(outside, np.percentile(image[~outside], _DARK), image)


def signed_distance(mask: np.ndarray, spacing: Sequence[float], cap: float) -> np.ndarray:
    """Distance to the border of a mask (*R) in mm, above 0 inside it: float32 (*R) within [-cap, cap].

    The border lies half way between the centres of voxels in and out of it.
    """
    distance = np.full(mask.shape, -cap, dtype=np.float32)
    if not mask.any():
        return distance
    reach = [int(np.ceil(cap / step)) + 1 for step in spacing]
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    near = tuple(slice(max(side.start - r, 0), side.stop + r) for side, r in zip(box, reach, strict=True))
    here = mask[near]
    half = min(spacing) / 2
    outside = ndimage.distance_transform_edt(~here, sampling=spacing) - half
    inside = half - ndimage.distance_transform_edt(here, sampling=spacing) if not here.all() else -cap
    distance[near] = -np.where(here, inside, outside)
    return distance.clip(-cap, cap)
