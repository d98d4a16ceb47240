"""Scores of one case: overlap, surface distances and calibration, from its files."""

import itertools
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_calib import metrics
from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import LabelImage, check_same_geometry, read_labels
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.evaluation.nacl import nacl_scores
from nnunet_calib.evaluation.protocol import Protocol

_SUSPICIOUS = 0.1  # share of the foreground; fewer differences are post-processing, not another axis order
_SLICES = 16
_TAILS = "float16 probabilities: those below 6e-8 are 0; NLL counts them as 2^-24"


@dataclass(frozen=True)
class CaseResult:
    """What one case contributes to a summary.

    Attributes:
        record: its entry in ``metric_per_case``.
        statistics: by region, what its calibration numbers were computed from; empty without probabilities.
    """

    record: dict[str, Any]
    statistics: dict[str, metrics.CalibrationStatistics]


class Calibration(typing.Protocol):
    """What calibrates the probabilities of a file before they are scored. Workers are sent it: it is picklable."""

    def __call__(self, stored: ProbabilityFile) -> Iterator[np.ndarray]:
        """Calibrated channels (z, y, x), in the type of the file."""

    def describe(self) -> dict[str, str]:
        """What tells it from others."""


def evaluate_case(
    files: CaseFiles,
    dataset: Dataset,
    reader: type[BaseReaderWriter],
    protocol: Protocol,
    calibration: Calibration | None = None,
) -> CaseResult:
    """Score one case; of calibrated probabilities, if so asked, and always the segmentation there is.

    Raises:
        InputError: a file that cannot be used; one line, naming it.
    """
    reference = read_reference(files.reference, dataset, reader)
    prediction = read_labels(files.prediction, reader, dataset.labels)
    check_same_geometry(reference, prediction)
    if files.probabilities is None:
        return score(files, dataset, reference, prediction, protocol)
    stored = ProbabilityFile(files.probabilities, exclusive=not dataset.has_regions)
    stored.check_fits(len(dataset.channels), prediction.labels.shape, prediction.place.affine)
    passes = _passes(stored, calibration, 2 if protocol.nacl else 1)
    parts = _slabs(stored) if stored.in_slabs and calibration is None else [(slice(None), passes[0])]

    def notes(decided: np.ndarray) -> list[str]:
        return _notes(decided, prediction.labels, stored, calibration is not None)

    return score(files, dataset, reference, prediction, protocol, parts, notes, passes[1] if protocol.nacl else None)


def read_reference(path: Path, dataset: Dataset, reader: type[BaseReaderWriter]) -> LabelImage:
    """A label map that may hold the ignore label.

    Raises:
        InputError: as ``read_labels``.
    """
    ignored = [] if dataset.ignore_label is None else [dataset.ignore_label]
    return read_labels(path, reader, [*dataset.labels, *ignored])


def score(
    files: CaseFiles,
    dataset: Dataset,
    reference: LabelImage,
    prediction: LabelImage,
    protocol: Protocol,
    parts: Iterable[tuple[slice, Iterable[np.ndarray]]] = (),
    notes: Callable[[np.ndarray], list[str]] | None = None,
    channels: Iterator[np.ndarray] | None = None,
) -> CaseResult:
    """Score one case that is in memory, from wherever its probabilities come.

    Args:
        files: named in the record.
        dataset: labels.
        reference: with ignored voxels, where there are any.
        prediction: on the same grid; the axes of both may be in any order that is the same.
        protocol: the options.
        parts: slices of the first axis and their channels, float (C, n, y, x) or one (n, y, x) after the other; each
            is used before the next is asked for. Empty: no probabilities.
        notes: of the segmentation that the probabilities decide for, what a reader should know.
        channels: the probabilities once more, for the protocol of NACL.

    Raises:
        InputError: axes that are not at right angles, and a protocol that needs them.
    """
    if reference.place.oblique is not None and (protocol.surface != "voxel" or protocol.dilate or protocol.boundary):
        raise InputError(
            f"{reference.path}: its axes are not at right angles, which areas of surfaces, --dilate and --boundary "
            "need; leave them out, or resample it and its prediction onto a grid whose axes are"
        )
    valid = None if dataset.ignore_label is None else reference.labels != dataset.ignore_label
    statistics: dict[str, metrics.CalibrationStatistics] = {}
    said: list[str] = []
    if parts:
        decided = np.zeros(reference.labels.shape, np.min_scalar_type(max(dataset.labels))) if notes else None
        statistics = _statistics(parts, dataset, reference, prediction, valid, protocol, decided)
        if decided is not None and valid is not None:  # what is ignored is not counted everywhere
            np.copyto(decided, prediction.labels, where=~valid, casting="unsafe")
        said = notes(decided) if notes and decided is not None else []
    channel_keys = [key(channel) for channel in dataset.channels]
    record = {
        "case": files.name,
        "reference_file": str(files.reference),
        "prediction_file": str(files.prediction),
        "probabilities_file": None if files.probabilities is None else str(files.probabilities),
        "metrics": _segmentation_scores(dataset, reference, prediction, valid, protocol),
        "calibration": {region: metrics.scores(counted, channel_keys) for region, counted in statistics.items()},
        "notes": said,
    }
    if protocol.nacl:
        record["nacl"] = nacl_scores(
            _without_ignored(reference.labels, valid),
            _without_ignored(prediction.labels, valid),
            dataset,
            channels,
        )
    return CaseResult(record, statistics)


