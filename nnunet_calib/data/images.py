"""Label maps on disk, read through nnU-Net's own readers, and the geometry they must share."""

import contextlib
import gzip
import io
import itertools
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_calib.data import nifti
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError

_SPACING_TOLERANCE = 1e-3  # relative: half a voxel over 500
_ORIGIN_TOLERANCE = 1e-2  # of the smallest spacing
_DIRECTION_TOLERANCE = 1e-3  # of the direction cosines: half a voxel over 500
_CHUNK = 1 << 20


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
    header = nifti.read_header(path) if path.name.endswith(nifti.ENDINGS) else None
    if (dtype := _float_type(header)) is not None and dtype.kind == "c":
        raise InputError(f"{path}: holds complex numbers; labels are integers")
    output = io.StringIO()  # readers print advice of their own
    try:
        with contextlib.redirect_stdout(output):
            volume, properties = reader().read_seg(str(path))
    except MemoryError as error:
        raise InputError(f"{path}: does not fit into memory") from error
    except Exception as error:  # third-party readers raise whatever their file format library does
        _check_whole(path, None, None)  # why, in most cases
        raise InputError(f"{path}: cannot be read as a label map ({_last_line(error)})") from error
    _check_whole(path, header, volume)
    if volume.ndim != 4 or volume.shape[0] != 1 or not volume.size:
        raise InputError(f"{path}: one 2D or 3D label map is expected; it holds an array of shape {volume.shape[1:]} "
                         f"with {volume.shape[0]} channels")  # fmt: skip
    spacing = tuple(float(step) for step in properties["spacing"])
    if not all(0 < step < np.inf for step in spacing):
        raise InputError(f"{path}: the spacing {_numbers(spacing)} is not positive")
    labels = _as_integers(volume[0], path, allowed)
    return LabelImage(path, labels, spacing, geometry_of(properties), affine_of(properties, spacing))


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


def _check_whole(path: Path, header: nibabel.Nifti1Header | None, volume: np.ndarray | None) -> None:
    """Refuse what SimpleITK makes up for: the rest of a truncated or damaged gzip file, and zeros for NaN.

    The checksum at the end of a ``.nii.gz`` is that of the header and the voxels, which are in memory. Where it is not,
    as with reoriented or scaled voxels, the file is decompressed once more.
    """
    compressed = path.suffix == ".gz"
    dtype = _float_type(header)
    if not compressed and dtype is None:
        return
    if compressed and header is not None and volume is not None and _is_of(path, header, volume):
        return
    finite = True
    try:
        with gzip.open(path) if compressed else path.open("rb") as stream:
            stream.read(0 if header is None else nifti.first_voxel(header))
            while piece := stream.read(_CHUNK):
                if dtype is not None:
                    values = np.frombuffer(piece, dtype=dtype, count=len(piece) // dtype.itemsize)
                    finite = finite and bool(np.isfinite(values).all())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged gzip file ({error}); copy or predict it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not finite:
        raise InputError(f"{path}: label values that are NaN or infinite; labels are integers in [0, 65535]")


def _float_type(header: nibabel.Nifti1Header | None) -> np.dtype | None:
    """Type of the voxels on file, if they can be NaN."""
    if header is None:
        return None
    try:
        dtype = header.get_data_dtype()
    except nibabel.spatialimages.HeaderDataError:  # of a type that only another reader knows
        return None
    return dtype if dtype.kind in "fc" and _CHUNK % dtype.itemsize == 0 else None


def _is_of(path: Path, header: nibabel.Nifti1Header, volume: np.ndarray) -> bool:
    """Whether the gzip checksum and length of a NIfTI file are those of this volume after the file's own header."""
    try:
        dtype = header.get_data_dtype()
        offset = nifti.first_voxel(header)
    except nibabel.spatialimages.HeaderDataError:
        return False
    if offset > _CHUNK:
        return False
    with gzip.open(path) as stream:
        checksum = zlib.crc32(stream.read(offset))
    with np.errstate(invalid="ignore"):
        for part in itertools.chain.from_iterable(volume):  # slice by slice: no copy of the whole
            checksum = zlib.crc32(np.ascontiguousarray(part, dtype=dtype).data, checksum)
    with path.open("rb") as raw:
        raw.seek(-8, os.SEEK_END)
        return raw.read() == struct.pack("<II", checksum, (offset + volume.size * dtype.itemsize) % (1 << 32))


def _as_integers(volume: np.ndarray, path: Path, allowed: Sequence[int]) -> np.ndarray:
    lowest, highest = volume.min(), volume.max()
    if not (lowest >= 0 and highest < 1 << 16):  # NaN fails too
        raise InputError(f"{path}: label values from {lowest:g} to {highest:g}; labels are integers in [0, 65535]")
    labels = np.empty(volume.shape, dtype=np.uint8 if highest < 1 << 8 else np.uint16)
    present = np.zeros(int(highest) + 1, dtype=bool)
    for ours, theirs in zip(labels, volume, strict=True):  # slice by slice: it stays in the cache
        ours[...] = theirs
        if (different := ours != theirs).any():
            example = theirs[different][0]
            raise InputError(f"{path}: holds values that are not integers, such as {example:g}; is it an image?")
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


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
