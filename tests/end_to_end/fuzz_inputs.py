"""Mutated inputs of all kinds, and a process of its own that uses them: see ``test_fuzz.py``.

    python fuzz_inputs.py FOLDER COUNT

Writes one line of JSON an input: its name, which holds its seed, and either the error it ended in or None for a result.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile

SEED = 20261120
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


@dataclass(frozen=True)
class Input:
    """One mutated file.

    Attributes:
        name: with the seed of the edit.
        file: that it takes the place of, relative to the folder of the fuzz.
        content: of it.
        kind: key of ``USES``.
        vouched: the file has a checksum of its voxels and was edited as a file: other voxels must be noticed.
    """

    name: str
    file: str
    content: bytes
    kind: str
    vouched: bool = False


FORMATS: dict[str, bool] = {"packed.mha": True, "plain.mha": False, "packed.nrrd": True, "plain.nrrd": False,
                            "plain.gipl": False, "packed.tif": True, "plain.tif": False}  # fmt: skip
"""Of label maps and images besides ``.nii.gz``, and whether they have a checksum of the voxels."""


def ending_of(kind: str) -> str:
    return ".nii.gz" if kind == "nifti" else Path(kind).suffix


def write(path: Path, array: np.ndarray, packed: bool) -> None:
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, compression="zlib" if packed else None, photometric="minisblack")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path), packed)


def prepare(root: Path) -> None:
    """A folder of references and predictions, and an image, of every format, beside the one of NIfTI."""
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(root / "nifti" / "predicted" / "case.nii.gz")))
    image = np.random.default_rng(SEED).normal(size=labels.shape).astype(np.float32)
    for kind, packed in ({"nifti": True} | FORMATS).items():
        folder, ending = root / kind, ending_of(kind)
        for name in ("labelsTs", "predicted", "images"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / "images" / f"case_0000{ending}", image, packed)
        if kind != "nifti":
            for name in ("labelsTs", "predicted"):
                write(folder / name / f"case{ending}", labels, packed)
            content = json.loads((root / "nifti" / "predicted" / "dataset.json").read_text())
            (folder / "predicted" / "dataset.json").write_text(json.dumps(content | {"file_ending": ending}))


def special_plans() -> list[tuple[str, bytes]]:
    return [(f"text {text[:9]!r}", text) for text in (b"[" * 99_999, b"", b"[]", b'{"label_manager": {}}')]


def special_calibrators(content: dict) -> list[tuple[str, bytes]]:
    values = (None, True, -1, 0, 3.5, 1e9, 10**9, 10**30, float("nan"), "3", [], {}, [[]], [1], [1e300] * 3)
    edited = [(f"{name} {value!r:.12}", content | {name: value}) for name in content for value in values]
    return [(name, json.dumps(entry).encode()) for name, entry in edited]


def special_tasks(content: bytes) -> list[tuple[str, bytes]]:
    """Task files whose JSON says something else."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    (key,) = header["__metadata__"]
    task = json.loads(header["__metadata__"][key])

    def of(**change) -> bytes:
        return whole(structures=[task["structures"][0] | change])

    def whole(**change) -> bytes:
        changed = header | {"__metadata__": {key: json.dumps(task | change)}}
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    settings = [{"chunks": 12.5}, {"chunks": 10**9}, {"head": "os.system"}, {"extent": "../x"}, {"margin": -5}]
    return [
        *((f"name {name!r:.20}", of(name=name)) for name in ("../x", "/tmp/x", "a/b", "", "..", ".", "x" * 5000, 5)),
        *((f"orientation {value!r:.20}", whole(orientation=value)) for value in ("XYZ", "LP", None, "LLL")),
        *((f"inside {value!r:.20}", of(inside=value)) for value in ([-1], [1e9], "1", [None])),
        *((f"limit {value!r:.20}", of(presence_limit=value)) for value in (float("nan"), "1", None, 1e999)),
        *((f"settings {change}", of(settings=task["structures"][0]["settings"] | change)) for change in settings),
        *((f"{name} gone", whole(**{name: None})) for name in task),
        *((f"{name} of a structure gone", of(**{name: None})) for name in task["structures"][0]),
        *((f"volumes {value!r:.20}", of(volumes=value)) for value in ([0], [-1], "1", [10**9])),
        *((f"structures {value!r:.20}", whole(structures=value)) for value in ([], {}, "1", task["structures"] * 2)),
        ("huge tensor", content[:8] + content[8:].replace(b'"shape":[', b'"shape":[99999999', 1)),
        ("header of 2^60", struct.pack("<Q", 1 << 60) + content[8:]),
    ]


