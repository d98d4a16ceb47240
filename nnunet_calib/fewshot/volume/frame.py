"""Chunks: intervals of one axis of the body, and the frame in which those of two volumes mean the same.

Chunk i of a query is paired with chunk i of the supports. The image is never cut: only the classifier differs from
chunk to chunk. Positions are taken in mm from the outer edge of the first voxel, and mapped to the frame of the task,

    u = (scale x + shift - low) / (high - low),

where the frame spans [low, high]. Three extents say how scale and shift are found:

    volume    the volume's ends are the frame's: wrong where fields of view differ
    aligned   from where the base classes start, have their centre and end; no annotation needed
    oracle    the structure's own ends are the frame's: for evaluation only, as the papers do
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MODES = ("hard", "interpolated")
EXTENTS = ("volume", "aligned", "oracle")

_TAIL = 0.01  # of a class's voxels beyond what counts as its start or end: a stray voxel moves nothing
_SMALLEST = 50  # voxels of a class that make it a landmark
_NOISE_MM = 5.0  # how far landmarks of two bodies are off a common map
_SCALES = 0.1  # how much the sizes of bodies differ
_ROUNDS = 20
_FRAME_ROUNDS = 3

Landmarks = Mapping[int, np.ndarray]
"""By base class: start, centre and end along each axis, float64 (3 axes, 3), mm; NaN where cut by the field of view."""


@dataclass(frozen=True)
class Chunks:
    """Equal intervals of [0, 1].

    Attributes:
        count: n, at least 1.
        mode: ``hard``, a voxel has the head of its own chunk; ``interpolated``, a mean of those of the two chunks with
            the nearest centres, linear in between and constant beyond the outermost: no seams.
    """

    count: int
    mode: str = "interpolated"

    def __post_init__(self):
        if self.count < 1 or self.mode not in MODES:
            raise ValueError(f"chunks must be 1 or more, and their mode one of {', '.join(MODES)}")

    def weights(self, t: Tensor) -> Tensor:
        """Weights float32 (N, n), of sum 1, of the chunks at coordinates (N,); outside [0, 1] those of its ends."""
        place = t.double().clamp(0, 1) * self.count
        if self.mode == "hard":
            own = place.long().clamp_max(self.count - 1)
            return torch.nn.functional.one_hot(own, self.count).float()
        centred = (place - 0.5).clamp(0, self.count - 1)
        below = centred.long()
        weights = torch.zeros((len(t), self.count), device=t.device)
        # every other chunk has none: distances to all of them would cost several times as much
        for chunk in (below + 1, below):  # in this order, for the last chunk has none above
            share = (1 - (centred - chunk).abs()).float()
            weights.scatter_(1, chunk.clamp_max(self.count - 1)[:, None], share[:, None])
        return weights


def landmarks(labels: np.ndarray, classes: Iterable[int], spacing: Sequence[float]) -> dict[int, np.ndarray]:
    """Where each base class starts, has its centre and ends, along each axis.

    Args:
        labels: integer (z, y, x), not negative.
        classes: which of them to look at; those of less than 50 voxels are left out.
        spacing: mm between voxels along each axis.

    Returns:
        As ``Landmarks``. Start and end leave out 1 % of the voxels each. A class that touches an end of the volume has
        no start (or end) there, and no centre.
    """
    classes = list(classes)
    found = {c: np.full((3, 3), np.nan) for c in classes}
    for axis, step in enumerate(spacing):
        profile = _profile(labels, axis, max(classes, default=0) + 1)
        for c in classes:
            found[c][axis] = _start_centre_end(profile[:, c], step)
    return {c: place for c, place in found.items() if np.isfinite(place).any()}


@dataclass(frozen=True)
class Alignment:
    """A map scale x + shift of mm along each axis to mm in the frame of a task.

    Attributes:
        scale: float64 (3,), positive.
        shift: float64 (3,), mm.
        landmarks: int64 (3,), how many it was found from; 0: the ends of the volume were used.
    """

    scale: np.ndarray
    shift: np.ndarray
    landmarks: np.ndarray

    @classmethod
    def of_extent(cls, low: np.ndarray, high: np.ndarray, to_low: np.ndarray, to_high: np.ndarray) -> Alignment:
        """The map that takes [low, high] (3,), mm, to [to_low, to_high] (3,) along each axis."""
        scale = (to_high - to_low) / (high - low)
        return cls(scale, to_low - scale * low, np.zeros(3, dtype=np.int64))

    def __call__(self, mm: np.ndarray) -> np.ndarray:
        """Places (..., 3) in the frame of the task, mm."""
        return self.scale * mm + self.shift


def align(query: Landmarks, task: Landmarks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale and shift along each axis that bring the landmarks of a volume to those of a task.

        min  sum_l log(1 + ((scale q_l + shift - t_l) / noise)^2) + ((scale - 1) / spread)^2,  noise 5 mm, spread 0.1

    by reweighted least squares. The logarithm (Cauchy's) leaves a class that is predicted in the wrong place no say.

    Returns:
        scale and shift float64 (3,), and the number of landmarks int64 (3,). Without a landmark 1 and 0.
    """
    shared = [c for c in query if c in task]
    scale, shift, counts = np.ones(3), np.zeros(3), np.zeros(3, dtype=np.int64)
    for axis in range(3):
        q, t = (np.concatenate([[], *(side[c][axis] for c in shared)]) for side in (query, task))
        both = np.isfinite(q) & np.isfinite(t)
        q, t, counts[axis] = q[both], t[both], both.sum()
        if not both.any():
            continue
        shift[axis] = np.median(t - q)
        for _ in range(_ROUNDS):
            w = 1 / (1 + np.square((scale[axis] * q + shift[axis] - t) / _NOISE_MM))
            q_mean, t_mean = w @ q / w.sum(), w @ t / w.sum()
            ridge = (_NOISE_MM / _SCALES) ** 2
            scale[axis] = (w @ ((q - q_mean) * (t - t_mean)) + ridge) / (w @ (q - q_mean) ** 2 + ridge)
            shift[axis] = t_mean - scale[axis] * q_mean
    return scale, shift, counts


