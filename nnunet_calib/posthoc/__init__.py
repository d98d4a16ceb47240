"""Calibrators fitted after training: calibrated probabilities from a network that is already there.

A calibrator is one class in one file of ``maps``. To add one: write the file, list it in ``CALIBRATORS``, write its
test. ``folders`` fits, applies and checks them on folders of predictions.
"""

from nnunet_calib.posthoc.maps import (
    CALIBRATORS,
    ArgmaxPreservingScaling,
    Calibrator,
    ClasswiseTemperature,
    DirichletCalibration,
    IsotonicCalibration,
    LocalTemperature,
    OrderPreservingScaling,
    TemperatureScaling,
    VectorScaling,
    load_calibrator,
    log_probabilities,
)
from nnunet_calib.posthoc.maps.volume import calibrate_case

__all__ = [
    "ArgmaxPreservingScaling",
    "CALIBRATORS",
    "Calibrator",
    "ClasswiseTemperature",
    "DirichletCalibration",
    "IsotonicCalibration",
    "LocalTemperature",
    "OrderPreservingScaling",
    "TemperatureScaling",
    "VectorScaling",
    "calibrate_case",
    "load_calibrator",
    "log_probabilities",
]
