"""Every choice that changes a number of an evaluation."""

import math
from dataclasses import dataclass
from typing import Any

from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import UsageError
from nnunet_calib.metrics import BINS

BOUNDARY_MM = 3.0
"""Width of the ``boundary`` region on either side of the reference surface."""


@dataclass(frozen=True)
class Protocol:
    """Options of an evaluation.

    Attributes:
        bins: equal-width bins of every reliability diagram.
        nsd_tolerance: mm, of the surface Dice.
        boundary: measure calibration near the reference surface too.
        dilate: mm by which the region ``foreground`` reaches beyond reference and prediction.

    Raises:
        UsageError: a value outside its range.
    """

    bins: int = BINS
    nsd_tolerance: float = 1.0
    boundary: bool = False
    dilate: float = 0.0

    def __post_init__(self):
        if not 1 <= self.bins <= 1000:
            raise UsageError(f"the number of bins must be between 1 and 1000, not {self.bins}")
        for name, length in (("NSD tolerance", self.nsd_tolerance), ("dilation", self.dilate)):
            if not (math.isfinite(length) and length >= 0):
                raise UsageError(f"the {name} must be a number of mm, 0 or more, not {length}")

    def describe(self, dataset: Dataset) -> dict[str, Any]:
        """The choices in words and numbers, for the record."""
        regions = {
            "volume": "all voxels",
            "reference_foreground": "voxels of any structure in the reference",
            "foreground": "voxels of any structure in reference or prediction"
            + (f", and those within {self.dilate:g} mm of one" if self.dilate else ""),
        }
        if self.boundary:
            regions["boundary"] = f"voxels within {BOUNDARY_MM:g} mm of the reference surface"
        if dataset.has_regions:
            meaning = "one binary problem (p, y) per region; overall numbers are means over regions"
            nll = "mean over voxels of -y log p - (1 - y) log(1 - p), mean over regions"
            brier = "mean over voxels of (p - y)^2, mean over regions"
        else:
            meaning = "ECE, ACE and MCE of the top label; CECE mean of the binary ECE over all classes with background"
            nll = "mean over voxels of -log p_y"
            brier = "mean over voxels of sum over classes of (p_c - y_c)^2"
        return {
            "bins": self.bins,
            "binning": "equal width, [k/B, (k+1)/B), p = 1 in the last bin",
            "calibration": meaning,
            "Brier": brier,
            "NLL": nll + "; nats; p clipped at the smallest positive number of its stored type",
            "ACE": "unweighted mean over the bins that hold a voxel",
            "regions": regions,
            "dilate_mm": self.dilate,
            "surface": "voxels with a face neighbour outside; beyond the image edge is outside; distances in mm",
            "HD95": "larger of the two directed 95th percentiles, linear interpolation",
            "ASSD": "mean over both directions pooled",
            "NSD_tolerance_mm": self.nsd_tolerance,
            "one_empty": "HD, HD95, ASSD inf; NSD 0",
            "both_empty": "nan, left out of means",
            "ignore_label": dataset.ignore_label,
            "ignored_voxels": "excluded; outside every structure",
        }
