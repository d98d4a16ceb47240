"""The compact format: probabilities in blosc2 chunks, many times faster to read than ``.npz``.

A file ``<case>.nncp`` is, all integers little endian::

    magic        8 bytes   b"NNCALIB" and the version of the format, 1
    start        8 bytes   where the header begins
    length       4 bytes   of the header
    checksum     4 bytes   CRC-32 of the header
    chunks                 back to back, each a slab of z of one channel
    header                 JSON: shape [C, z, y, x], dtype "float32" or "float16", slab (z per chunk), first ("channel":
                           all slabs of a channel before the next; "slab": all channels of a slab), size and crc32 of
                           each chunk, the version of blosc2 that wrote them

It is a container of our own because blosc2's may hold expressions that are evaluated on opening. Of a chunk, blosc2 is
given only what we write ourselves, LZ4 after bitshuffle, and its length is held against the header first; filters and
codecs that blosc2 would load from elsewhere are refused.

float32 comes back as it was. float16 takes half the place: values below 6e-8 (rounded: 3e-8) become 0 and the channels
no longer add up to exactly 1; where that changes a number, such as NLL, the evaluation says so.
"""

import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from nnunet_calib.data.files import whole_file

_MAGIC = b"NNCALIB\x01"
_PREFIX = struct.Struct("<8sQII")  # magic, header's start, length and checksum
_MAX_HEADER = 1 << 24  # bytes, about 800 000 chunks
_CHUNK = 1 << 22  # bytes of a chunk before compression, about; at least one slice
_MAX_CHUNK = (1 << 31) - (1 << 16)  # of blosc2
_TYPES = ("float16", "float32")
_ORDERS = ("channel", "slab")
# Among LZ4 and ZSTD, levels 1 to 5, with either shuffle, the fastest to read: twice as fast as ZSTD after shuffle, for
# files 6 % larger.
_LEVEL = 5

# Of a chunk's own header (32 bytes, blosc2's README_CHUNK_FORMAT): flags, size of an element, bytes before and after
# compression, the six filters, and blosc2's flags.
_CHUNK_HEADER = struct.Struct("<2xBBI4xI6s9xB")
_MEMCPYED, _LZ4 = 0x02, 1
_NO_FILTER, _BITSHUFFLE = 0, 2
_PLAIN, _ALL_ZERO = 0x00, 0x10


