"""Summaries as ``evaluate`` writes them, from given numbers."""

import json
from pathlib import Path

import numpy as np

from nnunet_calib.evaluation.write import numbers_as_json
from nnunet_calib.metrics import SCORES


def write_run(
    folder: Path,
    dice,
    ece=None,
    hd95=None,
    *,
    structures=("organ", "node"),
    cases=None,
    n_ref=100,
    n_pred=None,
    failed=(),
    protocol=None,
):
    """One case a row of ``dice`` (cases, structures); ECE (cases,) in the region ``foreground``, half in ``volume``."""
    dice = np.atleast_2d(np.asarray(dice, dtype=float))
    names = cases or [f"case_{i:03d}" for i in range(len(dice))]
    records = []
    for i, name in enumerate(names):
        metrics = {
            str(s + 1): {
                "Dice": dice[i, s],
                "IoU": dice[i, s] / (2 - dice[i, s]),
                "n_ref": n_ref,
                "n_pred": n_ref if n_pred is None else n_pred[i][s],
                "HD95": float(2 if hd95 is None else hd95[i][s]),
                "NSD": dice[i, s],
            }
            for s in range(len(structures))
        }
        calibration = {}
        if ece is not None:
            calibration = {
                region: dict.fromkeys(SCORES, float(ece[i]) * share) | {"n": 10, "classes": {}}
                for region, share in (("volume", 0.5), ("foreground", 1.0))
            }
        records.append(
            {
                "case": name,
                "reference_file": f"labelsTs/{name}.nii.gz",
                "prediction_file": f"{folder}/{name}.nii.gz",
                "probabilities_file": None,
                "metrics": metrics,
                "calibration": calibration,
                "notes": [],
            }
        )
    summary = {
        "structures": {str(s + 1): {"name": name} for s, name in enumerate(structures)},
        "protocol": {"bins": 15} if protocol is None else protocol,
        "software": {"numpy": "2.0"},
        "failed": [{"case": case, "error": f"case {case}: truncated"} for case in failed],
        "metric_per_case": records,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(numbers_as_json(summary)))
    return folder


def simulated(seed: int, cases: int, dice_shift: float = 0.0, ece_share: float = 1.0):
    """Dice (cases, 2) and ECE (cases,): difficulty of the cases is shared by all calls, noise is the seed's."""
    hard = np.random.default_rng(0).beta(2, 8, cases)
    rng = np.random.default_rng(seed)
    dice = np.clip(0.95 - hard[:, None] + dice_shift + rng.normal(0, 0.02, (cases, 2)), 0, 1)
    return dice, np.clip(hard * ece_share + rng.gamma(2, 0.005, cases), 0, 1)
