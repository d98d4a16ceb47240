"""Class-wise temperatures: one number for every predicted class; region models: one for every region.

    p = softmax(z / T_c),    c = argmax z

The predicted class is all that is known of a voxel when the calibrator is used; the reference's is not.
Each T_c minimises the NLL of its own voxels. The order of the classes in a voxel stays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_calib.posthoc.maps.temperature import fit_temperature
from nnunet_calib.posthoc.maps.tempered import TemperedCalibrator, check_temperature


class ClasswiseTemperature(TemperedCalibrator):
    """One temperature for each predicted class, or each region.

    A class that is predicted nowhere in the fit set has the temperature of all voxels together.
    """

    key = "classwise"

    @classmethod
    def _names(cls):
        return ("temperature",)

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        overall = fit_temperature(z, y, w)
        if self.multilabel:
            return {"temperature": overall}
        top = z.argmax(axis=0)
        temperatures = []
        for c in range(len(z)):
            own = top == c
            temperatures.append(fit_temperature(z[:, own], y[own], w[own]) if own.any() else overall)
            if not own.any():
                self.notes.append(f"class {c} is predicted nowhere in the fit set: it has the overall temperature")
        return {"temperature": temperatures}

    def _check_parameters(self, parameters, classes):
        check_temperature(parameters["temperature"], () if self.multilabel else (classes,))

    def _temperature(self, parameters: Mapping[str, Any]) -> float | list[float]:
        return parameters["temperature"]
