"""The volumes of ``benchmark_metrics.py``: organs of ellipsoids, predictions, probabilities, and a case as files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

VOLUMES = {  # shape, spacing (z, y, x), structures, voxels by which the bad prediction is shifted
    "abdomen": ((100, 512, 512), (3.0, 0.8, 0.8), 13, 60),
    "cardiac": ((10, 256, 216), (10.0, 1.4, 1.4), 3, 0),
    "hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0), 2, 0),
}
CLASSES = 14


def phantom(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A reference of ellipsoids with wavy surfaces, and a prediction of the same with other waves: Dice about 0.9."""
    shape, _, structures, _ = VOLUMES[name]
    random = np.random.default_rng(0)
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    grid = np.meshgrid(*(np.linspace(-1, 1, side, dtype=np.float32) for side in shape), indexing="ij", sparse=True)
    waves = [
        ndimage.zoom(random.normal(size=[6, 10, 10]), np.divide(shape, [6, 10, 10]), order=1)[
            tuple(slice(side) for side in shape)
        ].astype(np.float32)
        for _ in range(2)
    ]
    for label in range(1, structures + 1):
        centre = random.uniform(-0.6, 0.6, 3)
        radius = random.uniform(0.06, 0.3, 3) if structures > 3 else random.uniform(0.3, 0.5, 3)
        distance = sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radius, strict=True))
        for labels, wave in zip((reference, prediction), waves, strict=True):
            labels[distance < 1 + 0.15 * wave] = label
    return reference, prediction


def probabilities(reference: np.ndarray, classes: int) -> np.ndarray:
    """Softmax of noisy logits around the reference, float32 (C, *S), made slice by slice."""
    random = np.random.default_rng(1)
    result = np.empty((classes, *reference.shape), np.float32)
    for z, labels in enumerate(reference):
        logits = random.normal(0, 1, (classes, *labels.shape)).astype(np.float32)
        np.put_along_axis(logits, labels[None].astype(np.intp), 6.0, axis=0)
        logits = ndimage.uniform_filter(logits, (0, 3, 3))
        logits -= logits.max(axis=0)
        np.exp(logits, out=logits)
        result[:, z] = logits / logits.sum(axis=0)
    return result


def make_volumes(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for name, (_, _, structures, shift) in VOLUMES.items():
        if (work / f"{name}_prediction.npy").exists():
            continue
        reference, prediction = phantom(name)
        np.save(work / f"{name}_reference.npy", reference)
        if shift:
            np.save(work / f"{name}_bad.npy", np.roll(prediction, shift, axis=2))
        np.save(work / f"{name}_probabilities.npy", probabilities(reference, structures + 1))
        np.save(work / f"{name}_prediction.npy", prediction)


def make_case(work: Path) -> None:
    """The abdomen as files: label maps, ``.npz``, the compact format in float32 and float16."""
    import SimpleITK

    from nnunet_calib.data.probabilities import write_compact

    folders = [work / name for name in ("reference", "npz", "compact", "compact16")]
    if (work / "case.done").exists():
        return
    stored = np.load(work / "abdomen_probabilities.npy", mmap_mode="r")
    labels = {"reference": np.load(work / "abdomen_reference.npy"), "prediction": np.argmax(stored, axis=0)}
    for folder in folders:
        folder.mkdir(exist_ok=True)
        image = SimpleITK.GetImageFromArray(labels["reference" if folder.name == "reference" else "prediction"]
                                            .astype(np.uint8))  # fmt: skip
        image.SetSpacing(VOLUMES["abdomen"][1][::-1])
        SimpleITK.WriteImage(image, str(folder / "case.nii.gz"))
    content = {"labels": {"background": 0} | {f"organ{i}": i for i in range(1, CLASSES)}, "file_ending": ".nii.gz"}
    (work / "dataset.json").write_text(json.dumps(content | {"channel_names": {"0": "CT"}}))
    began = time.perf_counter()
    np.savez_compressed(work / "npz" / "case.npz", probabilities=stored)
    print(f"written in {time.perf_counter() - began:.1f} s: .npz")
    for folder, dtype in (("compact", np.float32), ("compact16", np.float16)):
        began = time.perf_counter()
        write_compact(work / folder / "case.nncp", stored, stored.shape, np.dtype(dtype))
        print(f"written in {time.perf_counter() - began:.1f} s: {folder}")
    (work / "case.done").touch()
