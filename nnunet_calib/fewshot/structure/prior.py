"""What the supports say of a query before it is looked at: how large the structure is, and where.

The size sets the operating point. A head ranks voxels; where it should cut them depends on shares that a few volumes do
not show, and the volume of an organ in mm3 is known far better than that. It is a hinge with a margin, as the size
constraint of Silva-Rodriguez et al., MedAGI 2023:

    e = (V* - V) / max(V, V*),    the cut stays where |e| <= margin, and else moves to where |e| = margin
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 0.3
"""Share by which a volume may be off what is expected before the cut moves."""

_BODY_LIMIT = 1.5  # a base class predicted in part must not halve what is expected
_LOGITS = 40.0  # log odds beyond are all the same
_STEP = 0.01  # of the histogram
_PRESENT_SD = 1.0  # of the log odds between supports, at least
_ALONE_SD = 2.0  # assumed with one support, whose own score is of what the head was fitted to
_SURE = 3.0  # standard deviations below the supports that are called absent
_REACH = 0.1  # of the frame, around where the supports have the structure
_PLACES = 500


@dataclass(frozen=True)
class SizePrior:
    """Volume of the structure, as the supports have it.

    Attributes:
        volume: geometric mean over the supports that hold it whole, mm3.
        spread: standard deviation of the logarithm; 0 of one support.
        supports: how many were used.
        body: geometric mean volume of each base class that is whole in a support, mm3: a proxy of the body's size.
    """

    volume: float
    spread: float
    supports: int
    body: Mapping[int, float]

    @classmethod
    def of(
        cls, volumes: Sequence[float], whole: Sequence[bool], bodies: Sequence[Mapping[int, float]]
    ) -> SizePrior | None:
        """From the supports; None if the field of view cuts the structure in all of them.

        Args:
            volumes: of the structure in each, mm3, above 0.
            whole: the structure does not touch an end of the volume.
            bodies: volume in mm3 of the base classes that are whole in each.
        """
        used = [(np.log(v), body) for v, ok, body in zip(volumes, whole, bodies, strict=True) if ok]
        if not used:
            return None
        logs = [log for log, _ in used]
        seen: dict[int, list[float]] = {}
        for _, body in used:
            for c, v in body.items():
                seen.setdefault(c, []).append(float(np.log(v)))
        body = {c: float(np.exp(np.mean(v))) for c, v in sorted(seen.items())}
        spread = float(np.std(logs, ddof=1)) if len(logs) > 1 else 0.0
        return cls(float(np.exp(np.mean(logs))), spread, len(logs), body)

    def expected(self, body: Mapping[int, float], share_in_view: float = 1.0) -> float:
        """V* of a query, mm3: the supports' volume times the ratio of the bodies times the share in view.

        Args:
            body: volume in mm3 of the base classes that are whole in the query.
            share_in_view: of the structure, as ``Places.share_inside`` tells.
        """
        return self.volume * self.body_ratio(body) * share_in_view

    def body_ratio(self, body: Mapping[int, float]) -> float:
        """Median over the base classes of query by supports, within 1.5 either way; 1 without a class in common."""
        logs = [np.log(v / self.body[c]) for c, v in body.items() if c in self.body]
        if not logs:
            return 1.0
        return float(np.exp(np.clip(np.median(logs), -np.log(_BODY_LIMIT), np.log(_BODY_LIMIT))))


class VolumeCurve:
    """How much of a volume lies above each cut: a histogram of log odds, filled in parts."""

    def __init__(self) -> None:
        self.edges = np.arange(-_LOGITS, _LOGITS + _STEP / 2, _STEP)
        self._counts = np.zeros(len(self.edges) - 1)

    def add(self, logit: np.ndarray, mm3: np.ndarray | float) -> VolumeCurve:
        """Count log odds (any shape), each standing for so many mm3; the curve itself is returned."""
        cell = ((np.clip(logit, -_LOGITS, _LOGITS) + _LOGITS) / _STEP).astype(np.int64).ravel()
        np.minimum(cell, len(self._counts) - 1, out=cell)
        weights = None if np.ndim(mm3) == 0 else np.ravel(mm3)
        counts = np.bincount(cell, weights, minlength=len(self._counts))
        self._counts += counts * float(mm3) if weights is None else counts
        return self

    def above(self, cut: float) -> float:
        """Volume in mm3 with log odds above the cut."""
        return float(np.interp(cut, self.edges, self._from_above()))

    def cut_for(self, volume: float) -> float:
        """The cut above which the volume in mm3 lies; the lowest log odds there are if that is all of it or more."""
        from_above = self._from_above()
        filled = np.flatnonzero(self._counts)
        if not filled.size:
            return 0.0
        reached = slice(filled[0], filled[-1] + 2)  # where the curve falls, so that it can be inverted
        return float(np.interp(-volume, -from_above[reached], self.edges[reached]))

    def _from_above(self) -> np.ndarray:
        return np.append(self._counts[::-1].cumsum()[::-1], 0.0)


def operating_shift(curve: VolumeCurve, expected: float, margin: float = MARGIN, *, present: bool = True) -> float:
    """What to add to the log odds so that the volume above 0 is within the margin of what is expected.

    Args:
        curve: of the query.
        expected: V*, mm3.
        margin: in [0, 1).
        present: else the hinge has no lower side: a structure that is not there is not forced.

    Returns:
        The shift; 0 within the margin.
    """
    volume = curve.above(0.0)
    smallest, largest = (1 - margin) * expected, expected / (1 - margin)
    if volume > largest:
        return -curve.cut_for(largest)
    return -curve.cut_for(smallest) if volume < smallest and present else 0.0


def presence_score(curve: VolumeCurve, expected: float) -> float:
    """How sure the head is of the surer half of the structure: log odds above which half of V* lies."""
    return curve.cut_for(expected / 2)


def presence_limit(support_scores: Sequence[float]) -> float:
    """Presence scores below are called absent.

    Args:
        support_scores: of the supports, each predicted by the others; with one support its own.

    Returns:
        Three standard deviations of a new score below the mean of the supports', and at most 0: where the head finds
        half of the structure by itself it is present.
    """
    k = len(support_scores)
    sd = max(float(np.std(support_scores, ddof=1)), _PRESENT_SD) if k > 1 else _ALONE_SD
    return min(0.0, float(np.mean(support_scores)) - _SURE * sd * float(np.sqrt(1 + 1 / k)))


@dataclass(frozen=True)
class Places:
    """Where in the frame the supports have the structure.

    Attributes:
        points: float32 (m, 3), positions u drawn evenly from the structure of all supports.
    """

    points: np.ndarray

    @classmethod
    def of(cls, position: np.ndarray, weight: np.ndarray, seed: int = 0) -> Places:
        """From positions (N, 3) of the structure's voxels, each standing for weight (N,) voxels."""
        share = np.asarray(weight, dtype=np.float64) / np.sum(weight, dtype=np.float64)
        chosen = np.random.default_rng(seed).choice(len(position), _PLACES, p=share)
        return cls(np.asarray(position, dtype=np.float32)[chosen])

    def share_inside(self, low: np.ndarray, high: np.ndarray) -> float:
        """Share of the structure in a field of view that spans [low, high] (3,) of the frame."""
        return float(((self.points >= low) & (self.points <= high)).all(axis=1).mean())

    def reach(self, position: np.ndarray) -> np.ndarray:
        """Which positions (N, 3) are near a place of the structure: bool (N,), in their box and a tenth beyond."""
        low, high = self.points.min(axis=0) - _REACH, self.points.max(axis=0) + _REACH
        return ((position >= low) & (position <= high)).all(axis=1)
