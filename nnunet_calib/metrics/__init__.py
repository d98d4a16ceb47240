"""Pure functions on arrays: overlap, surface distances, binned calibration and proper scores. No torch needed."""

from nnunet_calib.metrics.binning import (
    BINS,
    Bins,
    average_calibration_error,
    bin_index,
    expected_calibration_error,
    maximum_calibration_error,
)
from nnunet_calib.metrics.calibration import (
    CalibrationStatistics,
    calibration_statistics,
    scores,
    smallest_probability,
)
from nnunet_calib.metrics.distances import (
    SurfaceDistances,
    average_surface_distance,
    hausdorff,
    hausdorff_95,
    near_surface,
    surface,
    surface_dice,
    surface_distances,
)
from nnunet_calib.metrics.overlap import Overlap, Structure, overlaps

__all__ = [
    "BINS",
    "Bins",
    "CalibrationStatistics",
    "Overlap",
    "Structure",
    "SurfaceDistances",
    "average_calibration_error",
    "average_surface_distance",
    "bin_index",
    "calibration_statistics",
    "expected_calibration_error",
    "hausdorff",
    "hausdorff_95",
    "maximum_calibration_error",
    "near_surface",
    "overlaps",
    "scores",
    "smallest_probability",
    "surface",
    "surface_dice",
    "surface_distances",
]
