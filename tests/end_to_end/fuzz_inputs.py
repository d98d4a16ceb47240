"""Mutated inputs of an evaluation, and a process of its own that evaluates them: see ``test_fuzz.py``.

    python fuzz_inputs.py FOLDER

Writes one line of JSON an input: its name and either the error it ended in or None for a result.
"""

import contextlib
import gzip
import io
import json
import pickle
import random
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np

SEED = 20261120
COUNT = 300
MEMORY = 1 << 30  # bytes of address space, beyond what it takes to import the libraries

Edit = Callable[[bytes, random.Random], bytes]


class Trap:
    """Makes a file if it is ever unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    edited = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        edited[rng.randrange(len(edited))] ^= 1 << rng.randrange(8)
    return bytes(edited)


def flipped_early(content: bytes, rng: random.Random) -> bytes:
    return flipped(content[:400], rng) + content[400:]


def overwritten(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64))
    filler = rng.choice((b"\x00", b"\xff", b"\x7f", bytes([rng.randrange(256)])))
    return content[:start] + filler * length + content[start + length :]


def lengthened(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 100, 10_000)))


def shuffled(content: bytes, rng: random.Random) -> bytes:
    cut = rng.randrange(len(content))
    return content[cut:] + content[:cut]


BYTES: list[Edit] = [truncated, flipped, flipped, flipped_early, flipped_early, overwritten, lengthened, shuffled]


def inside_gzip(edit: Edit) -> Edit:
    """The same to what is compressed, with a checksum that is right: the readers see it."""
    return lambda content, rng: gzip.compress(edit(gzip.decompress(content), rng), compresslevel=1)


def nifti_field(content: bytes, rng: random.Random) -> bytes:
    """One field of the header set to something hostile."""
    raw = bytearray(gzip.decompress(content))
    layout, offset, value = rng.choice(
        [
            ("<8h", 40, (3, 32767, 32767, 32767, 1, 1, 1, 1)),
            ("<8h", 40, (7, *[32767] * 7)),
            ("<8h", 40, (4, 12, 14, 6, 1000, 1, 1, 1)),
            ("<8h", 40, (3, -1, -1, -1, -1, -1, -1, -1)),
            ("<8h", 40, (0, 0, 0, 0, 0, 0, 0, 0)),
            ("<8h", 40, (rng.randrange(-9, 9), *[rng.randrange(-99, 99) for _ in range(7)])),
            ("<h", 70, (rng.choice((0, 1, 16, 32, 64, 128, 255, 512, 768, 1024, 1536, 1792, 2048, 2304, -1)),)),
            ("<h", 72, (rng.choice((0, 1, 32767, -8)),)),
            ("<f", 108, (rng.choice((0.0, -1.0, 1e30, float("nan"), 353.0, 1e6)),)),
            ("<8f", 76, (1, 0, -1, float("nan"), float("inf"), 1, 1, 1)),
            ("<2f", 112, (rng.choice((float("nan"), float("inf"), 1e38, 0.5)), rng.choice((0.0, float("inf"), 3.5)))),
            ("<2h", 252, (rng.randrange(-5, 9), rng.randrange(-5, 9))),
            ("<12f", 280, tuple(rng.choice((0, float("nan"), 1e30, 1)) for _ in range(12))),
            ("<4B", 348, (1, 0, 0, 0)),
            ("<i", 0, (rng.choice((0, 540, 1543569408, -1)),)),
        ]
    )
    struct.pack_into(layout, raw, offset, *value)
    return gzip.compress(bytes(raw), compresslevel=1)


def nifti_of(array: np.ndarray) -> bytes:
    return gzip.compress(nibabel.Nifti1Image(array, np.diag([-1, -1, 1, 1])).to_bytes(), compresslevel=1)


def npz_of(npy: bytes, claimed: int | None = None) -> bytes:
    """A zip with this member; its directory may claim another size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("probabilities.npy", npy)
    content = buffer.getvalue()
    if claimed is None:
        return content
    directory = content.rindex(b"PK\x01\x02")
    return content[: directory + 24] + struct.pack("<I", claimed) + content[directory + 28 :]