class CompactReader:
    """Header and channels of ``<case>.nncp``; attributes as ``ProbabilityFile``."""

    affine: np.ndarray | None = None

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as stream:
            magic, start, length, checksum = _PREFIX.unpack(stream.read(_PREFIX.size))
            if magic != _MAGIC:
                raise ValueError("not a compact probability file, or one of a later version")
            if length > _MAX_HEADER or start + length != os.fstat(stream.fileno()).st_size:
                raise ValueError("its header lies outside")
            stream.seek(start)
            header = stream.read(length)
        if zlib.crc32(header) != checksum:
            raise ValueError("checksum of the header")
        content = json.loads(header)
        self.shape: tuple[int, ...] = tuple(_whole_numbers(content["shape"]))
        (self._slab,) = _whole_numbers([content["slab"]])
        if len(self.shape) != 4 or content["dtype"] not in _TYPES or self._slab < 1:
            raise ValueError(f"{content['dtype']} values {self.shape}, {self._slab} slices a chunk")
        self.dtype = np.dtype(content["dtype"])
        self._slabs, self._first = math.ceil(self.shape[1] / self._slab), content.get("first", "channel")
        sizes, self._checksums = _whole_numbers(content["sizes"]), _whole_numbers(content["crc32"])
        self._ends = list(itertools.accumulate(sizes, initial=_PREFIX.size))
        if self._first not in _ORDERS or not len(sizes) == len(self._checksums) == self.shape[0] * self._slabs:
            raise ValueError("its chunks are not those of its shape")
        if self._ends[-1] != start:
            raise ValueError("its chunks do not add up")
        if _slice_bytes(self.shape, self.dtype) * self._slab > _MAX_CHUNK:
            raise ValueError("chunks of impossible length")

    def channels(self) -> Iterator[np.ndarray]:
        """Yield (z, y, x) arrays as stored."""
        with self._path.open("rb") as stream:
            for c in range(self.shape[0]):
                channel = np.empty(self.shape[1:], dtype=self.dtype)
                for s in range(self._slabs):
                    self._read(stream, c, s, channel[s * self._slab : (s + 1) * self._slab])
                yield channel

    def slabs(self, check: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield (C, slab, y, x) arrays; each takes the memory of the one before.

        ``check`` sees each chunk just decompressed, still in the cache, and returns what takes its place.
        """
        thickness = min(self._slab, self.shape[1])
        memory = np.empty((self.shape[0], thickness, *self.shape[2:]), dtype=self.dtype)
        with self._path.open("rb") as stream:
            for s in range(self._slabs):
                slab = memory[:, : self.shape[1] - s * thickness]
                for c, part in enumerate(slab):
                    self._read(stream, c, s, part)
                    checked = check(part)
                    if checked is not part:
                        part[...] = checked
                yield slab

    def _read(self, stream: BinaryIO, c: int, s: int, into: np.ndarray) -> None:
        """One slab of one channel."""
        import blosc2  # here: takes a while, and not everybody has such files

        i = c * self._slabs + s if self._first == "channel" else s * self.shape[0] + c
        stream.seek(self._ends[i])
        chunk = stream.read(self._ends[i + 1] - self._ends[i])
        if zlib.crc32(chunk) != self._checksums[i]:
            raise ValueError("checksum of a chunk")
        _check_chunk(chunk, into)
        blosc2.decompress2(chunk, dst=into, nthreads=1)


def write_compact(path: Path, channels: Iterable[np.ndarray], shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Write a compact file, one channel at a time, whole or not at all.

    Args:
        path: of the file; ``<case>.nncp`` is found beside a prediction.
        channels: probabilities (z, y, x) of one class or region after the other.
        shape: (C, z, y, x).
        dtype: float32 or float16.

    Raises:
        ValueError: another dtype, or channels that do not have that shape.
    """
    dtype, shape = np.dtype(dtype), tuple(map(int, shape))
    thickness = max(1, _CHUNK // _slice_bytes(shape, dtype))

    def parts() -> Iterator[np.ndarray]:
        count = 0
        for channel in channels:
            if channel.shape != shape[1:]:
                raise ValueError(f"a channel of shape {channel.shape} is none of {shape}")
            yield from (channel[z : z + thickness] for z in range(0, shape[1], thickness))
            count += 1
        if count != shape[0]:
            raise ValueError(f"{count} channels are not {shape[0]}")

    _write(path, parts(), shape, dtype, thickness, "channel")


def write_compact_slabs(path: Path, slabs: Iterable[np.ndarray], shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Write a compact file, some slices of all channels at a time, whole or not at all.

    Args:
        path: of the file.
        slabs: probabilities (C, slab, y, x), all but the last equally thick.
        shape: (C, z, y, x).
        dtype: float32 or float16.

    Raises:
        ValueError: another dtype, or slabs that do not add up to that shape.
    """
    dtype, shape = np.dtype(dtype), tuple(map(int, shape))
    slabs = iter(slabs)
    head = next(slabs, np.empty((0, 0, 0, 0)))
    thickness = head.shape[1]

    def parts() -> Iterator[np.ndarray]:
        z = 0
        for slab in itertools.chain([head], slabs):
            if slab.shape != (shape[0], min(thickness, shape[1] - z), *shape[2:]):
                raise ValueError(f"a slab of shape {slab.shape} at slice {z} is none of {shape}")
            yield from slab
            z += thickness
        if z < shape[1]:
            raise ValueError(f"{z} slices are not {shape[1]}")

    _write(path, parts(), shape, dtype, thickness, "slab")


def _write(
    path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, thickness: int, first: str
) -> None:
    """Write chunks in the order given."""
    import blosc2

    if dtype.name not in _TYPES:
        raise ValueError(f"dtype is float32 or float16, not {dtype}")
    if _slice_bytes(shape, dtype) > _MAX_CHUNK:
        raise ValueError(f"slices of {shape[2:]} are too large")
    sizes, checksums = [], []
    with whole_file(path) as stream:
        stream.seek(_PREFIX.size)
        for part in parts:
            chunk = blosc2.compress2(
                np.ascontiguousarray(part, dtype=dtype),
                codec=blosc2.Codec.LZ4,
                clevel=_LEVEL,
                filters=[blosc2.Filter.BITSHUFFLE],
                filters_meta=[0],
                typesize=dtype.itemsize,
                nthreads=1,
            )
            stream.write(chunk)
            sizes.append(len(chunk))
            checksums.append(zlib.crc32(chunk))
        content = {"shape": shape, "dtype": dtype.name, "slab": thickness, "first": first}
        content |= {"blosc2": blosc2.__version__, "sizes": sizes, "crc32": checksums}
        header = json.dumps(content).encode()
        start = stream.tell()
        stream.write(header)
        stream.seek(0)
        stream.write(_PREFIX.pack(_MAGIC, start, len(header), zlib.crc32(header)))


def _check_chunk(chunk: bytes, slab: np.ndarray) -> None:
    """Refuse a chunk that would not fill the slab, or that blosc2 would do anything else for."""
    flags, typesize, size, compressed, filters, blosc2_flags = _CHUNK_HEADER.unpack_from(chunk)
    if (typesize, size, compressed) != (slab.itemsize, slab.nbytes, len(chunk)):
        raise ValueError("length of a chunk")
    if (
        not (flags & _MEMCPYED or flags >> 5 == _LZ4)
        or not set(filters) <= {_NO_FILTER, _BITSHUFFLE}
        or blosc2_flags not in (_PLAIN, _ALL_ZERO)
    ):
        raise ValueError("a chunk that this package did not write")


def _slice_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return shape[2] * shape[3] * dtype.itemsize


def _whole_numbers(values: Any) -> list[int]:
    """JSON values that must be sizes: integers, not negative."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("its header")
    return values
