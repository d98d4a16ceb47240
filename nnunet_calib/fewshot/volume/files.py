"""Volumes as the base model sees them, and the way back to the image.

Supports and queries go through nnU-Net's own reader and preprocessor, with the base model's plans. Labels of supports
are carried along. nnU-Net predicts an array as it is stored; chunks, positions and left and right only mean something
in the patient, so a case stored in another orientation than the task's is turned before and turned back after.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunet_calib.data.cases import find_images
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_hidden
from nnunet_calib.data.images import LabelImage, Place, check_same_geometry, place_of, read_image, read_labels
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.prediction.model import TrainedModel

STRUCTURE, IGNORED = 1, 2
"""Values of ``Volume.label``."""

UNKNOWN = "unknown"
"""Orientation of images whose files do not say how they lie in the patient, such as 2D images."""

_COARSE = 3.0  # times the target spacing, from which a label map has visible steps


@dataclass(frozen=True)
class Volume:
    """A case on the base model's grid, S.

    Attributes:
        case: its name.
        image: float32 (channels, *S), preprocessed; for a cascade with the previous stage's classes.
        spacing: mm between voxels of S.
        orientation: of the array that was preprocessed, for its axes x, y, z: ``LPS`` means that x grows towards the
            patient's left, y towards posterior, z towards superior; ``UNKNOWN`` if the file does not say.
        stored: orientation of the file; the same unless the case was turned.
        axes: for each axis of S the patient axis, 0 (left to right), 1 (posterior to anterior) or 2 (inferior to
            superior), and whether the index grows along it (1) or against it (-1).
        properties: nnU-Net's, of the array that was preprocessed.
        file_properties: nnU-Net's, of the file.
        place: of the file's voxels, in mm whatever the unit of the file.
        label: int8 (*S), ``STRUCTURE``, ``IGNORED`` or 0; None for a query.
        structure_mm3: volume of the structure in the image; None for a query.
        cut: the structure touches the border of the image, or voxels that do not count: some of it may lie there.
        coarsest: the largest ratio of the image's spacing to that of S.
        unit: of ``structure_mm3`` and all volumes of the case: ``mm3``; of a 2D image ``mm2``, its slice being taken as
            1 mm thick, for nnU-Net's spacing along the third axis is a placeholder; or ``pixels`` where the format
            holds no spacing.
    """

    case: str
    image: np.ndarray
    spacing: tuple[float, float, float]
    orientation: str
    stored: str
    axes: tuple[tuple[int, int], ...]
    properties: dict[str, Any]
    file_properties: dict[str, Any]
    place: Place
    label: np.ndarray | None = None
    structure_mm3: float | None = None
    cut: bool = False
    coarsest: float = 1.0
    unit: str = "mm3"

    @property
    def shape(self) -> tuple[int, int, int]:
        """S."""
        return self.image.shape[1:]

    @property
    def turned(self) -> bool:
        """The array was turned into another orientation than the file's."""
        return self.orientation != self.stored

    @property
    def staircase(self) -> bool:
        """The image is so coarse that its labels have steps on the grid S."""
        return self.coarsest > _COARSE


def find_supports(images: Path, labels: Path, file_ending: str) -> dict[str, tuple[list[Path], Path]]:
    """Image files and label map of each case that has a label map.

    Raises:
        UsageError: not folders.
        InputError: no label map, or one without image.
    """
    found = find_images(images, file_ending)
    if not labels.is_dir():
        raise UsageError(f"{labels} is not a folder")
    maps = {
        path.name.removesuffix(file_ending): path
        for path in labels.iterdir()
        if path.name.endswith(file_ending) and not is_hidden(path)
    }
    if not maps:
        raise InputError(f"{labels}: no label map; they are named CASE{file_ending}, like the cases of {images}")
    if alone := sorted(maps.keys() - found.keys()):
        raise InputError(f"{maps[alone[0]]}: no image {alone[0]}_0000{file_ending} in {images}")
    return {case: (found[case], maps[case]) for case in sorted(maps)}


def read_volume(
    model: BaseModel,
    case: str,
    images: Sequence[Path],
    *,
    label: Path | None = None,
    value: int = 1,
    ignore: int | None = None,
    orientation: str | None = None,
    previous: Path | None = None,
) -> Volume:
    """Read and preprocess a case with the base model's plans, as ``read_structures`` does.

    Args:
        model: the base model.
        case: name.
        images: one file a channel.
        label: label map of a support; None for a query.
        value: label value of the structure.
        ignore: see there.
        orientation: see there.
        previous: see there.
    """
    values = () if label is None else (value,)
    return read_structures(
        model, case, images, label=label, values=values, ignore=ignore, orientation=orientation, previous=previous
    )[0]