def _segmentation_scores(
    dataset: Dataset, reference: LabelImage, prediction: LabelImage, valid: np.ndarray | None, protocol: Protocol
) -> dict[str, dict[str, float]]:
    """Overlap and distances of every structure, by key."""
    overlaps = metrics.overlaps(reference.labels, prediction.labels, dataset.structures, valid)
    ours, theirs = _without_ignored(prediction.labels, valid), _without_ignored(reference.labels, valid)
    measured = metrics.structure_distances(
        theirs,
        ours,
        dataset.structures,
        reference.spacing,
        surface=protocol.surface,
        backend=_backend(protocol),
        device=protocol.device,
        axes=reference.place.oblique,
    )
    # Formats without geometry have no volumes. Where a file has two axes, nnU-Net's third spacing is a placeholder:
    # an area is no volume.
    in_space = len(reference.place.geometry.get("origin", ())) == 3
    mm3 = reference.place.voxel if in_space else float("nan")
    rule = protocol.percentile_rule
    scored = {}
    for structure, overlap, distances in zip(dataset.structures, overlaps, measured, strict=True):
        scored[key(structure)] = {
            "Dice": overlap.dice,
            "IoU": overlap.iou,
            "TP": overlap.true_positives,
            "FP": overlap.false_positives,
            "FN": overlap.false_negatives,
            "TN": overlap.true_negatives,
            "n_pred": overlap.in_prediction,
            "n_ref": overlap.in_reference,
            "volume_pred_mm3": overlap.in_prediction * mm3,
            "volume_ref_mm3": overlap.in_reference * mm3,
            "RVE": overlap.relative_volume_error,
            "HD": metrics.hausdorff(distances),
            "HD95": metrics.hausdorff_95(distances, rule),
            **{f"HD{q:.15g}": metrics.hausdorff(distances, q, rule) for q in protocol.further_percentiles},
            "ASSD": metrics.average_surface_distance(distances),
            "MASD": metrics.mean_average_surface_distance(distances),
            "NSD": metrics.surface_dice(
                distances, protocol.structure_tolerances.get(key(structure), protocol.nsd_tolerance)
            ),
            **{f"NSD@{mm:.15g}mm": metrics.surface_dice(distances, mm) for mm in protocol.further_tolerances},
        }
    return scored


def _backend(protocol: Protocol) -> str:
    return "auto" if protocol.device == "cpu" else "torch"


def _passes(stored: ProbabilityFile, calibration: Calibration | None, number: int) -> Sequence[Iterator[np.ndarray]]:
    """The channels, so many times over: read anew each time, but calibrated only once."""
    if calibration is None:
        return [stored.channels() for _ in range(number)]
    return itertools.tee(calibration(stored), number)


def _slabs(stored: ProbabilityFile) -> Iterator[tuple[slice, np.ndarray]]:
    """Some slices after the others, and all channels of them: what was read is counted before it leaves the cache."""
    z = 0
    for slab in stored.slabs():
        yield slice(z, z + slab.shape[1]), slab
        z += slab.shape[1]


def _statistics(
    parts: Iterable[tuple[slice, Iterable[np.ndarray]]],
    dataset: Dataset,
    reference: LabelImage,
    prediction: LabelImage,
    valid: np.ndarray | None,
    protocol: Protocol,
    decided: np.ndarray | None,
) -> dict[str, metrics.CalibrationStatistics]:
    """Calibration statistics by region.

    ``parts`` are slices of the volume and their channels; ``decided`` takes the segmentation that these decide for.
    """
    labels = _without_ignored(reference.labels, valid)
    regions = _Regions(labels, prediction, valid, protocol)
    label_of = None if dataset.labels == tuple(range(len(dataset.labels))) else np.array(dataset.labels)
    total: dict[str, metrics.CalibrationStatistics] = {}
    for z, channels in parts:
        if decided is not None and dataset.region_order is not None:
            channels = _deciding(channels, dataset.region_order, decided[z])
        statistics, top = metrics.calibration_statistics(
            channels,
            labels[z],
            dataset.channels,
            regions.of(z),
            bins=protocol.bins,
            threshold=protocol.threshold,
            backend=_backend(protocol),
            device=protocol.device,
            multilabel=dataset.has_regions,
        )
        total = {name: total[name] + part for name, part in statistics.items()} if total else statistics
        if decided is not None and top is not None:
            decided[z] = top if label_of is None else label_of[top]
    return total


