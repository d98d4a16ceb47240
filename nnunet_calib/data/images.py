"""Label maps and images on disk, read through nnU-Net's own readers, and the geometry they must share."""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.quiet import quiet
from nnunet_calib.data.whole import announced, check_whole

_SPACING_TOLERANCE = 1e-3  # relative: half a voxel over 500
_ORIGIN_TOLERANCE = 1e-2  # of the smallest spacing
_ROUNDING = 1e-3  # of a label stored as a float
_DIRECTION_TOLERANCE = 1e-3  # of the direction cosines: half a voxel over 500


@dataclass(frozen=True)
class LabelImage:
    """A label map and where it lies in space.

    Attributes:
        path: its file.
        labels: unsigned integers (z, y, x); z is 1 for 2D images.
        spacing: mm, in the order of the axes.
        geometry: what else the file says of its place, if anything: ``origin`` (mm) and ``direction``, a matrix whose
            columns are the file's axes, of whatever length the reader gives them.
        affine: from voxel (x, y, z) to mm (right, anterior, superior), 4 x 4; None if the file does not say.
    """

    path: Path
    labels: np.ndarray
    spacing: tuple[float, ...]
    geometry: dict[str, np.ndarray]
    affine: np.ndarray | None = None


def choose_reader(dataset: Dataset, examples: Sequence[Path]) -> type[BaseReaderWriter]:
    """nnU-Net's reader for these files, chosen as nnU-Net's evaluation does: the first that can open an example.

    Examples that nothing can open are passed over, so that one broken file does not stop a folder.

    Raises:
        InputError: nnU-Net has no reader for the file ending.
    """
    named = dataset.content.get("overwrite_image_reader_writer")
    if named is not None and not isinstance(named, str):
        raise InputError(
            f"{dataset.path}: 'overwrite_image_reader_writer' must be the name of a reader, it is {named!r:.100}"
        )
    silence = io.StringIO()  # nnU-Net prints a traceback for every reader it tries in vain
    with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
        for example in (*map(str, examples), None):
            with contextlib.suppress(RuntimeError):
                return determine_reader_writer_from_dataset_json(dataset.content, example, verbose=False)
    raise InputError(f"{dataset.path}: nnU-Net has no reader for {dataset.file_ending!r} files")


def read_labels(path: Path, reader: type[BaseReaderWriter], allowed: Sequence[int]) -> LabelImage:
    """Read a label map.

    Args:
        path: its file.
        reader: from ``choose_reader``.
        allowed: the label values it may hold.

    Raises:
        InputError: a file that is damaged, not a single volume, or holds other values; one line, naming the file.
    """
    volume, properties = _read([path], "a label map", lambda: reader().read_seg(str(path)))
    check_whole(path, volume, finite=True)
    if volume.ndim != 4 or volume.shape[0] != 1 or not volume.size:
        raise InputError(f"{path}: one 2D or 3D label map is expected; it holds an array of shape {volume.shape[1:]} "
                         f"with {volume.shape[0]} channels")  # fmt: skip
    spacing = tuple(float(step) for step in properties["spacing"])
    if not all(0 < step < np.inf for step in spacing):
        raise InputError(f"{path}: the spacing {_numbers(spacing)} is not positive")
    labels = _as_integers(volume[0], path, allowed)
    return LabelImage(path, labels, spacing, geometry_of(properties), affine_of(properties, spacing))


def read_image(paths: Sequence[Path], reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict[str, Any]]:
    """Read an image with nnU-Net's reader, and check that its files are whole, which that does not.

    Args:
        paths: a file a channel.
        reader: from ``choose_reader`` or the plans.

    Returns:
        float32 (channels, z, y, x) and the reader's properties.

    Raises:
        InputError: a file that is damaged, or cannot be read; one line, naming it.
    """
    names = [str(path) for path in paths]
    image, properties = _read(paths, "an image", lambda: reader().read_images(names))
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
    if not np.allclose(prediction.spacing, reference.spacing, rtol=_SPACING_TOLERANCE, atol=0):
        raise _differ("spacing", prediction, prediction.spacing, reference, reference.spacing, role)
    for name in reference.geometry.keys() & prediction.geometry.keys():
        ours, theirs = prediction.geometry[name], reference.geometry[name]
        if name == "direction":
            tolerance = _DIRECTION_TOLERANCE * np.linalg.norm(theirs, axis=0)
        else:
            tolerance = _ORIGIN_TOLERANCE * min(reference.spacing)
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=tolerance):
            raise _differ(name, prediction, ours.ravel(), reference, theirs.ravel(), role)


def _read(
    paths: Sequence[Path], what: str, read: Callable[[], tuple[np.ndarray, dict[str, Any]]]
) -> tuple[np.ndarray, dict[str, Any]]:
    for path in paths:
        announced(path)  # before the reader sets aside the memory that the header asks for
    with quiet() as output:  # readers print advice of their own
        try:
            return read()
        except MemoryError as error:
            raise InputError(f"{paths[0]}: does not fit into memory") from error
        except Exception as error:  # third-party readers raise whatever their file format library does
            for path in paths:
                check_whole(path)  # why, in most cases
            said = _last_line(error) or _last_line(output.getvalue()) or type(error).__name__
            raise InputError(f"{paths[0]}: cannot be read as {what} ({said})") from error


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


def geometry_of(properties: dict[str, Any]) -> dict[str, np.ndarray]:
    """``origin`` and ``direction`` from what nnU-Net's readers say of a file; empty if they say nothing."""
    if "sitk_stuff" in properties:
        origin, direction = (np.asarray(properties["sitk_stuff"][name]) for name in ("origin", "direction"))
        return {"origin": origin, "direction": direction.reshape(origin.size, -1)}
    if "nibabel_stuff" in properties:
        affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
        return {"origin": affine[:3, 3], "direction": affine[:3, :3]}
    return {}


def affine_of(properties: dict[str, Any], spacing: Sequence[float]) -> np.ndarray | None:
    """From voxel (x, y, z) of the array that nnU-Net's reader gives to mm (right, anterior, superior), 4 x 4.

    None if the file does not say. ``spacing`` is in the order of the array's axes.
    """
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
    if "sitk_stuff" not in properties or len(properties["sitk_stuff"]["origin"]) != 3:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(properties["sitk_stuff"]["direction"], (3, 3)) * np.array(spacing[::-1])
    affine[:3, 3] = properties["sitk_stuff"]["origin"]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK counts towards left and posterior


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