@dataclass(frozen=True)
class Frame:
    """The coordinates of a task.

    Attributes:
        extent: ``volume``, ``aligned`` or ``oracle``.
        low: float64 (3,), mm.
        high: float64 (3,), mm.
        landmarks: the mean over the supports, in mm of the frame; empty but for ``aligned``.
    """

    extent: str
    low: np.ndarray
    high: np.ndarray
    landmarks: Landmarks

    def align(self, size: np.ndarray, own: Landmarks | None = None) -> Alignment:
        """Map a volume to the frame; what ``apply`` knows of a query is enough.

        Args:
            size: float (3,), mm from edge to edge.
            own: its landmarks; of use to ``aligned``. Along an axis without one that the task has too, as ``volume``.
        """
        ends = Alignment.of_extent(np.zeros(3), np.asarray(size, dtype=np.float64), self.low, self.high)
        if self.extent != "aligned":
            return ends
        scale, shift, counts = align(own or {}, self.landmarks)
        found = counts > 0
        return Alignment(np.where(found, scale, ends.scale), np.where(found, shift, ends.shift), counts)

    def shown(self, size: np.ndarray, alignment: Alignment) -> np.ndarray:
        """Share of a volume's extent along each axis that the supports show too, float64 (3,).

        Along an axis with landmarks of where both lie; without, of how long both are.

        Args:
            size: float (3,), mm from edge to edge.
            alignment: of the volume, as ``align`` finds it.
        """
        size = np.asarray(size, dtype=np.float64)
        first, last = alignment(np.zeros(3)), alignment(size)
        common = (np.minimum(last, self.high) - np.maximum(first, self.low)).clip(min=0)
        return np.where(alignment.landmarks > 0, common / (last - first), ((self.high - self.low) / size).clip(max=1))

    def position(self, mm: np.ndarray) -> np.ndarray:
        """U (..., 3) of places (..., 3) in mm of the frame; [0, 1] inside it."""
        return (mm - self.low) / (self.high - self.low)


