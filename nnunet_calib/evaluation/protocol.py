"""Every choice that changes a number of an evaluation."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.data.errors import UsageError, nearest
from nnunet_calib.metrics import BINS, BOUNDARY_MM, MAX_BINS, RULES, SURFACES, THRESHOLD


@dataclass(frozen=True)
class Protocol:
    """Options of an evaluation.

    Attributes:
        bins: equal-width bins of every reliability diagram, and equal-mass bins of the adaptive ECE.
        threshold: probabilities up to it are left out of TCECE.
        nsd_tolerance: mm, of the surface Dice ``NSD``.
        structure_tolerances: by label or region as ``summary.json`` writes it, its own tolerance for ``NSD``.
        further_tolerances: mm; each gives one more number, such as ``NSD@2mm``.
        surface: "voxel" (as MONAI) or "area" (as DeepMind's surface-distance).
        percentile_rule: "directed" or "pooled", see ``metrics.hausdorff``.
        further_percentiles: of the surface distances; each gives one more number, such as ``HD99``.
        boundary: measure calibration near the reference surface too.
        dilate: mm by which the region ``foreground`` reaches beyond reference and prediction.
        nacl: measure as the code of MarginLoss and NACL does, too (``evaluation.nacl``).
        device: "cpu", or a CUDA device, "cuda" or "cuda:1", for distances and calibration.

    Raises:
        UsageError: a value outside its range.
    """

    bins: int = BINS
    threshold: float = THRESHOLD
    nsd_tolerance: float = 1.0
    structure_tolerances: Mapping[str, float] = field(default_factory=dict)
    further_tolerances: tuple[float, ...] = ()
    surface: str = "voxel"
    percentile_rule: str = "directed"
    further_percentiles: tuple[float, ...] = ()
    boundary: bool = False
    dilate: float = 0.0
    nacl: bool = False
    device: str = "cpu"

    def __post_init__(self):
        if not 1 <= self.bins <= MAX_BINS:
            raise UsageError(f"the number of bins must be between 1 and {MAX_BINS}, not {self.bins}")
        if not 0 <= self.threshold < 1:
            raise UsageError(f"the threshold of TCECE must be in [0, 1), not {self.threshold}")
        tolerances = (self.nsd_tolerance, *self.structure_tolerances.values(), *self.further_tolerances)
        for name, length in (*(("NSD tolerance", mm) for mm in tolerances), ("dilation", self.dilate)):
            if not (math.isfinite(length) and length >= 0):
                raise UsageError(f"the {name} must be a number of mm, 0 or more, not {length}")
        for percentile in self.further_percentiles:
            if not 0 <= percentile <= 100:
                raise UsageError(f"a percentile must be between 0 and 100, not {percentile}")
        for option, value, allowed in (
            ("surface", self.surface, SURFACES),
            ("percentile rule", self.percentile_rule, RULES),
        ):
            if value not in allowed:
                raise UsageError(f"the {option} must be one of {', '.join(allowed)}, not {value!r}")
        if self.device != "cpu":
            _check_device(self.device)

    def check_fits(self, dataset: Dataset) -> None:
        """Refuse options that mean nothing for a data set.

        Raises:
            UsageError: a tolerance for an unknown structure, or the NACL protocol for regions.
        """
        known = {key(structure): dataset.names[key(structure)] for structure in dataset.structures}
        if unknown := sorted(set(self.structure_tolerances) - known.keys()):
            near = nearest(unknown[0], known.values())
            meant = "".join(f"did you mean {label}? There are " for label, name in known.items() if name == near)
            named = ", ".join(f"{label} ({name})" for label, name in known.items())
            raise UsageError(f"NSD tolerance for {unknown[0]!r}; {meant or 'the structures are '}{named}")
        if self.nacl and dataset.has_regions:
            raise UsageError("the protocol of MarginLoss and NACL is for labels, not for regions")

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
            "TCECE": f"as CECE of p > {self.threshold:g}",
            "AdaptiveECE": f"of the top label (regions: of max(p, 1 - p)), {self.bins} bins of equal mass",
            "AURC": "mean error rate of the voxels kept, over all shares kept in the order of confidence",
            "Brier": brier,
            "NLL": nll + "; nats; p clipped at the smallest positive number of its stored type",
            "ACE": "unweighted mean over the bins that hold a voxel",
            "regions": regions,
            "dilate_mm": self.dilate,
            "surface": _SURFACE[self.surface] + "; beyond the image edge is outside; distances in mm",
            "HD95": _RULE[self.percentile_rule] + (", linear interpolation" if self.surface == "voxel" else ""),
            "further_percentiles": list(self.further_percentiles),
            "ASSD": "mean over both directions pooled",
            "MASD": "mean of the two directed means",
            "NSD_tolerance_mm": self.nsd_tolerance,
            "NSD_structure_tolerances_mm": dict(self.structure_tolerances),
            "NSD_further_tolerances_mm": list(self.further_tolerances),
            "RVE": "(prediction - reference) / reference, of the volumes",
            "one_empty": "HD, HD95, ASSD, MASD inf; NSD 0; RVE inf if the reference is, else -1",
            "both_empty": "nan, left out of means",
            "ignore_label": dataset.ignore_label,
            "ignored_voxels": "excluded; outside every structure",
            "nacl": "see docs/evaluate.md" if self.nacl else None,
            "device": self.device,
        }


_SURFACE = {
    "voxel": "voxels with a face neighbour outside, each counts one",
    "area": "surface pieces between voxel centres, weighted by their area",
}
_RULE = {
    "directed": "larger of the two directed 95th percentiles",
    "pooled": "95th percentile of the distances of both directions together",
}


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"the device must be cpu, cuda or cuda:<number>, not {device!r}")
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"the device {device!r} cannot be used here: {reason}") from error
