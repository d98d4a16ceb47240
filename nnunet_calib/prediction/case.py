"""The prediction of one case: its label map, and its probabilities some planes at a time.

Planes follow each other along the first axis of the plans (``transpose_forward``), in which the network saw the image;
``Grid.to_image`` turns arrays of that order into the order of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor

from nnunet_calib.data.errors import InputError
from nnunet_calib.prediction.grid import Grid
from nnunet_calib.prediction.interpolation import compiled_loops, interpolate, interpolate_on

_VALUES = 1 << 22  # of a part: some planes of a small image, one of a large one
_CPU = torch.device("cpu")
_REST = "the rest of this case's probabilities is made on the CPU"
_TOGETHER = 1 << 17  # values whose softmax stays in the cache


@dataclass(frozen=True)
class Part:
    """Some planes of a case.

    Attributes:
        planes: which, along the first axis.
        probabilities: float32 (C, n, Y, X) on the image's grid, axes in the order of the plans: what export writes.
    """

    planes: slice
    probabilities: np.ndarray


class PredictedCase:
    """Logits of a case on their way to its image.

    Args:
        logits: (C, *S) as nnU-Net's predictor gives them, on any device.
        grid: where they lie.
        labels: nnU-Net's label manager of the model.
        configuration: of the model; its own resampling function is used where it is not nnU-Net's default.
        device: where probabilities are made from logits on the CPU; a graphics card that has too little memory for a
            slab leaves the rest of the case to the CPU, which a line on stderr says. The label map alone, for which
            little is interpolated, is made on the CPU.

    Attributes:
        streamed: False where the plans resample in another way than nnU-Net's default: the plans' own function is
            called then, which needs as much memory as stock export.
    """

    def __init__(
        self,
        logits: Tensor,
        grid: Grid,
        labels: LabelManager,
        configuration: ConfigurationManager,
        device: torch.device | str = "cpu",
    ):
        self.grid, self._labels, self._device = grid, labels, torch.device(device)
        self.streamed = grid.axes is not None
        self._logits = logits
        self._resample: Callable = configuration.resampling_fn_probabilities

    def label_map(self) -> np.ndarray:
        """The label map (Z, Y, X), axes in the order of the plans, as ``nnUNetv2_predict`` writes it.

        Raises:
            InputError: logits that are not finite.
        """
        kind = np.uint8 if len(self._labels.foreground_labels) < 255 else np.uint16
        whole = np.zeros(self.grid.shape, dtype=kind)
        inside = whole[self.grid.box]
        logits, axes = self._on_grid
        loops = compiled_loops() if logits.device.type == "cpu" and logits.dtype == torch.float16 else None
        if loops is not None and not self._labels.has_regions:
            if not loops.label_map(logits.numpy(), axes, inside):
                raise _not_finite()
            return whole
        for planes, values, _ in self._box_parts():
            if self._labels.has_regions:
                decided = self._labels.convert_logits_to_segmentation(values)
            else:
                best, decided = values[0], torch.zeros(values.shape[1:], dtype=torch.int32, device=values.device)
                for c in range(1, len(values)):  # torch.argmax does not promise the first of equals
                    decided.masked_fill_(values[c] > best, c)
                    best = torch.maximum(best, values[c])
            inside[planes] = decided.cpu().numpy()
        return whole

    def parts(self) -> Iterator[Part]:
        """Yield the probabilities, some planes after the others; each part takes the memory of the one before.

        Raises:
            InputError: logits that are not finite.
        """
        grid, inside = self.grid, (slice(None), slice(None), *self.grid.box[1:])
        before, after, thickness = grid.box[0].start, grid.box[0].stop, min(self._thickness, grid.shape[0])
        memory = torch.empty((grid.channels, thickness, *grid.shape[1:]), dtype=torch.float32)

        def outside(start: int, stop: int) -> Iterator[Part]:
            if start < stop:
                self._fill_outside(memory)
            for z in range(start, stop, thickness):
                part = memory[:, : min(thickness, stop - z)]
                yield Part(slice(z, z + part.shape[1]), part.numpy())

        yield from outside(0, before)
        on_cpu = self._on_grid[0].device.type == "cpu"
        if grid.box_shape[1:] != grid.shape[1:]:
            self._fill_outside(memory)
        for planes, values, in_memory in self._box_parts(memory[inside] if on_cpu else None, self._device):
            part = memory[:, : values.shape[1]]
            if on_cpu and in_memory:  # in place: with all classes a plane is large
                self._make_probabilities(values)
            else:
                part[inside] = self._labels.apply_inference_nonlin(values).cpu()
            yield Part(slice(before + planes.start, before + planes.stop), part.numpy())
        yield from outside(after, grid.shape[0])

    def _make_probabilities(self, values: Tensor) -> None:
        """Logits (C, n, Y, X) to probabilities, some rows after the others."""
        rows = max(1, _TOGETHER // (values.shape[0] * values.shape[3]))
        for plane in range(values.shape[1]):
            for row in range(0, values.shape[2], rows):
                some = values[:, plane, row : row + rows]
                some[...] = self._labels.apply_inference_nonlin(some)

    def _fill_outside(self, part: Tensor) -> None:
        part[...] = 0
        if not self._labels.has_regions:
            part[0] = 1

    @property
    def _thickness(self) -> int:
        """Planes of a part."""
        return max(1, _VALUES // (self.grid.channels * int(np.prod(self.grid.shape[1:]))))

    def _box_parts(
        self, memory: Tensor | None = None, device: torch.device = _CPU
    ) -> Iterator[tuple[slice, Tensor, bool]]:
        """Planes of the box, and their logits float32 (C, n, Y, X) rounded as export rounds them; in ``memory``."""
        logits, axes = self._on_grid
        shape = self.grid.box_shape
        thickness = min(self._thickness, shape[0])
        if memory is None:
            memory = torch.empty((len(logits), thickness, *shape[1:]), dtype=torch.float32, device=logits.device)
        for start in range(0, shape[0], thickness):
            stop = min(start + thickness, shape[0])
            values, in_memory = None, False
            if device.type != logits.device.type:
                try:
                    values = interpolate_on(device, logits, axes, start, stop)
                except torch.OutOfMemoryError:
                    device = _CPU
                    print(f"nnunet-calib: out of memory on {self._device}; {_REST}", file=sys.stderr, flush=True)
            if values is None:  # not in the handler: its traceback would keep what is on the device
                values, in_memory = memory[:, : stop - start], True
                interpolate(logits, axes, start, stop, values)
            if not bool(torch.isfinite(values.sum())):
                raise _not_finite()
            yield slice(start, stop), values, in_memory

    @cached_property
    def _on_grid(self) -> tuple[Tensor, tuple]:
        """Logits and what the box's axes are interpolated from."""
        grid, logits = self.grid, self._logits
        if grid.axes is not None:
            return logits, grid.axes
        whole = self._resample(logits.cpu(), grid.box_shape, grid.current_spacing, grid.new_spacing)
        whole = torch.from_numpy(whole) if isinstance(whole, np.ndarray) else whole
        self._logits = whole  # the others are not needed any more
        return whole, grid.as_they_are()


def _not_finite() -> InputError:
    return InputError("the network's logits are not finite (NaN or infinite); is the checkpoint of a failed training?")
