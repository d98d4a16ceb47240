"""nnU-Net's probability files, read one channel at a time.

``nnUNetv2_predict --save_probabilities`` writes ``<case>.npz``: a zip whose member ``probabilities.npy`` is a float
array (C, z, y, x) on the grid of the image. Opening it reads the header alone; nothing is ever unpickled.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from nnunet_calib.data.errors import InputError

_MEMBER = "probabilities.npy"
_TYPES = ("float16", "float32", "float64")
_MAX_HEADER = 10_000  # bytes; numpy's own bound for headers it does not trust
_ROUNDING = 1e-5  # how far beyond [0, 1] sums of float32 probabilities, as in an ensemble, may end
_DAMAGE = (  # what zipfile, zlib and numpy raise for a file that is not what it should be
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
)


class ProbabilityFile:
    """Header of a probability file.

    Attributes:
        path: the file.
        shape: (C, z, y, x).
        dtype: float16, float32 or float64.
    """

    def __init__(self, path: Path):
        """Read the header.

        Raises:
            InputError: damaged, or not a probability file of nnU-Net.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                if _MEMBER not in archive.namelist():
                    raise InputError(f"{path}: no array 'probabilities'; it is not a file of --save_probabilities")
                with archive.open(_MEMBER) as member:
                    self.shape, self._fortran_order, self.dtype = _read_header(member)
                    self._start = member.tell()
                size = archive.getinfo(_MEMBER).file_size
        except _DAMAGE as error:
            raise _damaged(path, error) from error
        if self.dtype.name not in _TYPES or len(self.shape) != 4:
            raise InputError(f"{path}: a float array (C, z, y, x) is expected, it holds {self.dtype} {self.shape}")
        if size != self._start + math.prod(self.shape) * self.dtype.itemsize:
            raise InputError(f"{path}: its size does not fit its shape {self.shape}; predict it again")

    def check_fits(self, channels: int, shape: tuple[int, ...]) -> None:
        """Refuse probabilities of another model or another image, before any of them is read.

        Args:
            channels: how many classes or regions ``dataset.json`` has.
            shape: (z, y, x) of the label map.

        Raises:
            InputError: the file does not fit them.
        """
        if self.shape[0] != channels:
            raise InputError(
                f"{self.path}: {self.shape[0]} channels, but dataset.json has {channels} classes or regions"
            )
        if self.shape[1:] != shape:
            reordered = "; its axes are in another order" if sorted(self.shape[1:]) == sorted(shape) else ""
            raise InputError(f"{self.path}: shape {self.shape[1:]} differs from {shape} of the segmentation{reordered}")

    def channels(self) -> Iterator[np.ndarray]:
        """Yield the probabilities of one class or region after the other, (z, y, x), values in [0, 1].

        Raises:
            InputError: the file is damaged or holds something that is not a probability.
        """
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(_MEMBER) as member:
                member.read(self._start)
                if self._fortran_order:  # the channel is the fastest axis: there is no reading them one by one
                    whole = _read_array(member, self.shape[::-1], self.dtype).T
                    yield from (self._checked(channel) for channel in whole)
                else:
                    for _ in range(self.shape[0]):
                        yield self._checked(_read_array(member, self.shape[1:], self.dtype))
                if member.read(1):  # reaching the end also checks the checksum
                    raise InputError(f"{self.path}: longer than its header says; predict it again")
        except _DAMAGE as error:
            raise _damaged(self.path, error) from error

    def _checked(self, channel: np.ndarray) -> np.ndarray:
        lowest, highest = channel.min(), channel.max()
        if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):  # NaN fails too
            raise InputError(f"{self.path}: values from {lowest:g} to {highest:g}; probabilities are in [0, 1]")
        return channel if lowest >= 0 and highest <= 1 else channel.clip(0, 1)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # later ones have headers of up to 4 GB, which numpy reads before it looks at their length
        raise ValueError(f"npy format {version} is not supported")
    return np.lib.format.read_array_header_1_0(member, max_header_size=_MAX_HEADER)


def _read_array(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    array = np.empty(shape, dtype=dtype)
    buffer = array.reshape(-1).view(np.uint8).data
    while buffer:
        count = member.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("ends too early")
        buffer = buffer[count:]
    return array


def _damaged(path: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: truncated or damaged probability file ({reason}); predict it again")
