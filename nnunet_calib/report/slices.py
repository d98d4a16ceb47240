"""Pictures of a case: its image with contours, how confident the network is, and where it is wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from nnunet_calib.data.cases import files_written, probabilities_of
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import is_named
from nnunet_calib.data.images import check_same_geometry, choose_reader, read_image, read_labels
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.report.runs import Run

SLICES = 3
_LEAST = 240  # pixels across: smaller pictures are enlarged, so that contours stay thin
_MOST = 360
_GREYS = 60  # of the palette; the colours come after them
_MARGIN_MM = 10.0
_REFERENCE, _PREDICTION, _ERROR = (0, 200, 120), (255, 120, 0), (220, 40, 60)


@dataclass(frozen=True)
class CasePictures:
    """Pictures of one case and method.

    Attributes:
        case: its name.
        method: whose prediction.
        slices: index along the first axis, counted from 0.
        pictures: data URLs, one a slice: image with contours, confidence, errors, side by side.
    """

    case: str
    method: str
    slices: list[int]
    pictures: list[str]


def case_pictures(
    run: Run,
    case: str,
    images: Path,
    dataset: Dataset,
    slices: Sequence[int] | None = None,
    *,
    middle: bool = False,
) -> CasePictures:
    """Draw slices of a case, by default those with the most wrong voxels, spread over the structures' extent.

    Args:
        run: that has the case; its files must be where ``summary.json`` says.
        case: its name.
        images: folder with ``<case>_0000`` in the data set's file ending.
        dataset: of the run.
        slices: to draw, index along the first axis.
        middle: whether there is a panel for the confidence where it is not known, hatched.

    Raises:
        InputError: a file is missing or cannot be used.
    """
    record = run.records[case]
    reference_file, prediction_file = (Path(record[key]) for key in ("reference_file", "prediction_file"))
    image_file = images / f"{case}_0000{dataset.file_ending}"
    for file in (reference_file, prediction_file, image_file):
        if not file.is_file():
            raise InputError(f"{file}: not there")
    reader = choose_reader(dataset)
    ignored = [] if dataset.ignore_label is None else [dataset.ignore_label]
    reference = read_labels(reference_file, reader, [*dataset.labels, *ignored])
    prediction = read_labels(prediction_file, reader, dataset.labels)
    check_same_geometry(reference, prediction)
    image = _read_image(image_file, reader)
    if image.shape != reference.labels.shape:
        raise InputError(f"{image_file}: shape {image.shape} differs from {reference.labels.shape} of its reference")
    confidence = _confidence(run, case, dataset, reference.labels.shape)
    valid = reference.labels != dataset.ignore_label
    wrong = (reference.labels != prediction.labels) & valid
    found = (reference.labels != 0) | (prediction.labels != 0)
    chosen = _choose(wrong, found) if slices is None else slices
    window = _window(found, reference.spacing)
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    pictures = []
    for z in chosen:
        grey_z, reference_z, prediction_z, wrong_z = (
            volume[z][window] for volume in (grey, reference.labels, prediction.labels, wrong)
        )
        shown = None if confidence is None else confidence[z][window]
        pictures.append(_picture(grey_z, reference_z, prediction_z, wrong_z, shown, reference.spacing, middle))
    return CasePictures(case, run.name, [int(z) for z in chosen], pictures)


def _read_image(path: Path, reader: Any) -> np.ndarray:
    volume, _ = read_image([path], reader, any_reader=True)
    return np.asarray(volume[0], dtype=np.float32)


def _confidence(run: Run, case: str, dataset: Dataset, shape: tuple[int, ...]) -> np.ndarray | None:
    """Of the top label, or the least sure region; None without a file of the probabilities that were scored."""
    file = scored_probabilities(run, case)
    if file is None:
        return None
    stored = ProbabilityFile(file, exclusive=not dataset.has_regions)
    stored.check_fits(len(dataset.channels), shape, None)
    confidence = np.full(shape, np.inf if dataset.has_regions else 0.0, dtype=np.float32)
    for channel in stored.channels():
        if dataset.has_regions:
            np.minimum(confidence, np.maximum(channel, 1 - channel), out=confidence)
        else:
            np.maximum(confidence, channel, out=confidence)
    return confidence


def scored_probabilities(run: Run, case: str) -> Path | None:
    """The file of the probabilities that a run scored of a case; None where there is none."""
    record = run.records[case]
    if run.protocol.get("probabilities") == "in memory":  # scored before they were written, if they were
        folder = Path(record["prediction_file"]).parent
        file = probabilities_of(folder, case)
        return file if file in files_written(folder, case) else None
    if run.protocol.get("calibrator"):  # the file holds what was calibrated while it was scored
        return None
    file = record.get("probabilities_file")
    return Path(file) if file and is_named(Path(file)) else None


def _choose(wrong: np.ndarray, found: np.ndarray) -> list[int]:
    """In each third of the structures' extent, the slice with most wrong voxels."""
    where = np.flatnonzero(found.any(axis=(1, 2)))
    if not where.size:
        return [wrong.shape[0] // 2]
    errors = wrong.sum(axis=(1, 2))
    thirds = np.array_split(np.arange(where[0], where[-1] + 1), min(SLICES, where[-1] - where[0] + 1))
    return [int(third[errors[third].argmax()]) for third in thirds]


def _window(found: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice]:
    """The rows and columns around all structures."""
    slices = []
    for axis, step in ((1, spacing[1]), (2, spacing[2])):
        where = np.flatnonzero(found.any(axis=tuple({0, 1, 2} - {axis})))
        margin = int(np.ceil(_MARGIN_MM / step))
        whole = found.shape[axis]
        slices.append(
            slice(max(where[0] - margin, 0), min(where[-1] + margin + 1, whole)) if where.size else slice(0, whole)
        )
    return slices[0], slices[1]


def _picture(
    grey: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    wrong: np.ndarray,
    confidence: np.ndarray | None,
    spacing: Sequence[float],
    middle: bool,
) -> str:
    """Panels of one slice as a PNG's data URL, with square millimetres; an unknown confidence is hatched."""
    size = np.array(grey.shape) * np.array(spacing[1:])
    scale = np.clip(max(grey.shape), _LEAST, _MOST) / size.max()
    rows, columns = (np.maximum(size * scale, 1)).astype(int)

    def enlarged(part: np.ndarray, order: int) -> np.ndarray:
        zoom = (rows / part.shape[0], columns / part.shape[1])
        return ndimage.zoom(part.astype(np.float32), zoom, order=order, grid_mode=True, mode="nearest")

    base = (enlarged(grey, 1).clip(0, 1) * (_GREYS - 1)).astype(np.uint8)
    contours = base.copy()
    for labels, colour, dashed in ((reference, _GREYS, False), (prediction, _GREYS + 1, True)):
        edge = _contour(enlarged(labels, 0))
        if dashed:  # told from the other without colour
            row, column = np.indices(edge.shape)
            edge &= (row + column) % 10 < 6
        contours[edge] = colour
    errors = (base * 0.6).astype(np.uint8)
    errors[enlarged(wrong, 0) > 0.5] = _GREYS + 2
    panels = [contours, errors]
    if confidence is not None:
        doubt = 2 * (1 - enlarged(confidence, 1).clip(0.5, 1))
        panels.insert(1, ((1 - doubt) * (_GREYS - 1)).astype(np.uint8))
    elif middle:
        row, column = np.indices(base.shape)
        panels.insert(1, np.where((row + column) % 16 < 3, _GREYS // 2, _GREYS * 3 // 4).astype(np.uint8))
    gap = np.full((len(base), 4), _GREYS - 1, dtype=np.uint8)
    strip = Image.fromarray(np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1))
    greys = np.repeat(np.linspace(0, 255, _GREYS).astype(np.uint8), 3)
    strip.putpalette([*greys.tolist(), *_REFERENCE, *_PREDICTION, *_ERROR])
    stream = io.BytesIO()
    strip.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _contour(labels: np.ndarray) -> np.ndarray:
    """Pixels of a structure beside one of another label."""
    padded = np.pad(labels, 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = (centre != 0) & np.logical_or.reduce([neighbour != centre for neighbour in neighbours])
    return ndimage.binary_dilation(edge, np.ones((2, 2)))  # two pixels wide
