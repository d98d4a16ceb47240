"""NIfTI headers, looked at before a reader sets aside the memory they claim."""

import gzip
import io
import math
import os
import zlib
from pathlib import Path

import nibabel
import numpy as np

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import unreadable
from nnunet_calib.data.quiet import quiet

ENDINGS = (".nii", ".nii.gz")
UNKNOWN = "unknown"
_MM = {"meter": 1e3, "mm": 1.0, "micron": 1e-3}  # units that a header can name; one that names none means mm
_MAX_RATIO = 1032  # deflate cannot do better
_LONGEST = 540  # bytes of a NIfTI-2 header


def read_header(path: Path) -> nibabel.Nifti1Header | None:
    """The header of a NIfTI file, checked against the size of the file.

    Returns:
        The header; None if the file does not begin with one.

    Raises:
        InputError: the file cannot be read, or is too small for the volume its header announces.
    """
    try:
        compressed = is_compressed(path)
        with gzip.open(path) if compressed else path.open("rb") as stream:
            begin = stream.read(_LONGEST)
        size = os.path.getsize(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); copy or predict it again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    header = _parse(begin)
    if header is None:
        return None
    offset = float(header["vox_offset"])
    possible = size * (_MAX_RATIO if compressed else 1)
    if not 0 <= offset <= possible - voxels(header) * _itemsize(header):  # NaN fails too
        dims = tuple(int(length) for length in header["dim"][1:])
        raise InputError(f"{path}: truncated or damaged: {size} bytes cannot hold the volume {dims} of its header")
    return header


def is_compressed(path: Path) -> bool:
    """Whether it is a gzip file, whatever it is called: ITK reads a plain one that is called ``.gz``.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def voxels(header: nibabel.Nifti1Header) -> int:
    """How many values a file has."""
    axes = max(0, min(7, int(header["dim"][0])))
    return math.prod(max(1, int(length)) for length in header["dim"][1 : 1 + axes])


def type_of(header: nibabel.Nifti1Header) -> np.dtype | None:
    """Of a value; None of a type that there is not, which the reader will refuse."""
    try:
        return header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError):
        return None


def first_voxel(header: nibabel.Nifti1Header) -> int:
    """Where the voxels begin in a file of header and voxels, in bytes."""
    return int(header["vox_offset"]) or header.single_vox_offset


def affine_in_mm(path: Path) -> np.ndarray | None:
    """Where the voxels of a NIfTI file lie: the one reading of it that label maps, images and probabilities share.

    As ITK reads the header: the unit that it names is converted, and ITK chooses between qform and sform. Of what ITK
    does not read, such as NIfTI-2 and axes that are not at right angles, it is the sform, else the qform, in mm.

    Returns:
        From voxel (x, y, z) of the file to mm (right, anterior, superior), 4 x 4 float64; None of a 2D file.

    Raises:
        InputError: as ``read_header``, or no NIfTI file.
    """
    import SimpleITK as sitk  # here: what reads no NIfTI file needs no ITK

    header = read_header(path)
    if header is None:
        raise InputError(f"{path}: truncated or damaged (it does not begin as a NIfTI file); copy or predict it again")
    if header["dim"][0] < 3:
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet():
            reader.ReadImageInformation()
    except RuntimeError:
        try:
            affine = header.get_best_affine()
        except (ArithmeticError, ValueError, nibabel.spatialimages.HeaderDataError) as error:
            raise InputError(f"{path}: its header does not say where its voxels lie ({error})") from error
        return np.diag([*[in_mm(_unit(header))] * 3, 1.0]) @ affine
    axes = reader.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3] * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK counts towards left and posterior


def unit_of(path: Path) -> str:
    """Of lengths in a NIfTI file: ``meter``, ``mm``, ``micron`` or ``unknown``."""
    header = read_header(path)
    return UNKNOWN if header is None else _unit(header)


def in_mm(unit: str) -> float:
    """Length of a unit."""
    return _MM.get(unit, 1.0)


def has_channels(path: Path) -> bool:
    """Whether it is a readable NIfTI file of more than one volume, as probabilities are and label maps are not."""
    try:
        header = read_header(path) if path.name.endswith(ENDINGS) else None
    except InputError:
        return False
    return header is not None and math.prod(max(1, int(length)) for length in header["dim"][4:8]) > 1


def is_second(path: Path) -> bool:
    """Whether it is a file of NIfTI-2."""
    return path.name.lower().endswith(ENDINGS) and isinstance(read_header(path), nibabel.Nifti2Header)


def _unit(header: nibabel.Nifti1Header) -> str:
    try:
        return header.get_xyzt_units()[0]
    except KeyError:
        return UNKNOWN


def _parse(begin: bytes) -> nibabel.Nifti1Header | None:
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        length = kind.template_dtype.itemsize
        if len(begin) >= length and int.from_bytes(begin[:4], "little") in (length, _swapped(length)):
            return kind.from_fileobj(io.BytesIO(begin[:length]), check=False)
    return None


def _swapped(number: int) -> int:
    return int.from_bytes(number.to_bytes(4, "little"), "big")


def _itemsize(header: nibabel.Nifti1Header) -> int:
    dtype = type_of(header)
    return max(1, abs(int(header["bitpix"])) // 8) if dtype is None else dtype.itemsize