def read_structures(
    model: BaseModel,
    case: str,
    images: Sequence[Path],
    *,
    label: Path | None,
    values: Sequence[int],
    ignore: int | None = None,
    orientation: str | None = None,
    previous: Path | None = None,
) -> list[Volume]:
    """Read and preprocess a case with the base model's plans, and several structures in it.

    Args:
        model: the base model.
        case: name.
        images: one file a channel.
        label: label map of a support; None for a query.
        values: label values of the structures; none for a query.
        ignore: label value of voxels that do not count.
        orientation: to turn the case into; as stored if None.
        previous: of a cascade, the segmentation of the previous stage.

    Returns:
        A volume for each structure, which differ in what is said of the structure alone; one for a query.

    Raises:
        UsageError: a cascade without the previous stage's segmentation.
        InputError: files that cannot be used, do not fit each other, or do not say how they lie in the patient where
            that is needed.
    """
    model.check_previous_stage(previous)
    reader = model.plans_manager.image_reader_writer_class
    image, properties = _read(model, images)
    place = place_of(images[0], properties)
    spacing: Any = place.spacing
    stored = _orientation(place.affine)
    unit = unit_of(image, place)
    target = stored if orientation is None else orientation
    if UNKNOWN in (stored, target) and stored != target:
        unknown = images[0] if stored == UNKNOWN else "the task's supports"
        raise InputError(
            f"{images[0]}: its orientation cannot be compared with the task's, for the file of {unknown} has no "
            "affine; convert it to NIfTI with its orientation"
        )
    if target != stored and len(axcodes2ornt(target)) != len(axcodes2ornt(stored)):
        raise InputError(f"{images[0]}: oriented {stored}, which cannot be turned into {target}")

    structures, uncounted = list[np.ndarray](), np.zeros(0)
    segmentations: list[np.ndarray] = []
    if previous is not None:
        segmentations.append(_read_labels(previous, reader, images[0], image, place).labels.astype(np.float32))
    if label is not None:
        labels = _read_labels(label, reader, images[0], image, place).labels
        structures = [labels == value for value in values]
        uncounted = labels == ignore if ignore is not None else uncounted
        for structure in structures:
            segmentations.append((structure * STRUCTURE).astype(np.float32))
            if ignore is not None:
                segmentations[-1][uncounted] = IGNORED

    file_properties = dict(properties)
    if target != stored:
        image = _turn(image, stored, target)
        segmentations = [_turn(part[None], stored, target)[0] for part in segmentations]
        properties = properties | {"spacing": _turn_spacing(properties["spacing"], stored, target)}
        spacing = tuple(_turn_spacing(spacing, stored, target))
    volume = Volume(
        case,
        image,
        spacing,
        target,
        stored,
        _axes(target),
        properties,
        file_properties,
        place,
        unit=unit,
    )
    volume, carried = _preprocess(model, volume, segmentations, len(structures))
    if label is None:
        return [volume]
    return [
        replace(
            volume,
            label=own,
            structure_mm3=np.count_nonzero(structure) * voxel_size(place, unit),
            cut=_touches_border(structure) or _touch(structure, uncounted),
        )
        for structure, own in zip(structures, carried, strict=True)
    ]


def read_case(
    model: TrainedModel, images: Sequence[Path], label: Path
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """A case as it is stored: float32 (channels, z, y, x), the reader's properties, and its label map (z, y, x).

    Raises:
        InputError: files that cannot be used, or do not fit each other.
    """
    image, properties = _read(model, images)
    reader = model.plans_manager.image_reader_writer_class
    annotated = _read_labels(label, reader, images[0], image, place_of(images[0], properties))
    return image, properties, annotated.labels


def unit_of(image: np.ndarray, place: Place) -> str:
    """Unit of a voxel of an image (channels, z, y, x), as ``Volume.unit``."""
    if not place.geometry:
        return "pixels" if image.shape[1] == 1 else "mm3"
    return "mm2" if len(place.geometry["origin"]) == 2 else "mm3"


MEASURES = {"mm3": "volume_mm3", "mm2": "area_mm2", "pixels": "pixels"}
"""Key in reports of a structure's size in each unit."""


def voxel_size(place: Place, unit: str) -> float:
    """Of one voxel, in its unit."""
    return place.voxel if unit == "mm3" else float(np.prod(place.spacing[1:]))


def to_image_grid(model: BaseModel, volume: Volume, channels: np.ndarray, fill: float) -> np.ndarray:
    """Resample maps from the base model's grid to the image, as nnU-Net resamples its logits.

    Args:
        model: the base model.
        volume: the case.
        channels: float (n, *S).
        fill: value outside the box that nnU-Net cropped to.

    Returns:
        float (n, z, y, x) in the orientation of the file.
    """
    properties, plans = volume.properties, model.plans_manager
    steps = [properties["spacing"][axis] for axis in plans.transpose_forward]
    current = list(model.configuration_manager.spacing)
    current = [*steps[: 3 - len(current)], *current]
    resampled = model.configuration_manager.resampling_fn_probabilities(
        channels, properties["shape_after_cropping_and_before_resampling"], current, steps
    )
    whole = np.full((len(channels), *properties["shape_before_cropping"]), fill, dtype=np.float32)
    whole = insert_crop_into_image(whole, np.asarray(resampled), properties["bbox_used_for_cropping"])
    whole = whole.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])
    return turn_back(volume, whole)


