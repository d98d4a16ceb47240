"""Maps from probabilities to calibrated ones, one calibrator a file; on arrays, without folders.

A calibrator is one class in one file. To add one: write the file, list it in `CALIBRATORS`, write its test.
"""

from pathlib import Path

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import read_json
from nnunet_calib.posthoc.maps.calibrator import Calibrator, file_of, log_probabilities
from nnunet_calib.posthoc.maps.classwise import ClasswiseTemperature
from nnunet_calib.posthoc.maps.dirichlet import DirichletCalibration
from nnunet_calib.posthoc.maps.isotonic import IsotonicCalibration
from nnunet_calib.posthoc.maps.local import LocalTemperature
from nnunet_calib.posthoc.maps.preserving import ArgmaxPreservingScaling, OrderPreservingScaling
from nnunet_calib.posthoc.maps.temperature import TemperatureScaling
from nnunet_calib.posthoc.maps.vector import VectorScaling

CALIBRATORS: dict[str, type[Calibrator]] = {
    calibrator.key: calibrator
    for calibrator in (
        TemperatureScaling,
        ClasswiseTemperature,
        OrderPreservingScaling,
        ArgmaxPreservingScaling,
        VectorScaling,
        IsotonicCalibration,
        DirichletCalibration,
        LocalTemperature,
    )
}
"""Key to class, the simplest first; the keys are the names used in commands, files and tables."""


def load_calibrator(path: str | Path) -> Calibrator:
    """Read a calibrator of any method.

    Args:
        path: its JSON file, or the folder that holds ``calibrator.json``.

    Raises:
        InputError: the file cannot be read or is not a calibrator.
    """
    file = file_of(path)
    method = read_json(file).get("method")
    if not isinstance(method, str) or method not in CALIBRATORS:
        raise InputError(f"{file}: not a calibrator of this package (method {method!r}); fit it again")
    return CALIBRATORS[method].load(file)


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
    "load_calibrator",
    "log_probabilities",
]
