"""A small 3D data set whose borders are truly ambiguous, so that a probability can be right or wrong.

Every case shows a bright organ and a dark node. Each structure s has a signed distance d_s(x) in mm,
negative inside. Reader r draws the border where

    d_s(x) = bias_r + wobble_{r,s}(x),

bias_r being the reader's habit, the same in all cases (generous or strict), and wobble a smooth random field.
The image does not tell which reader is right: its intensity falls off as the share of readers does, Phi(-d_s / sigma)
with sigma^2 = var(bias) + var(wobble), plus noise. The stored label of a case is the drawing of one reader; hence the
true probability of a class at a voxel is the fraction of readers who drew it, and that fraction is stored too.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr, ndtri

from nnunet_calib.data.files import write_whole

DATASET = "Dataset999_CalibDemo"
LABELS = {"background": 0, "organ": 1, "node": 2}
NEW_LABELS = {**LABELS, "cyst": 3}
"""With the structure of the few-shot part, which the networks never saw; few-shot gives it the next free label."""

READERS = 8
TRAINING_CASES = 16
TEST_CASES = 12
SHAPE = (32, 40, 40)  # voxels, (z, y, x)
SPACING = (1.2, 0.9, 0.9)  # mm, (z, y, x)
BIAS_MM = 0.6
WOBBLE_MM = 0.7
WOBBLE_LENGTH_MM = 3.0
NOISE = 0.15  # structures differ from the background by 1


@dataclass(frozen=True)
class Structure:
    """An ellipsoid; lengths in mm, axes (z, y, x), the centre counted from the middle of the image."""

    centre: tuple[float, float, float]
    semi_axes: tuple[float, float, float]
    intensity: float  # the background has 0


STRUCTURES = {
    "organ": Structure((-4.0, -5.0, -5.0), (11.5, 10.0, 10.0), intensity=1.0),
    "node": Structure((7.0, 7.5, 7.5), (8.5, 8.0, 8.0), intensity=-1.0),
}
NEW_STRUCTURES = {**STRUCTURES, "cyst": Structure((-8.0, 10.0, -10.0), (6.0, 6.0, 6.0), intensity=0.5)}
SUPPORTS, QUERIES = 3, 4


@dataclass(frozen=True)
class Case:
    """One case, axes (z, y, x).

    Attributes:
        image: float32, the background has 0, the structures +1 and -1.
        label: uint8, the drawing of one reader, values of ``LABELS``.
        fractions: float32 ``(classes, z, y, x)`` in [0, 1], the fraction of readers who drew the class; sums to 1.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    fractions: NDArray[np.float32]


def _smooth_field(rng: np.random.Generator) -> NDArray[np.float64]:
    """Random field of zero mean, unit deviation and a correlation length of ``WOBBLE_LENGTH_MM``."""
    field = gaussian_filter(rng.standard_normal(SHAPE), [WOBBLE_LENGTH_MM / mm for mm in SPACING], mode="wrap")
    return (field - field.mean()) / field.std()


def _signed_distance(structure: Structure, rng: np.random.Generator) -> NDArray[np.float64]:
    """Distance in mm to the true border of a randomly moved, stretched and dented ellipsoid, negative inside."""
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SHAPE, SPACING, strict=True)]
    centre = np.add(structure.centre, rng.uniform(-1.0, 1.0, 3))
    semi_axes = np.multiply(structure.semi_axes, rng.uniform(0.94, 1.06, 3))
    offsets = [x - c for x, c in zip(np.meshgrid(*axes, indexing="ij"), centre, strict=True)]
    level = np.sqrt(sum((x / a) ** 2 for x, a in zip(offsets, semi_axes, strict=True)))
    slope = np.sqrt(sum((x / a**2) ** 2 for x, a in zip(offsets, semi_axes, strict=True)))
    # first order in the distance: exact on the border, which is all that the readers and the image look at
    return level * (level - 1) / np.maximum(slope, 1e-9) + 0.8 * _smooth_field(rng)


