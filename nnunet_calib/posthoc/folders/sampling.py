"""A few voxels of each case that stand for all of them.

Voxels are drawn at random within strata, the same number in each: the reference's class by the nearness to a border.
Errors are at borders, and most of a volume is far from any, so the sample is small where there is nothing to learn.
Every voxel drawn has as its weight how many it stands for, so that weighted sums over the sample estimate sums over the
volume without bias, and those over any part of the volume too.

The indices are chosen from the label maps; then one pass over the probabilities, channel by channel, picks them up.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import LabelImage, check_same_geometry, read_labels
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.data.strata import draw
from nnunet_calib.metrics import BOUNDARY_MM, bin_index, near_surface
from nnunet_calib.metrics.surface.boundary import differs_from_neighbour, surface_of_any
from nnunet_calib.posthoc.maps.calibrator import log_probabilities

VOXELS = 10_000
"""Voxels drawn from each case unless said otherwise."""

REGIONS = ("volume", "foreground", "boundary")
"""Parts of a volume: all; reference or prediction foreground; within 3 mm of the reference's surface."""

CONFIDENCE_BINS = 20
_NEAR = 3  # voxels from a border that are the second of three strata
_CONFIDENCES = 20_000  # voxels whose confidences are counted
_PATCH = 24  # voxels along each side of a patch
_MANY = 50_000  # neighbours within reach of a voxel: microscopy, where distances are the faster way
_ROUNDING = 1e-6  # mm; file headers keep the spacing in float32


@dataclass(frozen=True)
class Patches:
    """Equal cubes around sampled voxels near a border, for methods that look at a voxel's surroundings.

    Attributes:
        probabilities: (C, B, z, y, x), as stored.
        target: integer (B, z, y, x), or bool (C, B, z, y, x).
        regions: by name, bool (B, z, y, x): voxels that count; none beyond the edge of the volume.
    """

    probabilities: np.ndarray
    target: np.ndarray
    regions: dict[str, np.ndarray]


@dataclass(frozen=True)
class CaseSample:
    """What a fit sees of a case.

    Attributes:
        files: where it comes from.
        index: int64 (n,), of the voxels in the flat volume.
        probabilities: float (C, n), as stored.
        target: integer (n,), index of the reference's class; region models: bool (C, n).
        weights: float64 (n,), voxels that each stands for; they add up to the voxels that count.
        regions: by name of ``REGIONS``, bool (n,).
        confidences: float64 (``CONFIDENCE_BINS``,), shares of the predicted foreground by confidence; NaN without any.
        patches: where they were asked for.
    """

    files: CaseFiles
    index: np.ndarray
    probabilities: np.ndarray
    target: np.ndarray
    weights: np.ndarray
    regions: dict[str, np.ndarray]
    confidences: np.ndarray
    patches: Patches | None = None

    def log_probabilities(self, *, multilabel: bool) -> np.ndarray:
        """Float64 (C, n), what calibrators take."""
        return log_probabilities(self.probabilities, multilabel=multilabel)


def sample_case(
    files: CaseFiles,
    dataset: Dataset,
    reader: type[BaseReaderWriter],
    *,
    voxels: int = VOXELS,
    seed: int = 0,
    patches: int = 0,
) -> CaseSample:
    """Draw voxels of a case with reference and pick up their probabilities.

    Args:
        files: with probabilities.
        dataset: its labels.
        reader: of the label maps.
        voxels: how many to draw; all of a smaller volume.
        seed: the same seed draws the same voxels of a case of the same name.
        patches: how many cubes to cut out as well.

    Raises:
        InputError: a file that cannot be used, or a case all of whose voxels are ignored.
    """
    ignored = [] if dataset.ignore_label is None else [dataset.ignore_label]
    reference = read_labels(files.reference, reader, [*dataset.labels, *ignored])
    prediction = read_labels(files.prediction, reader, dataset.labels)
    check_same_geometry(reference, prediction)
    stored = open_probabilities(files, dataset, prediction)
    rng = np.random.default_rng([seed, zlib.crc32(files.name.encode())])
    valid = None if dataset.ignore_label is None else reference.labels != dataset.ignore_label
    labels = reference.labels if valid is None else np.where(valid, reference.labels, 0).astype(reference.labels.dtype)
    if valid is not None and not valid.any():
        raise InputError(f"{files.reference}: every voxel has the ignore label; leave the case out")

    stratum = _nearness(labels, prediction.labels)
    near_border = np.flatnonzero((stratum == 0) if valid is None else (stratum == 0) & valid) if patches else None
    stratum += np.uint16(3) * labels
    index, weights = draw(stratum, valid, voxels, rng)
    del stratum
    shown = _predicted_foreground(prediction.labels, rng)
    corners = _corners(near_border if near_border is not None else index[:0], labels.shape, patches, rng)
    cubes = [tuple(slice(start, start + _PATCH) for start in corner) for corner in corners]

    picked = np.empty((stored.shape[0], index.size), dtype=stored.dtype)
    seen = np.empty((stored.shape[0], shown.size), dtype=stored.dtype)
    cut = np.empty((stored.shape[0], len(cubes), _PATCH, _PATCH, _PATCH), dtype=stored.dtype)
    for c, channel in enumerate(stored.channels()):
        flat = channel.reshape(-1)
        picked[c], seen[c] = flat[index], flat[shown]
        for b, cube in enumerate(cubes):
            cut[c, b] = _padded(channel[cube])

    flat_reference, flat_prediction = labels.reshape(-1)[index], prediction.labels.reshape(-1)[index]
    _check_same_decision(stored, picked, flat_prediction, weights, dataset)
    return CaseSample(
        files,
        index,
        picked,
        class_index(flat_reference, dataset),
        weights,
        {
            "volume": np.ones(index.size, dtype=bool),
            "foreground": (flat_reference != 0) | (flat_prediction != 0),
            "boundary": _close_to(labels, np.array(np.unravel_index(index, labels.shape)), reference.spacing),
        },
        confidence_shares(seen, multilabel=dataset.has_regions),
        _patches(cut, cubes, labels, prediction.labels, valid, reference.spacing, dataset) if cubes else None,
    )


