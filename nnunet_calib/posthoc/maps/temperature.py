"""Temperature scaling: one number for the whole network.

    p = softmax(z / T),    T minimises the NLL

The NLL is convex in 1/T, so its slope has one root, which is found to machine precision:

    d NLL / d(1/T) = sum_i w_i (E_p[z] - z_y),    p = softmax(z / T)

Guo et al., On calibration of modern neural networks, ICML 2017, section 4.2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import brentq

from nnunet_calib.metrics import BINS, Bins, bin_index, expected_calibration_error
from nnunet_calib.posthoc.maps.calibrator import softmax
from nnunet_calib.posthoc.maps.tempered import TemperedCalibrator, check_temperature

BOUNDS = (0.05, 20.0)
"""Temperatures that are looked at. All predictions right: 0 would fit best; all wrong: infinity."""

_GRID = np.arange(1, 101) / 10


class TemperatureScaling(TemperedCalibrator):
    """One temperature for all voxels and classes, or all regions.

    Args:
        multilabel: sigmoid regions.
        criterion: ``nll``, or ``ece``: the grid search 0.1, 0.2, ..., 10 for the smallest ECE, which the papers on
            MbLS and focal loss used.
        bounds: smallest and largest temperature of ``nll``.
    """

    key = "temperature"
    tells_classes_apart = False
    shared_by_regions = True

    def __init__(self, *, multilabel: bool = False, criterion: str = "nll", bounds: tuple[float, float] = BOUNDS):
        super().__init__(multilabel=multilabel)
        if criterion not in ("nll", "ece"):
            raise ValueError(f"criterion must be 'nll' or 'ece', not {criterion!r}")
        if not 0 < bounds[0] < bounds[1] < np.inf:
            raise ValueError(f"bounds must be positive and ascending, not {bounds}")
        self.criterion, self.bounds = criterion, bounds

    @property
    def temperature(self) -> float:
        """T; above 1 the network was too sure."""
        return float(self.parameters[0]["temperature"])

    @classmethod
    def _names(cls):
        return ("temperature",)

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        if self.criterion == "ece":
            return {"temperature": float(min(_GRID, key=lambda t: _ece(softmax(z / t), y, w)))}
        temperature = fit_temperature(z, y, w, self.bounds)
        if temperature in self.bounds:
            self.notes.append(f"the temperature ended at the bound {temperature:g}: {_why(z, y)}")
        return {"temperature": temperature}

    def _check_parameters(self, parameters, classes):
        check_temperature(parameters["temperature"], ())

    def _temperature(self, parameters: Mapping[str, Any]) -> float:
        return float(parameters["temperature"])


def fit_temperature(z: np.ndarray, y: np.ndarray, w: np.ndarray, bounds: tuple[float, float] = BOUNDS) -> float:
    """T of smallest NLL for log p (C, N), classes (N,) and weights (N,); a bound if it is not between them."""
    truth = w @ z[y, np.arange(y.size)]

    def slope(log_temperature: float) -> float:
        p = softmax(z * np.exp(-log_temperature))
        p *= z
        return float(w @ p.sum(axis=0) - truth)

    low, high = np.log(bounds)
    if slope(low) <= 0:
        return bounds[0]
    if slope(high) >= 0:
        return bounds[1]
    return float(np.exp(brentq(slope, low, high, xtol=1e-12, rtol=1e-12)))


def _ece(p: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    top, confidence = p.argmax(axis=0), p.max(axis=0)
    cell = bin_index(confidence)
    counts = (np.bincount(cell, weights=part, minlength=BINS) for part in (w, w * confidence, w * (top == y)))
    return float(expected_calibration_error(Bins(*counts)))


def _why(z: np.ndarray, y: np.ndarray) -> str:
    right = (z.argmax(axis=0) == y).mean()
    return "every prediction is right" if right == 1 else f"{right:.1%} of the predictions are right"
