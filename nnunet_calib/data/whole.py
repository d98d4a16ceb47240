"""Whether the file of a label map or image is whole.

Readers make up for what is missing: ITK gives zeros for the rest of a ``.nii.gz`` or ``.mha`` that was cut, and what
a damaged stream happens to decompress to. So a file is held against its own checksum where its format has one, and
against its exact size where it has none:

=============================== ==============================================================================
``.nii.gz``, ``.gipl.gz``       CRC-32 and length of gzip
``.mha``, ``.mhd``              compressed: Adler-32 of zlib; else the size
``.nrrd``, ``.nhdr``            gzip: CRC-32 and length; raw: the size
``.nii``, ``.gipl``, ``.bmp``   the size
``.png``                        CRC-32 of every chunk
``.tif``, ``.tiff``             place and size of every strip and tile; zlib's checksum is looked at when it is read
=============================== ==============================================================================

What a reader has in memory need not be decompressed again: its checksum is that of the stream. Any other ending, which
nnU-Net reads only where ``dataset.json`` names the reader, is left to that reader.
"""

import gzip
import itertools
import logging
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nnunet_calib.data import nifti
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import unreadable

_CHUNK = 1 << 20  # bytes, a multiple of every item size
_MAX_RATIO = 1032  # deflate cannot do better
_LONGEST_HEADER = 1 << 20  # bytes of the text before the voxels
_GZIP, _ZLIB = 31, 15  # zlib's names for the two streams
_GZIP_MAGIC = b"\x1f\x8b"


def check_whole(path: Path, voxels: np.ndarray | None = None, *, finite: bool = False) -> None:
    """Refuse the file of a label map or image that is damaged or cut off.

    Made for every file that somebody else's reader gives voxels of, in particular nnU-Net's, which do not look. With
    ``voxels`` it costs a checksum of them, without it costs decompressing the file.

    Args:
        path: the file, of any format that nnU-Net's readers take.
        voxels: what nnU-Net's reader made of this file alone: float (channels, z, y, x).
        finite: refuse NaN and infinity in a NIfTI file too; ITK reads them as 0.

    Raises:
        InputError: one line: the file, what is wrong, what to do.
    """
    stored = announced(path)
    if stored is not None and not (voxels is not None and stored.is_of(voxels)):
        stored.check(finite)


def announced(path: Path) -> "Stored | None":
    """What the header of a file says of its voxels, held against the size of the file; no voxel is read.

    Returns:
        None where there is nothing more to check: PNG and TIFF, which are checked here, and unknown formats.

    Raises:
        InputError: the file cannot be read, its header makes no sense, or the voxels cannot be in the file.
    """
    look = next((look for endings, look in _FORMATS if path.name.lower().endswith(endings)), None)
    try:
        stored = look(path) if look else None
        if stored is not None:
            stored.check_size()
        return stored
    except InputError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except (ArithmeticError, EOFError, LookupError, TypeError, ValueError, zlib.error, struct.error) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


