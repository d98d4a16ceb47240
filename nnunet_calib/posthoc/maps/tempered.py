"""What all temperatures have in common.

    p' = softmax(z / T) = p^(1/T) / sum p^(1/T)

The order of the classes in a voxel stays. What is stored in float16 or float32 is calibrated in float32: p' differs by
less than 1e-6 from what float64 gives. Where T may be below 1, p is first divided by its maximum over the classes, for
all of its powers could end at 0.
"""

import functools
from abc import abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from nnunet_calib.metrics import smallest_complement, smallest_probability
from nnunet_calib.metrics.backends import available
from nnunet_calib.posthoc.maps.calibrator import VoxelwiseCalibrator, check_numbers, softmax

_ADDED = 8  # classes
_ROUNDED_DOWN = 1 - 2.0**-24  # half the spacing of float32, and four times sooner than nextafter


def check_temperature(temperature: Any, shape: tuple[int, ...]) -> None:
    """Refuse what is no temperature, or not one for each class (ValueError)."""
    found = check_numbers(temperature, shape)
    if found.size and not 1e-6 <= found.min() <= found.max() <= 1e6:
        raise ValueError("a temperature is positive")


class TemperedCalibrator(VoxelwiseCalibrator):
    """A calibrator of one temperature, or one for each predicted class."""

    keeps_labels = True
    keeps_order = True

    @abstractmethod
    def _temperature(self, parameters: Mapping[str, Any]) -> ArrayLike:
        """T, one or (C,)."""

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        own = np.asarray(self._temperature(parameters), dtype=np.float64)
        return softmax(z / (own[z.argmax(axis=0)] if own.ndim else own))

    def calibrate(self, probabilities: np.ndarray, dtype: DTypeLike | None = None) -> np.ndarray:
        """As ``Calibrator.calibrate``; float32 but for what was stored in float64."""
        stored: np.dtype[Any] = np.dtype(dtype or probabilities.dtype)
        if stored.itemsize > np.dtype(np.float32).itemsize:
            return super().calibrate(probabilities, dtype)
        self._check_fitted(probabilities)
        p = probabilities.reshape(len(probabilities), -1).astype(np.float32, copy=False)
        # a row of floors: numpy takes four times as long to compare with a single number
        inside = np.maximum(p, np.full(p.shape[1], smallest_probability(stored), dtype=np.float32), order="C")
        if not self.multilabel:
            calibrated = _softened(inside, self._temperature(self.parameters[0]))
        else:
            both = np.stack([np.maximum(1 - p, np.float32(smallest_complement(stored))), inside])
            if self.shared_by_regions:
                calibrated = _softened(both.reshape(2, -1), self._temperature(self.parameters[0]))[1]
            else:
                pairs = zip(both.swapaxes(0, 1), self.parameters, strict=True)
                calibrated = np.stack([_softened(region, self._temperature(own))[1] for region, own in pairs])
        return calibrated.reshape(probabilities.shape)


def _softened(p: np.ndarray, temperature: ArrayLike) -> np.ndarray:
    """``TemperedCalibrator._calibrate`` of probabilities float32 (C, N) above 0 that need not add up to 1.

    They are overwritten: to set memory aside for each step would take longer than the steps.
    """
    powers = 1 / np.asarray(temperature, dtype=np.float64)
    if powers.ndim or powers > 1:
        p /= p.max(axis=0)
    own = _of_voxels(powers, p)
    soft = _raised(p, own)
    soft *= _inverse_of_sum(soft)
    return soft


@functools.cache
def compiled_loops() -> ModuleType | None:
    """``tempered_numba`` where numba is installed (extra ``fast``)."""
    if available("auto") != "numba":
        return None
    from nnunet_calib.posthoc.maps import tempered_numba

    return tempered_numba


def _raised(p: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Probabilities to a power, one or of every voxel, in their own memory."""
    if loops := compiled_loops():
        loops.raise_to(p, powers)
        return p
    np.log(p, out=p)
    p *= powers
    return np.exp(p, out=p)


def _inverse_of_sum(p: np.ndarray) -> np.ndarray:
    """1 by the sum over the classes, float32 (N,), rounded down: no share of it comes out above 1.

    Only so many are added in float32; many small summands would be lost beside a large one.
    """
    parts = [p[c : c + _ADDED].sum(axis=0) for c in range(0, len(p), _ADDED)]
    total = np.sum(parts, axis=0, dtype=np.float64)
    return np.asarray(_ROUNDED_DOWN / total, dtype=np.float32)


def _of_voxels(powers: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """1 / T float32: one (shape ()), or of every voxel that of its class, the first for which p / max p is 1."""
    powers = powers.astype(np.float32)
    if not powers.ndim:
        return powers
    own = np.empty(relative.shape[1], dtype=np.float32)
    for power, of_class in zip(powers[::-1], relative[::-1], strict=True):
        np.copyto(own, power, where=of_class == 1)
    return own
