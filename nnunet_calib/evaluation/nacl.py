"""The protocol of the MarginLoss, NACL and CRaC code, quirks included, so that published tables can be matched.

``calibrate/evaluation/calib_segment_test.py`` of these repositories scores one volume after the other and averages:

* DSC per label (medpy's ``dc``), rounded to 4 digits per volume. A reference without the label scores 1, even where the
  prediction has it.
* HD is the pooled 95th percentile (medpy's ``hd95``) WITHOUT voxel spacing: in voxels, the slice axis counting like the
  others. A label missing from the reference, or missed by the prediction, scores 0, the best there is.
* ECE and CECE as ``metrics.nacl_calibration`` has them, rounded to 4 digits per volume.

These numbers are for comparison with those papers only; the others of a record have none of these particulars.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from nnunet_calib import metrics
from nnunet_calib.data.dataset import Dataset, key

_DIGITS = 4


def nacl_scores(
    reference: np.ndarray, prediction: np.ndarray, dataset: Dataset, channels: Iterable[np.ndarray] | None
) -> dict[str, Any]:
    """Score one volume.

    Args:
        reference: label map, ignored voxels set to background.
        prediction: label map of the same shape.
        dataset: whose foreground labels are scored.
        channels: probabilities of the classes one after the other; None if there are none.

    Returns:
        ``DSC`` and ``HD`` (voxels), the means over labels; ``ECE`` and ``CECE``, NaN without probabilities or reference
        foreground; ``structures``: ``DSC`` and ``HD`` of each label.
    """
    scored = {}
    overlaps = metrics.overlaps(reference, prediction, dataset.structures)
    distances = metrics.structure_distances(reference, prediction, dataset.structures, [1.0] * reference.ndim)
    for structure, overlap, measured in zip(dataset.structures, overlaps, distances, strict=True):
        in_both = overlap.in_reference and overlap.in_prediction
        scored[key(structure)] = {
            "DSC": round(overlap.dice, _DIGITS) if overlap.in_reference else 1.0,
            "HD": metrics.hausdorff_95(measured, "pooled") if in_both else 0.0,
        }
    nan = float("nan")
    calibration = {"ECE": nan, "CECE": nan}
    if channels is not None:
        channel_of = np.zeros(dataset.labels[-1] + 1, dtype=np.uint16)  # label values may have gaps
        channel_of[list(dataset.labels)] = np.arange(len(dataset.labels))
        calibration = metrics.nacl_calibration(channels, channel_of[reference])
    return {
        "DSC": float(np.mean([of_label["DSC"] for of_label in scored.values()])),
        "HD": float(np.mean([of_label["HD"] for of_label in scored.values()])),
        "ECE": round(calibration["ECE"], _DIGITS),
        "CECE": round(calibration["CECE"], _DIGITS),
        "structures": scored,
    }
