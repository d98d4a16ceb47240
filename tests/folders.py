"""Small folders of references and predictions, as nnU-Net leaves them."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage


class Folders:
    """A reference folder, a prediction folder with dataset.json, and the place for results, under construction."""

    def __init__(self, root: Path, labels: dict | None = None, **dataset):
        self.reference, self.prediction, self.output = root / "labelsTs", root / "predicted", root / "scores"
        self.reference.mkdir(parents=True)
        self.prediction.mkdir()
        self.dataset_json = self.prediction / "dataset.json"
        content = {"labels": labels or {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"} | dataset
        self.dataset_json.write_text(json.dumps(content))

    def add(self, name: str, reference, prediction, probabilities=None, spacing=(1.0, 1.0, 1.0)):
        """Write one case; spacing in the order of the array's axes."""
        write_labels(self.reference / f"{name}.nii.gz", reference, spacing)
        write_labels(self.prediction / f"{name}.nii.gz", prediction, spacing)
        if probabilities is not None:
            np.savez_compressed(self.prediction / f"{name}.npz", probabilities=probabilities)

    def add_ambiguous(self, name: str, seed: int = 0, shape=(6, 14, 12), spacing=(1.0, 1.0, 1.0)):
        """Write one case with probabilities whose arg-max is the prediction."""
        reference, probabilities = ambiguous(seed, shape)
        self.add(name, reference, probabilities.argmax(axis=0), probabilities, spacing)

    @property
    def words(self) -> list[str]:
        """What follows ``nnunet-calib``."""
        return ["evaluate", str(self.reference), str(self.prediction), "-o", str(self.output), "-np", "1"]

    def summary(self) -> dict:
        return json.loads((self.output / "summary.json").read_text())


def write_labels(path: Path, labels: np.ndarray, spacing=(1.0, 1.0, 1.0), origin=None) -> None:
    if labels.dtype == np.int64:
        labels = labels.astype(np.uint8)
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing([float(step) for step in spacing][::-1])
    if origin is not None:
        image.SetOrigin(origin)
    sitk.WriteImage(image, str(path), True)


def assert_same(ours, theirs, rel: float = 1e-12) -> None:
    """Nested records hold the same numbers, up to the order of summation; NaN is NaN."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name], rel)
    elif isinstance(ours, list):
        for our_entry, their_entry in zip(ours, theirs, strict=True):
            assert_same(our_entry, their_entry, rel)
    else:
        assert ours == (pytest.approx(theirs, rel=rel, nan_ok=True) if isinstance(theirs, float) else theirs)


def ambiguous(seed: int, shape: tuple[int, ...], classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A reference (uint8) of smooth structures, and float32 probabilities (C, *shape) that mostly agree with it."""
    rng = np.random.default_rng(seed)
    logits = np.stack([ndimage.gaussian_filter(rng.normal(0, 12, shape), 1.5) for _ in range(classes)])
    truth = (logits + rng.gumbel(0, 0.5, logits.shape)).argmax(axis=0).astype(np.uint8)
    probabilities = np.exp(logits - logits.max(axis=0))
    return truth, (probabilities / probabilities.sum(axis=0)).astype(np.float32)