def turn_back(volume: Volume, channels: np.ndarray) -> np.ndarray:
    """Turn maps (n, z, y, x) of the array that was preprocessed into the orientation of the file."""
    return _turn(channels, volume.orientation, volume.stored) if volume.turned else channels


def write_segmentation(model: BaseModel, volume: Volume, segmentation: np.ndarray, path: Path) -> None:
    """Write a label map (z, y, x) in the orientation of the file, with nnU-Net's writer, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = os.path.join(folder, path.name)  # writers go by the ending
        model.plans_manager.image_reader_writer_class().write_seg(segmentation, temporary, volume.file_properties)
        os.replace(temporary, path)


def _preprocess(
    model: BaseModel, volume: Volume, segmentations: list[np.ndarray], structures: int
) -> tuple[Volume, list[np.ndarray]]:
    """On the base model's grid: the volume, and of the last segmentations, one a structure, ``Volume.label``."""
    preprocessor = model.configuration_manager.preprocessor_class(verbose=False)
    properties = dict(volume.properties)
    image, segmentation, properties = preprocessor.run_case_npy(
        volume.image,
        np.stack(segmentations) if segmentations else None,
        properties,
        model.plans_manager,
        model.configuration_manager,
        model.dataset.content,
    )
    properties.pop("class_locations", None)
    if model.previous_stage is not None:
        one_hot = convert_labelmap_to_one_hot(segmentation[0], model.label_manager.foreground_labels, image.dtype)
        image = np.vstack((image, one_hot))
    forward = model.plans_manager.transpose_forward
    before = properties["shape_after_cropping_and_before_resampling"]
    steps = [volume.spacing[axis] for axis in forward]
    found = [step * old / new for step, old, new in zip(steps, before, image.shape[1:], strict=True)]
    coarsest = max(step / new for step, new in zip(steps, found, strict=True))
    if volume.unit != "mm3":
        found[list(forward).index(0)] = 1.0  # of the one slice, for which nnU-Net has a placeholder
    spacing: Any = tuple(found)
    volume = replace(
        volume,
        image=image,
        spacing=spacing,
        axes=tuple(volume.axes[axis] for axis in forward),
        properties=properties,
        coarsest=coarsest,
    )
    # nnU-Net marks what lies outside the nonzero mask with -1: not the structure.
    labels = [segmentation[number].clip(min=0) for number in range(len(segmentations) - structures, len(segmentations))]
    return volume, labels


def _read(model: TrainedModel, images: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
    image, properties = read_image(images, model.plans_manager.image_reader_writer_class)
    if not np.isfinite(image).all():
        raise InputError(f"{images[0]}: values that are NaN or infinite")
    channels = len(model.dataset.content.get("channel_names", model.dataset.content.get("modality", ())))
    if len(image) != channels:
        raise InputError(f"{images[0]}: {len(image)} image channels, the model takes {channels}")
    return image, properties


def _read_labels(path: Path, reader: type, image_path: Path, image: np.ndarray, place: Place) -> LabelImage:
    if not path.is_file():
        raise InputError(f"{path}: not there, for the image {image_path}")
    labels = read_labels(path, reader, range(1 << 16))
    check_same_geometry(LabelImage(image_path, image[0], place), labels, "image")
    return labels


def _orientation(affine: np.ndarray | None) -> str:
    return UNKNOWN if affine is None else "".join(nibabel.aff2axcodes(affine))


def _axes(orientation: str) -> tuple[tuple[int, int], ...]:
    """Patient axis and direction of the array's axes z, y, x; of unknown images as if they were ``RAS``."""
    rows = axcodes2ornt("RAS" if orientation == UNKNOWN else orientation)[::-1]
    return tuple((int(axis), int(direction)) for axis, direction in rows)


def _turn(channels: np.ndarray, from_: str, to: str) -> np.ndarray:
    """Turn (n, z, y, x) from one orientation into another; contiguous."""
    change = ornt_transform(axcodes2ornt(from_), axcodes2ornt(to))
    return np.ascontiguousarray(apply_orientation(channels.transpose(), change).transpose())


def _turn_spacing(spacing: Sequence[float], from_: str, to: str) -> list[float]:
    change = ornt_transform(axcodes2ornt(from_), axcodes2ornt(to))
    turned = np.empty(3)
    turned[change[:, 0].astype(int)] = spacing[::-1]
    return turned[::-1].tolist()


def _touch(structure: np.ndarray, other: np.ndarray) -> bool:
    """Whether voxels of two masks (z, y, x) lie beside each other; an empty array is no mask."""
    if not other.size:
        return False
    return any(
        (np.moveaxis(one, axis, 0)[1:] & np.moveaxis(two, axis, 0)[:-1]).any()
        for axis in range(structure.ndim)
        for one, two in ((structure, other), (other, structure))
    )


def _touches_border(structure: np.ndarray) -> bool:
    """Whether a mask (z, y, x) reaches a side of the image; an axis of one slice has no sides."""
    return any(
        structure.take(side, axis=axis).any()
        for axis, size in enumerate(structure.shape)
        if size > 1
        for side in (0, -1)
    )
