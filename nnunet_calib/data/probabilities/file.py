"""A probability file of any format, read one channel at a time.

Opening reads the header alone. Nothing is ever unpickled or evaluated, and what a header claims is held against the
size of the file before memory is set aside for it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import unreadable
from nnunet_calib.data.probabilities.compact import CompactReader
from nnunet_calib.data.probabilities.nifti import NiftiReader
from nnunet_calib.data.probabilities.npz import NpzReader

_ROUNDING = 1e-5  # how far beyond [0, 1] sums of float32 probabilities, as in an ensemble, may end
_SUM_TOLERANCE = {"float16": 5e-3, "float32": 1e-3, "float64": 1e-3}  # rounding of many classes, or of 3 digits
_PLACE_TOLERANCE = 1e-2  # of the smallest spacing
_DIRECTION_TOLERANCE = 1e-3  # of each axis: half a voxel over 500


class _Reader(Protocol):
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray | None

    def __init__(self, path: Path) -> None: ...

    def channels(self) -> Iterator[np.ndarray]: ...


_READERS: dict[str, type[_Reader]] = {
    ".nncp": CompactReader,
    ".npz": NpzReader,
    "_probabilities.nii.gz": NiftiReader,
    "_probabilities.nii": NiftiReader,
}
ENDINGS = tuple(_READERS)  # after the name of the case; where a case has several files, the first of these counts


class ProbabilityFile:
    """Header of a probability file; its ending says which format it has.

    Attributes:
        path: the file.
        shape: (C, z, y, x).
        dtype: float16, float32 or float64.
        affine: from voxel (x, y, z) to mm (right, anterior, superior), 4 x 4; None where the format does not say.
    """

    def __init__(self, path: Path, *, exclusive: bool = False):
        """Read the header.

        Args:
            path: the file.
            exclusive: its channels are classes of a softmax: those of a voxel must add up to 1, and whatever reads them
                refuses others.

        Raises:
            InputError: damaged, or no file of probabilities.
        """
        self.path, self._exclusive = path, exclusive
        plain_nifti = (".nii", ".nii.gz")  # any name will do for one that is named explicitly
        reader = next((r for ending, r in _READERS.items() if path.name.endswith(ending)), None)
        if reader is None and path.name.endswith(plain_nifti):
            reader = NiftiReader
        if reader is None:
            raise InputError(f"{path}: not a probability file; those end with {', '.join(ENDINGS)}")
        try:
            self._stored = reader(path)
        except InputError:
            raise
        except OSError as error:
            raise unreadable(path, error) from error
        except Exception as error:  # of a file that is not what it should be, libraries say so in many ways
            raise _damaged(path, error) from error
        self.shape, self.dtype, self.affine = self._stored.shape, self._stored.dtype, self._stored.affine
        if self.dtype.name not in ("float16", "float32", "float64") or len(self.shape) != 4 or min(self.shape) < 1:
            raise InputError(f"{path}: a float array (C, z, y, x) is expected, it holds {self.dtype} {self.shape}")

    def check_fits(self, channels: int, shape: tuple[int, ...], affine: np.ndarray | None = None) -> None:
        """Refuse probabilities of another model or another image, before any of them is read.

        Args:
            channels: how many classes or regions ``dataset.json`` has.
            shape: (z, y, x) of the label map.
            affine: where the label map lies, as ``LabelImage.affine``; compared if the file says where it lies.

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
        if affine is not None and self.affine is not None and not _same_place(self.affine, affine):
            raise InputError(f"{self.path}: origin, spacing or direction differ from those of the segmentation")

    def channels(self) -> Iterator[np.ndarray]:
        """Yield the probabilities of one class or region after the other, (z, y, x), values in [0, 1].

        Raises:
            InputError: the file is damaged or holds something that is not a probability.
        """
        total = np.zeros(self.shape[1:], dtype=np.float32) if self._exclusive else None
        for c, channel in enumerate(map(self._checked, self._parts(self._stored.channels()))):
            if total is not None:
                total += channel
                if c == self.shape[0] - 1:  # before the last is given away: nobody takes more
                    self._check_sums(total)
            yield channel

    def whole(self) -> np.ndarray:
        """All probabilities (C, z, y, x).

        Raises:
            InputError: as ``channels``, or they do not fit into memory.
        """
        try:
            whole = np.empty(self.shape, dtype=self.dtype)
        except MemoryError as error:
            raise _damaged(self.path, error) from error
        for row, channel in zip(whole, self.channels(), strict=True):
            row[...] = channel
        return whole

    @property
    def in_slabs(self) -> bool:
        """Some slices of all channels can be read without the others: the file is of the compact format."""
        return isinstance(self._stored, CompactReader)

    def slabs(self) -> Iterator[np.ndarray]:
        """Yield all channels of some slices after the others, (C, slab, y, x), in the order of z.

        Of the compact format each is some 4 MB a channel and takes the memory of the one before. In the other formats
        one channel follows the other, so there the only slab is the whole volume.

        Raises:
            InputError: as ``whole``.
        """
        if isinstance(self._stored, CompactReader):
            for slab in self._parts(self._stored.slabs(self._checked)):
                if self._exclusive:
                    self._check_sums(slab.sum(axis=0, dtype=np.float32))
                yield slab
                del slab  # as in _parts
        else:
            yield self.whole()

    def _parts(self, parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        while True:
            try:
                part = next(parts, None)
            except InputError:
                raise
            except Exception as error:  # as in __init__
                raise _damaged(self.path, error) from error
            if part is None:
                return
            yield part
            del part  # the next one needs its memory

    def _checked(self, part: np.ndarray) -> np.ndarray:
        # Floats from 0 to 1 are in the order of their bits, with negative ones and NaN after them: one fast pass.
        bits = part.dtype.str.replace("f", "u")
        if part.view(bits).max() <= np.ones((), part.dtype).view(bits):
            return part
        lowest, highest = part.min(), part.max()
        if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):  # NaN fails too
            raise InputError(f"{self.path}: values from {lowest:g} to {highest:g}; probabilities are in [0, 1]")
        return part.clip(0, 1)

    def _check_sums(self, total: np.ndarray) -> None:
        lowest, highest = float(total.min()), float(total.max())
        if not (abs(lowest - 1) <= _SUM_TOLERANCE[self.dtype.name] >= abs(highest - 1)):
            raise InputError(
                f"{self.path}: the probabilities of a voxel add up to {lowest:.4g} to {highest:.4g}, not to 1, as "
                "those of classes that exclude each other do; made by sigmoids, or a sum instead of a mean?"
            )


def _same_place(ours: np.ndarray, theirs: np.ndarray) -> bool:
    lengths = np.linalg.norm(theirs[:3, :3], axis=0)
    return bool(
        np.allclose(ours[:3, :3], theirs[:3, :3], rtol=0, atol=_DIRECTION_TOLERANCE * lengths)
        and np.allclose(ours[:3, 3], theirs[:3, 3], rtol=0, atol=_PLACE_TOLERANCE * lengths.min())
    )


def _damaged(path: Path, error: Exception) -> InputError:
    if isinstance(error, MemoryError):
        return InputError(f"{path}: does not fit into memory")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{path}: truncated or damaged probability file ({reason}); predict it again")
