"""Ensemble temperature scaling: softened, raw and uniform probabilities mixed.

    p = w_1 softmax(z / T) + w_2 softmax(z) + w_3 / C,    w on the simplex

Zhang et al., Mix-n-Match, ICML 2020, equation 8. T first, by temperature scaling, then w; both minimise the NLL, which
is convex in w. The order of the classes in a voxel stays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize

from nnunet_calib.posthoc.maps.calibrator import check_numbers, softmax
from nnunet_calib.posthoc.maps.temperature import BOUNDS, fit_temperature
from nnunet_calib.posthoc.maps.tempered import TemperedCalibrator, check_temperature


class EnsembleTemperature(TemperedCalibrator):
    """A temperature and three weights for all voxels, shared by regions.

    Args:
        multilabel: sigmoid regions.
        bounds: smallest and largest temperature.
    """

    key = "ensemble"
    tells_classes_apart = False
    shared_by_regions = True

    def __init__(self, *, multilabel: bool = False, bounds: tuple[float, float] = BOUNDS):
        super().__init__(multilabel=multilabel)
        self.bounds = bounds

    @classmethod
    def _names(cls):
        return ("temperature", "weights")

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        temperature = fit_temperature(z, y, w, self.bounds)
        voxels = np.arange(y.size)
        parts = np.stack([softmax(z / temperature)[y, voxels], softmax(z)[y, voxels], np.full(y.size, 1 / len(z))])

        def nll(mix: np.ndarray) -> tuple[float, np.ndarray]:
            p = np.maximum(mix @ parts, np.finfo(np.float64).tiny)
            return -float(w @ np.log(p)), -(parts @ (w / p))

        sum_is_one = {"type": "eq", "fun": lambda mix: mix.sum() - 1, "jac": np.ones_like}
        found = minimize(
            nll,
            np.full(3, 1 / 3),
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            constraints=[sum_is_one],
            options={"ftol": 1e-14, "maxiter": 500},
        ).x.clip(0)
        return {"temperature": temperature, "weights": (found / found.sum()).tolist()}

    def _check_parameters(self, parameters, classes):
        check_temperature(parameters["temperature"], ())
        weights = check_numbers(parameters["weights"], (3,))
        if weights.min() < 0 or abs(weights.sum() - 1) > 1e-6:
            raise ValueError("weights are not on the simplex")

    def _mixture(self, parameters: Mapping[str, Any]) -> tuple[float, tuple[float, ...]]:
        soft, raw, uniform = map(float, parameters["weights"])
        return float(parameters["temperature"]), (soft, raw, uniform)
