"""Where a case's logits lie in its image, and what a voxel of the image is interpolated from.

nnU-Net's export resamples logits by ``resample_data_or_seg_to_shape``: scikit-image's ``resize`` of order 1 (half-pixel
centres, the edge repeated) in float64, or in anisotropic images slice by slice with the nearest slice between them, and
rounds the result to the type of the logits. That is separable: along every axis a voxel has two neighbours and two
weights. The weights are scipy's to the last bit; tests hold them against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy.ndimage import map_coordinates

_STREAMED = "resample_data_or_seg_to_shape"


@dataclass(frozen=True)
class Axis:
    """What the voxels along one axis are interpolated from.

    Attributes:
        first, second: int32 (n,), indices of the two neighbours; twice the same beyond the last centre.
        before, after: float64 (n,), their weights; ``after`` is 0 where a single voxel counts.
    """

    first: np.ndarray
    second: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @classmethod
    def linear(cls, size: int, new_size: int) -> Axis:
        """As ``skimage.transform.resize(order=1, mode="edge")`` weights ``size`` voxels."""
        if size == new_size:
            return cls.single(np.arange(size))
        place = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5  # in this order, as scipy
        below = np.floor(place)
        after = place - below
        first, second = (np.clip(index, 0, size - 1).astype(np.int32) for index in (below, below + 1))
        return cls(first, second, 1 - after, after)

    @classmethod
    def nearest(cls, size: int, new_size: int) -> Axis:
        """As nnU-Net's out-of-plane resampling takes whole slices."""
        place = float(size) / new_size * (np.arange(new_size) + 0.5) - 0.5
        taken = map_coordinates(np.arange(size, dtype=np.float64), [place], order=0, mode="nearest")
        return cls.single(taken)

    @classmethod
    def single(cls, index: np.ndarray) -> Axis:
        """One voxel each."""
        index = index.astype(np.int32)
        return cls(index, index, np.ones(index.size), np.zeros(index.size))

    @property
    def is_plain(self) -> bool:
        """Every voxel is the one of the same index."""
        return not self.after.any() and np.array_equal(self.first, np.arange(self.first.size))


@dataclass(frozen=True)
class Grid:
    """The grid of a case's image, its axes in the order of the plans (``transpose_forward``).

    Attributes:
        shape: of the image.
        box: the part of it that was not cropped away, which the logits cover.
        axes: of the box, where interpolation is nnU-Net's default; None: only the plans' own function can resample.
        current_spacing: mm, of the logits, as export passes it to the plans' function.
        new_spacing: mm, of the image.
        to_image: the image's axes in the order of its file (``transpose_backward``).
        from_image: the way back (``transpose_forward``).
        channels: (C, ...) of the logits before resampling.
    """

    shape: tuple[int, ...]
    box: tuple[slice, ...]
    axes: tuple[Axis, ...] | None
    current_spacing: list[float]
    new_spacing: list[float]
    to_image: tuple[int, ...]
    from_image: tuple[int, ...]
    channels: int

    @classmethod
    def of(
        cls,
        logits_shape: tuple[int, ...],
        properties: Mapping[str, Any],
        plans: PlansManager,
        configuration: ConfigurationManager,
    ) -> Grid:
        """The grid of a case.

        Args:
            logits_shape: (C, *S) of the network's output.
            properties: what nnU-Net's preprocessor says of the case.
            plans: of the model.
            configuration: of the model.
        """
        cropped = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
        new_spacing = [properties["spacing"][i] for i in plans.transpose_forward]
        current = list(configuration.spacing)
        if len(current) != len(cropped):
            current = [new_spacing[0], *current]
        return replace(
            cls.resampled(logits_shape, cropped, current, new_spacing, configuration),
            shape=tuple(int(n) for n in properties["shape_before_cropping"]),
            box=tuple(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]),
            to_image=tuple(plans.transpose_backward),
            from_image=tuple(plans.transpose_forward),
        )

    @classmethod
    def resampled(
        cls,
        logits_shape: tuple[int, ...],
        shape: Sequence[int],
        current_spacing: Sequence[float],
        new_spacing: Sequence[float],
        configuration: ConfigurationManager,
    ) -> Grid:
        """The grid of the image that the plans' resampling function makes, all of it covered by the logits.

        Args:
            logits_shape: (C, *S) of the network's output.
            shape: of the image.
            current_spacing: mm, of the logits.
            new_spacing: mm, of the image.
            configuration: of the model.
        """
        size, current, new = tuple(int(n) for n in shape), list(current_spacing), list(new_spacing)
        axes = None
        if (arguments := _default_arguments(configuration)) is not None:
            axes = _axes(logits_shape[1:], size, current, new, arguments)
        as_it_is = tuple(range(len(size)))
        box = tuple(slice(0, n) for n in size)
        return cls(size, box, axes, current, new, as_it_is, as_it_is, int(logits_shape[0]))

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Of the part that the logits cover."""
        return tuple(side.stop - side.start for side in self.box)

    def as_they_are(self) -> tuple[Axis, ...]:
        """Axes of a box whose logits are on the image's grid already."""
        return tuple(Axis.single(np.arange(length)) for length in self.box_shape)


def _default_arguments(configuration: ConfigurationManager) -> dict[str, Any] | None:
    """Arguments of nnU-Net's default resampling of probabilities; None if the plans name another way."""
    content = configuration.configuration
    arguments = dict(content["resampling_fn_probabilities_kwargs"])
    if content["resampling_fn_probabilities"] != _STREAMED:
        return None
    known = {"is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"}
    linear = arguments.get("order", 3) == 1 and arguments.get("order_z", 0) == 0 and not arguments.get("is_seg", False)
    return arguments if linear and set(arguments) <= known else None


def _axes(
    size: tuple[int, ...],
    new_size: tuple[int, ...],
    current: list[float],
    new: list[float],
    arguments: Mapping[str, Any],
) -> tuple[Axis, ...]:
    separate, coarse = determine_do_sep_z_and_axis(
        arguments.get("force_separate_z", False),
        current,
        new,
        arguments.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD),
    )
    return tuple(
        Axis.nearest(n, m) if separate and axis == coarse else Axis.linear(n, m)
        for axis, (n, m) in enumerate(zip(size, new_size, strict=True))
    )
