"""nnU-Net's probability files.

``nnUNetv2_predict --save_probabilities`` writes ``<case>.npz``: a zip whose member ``probabilities.npy`` is a float
array (C, z, y, x) on the grid of the image.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import whole_file

_MEMBER = "probabilities.npy"
_MAX_HEADER = 10_000  # bytes; numpy's own bound for headers it does not trust
_MAX_RATIO = 1032  # deflate cannot do better
_PIECE = 1 << 20  # bytes; larger reads make zipfile copy more


class NpzReader:
    """Header and channels of ``<case>.npz``; attributes as ``ProbabilityFile``."""

    affine: np.ndarray | None = None

    def __init__(self, path: Path):
        self._path = path
        with zipfile.ZipFile(path) as archive:
            if _MEMBER not in archive.namelist():
                raise InputError(f"{path}: no array 'probabilities'; it is not a file of --save_probabilities")
            info = archive.getinfo(_MEMBER)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"zip compression method {info.compress_type}")
            with archive.open(_MEMBER) as member:
                self.shape, self._fortran_order, self._stored = _read_header(member)
                self._start = member.tell()
        self.dtype = self._stored.newbyteorder("=")
        possible = _MAX_RATIO * min(info.compress_size, path.stat().st_size)
        if self.dtype.hasobject or not self._start + self._bytes(self.shape) == info.file_size <= possible:
            raise InputError(f"{path}: its size does not fit its shape {self.shape}; predict it again")

    def channels(self) -> Iterator[np.ndarray]:
        """Yield (z, y, x) arrays as stored, but in the processor's byte order."""
        with zipfile.ZipFile(self._path) as archive, archive.open(_MEMBER) as member:
            member.read(self._start)
            if self._fortran_order:  # the channel is the fastest axis: there is no reading them one by one
                yield from self._read(member, self.shape[::-1]).T
            else:
                for _ in range(self.shape[0]):
                    yield self._read(member, self.shape[1:])
            if member.read(1):  # reaching the end also checks the checksum
                raise ValueError("longer than its header says")

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def _read(self, member: IO[bytes], shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, dtype=self._stored)
        buffer = array.reshape(-1).view(np.uint8).data
        while buffer:
            piece = member.read(min(_PIECE, len(buffer)))
            if not piece:
                raise EOFError("ends too early")
            buffer[: len(piece)] = piece
            buffer = buffer[len(piece) :]
        return array.astype(self.dtype, copy=False)


def write_npz(path: Path, channels: Iterable[np.ndarray], shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Write probabilities as nnU-Net does, one channel at a time, whole or not at all.

    Args:
        path: of the ``.npz``.
        channels: (z, y, x) each.
        shape: (C, z, y, x).
        dtype: float16, float32 or float64.

    Raises:
        ValueError: the channels do not have that shape.
    """
    dtype, shape = np.dtype(dtype), tuple(map(int, shape))
    descr = np.lib.format.dtype_to_descr(dtype)
    count = 0
    with (
        whole_file(path) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(_MEMBER, "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
        for channel in channels:
            if channel.shape != shape[1:]:
                raise ValueError(f"a channel of shape {channel.shape} is none of {shape}")
            flat = np.ascontiguousarray(channel, dtype=dtype).reshape(-1).view(np.uint8).data
            for start in range(0, len(flat), _PIECE):
                member.write(flat[start : start + _PIECE])
            count += 1
        if count != shape[0]:
            raise ValueError(f"{count} channels are not {shape[0]}")


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # later ones have headers of up to 4 GB, which numpy reads before it looks at their length
        raise ValueError(f"npy format {version} is not supported")
    return np.lib.format.read_array_header_1_0(member, max_header_size=_MAX_HEADER)
