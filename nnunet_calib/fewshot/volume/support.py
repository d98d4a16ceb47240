"""An annotated volume as a support: what is sampled of it, and what the user should know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.volume.anatomy import Anatomy
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


def read_supports(
    model: BaseModel,
    predictor: FeaturePredictor,
    volumes: Sequence[Volume],
    *,
    voxels: int = VOXELS,
    seeds: Sequence[int] = (0,),
    labelled: bool = False,
) -> list[Annotated | InputError]:
    """Look at an annotated volume: one pass for the base classes, one for the features of sampled voxels.

    Args:
        model: the base model.
        predictor: of the model.
        volumes: the case with the label of each structure, as ``read_structures`` gives it.
        voxels: how many are sampled for each structure.
        seeds: of the sample of each structure.
        labelled: keep the volume for registration.

    Returns:
        For each structure the support, or why it cannot be one: less than 10 voxels on the network's grid.
    """
    first = volumes[0]
    refused = [_too_few(volume) for volume in volumes]
    if all(refused):
        return [error for error in refused if error is not None]
    image = torch.from_numpy(first.image)
    scan = scan_of(model, first, predictor.predict(image).base)
    anatomy = Anatomy.of(first, scan) if labelled else None
    samples, places = [], []
    for volume, seed in zip(volumes, seeds, strict=True):
        assert volume.label is not None
        structure, valid = volume.label == STRUCTURE, volume.label != IGNORED
        if structure.any():
            samples.append(sample_support(structure, scan.base, volume.spacing, valid, voxels=voxels, seed=seed))
        else:
            samples.append((np.zeros(0, np.int64), np.zeros(0)))
        places.append(np.stack(np.unravel_index(samples[-1][0], volume.shape), axis=1))
        places.append(drawn_evenly(volume.shape, seed))
    ends = np.cumsum([len(part) for part in places]).tolist()
    features = predictor.features_at(image, torch.from_numpy(np.concatenate(places)))
    parts = [torch.tensor_split(fold, ends[:-1]) for fold in features]
    found: list[Annotated | InputError] = []
    for number, (volume, error, (index, weight)) in enumerate(zip(volumes, refused, samples, strict=True)):
        if error is not None:
            found.append(error)
            continue
        assert volume.label is not None
        assert volume.structure_mm3 is not None
        structure = volume.label == STRUCTURE
        support = Support(
            scan,
            index,
            structure.ravel()[index],
            weight,
            [fold[2 * number].clone() for fold in parts],
            volume.structure_mm3,
            parts[0][2 * number + 1].clone(),
            volume.cut,
            labelled=None if anatomy is None else Labelled.of(volume, anatomy),
        )
        told = tuple(_notes(volume))
        found.append(Annotated(volume.case, support, overlaps(structure, scan.base), told, volume.unit))
    return found


def _too_few(volume: Volume) -> InputError | None:
    """Why a volume cannot be a support."""
    assert volume.label is not None
    found = int(np.count_nonzero(volume.label == STRUCTURE))
    others = volume.label.size - found - int(np.count_nonzero(volume.label == IGNORED))
    if found >= FEWEST_VOXELS and others >= FEWEST_VOXELS:
        return None
    if found >= FEWEST_VOXELS:
        return InputError(
            f"{volume.case}: {others} voxels that are annotated as something else than the structure, {FEWEST_VOXELS} "
            "are needed; annotate some of its surroundings"
        )
    why = "" if volume.structure_mm3 else "; its label map does not hold that value"
    return InputError(
        f"{volume.case}: {found} voxels of the structure at the model's spacing, {FEWEST_VOXELS} are needed{why}"
    )


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
