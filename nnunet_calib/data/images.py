"""Label maps and images on disk, read through nnU-Net's own readers, and the geometry they must share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, determine_reader_writer_from_dataset_json

from nnunet_calib.data import nifti
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.quiet import quiet
from nnunet_calib.data.whole import announced, check_whole

_SPACING_TOLERANCE = 1e-3  # relative: half a voxel over 500
_ORIGIN_TOLERANCE = 1e-2  # of the smallest spacing
_ROUNDING = 1e-3  # of a label stored as a float
_DIRECTION_TOLERANCE = 1e-3  # of the direction cosines: half a voxel over 500


_SAME_ORDER = {"SimpleITKIO", "NibabelIO", "NaturalImage2DIO", "Tiff3DIO"}
"""nnU-Net's readers that give the voxels of a file in the order of the file: where one cannot, another may."""


@dataclass(frozen=True)
class Place:
    """Where the voxels of an array (z, y, x) lie, in mm.

    Attributes:
        spacing: in the order of the array's axes.
        geometry: what else the file says, if anything: ``origin`` and ``direction``, a matrix whose columns are the
            file's axes, of whatever length.
        affine: from voxel (x, y, z) to right, anterior, superior, 4 x 4; None if the file does not say.
        unit: in which the file had them; ``unknown`` means mm.
    """

    spacing: tuple[float, ...]
    geometry: dict[str, np.ndarray]
    affine: np.ndarray | None = None
    unit: str = "mm"

    @property
    def oblique(self) -> np.ndarray | None:
        """Steps of the array's axes (z, y, x), mm, one a column of (3, 3), where these are not at right angles."""
        if self.affine is None:
            return None
        steps = self.affine[:3, 2::-1]
        cosines = steps.T @ steps / np.outer(self.spacing, self.spacing)
        return steps if np.abs(cosines - np.diag(np.diag(cosines))).max() > _DIRECTION_TOLERANCE else None

    @property
    def voxel(self) -> float:
        """Volume of a voxel, mm3."""
        steps = self.oblique
        return float(np.prod(self.spacing) if steps is None else abs(np.linalg.det(steps)))

    def with_axes(self, order: Sequence[int]) -> "Place":
        """Of the array with its axes in this order."""
        affine = None
        if self.affine is not None:
            affine = self.affine.copy()
            affine[:, :3] = self.affine[:, 2::-1][:, list(order)][:, ::-1]
        return replace(self, spacing=tuple(self.spacing[axis] for axis in order), affine=affine)

    def in_unit(self, unit: str) -> "Place":
        """The same numbers, meant in this unit."""
        factor = nifti.in_mm(unit)
        return replace(
            self,
            spacing=tuple(step * factor for step in self.spacing),
            geometry={name: numbers * factor for name, numbers in self.geometry.items()},
            affine=None if self.affine is None else np.diag([factor, factor, factor, 1.0]) @ self.affine,
            unit=unit,
        )


@dataclass(frozen=True)
class LabelImage:
    """A label map and where it lies in space.

    Attributes:
        path: its file.
        labels: unsigned integers (z, y, x); z is 1 for 2D images.
        place: of its voxels.
        properties: what nnU-Net's reader said of the file.
    """

    path: Path
    labels: np.ndarray
    place: Place
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Mm, in the order of the axes."""
        return self.place.spacing


def choose_reader(dataset: Dataset) -> type[BaseReaderWriter]:
    """nnU-Net's reader for the files of a data set: the one it names, or nnU-Net's first for their ending.

    Which files there are does not matter: whatever reads one passes on to nnU-Net's next reader for its ending where
    this one cannot read it, file by file.

    Raises:
        InputError: nnU-Net has no reader for the file ending.
    """
    named = dataset.content.get("overwrite_image_reader_writer")
    if named is not None and not isinstance(named, str):
        raise InputError(
            f"{dataset.path}: 'overwrite_image_reader_writer' must be the name of a reader, it is {named!r:.100}"
        )
    try:
        return determine_reader_writer_from_dataset_json(dataset.content, None, verbose=False)
    except RuntimeError as error:
        raise InputError(f"{dataset.path}: nnU-Net has no reader for {dataset.file_ending!r} files") from error


def read_labels(path: Path, reader: type[BaseReaderWriter], allowed: Sequence[int]) -> LabelImage:
    """Read a label map.

    Args:
        path: its file.
        reader: from ``choose_reader``.
        allowed: the label values it may hold.

    Raises:
        InputError: a file that is damaged, not a single volume, or holds other values; one line, naming the file.
    """

    def read(one: BaseReaderWriter) -> tuple[np.ndarray, dict[str, Any]]:
        volume, properties = one.read_seg(str(path))
        if volume.ndim != 4 or volume.shape[0] != 1 or not volume.size:  # of a TIFF, 4 slices may look like RGBA
            channels, shape = volume.shape[0], volume.shape[1:]
            raise ValueError(f"one 2D or 3D label map is expected; it holds {channels} channels of shape {shape}")
        return volume, properties

    volume, properties = _read([path], "a label map", reader, read)
    check_whole(path, volume, finite=True)
    return LabelImage(path, _as_integers(volume[0], path, allowed), place_of(path, properties), properties)


def read_image(
    paths: Sequence[Path], reader: type[BaseReaderWriter], *, any_reader: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Read an image with nnU-Net's reader, and check that its files are whole, which that does not.

    Args:
        paths: a file a channel.
        reader: from ``choose_reader`` or the plans.
        any_reader: where it cannot read them, another of nnU-Net's may; not where it is to write what was made of them.

    Returns:
        float32 (channels, z, y, x) and the reader's properties.

    Raises:
        InputError: a file that is damaged, or cannot be read; one line, naming it.
    """
    names = [str(path) for path in paths]
    image, properties = _read(paths, "an image", reader, lambda one: one.read_images(names), any_reader)
    own = len(image) == len(paths)
    for c, path in enumerate(paths):
        check_whole(path, image[c : c + 1] if own else image if len(paths) == 1 else None)
    return image, properties


