"""The compact format: exact, small headers, and nothing done for a stranger's chunks."""

import json
import struct
import tracemalloc
import zlib

import blosc2
import numpy as np
import pytest

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact, write_compact_slabs, write_npz

P = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5, 6)).transpose(3, 0, 1, 2).astype(np.float32)
PREFIX = struct.Struct("<8sQII")


def read(path):
    return np.stack(list(ProbabilityFile(path).channels()))


def parts(path) -> tuple[bytes, dict]:
    """The chunks and the header of a file."""
    content = path.read_bytes()
    _, start, length, _ = PREFIX.unpack_from(content)
    return content[PREFIX.size : start], json.loads(content[start : start + length])


def assemble(path, chunks: bytes, header: dict | bytes):
    """A file with checksums that are right, as a stranger would write it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = PREFIX.pack(b"NNCALIB\x01", PREFIX.size + len(chunks), len(text), zlib.crc32(text))
    path.write_bytes(prefix + chunks + text)
    return path


@pytest.fixture(params=["channel", "slab"])
def path(tmp_path, request):
    if request.param == "channel":
        write_compact(tmp_path / "a.nncp", P, P.shape, np.float32)
    else:
        write_compact_slabs(tmp_path / "a.nncp", (P[:, :3], P[:, 3:]), P.shape, np.float32)
    return tmp_path / "a.nncp"


def test_float32_comes_back_bit_for_bit(path):
    stored = ProbabilityFile(path)
    assert (stored.shape, stored.dtype, stored.affine) == (P.shape, np.float32, None)
    assert np.array_equal(read(path), P)


def test_float16_is_rounded_and_its_tails_are_zero(tmp_path):
    values = np.array([1, 0.1, 1e-7, 6e-8, 2e-8, 0], dtype=np.float32).reshape(1, 1, 1, 6)
    write_compact(tmp_path / "a.nncp", values, values.shape, np.float16)
    assert ProbabilityFile(tmp_path / "a.nncp").dtype == np.float16
    assert read(tmp_path / "a.nncp").ravel().tolist() == [1, np.float16(0.1), 2**-23, 2**-24, 0, 0]


def test_many_slabs_uniform_channels_and_slices_larger_than_a_slab(tmp_path):
    rng = np.random.default_rng(1)
    for shape in ((2, 9, 700, 800), (1, 2, 1100, 1100), (1, 3, 1, 1)):
        values = rng.random(shape, dtype=np.float32)
        values[0, 0], values[0, -1] = 0, 1
        write_compact(tmp_path / "a.nncp", iter(values), shape, np.float32)
        assert np.array_equal(read(tmp_path / "a.nncp"), values)


def test_slabs_of_all_channels(path, tmp_path):
    """Each in the memory of the one before; of another format all at once."""
    write_npz(tmp_path / "a.npz", P, P.shape, np.float32)
    for file in (path, tmp_path / "a.npz"):
        slabs = [slab.copy() for slab in ProbabilityFile(file).slabs()]
        assert np.array_equal(np.concatenate(slabs, axis=1), P)
        assert np.array_equal(ProbabilityFile(file).whole(), P)


def test_slabs_one_after_the_other_need_no_more_memory_than_one(tmp_path):
    values = np.random.default_rng(0).random((3, 40, 64, 64), dtype=np.float32)
    write_compact_slabs(tmp_path / "a.nncp", (values[:, z : z + 2] for z in range(0, 40, 2)), values.shape, np.float32)
    tracemalloc.start()
    seen = [slab.shape[1] for slab in ProbabilityFile(tmp_path / "a.nncp").slabs()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == [2] * 20
    assert peak < values.nbytes / 4


def test_a_file_that_does_not_say_its_order_holds_one_channel_after_the_other(path):
    write_compact(path, P, P.shape, np.float32)
    chunks, header = parts(path)
    assert header.pop("first") == "channel"
    assert np.array_equal(read(assemble(path, chunks, header)), P)


def test_uniform_probabilities_take_no_place(tmp_path):
    values = np.zeros((2, 20, 256, 256), dtype=np.float32)
    values[0] = 1
    write_compact(tmp_path / "a.nncp", values, values.shape, np.float32)
    assert (tmp_path / "a.nncp").stat().st_size < values.nbytes / 200
    assert np.array_equal(read(tmp_path / "a.nncp"), values)


def test_whole_or_not_at_all(path, tmp_path):
    before = path.read_bytes()
    for channels in (P[:2], P[:, :2], [*P, P[0]]):
        with pytest.raises(ValueError, match="channel"):
            write_compact(path, channels, P.shape, np.float32)
    for slabs in ([], [P[:, :3]], [P[:, :1], P[:, 1:]], [P, P], [P[:2]], [P[..., :2]]):
        with pytest.raises(ValueError, match="slab of shape|slices are not"):
            write_compact_slabs(path, slabs, P.shape, np.float32)
    with pytest.raises(ValueError, match="float64"):
        write_compact(path, P, P.shape, np.float64)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=r"a\.nncp: truncated or damaged") as caught:
        ProbabilityFile(path)
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_is_noticed(path):
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(InputError, match="truncated or damaged"):
            read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3, 4, 5]},
        {"shape": [3, 4, 5, -6]},
        {"shape": [3, 4, 5, True]},
        {"shape": [10**12] * 4},
        {"shape": [3, 4, 50_000, 50_000]},
        {"shape": [3, 4, 5, 7]},
        {"shape": None},
        {"dtype": "object"},
        {"dtype": "float16"},
        {"slab": 0},
        {"slab": 2},
        {"first": "slice"},
        {"first": None},
        {"sizes": [1, 2, 3]},
        {"sizes": "abc"},
        {"crc32": []},
    ],
)
def test_a_header_that_does_not_fit_its_chunks(path, change):
    chunks, header = parts(path)
    with pytest.raises(InputError, match="truncated or damaged"):
        read(assemble(path, chunks, header | change))


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 10_000, b"{}", b"[]", b"\xff"])
def test_what_is_no_header(path, text):
    with pytest.raises(InputError, match="truncated or damaged"):
        read(assemble(path, b"", text))


def chunk_of(path, edit) -> None:
    """Edit the first chunk and put its checksum right."""
    chunks, header = parts(path)
    size = header["sizes"][0]
    first = bytearray(chunks[:size])
    edit(first)
    header["crc32"][0] = zlib.crc32(first)
    header["sizes"][0] = len(first)
    assemble(path, bytes(first) + chunks[size:], header)


@pytest.mark.parametrize(
    ("position", "value"),
    [(31, 0x08), (31, 0x40), (31, 0x01), (21, 3), (16, 32), (16, 160), (2, 0x15), (2, 0xD5), (3, 8), (7, 0x40)],
    ids=["lazy", "uninitialised", "dictionary", "delta", "plugin", "user", "blosclz", "codec", "typesize", "length"],
)
def test_blosc2_is_given_only_what_we_write(path, position, value):
    chunk_of(path, lambda chunk: chunk.__setitem__(position, value))
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


def test_a_chunk_that_unpacks_to_more_than_it_should_is_refused_before(tmp_path):
    bomb = blosc2.compress2(np.zeros(1 << 27, dtype=np.uint8), typesize=4, codec=blosc2.Codec.LZ4)
    header = {"shape": [1, 1, 2, 2], "dtype": "float32", "slab": 1, "sizes": [len(bomb)], "crc32": [zlib.crc32(bomb)]}
    path = assemble(tmp_path / "a.nncp", bomb, header)
    tracemalloc.start()
    with pytest.raises(InputError, match="length of a chunk"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_values_are_checked_as_in_every_format(tmp_path):
    bad = P.copy()
    bad[1, 2, 3, 4] = np.nan
    write_compact(tmp_path / "a.nncp", bad, bad.shape, np.float32)
    with pytest.raises(InputError, match="probabilities are in"):
        read(tmp_path / "a.nncp")
