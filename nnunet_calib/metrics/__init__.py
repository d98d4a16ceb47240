"""Pure functions on arrays: overlap, surface distances, binned calibration and proper scores. No torch needed."""

from nnunet_calib.metrics.counting.bins import (
    BINS,
    MAX_BINS,
    Bins,
    average_calibration_error,
    empty_bins,
    expected_calibration_error,
    maximum_calibration_error,
    overconfidence,
    underconfidence,
)
from nnunet_calib.metrics.counting.calibration import (
    SCORES,
    THRESHOLD,
    CalibrationStatistics,
    calibration_scores,
    calibration_statistics,
    scores,
)
from nnunet_calib.metrics.counting.nacl import nacl_calibration
from nnunet_calib.metrics.counting.ranked import (
    adaptive_calibration_error,
    area_under_risk_coverage,
)
from nnunet_calib.metrics.counting.rules import (
    CELLS,
    bin_index,
    confidence_cell,
    smallest_complement,
    smallest_probability,
)
from nnunet_calib.metrics.overlap import Overlap, Structure, overlaps
from nnunet_calib.metrics.surface.boundary import BOUNDARY_MM, near_surface, surface
from nnunet_calib.metrics.surface.distances import (
    RULES,
    SURFACES,
    SurfaceDistances,
    average_surface_distance,
    hausdorff,
    hausdorff_95,
    mean_average_surface_distance,
    structure_distances,
    surface_dice,
    surface_distances,
)

__all__ = [
    "BINS",
    "BOUNDARY_MM",
    "CELLS",
    "MAX_BINS",
    "RULES",
    "SCORES",
    "SURFACES",
    "THRESHOLD",
    "Bins",
    "CalibrationStatistics",
    "Overlap",
    "Structure",
    "SurfaceDistances",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "average_calibration_error",
    "average_surface_distance",
    "bin_index",
    "calibration_scores",
    "calibration_statistics",
    "confidence_cell",
    "empty_bins",
    "expected_calibration_error",
    "hausdorff",
    "hausdorff_95",
    "maximum_calibration_error",
    "mean_average_surface_distance",
    "nacl_calibration",
    "near_surface",
    "overconfidence",
    "overlaps",
    "scores",
    "smallest_complement",
    "smallest_probability",
    "structure_distances",
    "surface",
    "surface_dice",
    "surface_distances",
    "underconfidence",
]
