"""Volumes as the method knows them: where their voxels lie in the patient, and what was sampled of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from nnunet_calib.fewshot.chunks import Landmarks, landmarks
from nnunet_calib.fewshot.prior import whole_volumes


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


@dataclass(frozen=True)
class Support:
    """Sampled voxels of an annotated volume.

    Attributes:
        scan: the volume.
        index: int64 (N,), into the flat volume.
        target: bool (N,).
        weight: float64 (N,), voxels that each stands for.
        features: of each fold float32 (N, F).
        structure_mm3: volume of the structure.
        cut: the structure touches an end of the volume.
        part: int64 (N,), chunk of each voxel where the pairing is given; None: by the extent.
    """

    scan: Scan
    index: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    features: list[Tensor]
    structure_mm3: float
    cut: bool = False
    part: np.ndarray | None = None
