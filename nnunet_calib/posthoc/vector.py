"""Vector scaling: a slope and an offset for every class.

    p = softmax(a * z + b),    minimising NLL + r (|a - 1|^2 + |b|^2),    z = log p

Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2; for a region it is Platt scaling. The NLL
is convex in (a, b). r only decides where the data do not: the common part of b, and classes that never err.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_calib.posthoc.base import VoxelwiseCalibrator, softmax
from nnunet_calib.posthoc.likelihood import curvature, minimise, note_absent, present_classes, residual_and_nll

_RIDGE = 1e-6


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
        classes = len(z)
        z, y, there = present_classes(z, y)
        note_absent(self, there)
        features = np.stack([z, np.ones_like(z)], axis=1)
        identity = np.array([[1.0, 0.0]] * len(z))

        def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
            away = theta - identity
            residual, nll = residual_and_nll(theta[:, :1] * z + theta[:, 1:], y, w)
            gradient = np.einsum("cn,ckn->ck", residual, features)
            return nll + _RIDGE * float(np.square(away).sum()), gradient + 2 * _RIDGE * away

        fitted = identity
        if len(z) > 1:
            start = curvature(softmax(z), features, w, np.full(identity.shape, _RIDGE))
            fitted = minimise(objective, identity, start)
        slope, offset = np.ones(classes), np.zeros(classes)
        slope[there] = fitted[:, 0]
        offset[there] = fitted[:, 1] - fitted[:, 1].mean()  # their common part changes no probability
        return {"slope": slope.tolist(), "offset": offset.tolist()}

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        slope, offset = (np.asarray(parameters[name], dtype=np.float64)[:, None] for name in self._names())
        return softmax(slope * z + offset)
