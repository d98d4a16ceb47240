"""Vector scaling: a slope and an offset for every class.

    p = softmax(a * z + b),    minimising NLL + r (|a - 1|^2 + |b|^2),    z = log p

Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2; for a region it is Platt scaling. The NLL
is convex in (a, b). r only decides where the data do not: the common part of b, and classes that never err.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_calib.posthoc.maps.calibrator import VoxelwiseCalibrator, check_numbers, softmax
from nnunet_calib.posthoc.maps.likelihood import RIDGE, fit_linear, note_absent, present_classes


class VectorScaling(VoxelwiseCalibrator):
    """Slope and offset for each class, or each region. It can change labels.

    A class absent from the fit set keeps slope 1 and offset 0: the others are fitted as if it did not exist.
    """

    key = "vector"
    keeps_labels = False

    @classmethod
    def _names(cls):
        return ("slope", "offset")

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        theta = np.tile([1.0, 0.0], (len(z), 1))
        z, y, there = present_classes(z, y)
        note_absent(self, there)
        features = np.stack([z, np.ones_like(z)], axis=1)
        theta[there] = fit_linear(features, theta[there], np.full((len(z), 2), RIDGE), y, w)
        return {"slope": theta[:, 0].tolist(), "offset": theta[:, 1].tolist()}

    def _check_parameters(self, parameters, classes):
        for name in self._names():
            check_numbers(parameters[name], (classes,))

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        slope, offset = (np.asarray(parameters[name], dtype=np.float64)[:, None] for name in self._names())
        return softmax(slope * z + offset)
