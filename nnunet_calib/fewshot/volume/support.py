"""An annotated volume as a support: what is sampled of it, and what the user should know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.volume.atlas import Labelled
from nnunet_calib.fewshot.volume.files import IGNORED, STRUCTURE, Volume
from nnunet_calib.fewshot.volume.sampling import VOXELS, drawn_evenly, sample_support
from nnunet_calib.fewshot.volume.scan import Scan, scan_of

FEWEST_VOXELS = 10
"""Voxels of the structure on the network's grid without which a support cannot be used."""


@dataclass(frozen=True)
class Support:
    """Sampled voxels of an annotated volume.

    Attributes:
        scan: the volume.
        index: int64 (N,), into the flat volume.
        target: bool (N,).
        weight: float64 (N,), voxels that each stands for.
        features: of each fold float32 (N, F).
        structure_mm3: volume of the structure.
        even: float32 (M, F), features of the first fold at voxels drawn evenly from the volume.
        cut: the structure touches an end of the volume.
        part: int64 (N,), chunk of each voxel where the pairing is given; None: by the extent.
        labelled: the volume, for registration; None: without.
    """

    scan: Scan
    index: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    features: list[Tensor]
    structure_mm3: float
    even: Tensor
    cut: bool = False
    part: np.ndarray | None = None
    labelled: Labelled | None = None


@dataclass(frozen=True)
class Annotated:
    """A support, with what the user should know of it.

    Attributes:
        case: its name.
        support: what a structure is fitted to.
        overlaps: of each base label that is predicted in the structure, its share of the structure, and their Dice.
        notes: one sentence each.
        unit: of its volume, as ``Volume.unit``.
    """

    case: str
    support: Support
    overlaps: Mapping[int, tuple[float, float]]
    notes: tuple[str, ...]
    unit: str = "mm3"


def read_support(
    model: BaseModel,
    predictor: FeaturePredictor,
    volume: Volume,
    *,
    voxels: int = VOXELS,
    seed: int = 0,
    labelled: bool = False,
) -> Annotated:
    """Look at an annotated volume: one pass for the base classes, one for the features of sampled voxels.

    Args:
        model: the base model.
        predictor: of the model.
        volume: with a label.
        voxels: how many are sampled.
        seed: of the sample.
        labelled: keep the volume for registration.

    Raises:
        InputError: less than 10 voxels of the structure on the network's grid.
    """
    assert volume.label is not None
    assert volume.structure_mm3 is not None
    structure = volume.label == STRUCTURE
    found = int(np.count_nonzero(structure))
    if found < FEWEST_VOXELS:
        why = "" if volume.structure_mm3 else "; its label map does not hold that value"
        raise InputError(f"{volume.case}: {found} voxels of the structure at the model's spacing, "
                         f"{FEWEST_VOXELS} are needed{why}")  # fmt: skip
    image = torch.from_numpy(volume.image)
    scan = scan_of(model, volume, predictor.predict(image).base)
    index, weight = sample_support(
        structure, scan.base, volume.spacing, volume.label != IGNORED, voxels=voxels, seed=seed
    )
    places = np.stack(np.unravel_index(index, volume.shape), axis=1)
    even = drawn_evenly(volume.shape, seed)
    features = predictor.features_at(image, torch.from_numpy(np.concatenate([places, even])))
    support = Support(
        scan,
        index,
        structure.ravel()[index],
        weight,
        [part[: len(index)] for part in features],
        volume.structure_mm3,
        features[0][len(index) :],
        volume.cut,
        labelled=Labelled.of(volume, scan) if labelled else None,
    )
    return Annotated(volume.case, support, overlaps(structure, scan.base), tuple(_notes(volume)), volume.unit)


def overlaps(structure: np.ndarray, base: np.ndarray) -> dict[int, tuple[float, float]]:
    """Of each base label that is predicted in the structure, its share of the structure, and their Dice."""
    counts = np.bincount(base.ravel())
    inside = np.bincount(base[structure], minlength=len(counts))
    total = int(inside.sum())
    return {
        int(c): (float(inside[c] / total), float(2 * inside[c] / (counts[c] + total)))
        for c in np.flatnonzero(inside)
        if c > 0
    }


def _notes(volume: Volume) -> list[str]:
    notes = []
    if volume.turned:
        notes.append(f"{volume.case}: stored {volume.stored}, turned into {volume.orientation} as the first support")
    if volume.cut:
        notes.append(
            f"{volume.case}: the structure reaches the border of the image or voxels that do not count; "
            "its size is not used"
        )
    if volume.staircase:
        notes.append(
            f"{volume.case}: its voxels are {volume.coarsest:.1f} times as thick as the model's; its label map has "
            "steps there"
        )
    return notes