@dataclass(frozen=True)
class Stored:
    """Where the voxels of a file are.

    Attributes:
        path: the file that was named.
        file: the one that holds the voxels.
        start: where they begin in it, or the compressed stream.
        stream: of zlib's kinds; None if they are not compressed.
        skip: decompressed bytes before them.
        dtype: of a value.
        count: how many values, all channels.
        scaling: factor and summand that readers apply.
        end: where the stream ends, if the header says so.
        padded: what follows the voxels does not matter.
    """

    path: Path
    file: Path
    start: int
    stream: int | None
    skip: int
    dtype: np.dtype
    count: int
    scaling: tuple[float, float] = (1.0, 0.0)
    end: int | None = None
    padded: bool = False

    @property
    def size(self) -> int:
        """Of the voxels, and what is before them in a compressed stream."""
        return self.skip + self.count * self.dtype.itemsize

    def check_size(self) -> None:
        """Hold the size of the file against what the header announces.

        Raises:
            InputError: they do not fit.
        """
        size = self.file.stat().st_size
        stored = size - self.start
        if self.start < 0 or self.count < 1:
            raise _damaged(self.path, "its header announces no voxels")
        if self.end is not None and self.end != size:
            raise _damaged(self.path, f"{size} bytes instead of the {self.end} of its header")
        if self.stream is None and (stored < self.size if self.padded else stored != self.size):
            raise _damaged(self.path, f"{stored} bytes of voxels instead of the {self.size} of its header")
        if self.stream is not None and self.size > stored * _MAX_RATIO:
            raise _damaged(self.path, f"{stored} bytes cannot hold the {self.size} of its header")

    def is_of(self, voxels: np.ndarray) -> bool:
        """Whether the checksum at the end of the stream is that of these voxels."""
        if self.stream is None or voxels.size != self.count or self.skip > _CHUNK or self.dtype.kind not in "iuf":
            return False
        with self.file.open("rb") as stream:
            kind = self._kind(stream)
            stream.seek(self.start)
            head = _decompressed_begin(stream, kind, self.skip)
            length = 8 if kind == _GZIP else 4
            stream.seek(-length, os.SEEK_END)
            trailer = stream.read()
        sum_of = zlib.crc32 if kind == _GZIP else zlib.adler32
        checksum = sum_of(head)
        with np.errstate(invalid="ignore", over="ignore"):
            for part in itertools.chain.from_iterable(voxels):  # slice by slice: no copy of the whole
                checksum = sum_of(np.ascontiguousarray(self._unscaled(part), dtype=self.dtype).data, checksum)
        if kind == _GZIP:
            return trailer == struct.pack("<II", checksum, self.size % (1 << 32))
        return trailer == struct.pack(">I", checksum)

    def check(self, finite: bool) -> None:
        """Read all there is.

        Raises:
            InputError: it is damaged, of another length than the header announces, or, with ``finite``, not finite.
        """
        finite = finite and self.dtype.kind in "fc" and _CHUNK % self.dtype.itemsize == 0
        if self.stream is None and not finite:
            return
        length = 0
        try:
            for piece in self._pieces():
                length += len(piece)
                if finite:
                    values = np.frombuffer(piece, dtype=self.dtype, count=len(piece) // self.dtype.itemsize)
                    if not np.isfinite(values).all():
                        raise InputError(f"{self.path}: values that are NaN or infinite")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(self.path, str(error)) from error
        except OSError as error:
            raise unreadable(self.path, error) from error
        expected = self.size - self.skip
        if length < expected or (length > expected and not self.padded):
            raise _damaged(self.path, f"{length} bytes of voxels instead of the {expected} of its header")

    def _pieces(self) -> Iterator[bytes]:
        """The voxels' bytes, decompressed."""
        with self.file.open("rb") as stream:
            kind = self._kind(stream)
            stream.seek(self.start)
            if kind == _ZLIB:
                yield from _inflated(stream)
                return
            opened = gzip.GzipFile(fileobj=stream) if kind == _GZIP else stream
            opened.read(self.skip)
            while piece := opened.read(_CHUNK):
                yield piece

    def _kind(self, stream: BinaryIO) -> int | None:
        """MetaIO takes either kind of stream."""
        if self.stream is None:
            return None
        stream.seek(self.start)
        return _GZIP if stream.read(2) == _GZIP_MAGIC else self.stream

    def _unscaled(self, part: np.ndarray) -> np.ndarray:
        if self.scaling == (1, 0):
            return part
        stored = (part - self.scaling[1]) / self.scaling[0]
        return stored if self.dtype.kind == "f" else np.rint(stored)


def _inflated(stream: BinaryIO) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(_ZLIB)
    while not decompressor.eof:
        packed = decompressor.unconsumed_tail or stream.read(_CHUNK)
        if not packed:
            raise EOFError("the compressed voxels end too early")
        yield decompressor.decompress(packed, _CHUNK)
    if decompressor.unused_data or stream.read(1):
        raise EOFError("something follows the compressed voxels")


def _decompressed_begin(stream: BinaryIO, kind: int | None, length: int) -> bytes:
    if not length:
        return b""
    decompressor = zlib.decompressobj(kind or 0)
    begin = b""
    while len(begin) < length and (packed := decompressor.unconsumed_tail or stream.read(_CHUNK)):
        begin += decompressor.decompress(packed, length - len(begin))
    return begin


def _nifti(path: Path) -> Stored | None:
    header = nifti.read_header(path)
    if header is None:
        raise _damaged(path, "it does not begin as a NIfTI file")
    dtype = nifti.type_of(header)
    if dtype is None:
        return None
    if dtype.kind == "c":
        raise InputError(f"{path}: holds complex numbers, of which readers drop a half")
    first = nifti.first_voxel(header)
    compressed = nifti.is_compressed(path)
    slope, intercept = (float(header[name]) for name in ("scl_slope", "scl_inter"))
    scaled = math.isfinite(slope) and math.isfinite(intercept) and slope != 0
    return Stored(
        path,
        path,
        0 if compressed else first,
        _GZIP if compressed else None,
        first if compressed else 0,
        dtype,
        nifti.voxels(header),
        (slope, intercept) if scaled else (1.0, 0.0),
        padded=compressed,  # what gzip vouches for is as it was written
    )


_METAIO_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip


def _metaimage(path: Path) -> Stored:
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        while "ElementDataFile" not in fields:
            line = stream.readline(_LONGEST_HEADER)
            name, equals, value = line.decode("latin-1").partition("=")
            if not equals and line.strip() or not line or stream.tell() > _LONGEST_HEADER:
                raise _damaged(path, "its header has no end")
            fields[name.strip()] = value.strip()
        after = stream.tell()

    def is_set(name: str, otherwise: str) -> bool:
        return fields.get(name, otherwise)[:1] in ("T", "t", "1")

    sizes = [int(size) for size in fields["DimSize"].split()]
    if len(sizes) != int(fields["NDims"]) or min(sizes) < 1:
        raise _damaged(path, f"DimSize {fields['DimSize']} of {fields['NDims']} axes")
    name, local = fields["ElementDataFile"], fields["ElementDataFile"].upper() == "LOCAL"
    if name.upper().startswith("LIST") or "%" in name:
        raise _scattered(path)
    if not is_set("BinaryData", "False"):
        raise InputError(f"{path}: voxels written as text cannot be checked; save it as .nii.gz")
    most_significant_first = is_set("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    dtype = np.dtype((">" if most_significant_first else "<") + _METAIO_TYPES[fields["ElementType"]])
    count = math.prod(sizes) * int(fields.get("ElementNumberOfChannels", "1"))
    file, start = (path, after) if local else (path.parent / name, 0)
    compressed = is_set("CompressedData", "False")
    skip = int(fields.get("HeaderSize", "0"))
    if skip == -1 and not compressed:
        start = max(start, file.stat().st_size - count * dtype.itemsize)
    elif skip > 0:
        start += skip
    packed = fields.get("CompressedDataSize") if compressed else None
    # Written by MetaIO for what is compressed as one; 0 where it was not known.
    end = start + int(packed) if packed is not None and int(packed) > 0 else None
    return Stored(path, file, start, _ZLIB if compressed else None, 0, dtype, count, end=end)


_NRRD_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}


def _nrrd(path: Path) -> Stored:
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        if not re.match(rb"NRRD000\d", stream.readline(_LONGEST_HEADER)):
            raise _damaged(path, "it does not begin as an NRRD file")
        while line := stream.readline(_LONGEST_HEADER).decode("latin-1").rstrip("\r\n"):
            name, colon, value = line.partition(":")
            if colon and not value.startswith("=") and not line.startswith("#"):
                fields[name.strip().lower().replace(" ", "")] = value.strip()
        after = stream.tell()
    sizes = [int(size) for size in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or min(sizes) < 1:
        raise _damaged(path, f"sizes {fields['sizes']} of {fields['dimension']} axes")
    kind = next(kind for kind, names in _NRRD_TYPES.items() if fields["type"].lower() in names.split(", "))
    order = fields.get("endian", "little").lower()
    dtype, count = np.dtype({"little": "<", "big": ">"}[order] + kind), math.prod(sizes)
    detached = fields.get("datafile")
    if detached is not None and (detached.upper().startswith("LIST") or "%" in detached):
        raise _scattered(path)
    file, start = (path, after) if detached is None else (path.parent / detached, 0)
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in range(int(fields.get("lineskip", "0"))):
            stream.readline()
        start = stream.tell()
    encoding, skip = fields["encoding"].lower(), int(fields.get("byteskip", "0"))
    if encoding == "raw":
        start = max(start, file.stat().st_size - count * dtype.itemsize) if skip == -1 else start + skip
        return Stored(path, file, start, None, 0, dtype, count)
    if encoding in ("gzip", "gz"):
        return Stored(path, file, start, _GZIP, max(skip, 0), dtype, count)
    raise InputError(f"{path}: voxels in the encoding {encoding!r:.50} cannot be checked; save it as .nii.gz")


_GIPL_HEADER = 256  # bytes
_GIPL_MAGIC = (0xEFFFE9B0, 0x2AE389B8)
_GIPL_TYPES = {7: "i1", 8: "u1", 15: "i2", 16: "u2", 31: "u4", 32: "i4", 64: "f4", 65: "f8"}


def _gipl(path: Path) -> Stored:
    compressed = path.name.lower().endswith(".gz")
    with gzip.open(path) if compressed else path.open("rb") as stream:
        header = stream.read(_GIPL_HEADER)
    if len(header) < _GIPL_HEADER or struct.unpack_from(">I", header, 252)[0] not in _GIPL_MAGIC:
        raise _damaged(path, "it does not begin as a GIPL file")
    *sizes, kind = struct.unpack_from(">5H", header)
    dtype, count = np.dtype(">" + _GIPL_TYPES[kind]), math.prod(max(1, size) for size in sizes)
    if compressed:
        return Stored(path, path, 0, _GZIP, _GIPL_HEADER, dtype, count)
    return Stored(path, path, _GIPL_HEADER, None, 0, dtype, count)


def _png(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(8) != b"\x89PNG\r\n\x1a\n":
            raise _damaged(path, "it does not begin as a PNG file")
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", stream.read(8))
            content = stream.read(length)
            if stream.read(4) != struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))):
                raise _damaged(path, "the checksum of a chunk is another")


