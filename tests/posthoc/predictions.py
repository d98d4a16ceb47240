"""Folders of predictions whose probabilities are too sure by a known temperature."""

import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from nnunet_calib.posthoc.maps.calibrator import softmax

from ..folders import Folders
from .simulated import drawn

SHAPE = (12, 30, 28)
LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def too_sure(seed: int, temperature: float = 2.0, shape=SHAPE, classes: int = 3):
    """A reference of blobs in background, and float32 probabilities that are too sure by ``temperature``."""
    rng = np.random.default_rng(seed)
    z = np.stack([ndimage.gaussian_filter(rng.normal(0, 30, shape), 2) for _ in range(classes)])
    z[0] += 2
    reference = drawn(softmax(z), rng).astype(np.uint8)
    return reference, softmax(z * temperature).astype(np.float32)


def predictions(root: Path, cases: int = 6, first: int = 0, **how) -> Folders:
    made = Folders(root, labels=LABELS)
    for seed in range(first, first + cases):
        reference, p = too_sure(seed, **how)
        made.add(f"case_{seed:02d}", reference, p.argmax(axis=0), p)
    return made


def region_predictions(root: Path, cases: int = 4, temperature: float = 2.0) -> Folders:
    made = Folders(root, labels=REGIONS, regions_class_order=[1, 2])
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        whole, less = (ndimage.gaussian_filter(rng.normal(0, 30, SHAPE), 2) for _ in range(2))
        odds = np.stack([whole - 1, whole - 1 - np.abs(less)])
        whole, core = rng.uniform(size=SHAPE) < 1 / (1 + np.exp(-odds))  # one draw for both: the core is in the whole
        reference = np.where(core, 2, np.where(whole, 1, 0)).astype(np.uint8)
        p = (1 / (1 + np.exp(-odds * temperature))).astype(np.float32)
        made.add(f"case_{seed:02d}", reference, np.where(p[1] > 0.5, 2, np.where(p[0] > 0.5, 1, 0)), p)
    return made


def model(root: Path, folds: int = 2, cases_per_fold: int = 2) -> tuple[Path, Path]:
    """A trained model's folder with its validations, and the folder of references."""
    trained = root / "results" / "Dataset999_Toy" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    references = root / "references"
    references.mkdir(parents=True)
    for fold in range(folds):
        made = predictions(root / f"made_{fold}", cases_per_fold, first=fold * cases_per_fold)
        here = trained / f"fold_{fold}"
        here.mkdir(parents=True)
        (here / "checkpoint_final.pth").write_bytes(bytes([fold]) * 100)
        made.dataset_json.replace(trained / "dataset.json")
        made.prediction.rename(here / "validation")
        for file in made.reference.iterdir():
            file.replace(references / file.name)
    plans = {"dataset_name": "Dataset999_Toy", "plans_name": "nnUNetPlans", "configurations": {}}
    (trained / "plans.json").write_text(json.dumps(plans))
    return trained, references