def _notes(decided: np.ndarray, predicted: np.ndarray, stored: ProbabilityFile, calibrated: bool) -> list[str]:
    """What a reader of the record should know about the probabilities."""
    notes = [_disagreement(decided, predicted, stored, calibrated), _TAILS if stored.dtype == np.float16 else None]
    return [note for note in notes if note]


class _Regions:
    """The sets of voxels calibration is measured on, some slices of them at a time.

    Args:
        reference: labels, ignored voxels set to background.
        prediction: on the same grid.
        valid: voxels that are not ignored; None: all.
        protocol: the options.
    """

    def __init__(self, reference: np.ndarray, prediction: LabelImage, valid: np.ndarray | None, protocol: Protocol):
        self._reference, self._predicted, self._spacing = reference, prediction.labels, prediction.spacing
        self._valid, self._boundary = valid, protocol.boundary
        self._wide = None
        if protocol.dilate:
            self._wide = metrics.near_surface(self._foreground(slice(None)), self._spacing, protocol.dilate)
        self._near = np.empty((0, *reference.shape[1:]), dtype=bool)
        self._first = 0  # of the slices in ``_near``

    def of(self, z: slice) -> dict[str, np.ndarray]:
        """Bool (n, y, x) by name, of slices of the first axis."""
        reference = self._reference[z]
        counts = np.ones(reference.shape, dtype=bool) if self._valid is None else self._valid[z]
        foreground = self._foreground(z)
        if self._wide is not None:
            foreground |= self._wide[z] & counts
        regions = {"volume": counts, "reference_foreground": reference != 0, "foreground": foreground}
        if self._boundary:
            regions["boundary"] = self._close(z) & counts
        return regions

    def _foreground(self, z: slice) -> np.ndarray:
        shown = (self._reference[z] != 0) | (self._predicted[z] != 0)
        return shown if self._valid is None else shown & self._valid[z]

    def _close(self, z: slice) -> np.ndarray:
        """Voxels near the reference's surfaces, found for more slices than are asked for: neighbours are looked at."""
        start, stop, _ = z.indices(len(self._reference))
        if not self._first <= start <= stop <= self._first + len(self._near):
            planes = slice(start, max(stop, start + _SLICES))
            self._near = metrics.near_surface(self._reference, self._spacing, metrics.BOUNDARY_MM, planes)
            self._first = start
        return self._near[start - self._first : stop - self._first]


def _deciding(channels: Iterable[np.ndarray], order: tuple[int, ...], decided: np.ndarray) -> Iterator[np.ndarray]:
    """Pass the regions' channels on, writing nnU-Net's segmentation of them into ``decided``."""
    for label, channel in zip(order, channels, strict=True):
        decided[channel > 0.5] = label
        yield channel


def _disagreement(decided: np.ndarray, predicted: np.ndarray, stored: ProbabilityFile, calibrated: bool) -> str | None:
    """Compare the segmentation the probabilities imply with the one beside them.

    Raises:
        InputError: they agree only after flipping or reordering axes.
    """
    different = np.count_nonzero(decided != predicted)
    if not different:
        return None
    suspicious = different > _SUSPICIOUS * np.count_nonzero((decided != 0) | (predicted != 0))
    if suspicious and _fewest_differences(decided, predicted) < different / 10:
        for axes in itertools.permutations(range(3)):
            turned = decided.transpose(axes)
            if turned.shape != predicted.shape:
                continue
            for flipped in itertools.product((1, -1), repeat=3):
                view = turned[tuple(slice(None, None, step) for step in flipped)]
                if np.count_nonzero(view != predicted) < different / 10:
                    raise InputError(
                        f"{stored.path}: its axes are flipped or reordered against the segmentation; was it predicted "
                        "with another reader (overwrite_image_reader_writer in dataset.json)?"
                    )
    if calibrated:
        return f"{different} voxels of the segmentation, scored as it is, differ from the calibrated decision"
    if suspicious:
        return f"{different} voxels of the segmentation differ from its probabilities' decision (of another model?)"
    return f"{different} voxels of the segmentation differ from its probabilities' decision (post-processing?)"


def _fewest_differences(decided: np.ndarray, predicted: np.ndarray) -> int:
    """Voxels that differ in any arrangement of the axes: their labels' counts do not change with it."""
    labels = max(decided.max(initial=0), predicted.max(initial=0)) + 1
    counts = [np.bincount(of.reshape(-1), minlength=labels) for of in (decided, predicted)]
    return int(np.abs(counts[0] - counts[1]).sum()) // 2


def _without_ignored(labels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Ignored voxels become background: outside every structure, as voxels beyond the image edge are."""
    return labels if valid is None else np.where(valid, labels, 0)