def npy_header(descr: str, shape: str, order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def special_npz(p: np.ndarray, trap: Path) -> list[tuple[str, bytes]]:
    """Hostile arrays, by name."""
    bad = p.copy()
    bad[1, 2, 3, 4] = np.nan
    data, member = p.tobytes(), npy_of(p)
    with_trap = npy_header("'|O'", "(1, 1, 1, 1)") + pickle.dumps(Trap(trap))
    huge = npy_header("'<f4'", "(1000, 1000000, 1000, 1)")
    whole = io.BytesIO()
    np.savez(whole, probabilities=np.array([Trap(trap)], dtype=object))
    return [
        ("object array", npz_of(with_trap)),
        ("object array by numpy", whole.getvalue()),
        ("a pickle", pickle.dumps(Trap(trap))),
        ("a pickle as member", npz_of(pickle.dumps(Trap(trap)))),
        ("10^12 values", npz_of(huge + data)),
        ("10^12 values claimed", npz_of(huge + data, 0xFFFFFFF0)),
        ("values to the power", npz_of(npy_header("'<f4'", "(3, 2**70, 14, 12)") + data)),
        ("negative", npz_of(npy_header("'<f4'", "(3, -6, 14, 12)") + data)),
        ("bool as length", npz_of(npy_header("'<f4'", "(True, 6, 14, 12)") + data)),
        ("call in header", npz_of(npy_header("'<f4'", f"open({str(trap)!r}, 'w')") + data)),
        ("nested header", npz_of(npy_header("'<f4'", "(" * 5000) + data)),
        ("minus header", npz_of(npy_header("'<f4'", "-" * 9000 + "1") + data)),
        ("zero bomb", npz_of(npy_header("'<f4'", "(3, 100, 500, 500)") + bytes(300_000_000))),
        ("void", npz_of(npy_header("'|V4'", "(3, 6, 14, 12)") + data)),
        ("structure", npz_of(npy_header("[('a', '<f4')]", "(3, 6, 14, 12)") + data)),
        ("text", npz_of(npy_header("'<U1'", "(3, 6, 14, 12)") + data)),
        ("no values", npz_of(npy_header("'<f4'", "(3, 0, 14, 12)"))),
        ("int32", npz_of(npy_of((p * 100).astype(np.int32)))),
        ("complex", npz_of(npy_of(p.astype(np.complex64)))),
        ("bool", npz_of(npy_of(p > 0.5))),
        ("3D", npz_of(npy_of(p[0]))),
        ("5D", npz_of(npy_of(p[None]))),
        ("NaN", npz_of(npy_of(bad))),
        ("inf", npz_of(npy_of(np.where(np.isnan(bad), np.inf, bad)))),
        ("logits", npz_of(npy_of(p * 10 - 5))),
        ("turned", npz_of(npy_of(np.ascontiguousarray(p.transpose(0, 3, 2, 1))))),
        ("flipped", npz_of(npy_of(p[:, ::-1].copy()))),
        ("a class less", npz_of(npy_of(p[:2]))),
        ("big-endian", npz_of(npy_of(p.astype(">f4")))),
        ("float64 in Fortran order", npz_of(npy_of(np.asfortranarray(p.astype(np.float64))))),
        ("format 3", npz_of(b"\x93NUMPY\x03\x00\xff\xff\xff\x7f" + member[10:])),
        ("empty", b""),
    ]


def special_labels(labels: np.ndarray) -> list[tuple[str, bytes]]:
    """Label maps (x, y, z) that are none."""
    as_float = labels.astype(np.float32)
    return [
        ("4D", nifti_of(np.stack([labels] * 2, axis=-1))),
        ("5D", nifti_of(labels[..., None, None].repeat(2, axis=4))),
        ("2D", nifti_of(labels[:, :, 0])),
        ("NaN", nifti_of(np.where(labels == 1, np.nan, as_float).astype(np.float32))),
        ("inf", nifti_of(np.where(labels == 1, np.inf, as_float).astype(np.float32))),
        ("halves", nifti_of(as_float / 2)),
        ("negative", nifti_of(labels.astype(np.int16) - 2)),
        ("large", nifti_of(labels.astype(np.int32) * 1_000_000)),
        ("RGB", nifti_of(labels.astype([("R", "u1"), ("G", "u1"), ("B", "u1")]))),
        ("complex", nifti_of(labels.astype(np.complex64))),
        ("float64", nifti_of(labels.astype(np.float64))),
        ("another shape", nifti_of(labels[:-1])),
        ("zeros without end", gzip.compress(bytes(200_000_000), compresslevel=1)),
        ("gzip in gzip", gzip.compress(nifti_of(labels))),
        ("a zip", npz_of(b"")),
        ("empty", b""),
    ]


def special_json(content: dict) -> list[tuple[str, bytes]]:
    labels = {
        "background": 0,
        "many": list(range(70_000)),
        "nested": [[[1]]],
        "float": 1.5,
        "text": "1",
        "huge": 10**400,
        "null": None,
        "negative": -1,
        "object": {"a": 1},
    }
    texts = [
        ("[" * 200_000),
        '{"a":' * 200_000,
        "9" * 100_000,
        "NaN",
        "null",
        "[]",
        '"text"',
        "{}",
        '{"labels": 1e999}',
    ]
    edited = [{**content, "labels": {"background": 0, name: value}} for name, value in labels.items()]
    edited += [{**content, "file_ending": ending} for ending in (None, "", "../..", 5, ".exe", "." * 5000)]
    edited += [{**content, "labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": order}
               for order in (None, [], [1], [1, 2, 3], "ab", {"a": 1}, [[1], [2]], [None, None])]  # fmt: skip
    edited += [{**content, "overwrite_image_reader_writer": name} for name in ("os.system", "../x", 5, ["a"], "")]
    return [(f"text {text[:9]}", text.encode()) for text in texts] + [
        (f"edited {number}", json.dumps(entry).encode()) for number, entry in enumerate(edited)
    ] + [("bytes", b"\xff\xfe\x00"), ("null byte", b"{\x00}")]  # fmt: skip


def special_compact(content: bytes) -> list[tuple[str, bytes]]:
    """Headers of a compact file with a checksum that is right."""
    _, start, length, _ = struct.unpack_from("<8sQII", content)
    header = json.loads(content[start : start + length])

    def with_header(text: bytes) -> bytes:
        return struct.pack("<8sQII", content[:8], start, len(text), zlib.crc32(text)) + content[24:start] + text

    changes = [
        {"shape": [10**12] * 4}, {"shape": [3, 6, 14]}, {"shape": [3, 6, 14, 10**9]}, {"shape": [3, 6, 14, -12]},
        {"shape": [3.0, 6, 14, 12]}, {"shape": "3"}, {"dtype": "object"}, {"dtype": ["f4"]}, {"dtype": "float16"},
        {"slab": 0}, {"slab": 10**18}, {"slab": None}, {"sizes": [10**12] * 3}, {"sizes": []}, {"crc32": None},
    ]  # fmt: skip
    return [(f"header {change}", with_header(json.dumps(header | change).encode())) for change in changes] + [
        ("nested header", with_header(b"[" * 100_000)),
        ("plugin", _plugin_chunk(content, header)),
    ]


def _plugin_chunk(content: bytes, header: dict) -> bytes:
    """A chunk that asks blosc2 for a filter it would have to look for."""
    chunks = bytearray(content[24 : 24 + sum(header["sizes"])])
    chunks[21] = 161
    header = header | {"crc32": [zlib.crc32(chunks[: header["sizes"][0]]), *header["crc32"][1:]]}
    text = json.dumps(header).encode()
    return struct.pack("<8sQII", content[:8], 24 + len(chunks), len(text), zlib.crc32(text)) + chunks + text


def mutations(originals: dict[str, bytes], labels: np.ndarray, p: np.ndarray, trap: Path):
    """Name, file to replace and its new content; ``COUNT`` of them, the same every time."""
    rng = random.Random(SEED)
    of_file = {
        "predicted/case.npz": special_npz(p, trap),
        "predicted/case.nii.gz": special_labels(labels),
        "labelsTs/case.nii.gz": special_labels(labels)[:6],
        "predicted/dataset.json": special_json(json.loads(originals["predicted/dataset.json"])),
        "predicted/plans.json": [(f"text {t[:9]!r}", t) for t in (b"[" * 99_999, b"", b"[]", b'{"label_manager": {}}')],
        "predicted/case.nncp": special_compact(originals["predicted/case.nncp"]),
        "predicted/case_probabilities.nii.gz": [
            ("NaN", nifti_of(np.full((12, 14, 6, 3), np.nan, dtype=np.float32))),
            ("int", nifti_of(np.ones((12, 14, 6, 3), dtype=np.int16))),
            ("3D", nifti_of(np.ones((12, 14, 6), dtype=np.float32))),
        ],
    }
    made = [(f"{file}: {name}", file, content) for file, entries in of_file.items() for name, content in entries]
    gzipped = [nifti_field] * 4 + [inside_gzip(edit) for edit in BYTES] + BYTES
    edits = {file: gzipped if file.endswith(".gz") else BYTES for file in of_file}
    while len(made) < COUNT:
        file = rng.choice(list(of_file))
        edit = rng.choice(edits[file])
        made.append((f"{file}: mutation {len(made)}", file, edit(originals[file], rng)))
    return made


def evaluations(root: Path) -> Iterator[tuple[str, str | None]]:
    """Evaluate the folder once for every mutation: its name and the error, if any; unexpected ones with their type."""
    from nnunet_calib.data.errors import InputError, UsageError
    from nnunet_calib.evaluation import evaluate_folder

    originals = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    labels = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(originals["predicted/case.nii.gz"])).dataobj)
    p = np.load(root / "predicted" / "case.npz")["probabilities"]
    probabilities = [name for name in originals if "probabilities" in name or name.endswith((".npz", ".nncp"))]
    for name, file, content in mutations(originals, labels, p, root / "trap"):
        print(name, file=sys.stderr, flush=True)  # the last one is to blame if the interpreter crashes
        for other in probabilities:  # the mutated one must be the one that is read
            (root / other).unlink(missing_ok=True)
        if file not in probabilities:
            (root / "predicted" / "case.npz").write_bytes(originals["predicted/case.npz"])
        (root / file).write_bytes(content)
        shutil.rmtree(root / "scores", ignore_errors=True)
        failed: list[str] = []
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                evaluate_folder(
                    root / "labelsTs", root / "predicted", root / "scores", processes=1, on_failure=failed.append
                )
        except (InputError, UsageError) as error:
            failed.append(str(error))
        except Exception as error:
            failed.append(f"{type(error).__name__}: {error}")
        (root / file).write_bytes(originals[file])
        assert len(failed) < 2, failed
        yield name, failed[0] if failed else None


if __name__ == "__main__":
    import resource

    import nnunetv2.utilities.label_handling.label_handling  # noqa: F401

    import nnunet_calib.evaluation  # noqa: F401

    imported = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (imported + MEMORY,) * 2)
    for case, outcome in evaluations(Path(sys.argv[1])):
        print(json.dumps([case, outcome]), flush=True)