def open_probabilities(files: CaseFiles, dataset: Dataset, prediction: LabelImage) -> ProbabilityFile:
    """Open the probabilities of a case and hold them against its prediction.

    Raises:
        InputError: there are none, they are damaged, or they are of another model or image.
    """
    if files.probabilities is None:
        raise InputError(f"{files.prediction}: no probabilities beside it; predict with --save_probabilities")
    stored = ProbabilityFile(files.probabilities, exclusive=not dataset.has_regions)
    stored.check_fits(len(dataset.channels), prediction.labels.shape, prediction.place.affine)
    return stored


def class_index(labels: np.ndarray, dataset: Dataset) -> np.ndarray:
    """What calibrators take as target: the channel of each label; region models: bool (C, ...), membership."""
    table = np.zeros((len(dataset.channels), max(dataset.labels) + 1), dtype=bool)
    for row, channel in zip(table, dataset.channels, strict=True):
        row[np.atleast_1d(channel)] = True
    return table[:, labels] if dataset.has_regions else table.argmax(axis=0)[labels]


def confidence_shares(probabilities: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Shares of voxels by confidence: the largest probability; region models: max(p, 1 - p) of every region.

    Args:
        probabilities: float (C, n).
        multilabel: the channels are sigmoid regions.

    Returns:
        float64 (``CONFIDENCE_BINS``,) of sum 1; NaN without voxels.
    """
    if not probabilities.size:
        return np.full(CONFIDENCE_BINS, np.nan)
    p = probabilities.astype(np.float64)
    confidence = np.maximum(p, 1 - p).reshape(-1) if multilabel else p.max(axis=0)
    counts = np.bincount(bin_index(confidence, CONFIDENCE_BINS), minlength=CONFIDENCE_BINS)
    return counts / counts.sum()


def confidences_of(files: CaseFiles, dataset: Dataset, reader: type[BaseReaderWriter], seed: int = 0) -> np.ndarray:
    """``confidence_shares`` of a case without reference, over its predicted foreground.

    Raises:
        InputError: a file that cannot be used.
    """
    prediction = read_labels(files.prediction, reader, dataset.labels)
    stored = open_probabilities(files, dataset, prediction)
    rng = np.random.default_rng([seed, zlib.crc32(files.name.encode())])
    shown = _predicted_foreground(prediction.labels, rng)
    seen = np.stack([channel.reshape(-1)[shown] for channel in stored.channels()])
    return confidence_shares(seen, multilabel=dataset.has_regions)


def _nearness(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """uint16: 0 at a border of either label map or where they differ, 1 near such a voxel, 2 elsewhere."""
    border = differs_from_neighbour(reference)
    border |= differs_from_neighbour(prediction)
    border |= reference != prediction
    near = border.copy()
    for _ in range(_NEAR):
        grown = near.copy()
        for axis in range(near.ndim):
            view, out = np.moveaxis(near, axis, 0), np.moveaxis(grown, axis, 0)
            out[1:] |= view[:-1]
            out[:-1] |= view[1:]
        near = grown
    stratum = np.full(border.shape, 2, dtype=np.uint16)
    stratum[near] = 1
    stratum[border] = 0
    return stratum


def _close_to(labels: np.ndarray, coordinates: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Which voxels (3, n) lie within ``BOUNDARY_MM`` of a surface: ``near_surface``, for a few voxels.

    Looking around each of them takes a hundredth of the time and memory of distances for a whole CT.
    """
    reach = [int((BOUNDARY_MM + _ROUNDING) / step) for step in spacing]
    if np.prod([2.0 * r + 1 for r in reach]) > _MANY:
        shape = np.array(labels.shape)[:, None]
        inside = ((coordinates >= 0) & (coordinates < shape)).all(axis=0)
        near = near_surface(labels, spacing, BOUNDARY_MM)
        return near[tuple(coordinates.clip(0, shape - 1))] & inside
    offsets = np.indices([2 * r + 1 for r in reach]).reshape(3, -1) - np.array(reach)[:, None]
    distance = np.sqrt(np.square(offsets * np.asarray(spacing)[:, None]).sum(axis=0))
    offsets = offsets[:, distance <= BOUNDARY_MM + _ROUNDING]
    padded = np.pad(surface_of_any(labels), [(r, r + _PATCH) for r in reach])
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    centres, flat = strides @ (coordinates + np.array(reach)[:, None]), padded.reshape(-1)
    close = np.zeros(centres.size, dtype=bool)
    for step in strides @ offsets:
        close |= flat[centres + step]
    return close


def _predicted_foreground(prediction: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of voxels of the predicted foreground, ascending; not all of a large one."""
    inside = np.flatnonzero(prediction)
    return inside if inside.size <= _CONFIDENCES else np.sort(rng.choice(inside, _CONFIDENCES, replace=False))


def _corners(
    centres: np.ndarray, shape: tuple[int, ...], count: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """First voxels of cubes around some of the centres (anywhere without centres), inside the volume if it is large."""
    if not count:
        return []
    chosen = rng.choice(centres if centres.size else int(np.prod(shape)), count)
    starts = np.array(np.unravel_index(chosen, shape)).T - _PATCH // 2
    return [tuple(int(s) for s in start) for start in starts.clip(0, np.maximum(np.array(shape) - _PATCH, 0))]


def _padded(cube: np.ndarray, **how) -> np.ndarray:
    """A cube cut off at the edge of a small volume, filled up."""
    return np.pad(cube, [(0, _PATCH - length) for length in cube.shape], **(how or {"mode": "edge"}))


def _patches(
    cut: np.ndarray,
    cubes: list[tuple[slice, ...]],
    reference: np.ndarray,
    prediction: np.ndarray,
    valid: np.ndarray | None,
    spacing: Sequence[float],
    dataset: Dataset,
) -> Patches:
    target = class_index(np.stack([_padded(reference[cube]) for cube in cubes]), dataset)
    counts = np.stack(
        [
            _padded(np.ones(reference[cube].shape, bool) if valid is None else valid[cube], mode="constant")
            for cube in cubes
        ]
    )
    shown = np.stack([_padded((reference[cube] != 0) | (prediction[cube] != 0)) for cube in cubes])
    offsets = np.indices((_PATCH,) * 3).reshape(3, -1)
    voxels = np.concatenate([offsets + np.array([[side.start] for side in cube]) for cube in cubes], axis=1)
    boundary = _close_to(reference, voxels, spacing).reshape(counts.shape) & counts
    return Patches(cut, target, {"volume": counts, "foreground": shown & counts, "boundary": boundary})


def _check_same_decision(
    stored: ProbabilityFile, picked: np.ndarray, predicted: np.ndarray, weights: np.ndarray, dataset: Dataset
) -> None:
    """Refuse probabilities that decide otherwise than the segmentation beside them in most of its foreground."""
    shown = weights * (predicted != 0)
    different = float(shown @ (decide(picked, dataset) != predicted))
    if different > 0.5 * float(shown.sum()):
        raise InputError(
            f"{stored.path}: its decision differs from the segmentation beside it in most of the foreground; flipped "
            "or reordered axes, or another model's?"
        )


def decide(probabilities: np.ndarray, dataset: Dataset) -> np.ndarray:
    """nnU-Net's label for probabilities (C, ...): of the largest; region models: of the last region above one half."""
    if dataset.region_order is None:
        return np.array(dataset.labels, dtype=np.uint16)[probabilities.argmax(axis=0)]
    decided = np.zeros(probabilities.shape[1:], dtype=np.uint16)
    for label, channel in zip(dataset.region_order, probabilities, strict=True):
        decided[channel > 0.5] = label
    return decided