def check_same_geometry(reference: LabelImage, prediction: LabelImage, role: str = "reference") -> None:
    """Refuse a prediction that does not lie where its reference lies, or whatever ``role`` calls that.

    Raises:
        InputError: shape, spacing, origin or direction differ beyond rounding.
    """
    if reference.labels.shape != prediction.labels.shape:
        raise _differ("shape", prediction, prediction.labels.shape, reference, reference.labels.shape, role)
    place = prediction.place
    if place.unit == nifti.UNKNOWN:  # nnU-Net's NibabelIO leaves out the unit where it writes
        place = place.in_unit(reference.place.unit)
    if not np.allclose(place.spacing, reference.spacing, rtol=_SPACING_TOLERANCE, atol=0):
        raise _differ("spacing", prediction, place.spacing, reference, reference.spacing, role)
    for name in reference.place.geometry.keys() & place.geometry.keys():
        ours, theirs = place.geometry[name], reference.place.geometry[name]
        if name == "direction":
            tolerance = _DIRECTION_TOLERANCE * np.linalg.norm(theirs, axis=0)
        else:
            tolerance = _ORIGIN_TOLERANCE * min(reference.spacing)
        same = ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=0, atol=tolerance)
        if not (same or _same_affine(place, reference)):  # two readers write the same place in two ways
            raise _differ(name, prediction, ours.ravel(), reference, theirs.ravel(), role)


def _same_affine(place: Place, reference: LabelImage) -> bool:
    """Whether two images whose spacing is the same lie in the same place, as their affines say it."""
    ours, theirs = place.affine, reference.place.affine
    if ours is None or theirs is None:
        return False
    tolerance = np.append(_DIRECTION_TOLERANCE * np.linalg.norm(theirs[:3, :3], axis=0), 0.0)
    tolerance[3] = _ORIGIN_TOLERANCE * min(reference.spacing)
    return bool((np.abs(ours[:3] - theirs[:3]) <= tolerance).all())


def _read(
    paths: Sequence[Path],
    what: str,
    reader: type[BaseReaderWriter],
    read: Callable[[BaseReaderWriter], tuple[np.ndarray, dict[str, Any]]],
    any_reader: bool = True,
) -> tuple[np.ndarray, dict[str, Any]]:
    """What the first reader makes of the files that can read them."""
    for path in paths:
        announced(path)  # before the reader sets aside the memory that the header asks for
    failure: InputError | None = None
    for one in (reader, *(_others(reader, paths[0]) if any_reader else ())):
        with quiet() as output:  # readers print advice of their own
            try:
                return read(one())
            except MemoryError as error:
                raise InputError(f"{paths[0]}: does not fit into memory") from error
            except Exception as error:  # third-party readers raise whatever their file format library does
                if failure is None:
                    for path in paths:
                        check_whole(path)  # why, in most cases
                    said = _last_line(error) or _last_line(output.getvalue()) or type(error).__name__
                    failure = InputError(f"{paths[0]}: cannot be read as {what} ({said}){remedy(paths[0], said)}")
                    failure.__cause__ = error
    assert failure is not None
    raise failure


def _others(reader: type[BaseReaderWriter], path: Path) -> list[type[BaseReaderWriter]]:
    """nnU-Net's further readers of such a file that give its voxels in the same order."""
    if reader.__name__ not in _SAME_ORDER:
        return []
    return [
        other
        for other in LIST_OF_IO_CLASSES
        if other.__name__ in _SAME_ORDER - {reader.__name__}
        and path.name.lower().endswith(tuple(other.supported_file_endings))
    ]


