"""What is measured of a novel map: overlap, distance, calibration, and what became of the base classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import xlogy

from nnunet_calib import metrics
from nnunet_calib.data.dataset import Structure, key
from nnunet_calib.fewshot.measure.protocols import worst_tenth

REGIONS = ("volume", "foreground")
CALIBRATION = ("ECE", "Brier", "NLL")
SECONDS = ("seconds", "seconds_registration")
"""Of the processor: what a query took without the network, and what its registrations took when they were made."""

IF_CALIBRATED = "ECE_foreground_if_calibrated"
ORACLE_SCORES = ("Brier_volume_oracle", "NLL_volume_oracle")
NUMBERS = (
    "Dice",
    "HD95",
    *(f"{score}_{region}" for region in REGIONS for score in CALIBRATION),
    IF_CALIBRATED,
    *ORACLE_SCORES,
)
"""Keys of ``novel_scores``, in the order of files and tables."""


def novel_scores(
    probability: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    segmentation: np.ndarray | None = None,
    counted: np.ndarray | None = None,
) -> dict[str, float]:
    """Score the map of one structure in one query.

    Args:
        probability: float (*S) in [0, 1].
        reference: bool (*S).
        spacing: mm along each axis.
        segmentation: bool (*S), the decision; p > 1/2 if None.
        counted: bool (*S), the voxels that are scored; all if None. Others are outside the structure in both maps.

    Returns:
        ``Dice``, ``HD95`` (mm) and, for the two classes (novel, all else), ``ECE``, ``Brier`` (sum over both, in
        [0, 2]) and ``NLL`` (nats) in the regions ``volume`` and ``foreground`` (union of reference and
        segmentation); with the definitions and empty cases of `nnunet_calib.metrics`; what of the latter ECE a map
        whose probabilities are all true would have (``calibrated_foreground_ece``); and Brier and NLL in the volume
        after the best monotone recalibration (``oracle_recalibration``).
    """
    segmentation = probability > 0.5 if segmentation is None else segmentation
    counted = np.ones(reference.shape, dtype=bool) if counted is None else counted
    reference, segmentation = reference & counted, segmentation & counted
    (overlap,) = metrics.overlaps(reference, segmentation, [1])
    distances = metrics.surface_distances(reference, segmentation, spacing)
    of_classes = np.stack([1 - probability, probability])
    masks = {"volume": counted, "foreground": (reference | segmentation) & counted}
    statistics, _ = metrics.calibration_statistics(of_classes, reference.astype(np.uint8), [0, 1], masks)
    found = {"Dice": overlap.dice, "HD95": metrics.hausdorff_95(distances)}
    for region in REGIONS:
        scores = metrics.scores(statistics[region], ["0", "1"])
        found |= {f"{score}_{region}": scores[score] for score in CALIBRATION}
    found[IF_CALIBRATED] = calibrated_foreground_ece(probability[counted], segmentation[counted])
    return found | oracle_recalibration(probability[counted], reference[counted])


def oracle_recalibration(probability: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Brier score and NLL after the best monotone recalibration, fitted to this query's own labels: an oracle.

    The isotonic regression of the reference on the probability (Zadrozny and Elkan, Transforming classifier scores into
    accurate multiclass probability estimates, KDD 2002) has the smallest of both among all maps that do not change the
    order of the voxels. What a map's own scores are above these is what calibration could have done better in this
    query; nothing that knows only the supports reaches them.

    Args:
        probability: float (N,) in [0, 1].
        reference: bool (N,).

    Returns:
        ``Brier_volume_oracle``, sum over both classes, and ``NLL_volume_oracle``, nats; NaN of no voxel.
    """
    if not len(probability):
        return dict.fromkeys(ORACLE_SCORES, float("nan"))
    _, cell, count = np.unique(probability, return_inverse=True, return_counts=True)
    share = np.bincount(cell.ravel(), reference) / count
    fitted = isotonic_regression(share, weights=count.astype(np.float64)).x.clip(0, 1)
    inside = share * count
    outside = count - inside
    brier = 2 * (inside * (1 - fitted) ** 2 + outside * fitted**2).sum() / count.sum()
    nll = -(xlogy(inside, fitted) + xlogy(outside, 1 - fitted)).sum() / count.sum()
    return dict(zip(ORACLE_SCORES, (float(brier), float(nll)), strict=True))


def calibrated_foreground_ece(probability: np.ndarray, segmentation: np.ndarray) -> float:
    """The ECE in ``foreground`` that is to be expected of a map whose probabilities are all true.

        E = sum_{v not segmented} p (1 - p) / (n_segmented + sum_{v not segmented} p)

    It is not 0: of the voxels that are not segmented only those enter the foreground where that was wrong, p of them
    each, with confidence 1 - p. The less a head can tell, the larger it is, and only a cut at a lower probability
    makes it smaller.

    Args:
        probability: float (N,).
        segmentation: bool (N,), cut at a probability of 1/2 or less.

    Returns:
        NaN if there is neither.
    """
    outside = probability[~segmentation].astype(np.float64)
    voxels = np.count_nonzero(segmentation) + outside.sum()
    return float((outside * (1 - outside)).sum() / voxels) if voxels else float("nan")


def base_dice(reference: np.ndarray, segmentation: np.ndarray, structures: Sequence[Structure]) -> dict[str, float]:
    """Dice of every base class or region, by key; NaN where neither map has it."""
    counted = metrics.overlaps(reference, segmentation, structures)
    return {key(structure): overlap.dice for structure, overlap in zip(structures, counted, strict=True)}


def mean_dice(dice: Mapping[str, float]) -> float:
    """Mean over the classes that are there; NaN if none is."""
    known = [value for value in dice.values() if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def summarise(records: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> list[dict[str, Any]]:
    """Means over pairs of the same group, in the order in which the groups first come.

    Args:
        records: of one pair each; the keys of ``groups``, of ``NUMBERS`` and ``base_before``, ``base_after``; of
            ``SECONDS`` where they were taken.
        groups: keys whose values tell the groups apart.

    Returns:
        For each group its keys, ``pairs``, the mean of every number (NaN left out, infinite kept; NaN of none),
        ``Dice_worst_tenth``, ``HD95_median``, ``structures`` (how many) and ``missed``: pairs without any overlap.
    """
    rows: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        rows.setdefault(tuple(record[name] for name in groups), []).append(record)
    summaries = []
    for values, members in rows.items():
        summary: dict[str, Any] = dict(zip(groups, values, strict=True)) | {"pairs": len(members)}
        for name in (*NUMBERS, "base_before", "base_after", *SECONDS):
            given = [float(member.get(name, np.nan)) for member in members]
            known = [value for value in given if not np.isnan(value)]
            summary[name] = float(np.mean(known)) if known else float("nan")
        dice = [float(member["Dice"]) for member in members]
        summary["Dice_worst_tenth"] = worst_tenth(dice)
        # one pair without a prediction makes the mean infinite and the table blind for all others
        summary["HD95_median"] = float(np.nanmedian([float(member["HD95"]) for member in members]))
        summary["structures"] = len({member.get("structure") for member in members})
        summary["missed"] = sum(value == 0 for value in dice)
        summaries.append(summary)
    return summaries
