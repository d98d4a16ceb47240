"""Volumes as the method knows them: where their voxels lie in the patient, and what was sampled of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.volume.files import Volume
from nnunet_calib.fewshot.volume.frame import Landmarks, landmarks

_SLAB = 1 << 24  # logits at once
_BODY_VOXELS = 50  # of a class that tells anything of a body's size


@dataclass(frozen=True)
class Scan:
    """Where the voxels S of a volume lie in the patient, and what the base model sees there.

    Attributes:
        spacing: mm along the axes of S.
        axes: of each axis of S its patient axis and direction, as ``Volume.axes``.
        base: integer (*S), the base model's labels.
    """

    spacing: tuple[float, float, float]
    axes: tuple[tuple[int, int], ...]
    base: np.ndarray

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.spacing))

    @cached_property
    def size(self) -> np.ndarray:
        """Mm from edge to edge along the patient axes, float64 (3,)."""
        size = np.empty(3)
        for (axis, _), step, voxels in zip(self.axes, self.spacing, self.base.shape, strict=True):
            size[axis] = step * voxels
        return size

    def mm(self, index: np.ndarray) -> np.ndarray:
        """Places (N, 3) along the patient axes of indices (N,) into the flat volume, mm from its edge."""
        found = np.empty((len(index), 3))
        for here, (axis, direction), step, voxels in zip(
            np.unravel_index(index, self.base.shape), self.axes, self.spacing, self.base.shape, strict=True
        ):
            along = (here + 0.5) * step
            found[:, axis] = along if direction > 0 else step * voxels - along
        return found

    @cached_property
    def landmarks(self) -> Landmarks:
        """Of the base classes, along the patient axes."""
        order = [next(i for i, (axis, _) in enumerate(self.axes) if axis == wanted) for wanted in range(3)]
        turned = np.flip(self.base, tuple(i for i, (_, direction) in enumerate(self.axes) if direction < 0)).transpose(
            order
        )
        classes = [int(c) for c in np.unique(self.base) if c > 0]
        return landmarks(turned, classes, [self.spacing[i] for i in order])

    @cached_property
    def body(self) -> dict[int, float]:
        """Volumes of the base classes that are whole in it, mm3."""
        return whole_volumes(self.base, self.voxel_mm3)


def scan_of(model: BaseModel, volume: Volume, logits: Tensor) -> Scan:
    """Where a volume lies and what the base model sees there, from its logits (C, *S)."""
    labels = np.empty(volume.shape, dtype=np.uint8 if max(model.dataset.labels) < 256 else np.uint16)
    rows = max(1, _SLAB // max(1, logits[:, 0].numel()))
    for first in range(0, len(labels), rows):
        part = logits[:, first : first + rows].float().cpu()
        labels[first : first + rows] = np.asarray(model.label_manager.convert_logits_to_segmentation(part))
    return Scan(volume.spacing, volume.axes, labels)


def whole_volumes(labels: np.ndarray, voxel_mm3: float) -> dict[int, float]:
    """Volume in mm3 of the classes above 0 that touch no end of the volume; labels integer (z, y, x).

    Classes of less than 50 voxels are left out: a few stray ones say nothing of the body's size.
    """
    counts = np.bincount(labels.ravel())
    cut = set[int]()
    for axis, length in enumerate(labels.shape):
        if length > 1:  # a single slice has no ends
            ends = np.moveaxis(labels, axis, 0)
            cut |= set(np.unique(ends[0]).tolist()) | set(np.unique(ends[-1]).tolist())
    return {
        int(c): float(counts[c] * voxel_mm3)
        for c in np.flatnonzero(counts >= _BODY_VOXELS)
        if c > 0 and int(c) not in cut
    }
