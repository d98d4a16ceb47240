"""Evaluated phantoms: predictions without a network, from the readers' fractions, as sure as one asks for."""

import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from nnunet_calib.demo import phantom
from nnunet_calib.evaluation import evaluate_folder

from ..folders import write_labels


def write_phantoms(root: Path, cases: int, sharpness: dict[str, float]) -> dict[str, Path]:
    """Images, references and, by name, predictions with probabilities p^sharpness (1: calibrated), all evaluated."""
    for folder in ("images", "labels", *(f"predictions/{name}" for name in sharpness)):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(cases):
        rng = np.random.default_rng(i)
        case, name = phantom.make_case(i % phantom.READERS, rng), f"case_{i:03d}"
        write_labels(root / "labels" / f"{name}.nii.gz", case.label, phantom.SPACING)
        write_labels(root / "images" / f"{name}_0000.nii.gz", case.image, phantom.SPACING)
        logits = np.log(ndimage.gaussian_filter(case.fractions, (0, 1, 1, 1)) + 0.02)
        logits += 0.3 * ndimage.gaussian_filter(rng.normal(0, 8, logits.shape), (0, 2, 2, 2))
        for method, sharp in sharpness.items():
            scaled = np.exp(sharp * (logits + 0.1 * rng.normal(0, 1, logits.shape)))
            probabilities = (scaled / scaled.sum(axis=0)).astype(np.float32)
            labels = probabilities.argmax(axis=0).astype(np.uint8)
            write_labels(root / "predictions" / method / f"{name}.nii.gz", labels, phantom.SPACING)
            np.savez(root / "predictions" / method / f"{name}.npz", probabilities=probabilities)
    for method in sharpness:
        content = {"labels": phantom.LABELS, "file_ending": ".nii.gz"}
        (root / "predictions" / method / "dataset.json").write_text(json.dumps(content))
        evaluate_folder(root / "labels", root / "predictions" / method, root / "scores" / method, processes=1)
    return {method: root / "scores" / method for method in sharpness}