def _bmp(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        magic, start, length = struct.unpack("<2s8xII", stream.read(18))
        if magic != b"BM":
            raise _damaged(path, "it does not begin as a BMP file")
        if length == 12:
            width, height, _, bits = struct.unpack("<4H", stream.read(8))
            compression = 0
        else:
            width, height, _, bits, compression = struct.unpack("<iiHHI", stream.read(16))
    row = (width * bits + 31) // 32 * 4
    # Rows of plain pixels; a few bytes more are the padding that some write.
    if compression in (0, 3) and not 0 <= size - start - row * abs(height) < 4:
        raise _damaged(path, f"{size} bytes cannot be the {width} x {abs(height)} pixels of its header")


def _tiff(path: Path) -> None:
    import tifffile

    said = _Said()
    log = logging.getLogger("tifffile")
    log.addHandler(said)
    try:
        with tifffile.TiffFile(path) as opened:
            size, held, smallest = path.stat().st_size, 0, 1 << 62
            for page in opened.pages:
                places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
                if not places or not all(count > 0 and place + count <= size for place, count in places):
                    raise _damaged(path, "a strip of pixels lies outside")
                stored = sum(page.databytecounts)
                if page.compression == 1 and stored != page.nbytes and page.bitspersample % 8 == 0:
                    raise _damaged(path, f"{stored} bytes of pixels instead of the {page.nbytes} of its header")
                held, smallest = held + stored, min(smallest, stored)
                held += sum(tag.valuebytecount for tag in getattr(page, "tags", ()))
    except tifffile.TiffFileError as error:
        raise _damaged(path, str(error)) from error
    finally:
        log.removeHandler(said)
    if said.lines:
        raise _damaged(path, said.lines[0])
    if size - held > smallest + 4096:
        raise _damaged(path, f"{size - held} of its {size} bytes belong to no page")


class _Said(logging.Handler):
    """What tifffile finds wrong and goes on."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


_FORMATS: list[tuple[tuple[str, ...], Callable[[Path], Stored | None]]] = [
    ((".nii", ".nii.gz"), _nifti),
    ((".mha", ".mhd"), _metaimage),
    ((".nrrd", ".nhdr"), _nrrd),
    ((".gipl", ".gipl.gz"), _gipl),
    ((".png",), _png),
    ((".bmp",), _bmp),
    ((".tif", ".tiff"), _tiff),
]


def _damaged(path: Path, why: str) -> InputError:
    what = " ".join(why.split())
    return InputError(f"{path}: truncated or damaged ({what:.200}); copy or predict it again")


def _scattered(path: Path) -> InputError:
    return InputError(f"{path}: voxels spread over several files cannot be checked; save it as one, such as .nii.gz")
