"""Class-wise temperatures: one number for every predicted class; region models: one for every region.

    p = softmax(z / T_c),    c = argmax z

The predicted class is all that is known of a voxel when the calibrator is used; the reference's is not.
Each T_c minimises the NLL of its own voxels. The order of the classes in a voxel stays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_calib.posthoc.base import VoxelwiseCalibrator, softmax
from nnunet_calib.posthoc.temperature import fit_temperature


class ClasswiseTemperature(VoxelwiseCalibrator):
    """One temperature for each predicted class, or each region.

    A class that is predicted nowhere in the fit set has the temperature of all voxels together.
    """

    key = "classwise"
    keeps_labels = True

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

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        temperature = np.asarray(parameters["temperature"], dtype=np.float64)
        return softmax(z / (temperature[z.argmax(axis=0)] if temperature.ndim else temperature))