def frame_of_volumes(sizes: Sequence[np.ndarray], extent: str = "volume") -> tuple[Frame, list[Alignment]]:
    """A frame of the mean size of the supports (3,), mm, whose ends are those of every volume."""
    frame = Frame(extent, np.zeros(3), np.mean(sizes, axis=0).astype(np.float64), {})
    return frame, [frame.align(size) for size in sizes]


def frame_of_landmarks(sizes: Sequence[np.ndarray], supports: Sequence[Landmarks]) -> tuple[Frame, list[Alignment]]:
    """A frame in which the landmarks of the supports lie on each other, as far as a scale and a shift can do it.

    It begins as the support with most landmarks; then all are aligned to the mean, and the mean is taken anew. It spans
    all supports.

    Args:
        sizes: of each support float (3,), mm from edge to edge.
        supports: landmarks of each.
    """
    first = max(range(len(supports)), key=lambda s: sum(np.isfinite(place).sum() for place in supports[s].values()))
    frame = Frame("aligned", np.zeros(3), np.asarray(sizes[first], dtype=np.float64), supports[first])
    alignments = [frame.align(size, own) for size, own in zip(sizes, supports, strict=True)]
    for _ in range(_FRAME_ROUNDS):
        frame = Frame("aligned", frame.low, frame.high, _mean_landmarks(supports, alignments))
        alignments = [frame.align(size, own) for size, own in zip(sizes, supports, strict=True)]
    low = np.min([alignment(np.zeros(3)) for alignment in alignments], axis=0)
    high = np.max([alignment(np.asarray(size)) for alignment, size in zip(alignments, sizes, strict=True)], axis=0)
    frame = Frame("aligned", low, high, frame.landmarks)
    # where no landmark was found along an axis, the ends of the frame are used, and those have moved
    return frame, [frame.align(size, own) for size, own in zip(sizes, supports, strict=True)]


def _profile(labels: np.ndarray, axis: int, classes: int) -> np.ndarray:
    """Voxels of each class in each slice, int64 (slices, classes)."""
    return np.stack([np.bincount(plane.ravel(), minlength=classes)[:classes] for plane in np.moveaxis(labels, axis, 0)])


def _start_centre_end(voxels: np.ndarray, step: float) -> np.ndarray:
    """(3,), mm, of a class with so many voxels in each slice."""
    total = voxels.sum()
    if total < _SMALLEST:
        return np.full(3, np.nan)
    edges = np.arange(len(voxels) + 1) * step
    share = np.concatenate([[0], voxels.cumsum()]) / total
    inner = np.flatnonzero(voxels)
    reached = slice(inner[0], inner[-1] + 2)  # where the share rises, so that it can be inverted
    start, end = np.interp([_TAIL, 1 - _TAIL], share[reached], edges[reached])
    centre = voxels @ (edges[:-1] + step / 2) / total
    cut_first, cut_last = inner[0] == 0, inner[-1] == len(voxels) - 1
    return np.array(
        [np.nan if cut_first else start, np.nan if cut_first or cut_last else centre, np.nan if cut_last else end]
    )


def _mean_landmarks(supports: Sequence[Landmarks], alignments: Sequence[Alignment]) -> dict[int, np.ndarray]:
    """Mean over the supports that have it, in mm of the frame."""
    means = {}
    for c in sorted({c for own in supports for c in own}):
        places = [alignment(own[c].T).T for own, alignment in zip(supports, alignments, strict=True) if c in own]
        there = np.isfinite(places)
        with np.errstate(invalid="ignore"):
            means[c] = np.where(there, places, 0).sum(axis=0) / there.sum(axis=0)
    return means