def remedy(path: Path, said: str) -> str:
    """What to do about a file of which a reader said so, if anything is known to help; follows the message."""
    if "orthonormal" in said:
        return "; its axes are not at right angles: resample it, with its label map, onto a grid whose axes are"
    if "ImageIO" in said and nifti.is_second(path):
        return "; it is of NIfTI-2, which ITK does not read: save it as NIfTI-1"
    return ""


def _as_integers(volume: np.ndarray, path: Path, allowed: Sequence[int]) -> np.ndarray:
    lowest, highest = volume.min(), volume.max()
    if not (lowest >= -_ROUNDING and highest <= (1 << 16) - 1 + _ROUNDING):  # NaN fails too
        raise InputError(f"{path}: label values from {lowest:g} to {highest:g}; labels are integers in [0, 65535]")
    labels = np.empty(volume.shape, dtype=np.uint8 if np.rint(highest) < 1 << 8 else np.uint16)
    present = np.zeros(int(np.rint(highest)) + 1, dtype=bool)
    for ours, theirs in zip(labels, volume, strict=True):  # slice by slice: it stays in the cache
        if theirs.dtype.kind == "f":  # tools that resample leave 0.9999999 for 1
            ours[...] = np.rint(theirs)
            different = np.abs(theirs - ours) > _ROUNDING
        else:
            ours[...] = theirs
            different = ours != theirs
        if different.any():
            example = float(theirs[different][0])
            raise InputError(f"{path}: holds values that are not integers, such as {example:.9g}; is it an image?")
        row = ours.reshape(-1)
        present[row[0]] = True
        present[row[1:][row[1:] != row[:-1]]] = True  # most voxels are as the one before
    if unknown := [int(value) for value in np.setdiff1d(np.flatnonzero(present), allowed)]:
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise InputError(f"{path}: label values not in dataset.json: {shown}")
    return labels


def place_of(path: Path, properties: Mapping[str, Any]) -> Place:
    """Where the voxels lie that nnU-Net's reader gave of a file, in mm.

    Args:
        path: the file.
        properties: the reader's.

    Raises:
        InputError: the spacing is not positive, or the file does not say where it lies though it should.
    """
    place = place_as_read(properties)
    if "nibabel_stuff" in properties and (affine := nifti.affine_in_mm(path)) is not None:
        stuff = properties["nibabel_stuff"]
        if "reoriented_affine" in stuff:
            # from the voxels of the array to those of the file, which are whole steps
            affine = affine @ np.rint(np.linalg.solve(stuff["original_affine"], stuff["reoriented_affine"]))
        spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
        geometry = {"origin": affine[:3, 3], "direction": affine[:3, :3]}
        place = Place(tuple(map(float, spacing)), geometry, affine, nifti.unit_of(path))
    if not all(0 < step < np.inf for step in place.spacing):
        raise InputError(f"{path}: the spacing {_numbers(place.spacing)} is not positive")
    return place


def place_as_read(properties: Mapping[str, Any]) -> Place:
    """What nnU-Net's reader says of a place: ITK's in mm, nibabel's in the unit of the file, whichever that is."""
    spacing = tuple(float(step) for step in properties["spacing"])
    if "sitk_stuff" in properties:
        origin, direction = (np.asarray(properties["sitk_stuff"][name]) for name in ("origin", "direction"))
        direction = direction.reshape(origin.size, -1)
        affine = None
        if origin.size == 3:
            affine = np.eye(4)
            affine[:3, :3], affine[:3, 3] = direction * np.array(spacing[::-1]), origin
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK counts towards left and posterior
        return Place(spacing, {"origin": origin, "direction": direction}, affine)
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        return Place(spacing, {"origin": affine[:3, 3], "direction": affine[:3, :3]}, affine, nifti.UNKNOWN)
    return Place(spacing, {})


def predicted_at(reference: LabelImage, path: Path, labels: np.ndarray, properties: Mapping[str, Any]) -> LabelImage:
    """A label map in memory, predicted for an image, once its place has been held against that of its reference.

    Args:
        reference: the reference.
        path: file of the label map.
        labels: integer (z, y, x).
        properties: of the image, nnU-Net's.

    Raises:
        InputError: they lie elsewhere.
    """
    place = place_as_read(properties)
    if "nibabel_stuff" in properties and "nibabel_stuff" in reference.properties:  # as one reader sees both
        seen = replace(reference, place=place_as_read(reference.properties))
    else:
        seen = reference
    check_same_geometry(seen, LabelImage(path, labels, place))
    return LabelImage(path, labels, reference.place, dict(properties))


def _differ(
    what: str,
    prediction: LabelImage,
    ours: Iterable[float],
    reference: LabelImage,
    theirs: Iterable[float],
    role: str,
) -> InputError:
    return InputError(
        f"{prediction.path}: {what} {_numbers(ours)} differs from {_numbers(theirs)} of its {role} {reference.path}"
    )


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _last_line(said: Exception | str) -> str:
    lines = str(said).strip().splitlines()
    return lines[-1].strip() if lines else ""
