"""A few voxels of each case that stand for all of them.

Voxels are drawn at random within strata, the same number in each: the reference's class by the nearness to a border.
Errors are at borders, and most of a volume is far from any, so the sample is small where there is nothing to learn.
Every voxel drawn has as its weight how many it stands for, so that weighted sums over the sample estimate sums over the
volume without bias, and those over any part of the volume too.

The indices are chosen from the label maps; then one pass over the probabilities, channel by channel, picks them up.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from numpy.typing import DTypeLike

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import LabelImage, check_same_geometry, read_labels
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.data.strata import draw
from nnunet_calib.metrics import BOUNDARY_MM, bin_index, near_surface
from nnunet_calib.metrics.surface.boundary import differs_from_neighbour
from nnunet_calib.posthoc.maps.calibrator import log_probabilities

VOXELS = 10_000
"""Voxels drawn from each case unless said otherwise."""

REGIONS = ("volume", "foreground", "boundary")
"""Parts of a volume: all; reference or prediction foreground; within 3 mm of the reference's surface."""

CONFIDENCE_BINS = 20
_NEAR = 3  # voxels from a border that are the second of three strata
_CONFIDENCES = 20_000  # voxels whose confidences are counted
_PATCH = 24  # voxels along each side of a patch


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
    sampler = Sampler(
        files, dataset, reference, prediction, voxels=voxels, seed=seed, patches=patches, dtype=stored.dtype
    )
    sampler.take(slice(None), stored.channels())
    sample = sampler.sample()
    predicted = prediction.labels.reshape(-1)[sample.index]
    _check_same_decision(stored, sample.probabilities, predicted, sample.weights, dataset)
    return sample


class Sampler:
    """Draws voxels of a case, and picks up their probabilities as these come along.

    Args:
        files: of the case.
        dataset: its labels.
        reference: with ignored voxels, where there are any.
        prediction: on the same grid.
        voxels: how many to draw; all of a smaller volume.
        seed: the same seed draws the same voxels of a case of the same name.
        patches: how many cubes to cut out as well; the probabilities must come as a whole then.
        axes: of the label maps, in the order in which the probabilities have them.
        dtype: of the probabilities.

    Raises:
        InputError: all voxels are ignored.
    """

    def __init__(
        self,
        files: CaseFiles,
        dataset: Dataset,
        reference: LabelImage,
        prediction: LabelImage,
        *,
        voxels: int = VOXELS,
        seed: int = 0,
        patches: int = 0,
        axes: Sequence[int] = (0, 1, 2),
        dtype: DTypeLike = np.float32,
    ):
        self._files, self._dataset, self._prediction, self._spacing = files, dataset, prediction, reference.spacing
        rng = np.random.default_rng([seed, zlib.crc32(files.name.encode())])
        known = reference.labels
        self._valid = valid = None if dataset.ignore_label is None else known != dataset.ignore_label
        self._labels = labels = known if valid is None else np.where(valid, known, 0).astype(known.dtype)
        if valid is not None and not valid.any():
            raise InputError(f"{files.reference}: every voxel has the ignore label; leave the case out")

        stratum = _nearness(labels, prediction.labels)
        border = np.flatnonzero((stratum == 0) if valid is None else (stratum == 0) & valid) if patches else None
        stratum += np.uint16(3) * labels
        self._index, self._weights = draw(stratum, valid, voxels, rng)
        del stratum
        shown = _predicted_foreground(prediction.labels, rng)
        corners = _corners(border if border is not None else self._index[:0], labels.shape, patches, rng)
        self._cubes = [tuple(slice(start, start + _PATCH) for start in corner) for corner in corners]
        self._shape = tuple(labels.shape[axis] for axis in axes)
        self._places = [_reordered(index, labels.shape, axes) for index in (self._index, shown)]
        channels = len(dataset.channels)
        self._picked, self._seen = (np.empty((channels, order.size), dtype) for _, order in self._places)
        self._cut = np.empty((channels, len(self._cubes), _PATCH, _PATCH, _PATCH), dtype)

    def take(self, planes: slice, channels: Iterable[np.ndarray]) -> None:
        """Pick up what is wanted of some planes.

        Args:
            planes: along the first axis of the probabilities.
            channels: float (C, n, y, x), or one (n, y, x) after the other.
        """
        start, stop, _ = planes.indices(self._shape[0])
        size = int(np.prod(self._shape[1:]))
        ranges = [slice(*np.searchsorted(place, (start * size, stop * size))) for place, _ in self._places]
        inside = [(place[r] - start * size, order[r]) for r, (place, order) in zip(ranges, self._places, strict=True)]
        for c, channel in enumerate(channels):
            flat = channel.reshape(-1)
            for out, (place, order) in zip((self._picked, self._seen), inside, strict=True):
                out[c, order] = flat[place]
            for b, cube in enumerate(self._cubes):
                self._cut[c, b] = _padded(channel[cube])

    def sample(self) -> CaseSample:
        """What was picked up; all planes have been there."""
        dataset, index, labels, predicted = self._dataset, self._index, self._labels, self._prediction.labels
        near = near_surface(labels, self._spacing, BOUNDARY_MM)
        flat_reference, flat_prediction = labels.reshape(-1)[index], predicted.reshape(-1)[index]
        cubes = (self._cut, self._cubes, labels, predicted, self._valid, near, dataset)
        return CaseSample(
            self._files,
            index,
            self._picked,
            class_index(flat_reference, dataset),
            self._weights,
            {
                "volume": np.ones(index.size, dtype=bool),
                "foreground": (flat_reference != 0) | (flat_prediction != 0),
                "boundary": near.reshape(-1)[index],
            },
            confidence_shares(self._seen, multilabel=dataset.has_regions),
            _patches(*cubes) if self._cubes else None,
        )


def _reordered(index: np.ndarray, shape: tuple[int, ...], axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices after a transposition, ascending, and which of the given ones they are."""
    coordinates = np.unravel_index(index, shape)
    places = np.ravel_multi_index([coordinates[axis] for axis in axes], [shape[axis] for axis in axes])
    order = np.argsort(places)
    return places[order], order


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
    near: np.ndarray,
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
    boundary = np.stack([_padded(near[cube]) for cube in cubes])
    return Patches(cut, target, {"volume": counts, "foreground": shown & counts, "boundary": boundary & counts})


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
