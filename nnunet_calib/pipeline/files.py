"""Files of one predicted case, each written whole or not at all."""

import gzip
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_calib.data import nifti
from nnunet_calib.data.files import whole_file
from nnunet_calib.data.images import place_as_read
from nnunet_calib.data.probabilities import write_compact, write_compact_slabs, write_npz
from nnunet_calib.prediction import Grid, Part

FORMATS = ("none", "compact", "npz", "nifti")
_SLAB = 1 << 22  # values of a slab of the compact format, about; at least one plane


def write_label_map(labels: np.ndarray, path: Path, reader: type[BaseReaderWriter], properties: dict[str, Any]) -> None:
    """Write a label map (z, y, x) in the order of the file, as nnU-Net does."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = os.path.join(folder, path.name)  # writers go by the ending
        reader().write_seg(labels, temporary, properties)
        os.replace(temporary, path)


def write_volume(path: Path, volume: np.ndarray, properties: Mapping[str, Any], slope: float | None = None) -> None:
    """Write (z, y, x), or (C, z, y, x), as ``.nii.gz`` where the image lies; ``slope`` of integers."""
    place = place_as_read(properties)
    affine = np.diag([*place.spacing[::-1], 1.0]) if place.affine is None else place.affine
    image = nibabel.Nifti1Image(volume.T, affine)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    if place.unit != nifti.UNKNOWN:
        image.header.set_xyzt_units(place.unit)
    with whole_file(path) as stream, gzip.GzipFile("", "wb", 1, stream, mtime=0) as packed:
        packed.write(image.to_bytes())


def write_probabilities(
    folder: Path, name: str, kind: str, parts: Iterable[Part], grid: Grid, properties: Mapping[str, Any]
) -> list[Path]:
    """Write a case's probabilities on the image's grid.

    Args:
        folder: ``<name>.nncp``, or ``<name>.npz`` with ``<name>.pkl``, or ``probabilities/<name>.nii.gz``.
        name: of the case.
        kind: "compact" (float32), "npz" (as nnU-Net's) or "nifti" (uint8, scaled: a step is 1/255).
        parts: all of the case.
        grid: of the case.
        properties: what nnU-Net's preprocessor says of the case.

    Returns:
        The files. All formats but the compact one, and that too where the plans reorder axes, need the whole in memory.
    """
    shape = (grid.channels, *(grid.shape[axis] for axis in grid.to_image))
    if kind == "compact":
        path = folder / f"{name}.nncp"
        if grid.to_image == (0, 1, 2):
            write_compact_slabs(path, _regrouped(parts, grid), shape, np.float32)
        else:
            write_compact(path, _whole(parts, grid, np.float32), shape, np.float32)
        return [path]
    if kind == "npz":
        path, about = folder / f"{name}.npz", folder / f"{name}.pkl"
        write_npz(path, _whole(parts, grid, np.float32), shape, np.float32)
        with whole_file(about) as stream:
            pickle.dump(properties, stream)
        return [path, about]
    path = folder / "probabilities" / f"{name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    write_volume(path, _whole(parts, grid, np.uint8), properties, slope=1 / 255)
    return [path]


def _whole(parts: Iterable[Part], grid: Grid, dtype: Any) -> np.ndarray:
    """All probabilities (C, z, y, x) in the order of the file; of uint8, in steps of 1/255."""
    whole = np.empty((grid.channels, *grid.shape), dtype=dtype)
    for part in parts:
        values = part.probabilities
        whole[:, part.planes] = np.rint(values * 255) if dtype == np.uint8 else values
    return whole.transpose(0, *(axis + 1 for axis in grid.to_image))


def _regrouped(parts: Iterable[Part], grid: Grid) -> Iterator[np.ndarray]:
    """Slabs (C, n, y, x) of one thickness but for the last, from parts of any."""
    size, (depth, *plane) = grid.channels * int(np.prod(grid.shape[1:])), grid.shape
    thickness = min(depth, max(1, _SLAB // size))
    memory = np.empty((0,), dtype=np.float32)
    filled = 0
    for part in parts:
        values = part.probabilities
        while values.shape[1]:
            if not filled and values.shape[1] >= thickness:
                yield values[:, :thickness]
                values = values[:, thickness:]
                continue
            if not memory.size:  # most cases come in slabs of this thickness
                memory = np.empty((grid.channels, thickness, *plane), dtype=np.float32)
            taken = min(thickness - filled, values.shape[1])
            memory[:, filled : filled + taken] = values[:, :taken]
            values, filled = values[:, taken:], filled + taken
            if filled == thickness:
                yield memory
                filled = 0
    if filled:
        yield memory[:, :filled]