def inputs(root: Path, count: int) -> list[Input]:
    """``count`` of them, the same every time; what was made by hand first, then edits, each with a seed of its own."""
    originals = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.*") if file.is_file()}
    labels = np.asarray(
        nibabel.Nifti1Image.from_bytes(gzip.decompress(originals["nifti/predicted/case.nii.gz"])).dataobj
    )
    p = np.load(root / "nifti" / "predicted" / "case.npz")["probabilities"]
    by_hand = {
        "nifti/predicted/case.npz": special_npz(p, root / "trap"),
        "nifti/predicted/case.nii.gz": special_labels(labels),
        "nifti/labelsTs/case.nii.gz": special_labels(labels)[:6],
        "nifti/predicted/dataset.json": special_json(json.loads(originals["nifti/predicted/dataset.json"])),
        "nifti/predicted/plans.json": special_plans(),
        "nifti/predicted/case.nncp": special_compact(originals["nifti/predicted/case.nncp"]),
        "nifti/predicted/case_probabilities.nii.gz": [
            ("NaN", nifti_of(np.full((12, 14, 6, 3), np.nan, dtype=np.float32))),
            ("int", nifti_of(np.ones((12, 14, 6, 3), dtype=np.int16))),
            ("3D", nifti_of(np.ones((12, 14, 6), dtype=np.float32))),
        ],
        "calibrator.json": special_calibrators(json.loads(originals["calibrator.json"])),
        "ball.fewshot": special_tasks(originals["ball.fewshot"]),
    }  # fmt: skip
    kinds = dict.fromkeys(by_hand, "evaluation") | {"calibrator.json": "calibrator", "ball.fewshot": "task"}
    made = [
        Input(f"{file}: {name}", file, content, kinds[file])
        for file, entries in by_hand.items()
        for name, content in entries
    ]
    checked = {"nifti/images/case_0000.nii.gz", "nifti/predicted/case.nii.gz", "nifti/labelsTs/case.nii.gz"}
    kinds["nifti/images/case_0000.nii.gz"] = "image"
    for kind, packed in FORMATS.items():
        ending = ending_of(kind)
        of_kind = {f"{kind}/{name}/case{ending}": "evaluation" for name in ("labelsTs", "predicted")}
        kinds |= of_kind | {f"{kind}/images/case_0000{ending}": "image"}
        checked |= {file for file in kinds if file.startswith(f"{kind}/") and packed}
    order = random.Random(SEED).sample(list(kinds), len(kinds))
    for number in range(len(made), count):
        file, seed = order[number % len(order)], f"{SEED}-{number}"
        rng = random.Random(seed)
        inside = [nifti_field] * 4 + [inside_gzip(edit) for edit in BYTES] if file.endswith(".gz") else []
        edit = rng.choice([*inside, *BYTES, *BYTES] if "images" in file else [*inside, *BYTES])
        content = edit(originals[file], rng)
        whole_stream = edit in BYTES
        made.append(Input(f"{file}: seed {seed}", file, content, kinds[file], whole_stream and file in checked))
    return made[:count]


def evaluate(root: Path, file: str) -> None:
    from nnunet_calib.evaluation import evaluate_folder

    folder = root / file.partition("/")[0]
    failed: list[str] = []
    evaluate_folder(folder / "labelsTs", folder / "predicted", root / "scores", processes=1, on_failure=failed.append)
    assert len(failed) < 2, failed
    if failed:
        raise Failed(failed[0])


def read_an_image(root: Path, file: str) -> None:
    from nnunet_calib.data.images import place_of, read_image

    image, properties = read_image([root / file], reader_of(file))
    place_of(root / file, properties)
    assert np.isfinite(image).all() or file.endswith((".gipl", ".mha", ".nrrd", ".tif", ".gz"))


def load_a_calibrator(root: Path, file: str) -> None:
    from nnunet_calib.posthoc import load_calibrator

    calibrator = load_calibrator(root / file)
    p = calibrator.apply(np.zeros((calibrator.channels, 5)))
    assert np.isfinite(p).all(), "a calibrator that gives numbers that are none"


def load_a_task(root: Path, file: str) -> None:
    from nnunet_calib.fewshot.task.file import read_tasks

    task = read_tasks(root / file)[0]
    assert (root / "out" / task.name).resolve().parent == (root / "out").resolve(), "a task that leaves its folder"


USES = {"evaluation": evaluate, "image": read_an_image, "calibrator": load_a_calibrator, "task": load_a_task}


class Failed(Exception):
    """A case that was reported and left out."""


def reader_of(file: str) -> Any:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    return Tiff3DIO if file.endswith(".tif") else SimpleITKIO


def voxels_of(path: Path) -> np.ndarray:
    """What nnU-Net's reader makes of a file, damaged or not."""
    return reader_of(path.name)().read_images([str(path)])[0]


def outcomes(root: Path, count: int) -> Iterator[tuple[str, str | None]]:
    """Use every input once: its name and the error, if any; unexpected ones with their type."""
    from nnunet_calib.data.errors import InputError, UsageError

    before = {file: (root / file).read_bytes() for file in sorted(_files(root))}
    probabilities = [
        f for f in before if f.startswith("nifti/predicted/") and ("probabilities" in f or f[-4:] in (".npz", "nncp"))
    ]
    true = {file: voxels_of(root / file) for file in before if "/case" in file and file not in probabilities}
    for one in inputs(root, count):
        print(one.name, file=sys.stderr, flush=True)  # the last one is to blame if the interpreter crashes
        for other in probabilities:  # the mutated one must be the one that is read
            (root / other).unlink(missing_ok=True)
        if one.file not in probabilities:
            (root / "nifti/predicted/case.npz").write_bytes(before["nifti/predicted/case.npz"])
        (root / one.file).write_bytes(one.content)
        shutil.rmtree(root / "scores", ignore_errors=True)
        there, error = _files(root), None
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                USES[one.kind](root, one.file)
        except (Failed, InputError, UsageError) as failure:
            error = str(failure)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        if error is None and one.vouched and not np.array_equal(voxels_of(root / one.file), true[one.file]):
            error = "TrustedError: other voxels were taken for whole"
        if more := {file for file in _files(root) - there if not file.startswith("scores/")}:
            error = f"WrittenError: {more}"
        (root / one.file).write_bytes(before[one.file])
        yield one.name, error


def _files(root: Path) -> set[str]:
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


if __name__ == "__main__":
    import resource

    import nnunetv2.utilities.label_handling.label_handling  # noqa: F401

    import nnunet_calib.evaluation
    import nnunet_calib.fewshot.task.file
    import nnunet_calib.posthoc  # noqa: F401

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    prepare(Path(sys.argv[1]))
    imported = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (imported + MEMORY,) * 2)
    for case, outcome in outcomes(Path(sys.argv[1]), int(sys.argv[2])):
        print(json.dumps([case, outcome]), flush=True)