def make_case(reader: int, rng: np.random.Generator, structures: Mapping[str, Structure] = STRUCTURES) -> Case:
    """Draw a case as seen by all readers and labelled by one.

    Args:
        reader: whose drawing becomes the label, 0 to ``READERS - 1``; a higher number draws larger structures.
        rng: source of all randomness.
        structures: by name; one of ``STRUCTURES`` or ``NEW_STRUCTURES``.

    Returns:
        Image, label and the fractions of readers.
    """
    distances = {name: _signed_distance(structure, rng) for name, structure in structures.items()}
    sigma = np.hypot(BIAS_MM, WOBBLE_MM)
    image = np.zeros(SHAPE)
    for name, distance in distances.items():
        share = ndtr(-distance / sigma)
        image = (1 - share) * image + share * structures[name].intensity
    image += 0.1 * _smooth_field(rng) + NOISE * rng.standard_normal(SHAPE)

    biases = BIAS_MM * ndtri((np.arange(READERS) + 0.5) / READERS)
    drawings = np.zeros((READERS, *SHAPE), dtype=np.uint8)
    for drawing, bias in zip(drawings, biases, strict=True):
        for name, distance in distances.items():  # where they touch, the node comes last
            drawing[distance < bias + WOBBLE_MM * _smooth_field(rng)] = NEW_LABELS[name]
    fractions = np.stack(
        [(drawings == label).mean(axis=0) for label in (0, *(NEW_LABELS[name] for name in structures))]
    )
    return Case(image.astype(np.float32), drawings[reader].copy(), fractions.astype(np.float32))


def _write_volume(array: NDArray, file: Path) -> None:
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(SPACING[::-1])
    sitk.WriteImage(volume, str(file), useCompression=True)


def write_dataset(raw: Path, readers: Path, seed: int, tick: Callable[[int], object] = lambda cases: None) -> None:
    """Write the data set in nnU-Net's raw format, and what the readers think beside it.

    ``dataset.json`` is written last: where it exists, the data set is whole.

    Args:
        raw: folder of the data set: gets ``imagesTr, labelsTr, imagesTs, labelsTs, dataset.json``.
        readers: gets ``labelsTr, labelsTs`` with, as nnU-Net writes predictions, the class most readers drew
            (``CASE.nii.gz``) and the fractions (``CASE.npz``, key ``probabilities``).
        seed: 0 or larger; the same seed gives the same voxels.
        tick: called with the number of cases written, after each.
    """
    streams = iter(np.random.default_rng(seed).spawn(TRAINING_CASES + TEST_CASES + 1))
    order = next(streams)
    number = 0
    for part, cases in (("Tr", TRAINING_CASES), ("Ts", TEST_CASES)):
        for folder in (raw / f"images{part}", raw / f"labels{part}", readers / f"labels{part}"):
            folder.mkdir(parents=True, exist_ok=True)
        for reader in order.permutation(np.arange(cases) % READERS):  # every reader as often as the others
            number += 1
            name = f"demo_{number:03d}"
            case = make_case(int(reader), next(streams))
            _write_volume(case.image, raw / f"images{part}" / f"{name}_0000.nii.gz")
            _write_volume(case.label, raw / f"labels{part}" / f"{name}.nii.gz")
            majority = case.fractions.argmax(axis=0).astype(np.uint8)
            _write_volume(majority, readers / f"labels{part}" / f"{name}.nii.gz")
            np.savez_compressed(readers / f"labels{part}" / f"{name}.npz", probabilities=case.fractions)
            tick(number)
    dataset = {
        "channel_names": {"0": "MRI"},  # nnU-Net then normalises each image by its own mean and deviation
        "labels": LABELS,
        "numTraining": TRAINING_CASES,
        "file_ending": ".nii.gz",
        "name": "CalibDemo",
        "description": f"Simulated; the label of a case is the drawing of one of {READERS} readers. Seed {seed}.",
    }
    write_whole(raw / "dataset.json", json.dumps(dataset, indent=2) + "\n")


def write_new_structure(folder: Path, seed: int) -> None:
    """Write volumes with a structure that the demo's networks never saw, for few-shot.

    ``dataset.json`` is written last.

    Args:
        folder: gets ``imagesTr, labelsTr`` (``SUPPORTS`` volumes), ``imagesTs, labelsTs`` (``QUERIES``) and
            ``dataset.json``; label maps have the values of ``NEW_LABELS``.
        seed: as of ``write_dataset``; the volumes are others.
    """
    streams = iter(np.random.default_rng([seed, 1]).spawn(SUPPORTS + QUERIES))
    for part, cases in (("Tr", SUPPORTS), ("Ts", QUERIES)):
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        for i in range(cases):
            case, name = make_case(READERS // 2, next(streams), NEW_STRUCTURES), f"new_{part.lower()}_{i + 1}"
            _write_volume(case.image, folder / f"images{part}" / f"{name}_0000.nii.gz")
            _write_volume(case.label, folder / f"labels{part}" / f"{name}.nii.gz")
    dataset = {"channel_names": {"0": "MRI"}, "labels": NEW_LABELS, "numTraining": SUPPORTS, "file_ending": ".nii.gz"}
    write_whole(folder / "dataset.json", json.dumps(dataset, indent=2) + "\n")
