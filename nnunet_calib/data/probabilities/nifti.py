"""Probabilities as 4D NIfTI, the last axis the classes or regions.

What other tools exchange; nnU-Net itself does not write it. On disk x varies fastest and the channel slowest, so that
channels are read one by one as (z, y, x), the order of nnU-Net's ``SimpleITKIO``.
"""

import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.nifti import affine_in_mm, first_voxel, read_header

_PIECE = 1 << 20  # bytes


class NiftiReader:
    """Header and channels of ``<case>_probabilities.nii.gz``; attributes as ``ProbabilityFile``."""

    def __init__(self, path: Path):
        self._path = path
        header = read_header(path)
        if header is None:
            raise ValueError("no NIfTI header")
        shape = header.get_data_shape()
        if len(shape) == 5 and shape[3] == 1:  # as ITK writes vectors
            shape = (*shape[:3], shape[4])
        self._stored_dtype = header.get_data_dtype()
        if len(shape) != 4 or self._stored_dtype.kind != "f":
            raise InputError(f"{path}: a float array (x, y, z, C) is expected, it holds {self._stored_dtype} {shape}")
        self.shape = tuple(int(length) for length in shape[::-1])
        self.dtype = self._stored_dtype.newbyteorder("=")
        self.affine = affine_in_mm(path)
        slope, intercept = header.get_slope_inter()
        self._scaling = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
        self._start = first_voxel(header)

    def channels(self) -> Iterator[np.ndarray]:
        """Yield (z, y, x) arrays as stored."""
        size = math.prod(self.shape[1:])
        with gzip.open(self._path) if self._path.suffix == ".gz" else self._path.open("rb") as stream:
            stream.seek(self._start)
            for _ in range(self.shape[0]):
                channel = np.empty(size, dtype=self._stored_dtype)
                buffer = channel.view(np.uint8).data
                while buffer:
                    count = stream.readinto(buffer[:_PIECE])
                    if not count:
                        raise EOFError("ends too early")
                    buffer = buffer[count:]
                channel = channel.astype(self.dtype, copy=False).reshape(self.shape[1:])
                yield channel if self._scaling == (1, 0) else channel * self._scaling[0] + self._scaling[1]
            while stream.read(_PIECE):  # reaching the end also checks gzip's checksum
                pass
