"""What all calibrators share: the shapes they take, how regions become two-class problems, and their file.

Calibrators see logits as ``log p``, for that is what nnU-Net saves; a softmax cannot tell them from the network's own
logits, which differ by one number per voxel. Region (sigmoid) models give log odds, ``log p - log(1 - p)``. A region is
literally the two-class problem with logits (0, log odds), so a method is written once, for labels.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.metrics import smallest_complement, smallest_probability

FILE_NAME = "calibrator.json"
MAX_CHANNELS = 1 << 16
"""Classes or regions: labels are 16 bits, so there are no more."""
_FORMAT = 1

if TYPE_CHECKING:
    from typing_extensions import Self


def log_probabilities(
    probabilities: np.ndarray, *, multilabel: bool = False, dtype: DTypeLike | None = None
) -> np.ndarray:
    """Logits that calibrators take, from probabilities.

    Probabilities of exactly 0 or 1 only say that the stored type ended: p is clipped below at the smallest positive
    number of the type, 1 - p at its spacing below 1, as the NLL of ``nnunet_calib.metrics``.

    Args:
        probabilities: float (C, ...), values in [0, 1].
        multilabel: the channels are sigmoid regions.
        dtype: the type they were stored in; that of the array if None.

    Returns:
        float64 (C, ...): log p; ``multilabel``: log p - log(1 - p).
    """
    stored: np.dtype[Any] = np.dtype(dtype or probabilities.dtype)
    p = probabilities.astype(np.float64)
    logits = np.log(np.maximum(p, smallest_probability(stored)))
    if multilabel:
        logits -= np.log(np.maximum(1 - p, smallest_complement(stored)))
    return logits


def probabilities(log_probabilities: np.ndarray, *, multilabel: bool = False) -> np.ndarray:
    """The way back from ``log_probabilities``: softmax over the first axis; ``multilabel``: sigmoid."""
    return np.exp(-np.logaddexp(0, -log_probabilities)) if multilabel else softmax(log_probabilities)


def file_of(path: str | Path) -> Path:
    """The file of a calibrator: the path itself, or ``calibrator.json`` in that folder."""
    return Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Log of the softmax over the first axis."""
    shifted = z - z.max(axis=0)
    return shifted - np.log(np.exp(shifted).sum(axis=0))


def softmax(z: np.ndarray) -> np.ndarray:
    """Softmax over the first axis."""
    p = np.exp(z - z.max(axis=0))
    p /= p.sum(axis=0)
    return p


def voxel_weights(shape: tuple[int, ...], valid: np.ndarray | None, weights: np.ndarray | None) -> np.ndarray:
    """What each voxel counts, float64 of that shape, 0 where it is not valid.

    Raises:
        ValueError: other shapes, impossible weights, or no voxel that counts.
    """
    w = np.ones(shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != shape or (valid is not None and np.shape(valid) != shape):
        raise ValueError(f"valid and weights must have the shape {shape} of the voxels")
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError("weights must be finite and not negative")
    w = w if valid is None else np.where(valid, w, 0)
    if not w.any():
        raise ValueError("no voxel to fit on")
    return w


def check_numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Nested lists of finite numbers as float64 of exactly that shape.

    Raises:
        ValueError: they are something else; found before an array is made.
    """
    level = [value]
    for length in shape:
        if not all(isinstance(entry, list) and len(entry) == length for entry in level):
            raise ValueError(f"numbers of the shape {shape} are needed")
        level = [inner for entry in level for inner in entry]
    if not all(type(entry) in (int, float) and math.isfinite(entry) for entry in level):
        raise ValueError("a parameter is no finite number")
    return np.array(level, dtype=np.float64).reshape(shape)


class Calibrator(ABC):
    """A map from logits to probabilities, fitted on voxels whose reference is known.

    Attributes:
        key: its name in files, tables and commands.
        keeps_labels: the class with the largest probability stays the same in every voxel.
        keeps_order: so do all classes their order.
        tells_classes_apart: what it does to a voxel depends on the classes that the voxel is given. Fitted to voxels
            that were chosen by their reference, such a method learns the choice: where only the foreground of reference
            or prediction counts, every voxel predicted as background is wrong.
        shared_by_regions: region models have one set of parameters for all regions instead of one for each.
        margin: voxels around a voxel that decide about it; 0 if it is calibrated on its own.
        channels: classes or regions it was fitted to; None before.
        parameters: plain numbers and lists, by name: one set, or one for each region.
        notes: what a user should know about the fit, a line each.
    """

    key: ClassVar[str]
    keeps_labels: ClassVar[bool]
    keeps_order: ClassVar[bool] = False
    tells_classes_apart: ClassVar[bool] = True
    shared_by_regions: ClassVar[bool] = False
    margin: ClassVar[int] = 0

    def __init__(self, *, multilabel: bool = False):
        self.multilabel = multilabel
        self.channels: int | None = None
        self.parameters: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @abstractmethod
    def fit(
        self,
        log_probabilities: np.ndarray,
        target: np.ndarray,
        valid: np.ndarray | None = None,
        *,
        weights: np.ndarray | None = None,
    ) -> Self:
        """Find the parameters with the smallest NLL.

        Args:
            log_probabilities: float (C, *S): log p, or logits; ``multilabel``: log odds. S is any shape: volumes, or
                one axis of sampled voxels.
            target: integer (*S), index of the reference's class; ``multilabel``: bool (C, *S).
            valid: bool (*S), voxels that count; all if None.
            weights: float (*S), not negative: how many voxels each stands for; 1 if None.

        Raises:
            ValueError: shapes or values that do not fit, or no voxel that counts.
        """

    def choices(self, cases: int, channels: int) -> Sequence[Self]:
        """Unfitted calibrators of this method, the simplest first, of which cross-fitting over cases takes the best.

        Args:
            cases: to fit on.
            channels: classes, or regions.
        """
        return [self]

    @abstractmethod
    def apply(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Calibrated probabilities.

        Args:
            log_probabilities: float (C, *S), as for ``fit``.

        Returns:
            float64 (C, *S).

        Raises:
            ValueError: not fitted, or fitted to another number of channels.
        """

    def calibrate(self, probabilities: np.ndarray, dtype: DTypeLike | None = None) -> np.ndarray:
        """Calibrated probabilities from probabilities, clipped as ``log_probabilities`` does.

        Args:
            probabilities: float (C, *S), values in [0, 1].
            dtype: the type they were stored in; that of the array if None.

        Returns:
            float (C, *S), before rounding to what is stored.

        Raises:
            ValueError: not fitted, or fitted to another number of channels.
        """
        return self.apply(log_probabilities(probabilities, multilabel=self.multilabel, dtype=dtype))

    def save(self, path: str | Path, record: Mapping[str, Any] | None = None) -> Path:
        """Write the calibrator as JSON, whole or not at all.

        Args:
            path: a file, or a folder, where it is called ``calibrator.json``.
            record: what else the file should remember, as ``fit_folder`` writes it.

        Returns:
            The file.
        """
        file = file_of(path)
        write_whole(file, json.dumps(self.state() | dict(record or {}), indent=1) + "\n")
        return file

    def state(self) -> dict[str, Any]:
        """All that ``save`` writes of the calibrator itself."""
        if self.channels is None:
            raise ValueError("the calibrator is not fitted")
        single = self.shared_by_regions or not self.multilabel
        values = {
            name: value if single else [parameters[name] for parameters in self.parameters]
            for name, value in self.parameters[0].items()
        }
        about = {"format": _FORMAT, "method": self.key, "multilabel": self.multilabel, "channels": self.channels}
        return about | values | {"notes": self.notes}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Args:
            path: the file, or the folder that holds it.

        Raises:
            InputError: the file cannot be read, or is not one of this method.
        """
        file = file_of(path)
        content = read_json(file)
        try:
            if content["method"] != cls.key or content["format"] != _FORMAT:
                raise ValueError
            return cls._from_state(content)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{file}: not a {cls.key} calibrator of this package; fit it again") from error

    @classmethod
    def _from_state(cls, content: Mapping[str, Any]) -> Self:
        multilabel, channels, notes = content["multilabel"], content["channels"], content.get("notes", [])
        if type(multilabel) is not bool or type(channels) is not int or not 1 <= channels <= MAX_CHANNELS:
            raise ValueError("multilabel or channels are none")
        if not (isinstance(notes, list) and all(isinstance(note, str) for note in notes)):
            raise ValueError("notes are texts")
        calibrator = cls(multilabel=multilabel)
        calibrator.channels = channels
        single = cls.shared_by_regions or not calibrator.multilabel
        values = {name: content[name] for name in cls._names()}
        if not single and any(not isinstance(value, list) or len(value) != channels for value in values.values()):
            raise ValueError("as many parameters as regions are needed")
        calibrator.parameters = (
            [values]
            if single
            else [{name: value[r] for name, value in values.items()} for r in range(calibrator.channels)]
        )
        calibrator.notes = notes
        for parameters in calibrator.parameters:  # before anything is made of their size
            calibrator._check_parameters(parameters, 2 if multilabel else channels)
        calibrator._check_works()
        return calibrator

    @classmethod
    @abstractmethod
    def _names(cls) -> tuple[str, ...]:
        """Names of the parameters."""

    @abstractmethod
    def _check_parameters(self, parameters: Mapping[str, Any], classes: int) -> None:
        """Refuse parameters of another form than so many classes have (ValueError, or what their use raises)."""

    @abstractmethod
    def _check_works(self) -> None:
        """Refuse parameters that make no probabilities (ValueError, or what their use raises)."""

    def _check_fitted(self, log_probabilities: np.ndarray) -> None:
        if self.channels is None:
            raise ValueError("the calibrator is not fitted")
        if len(log_probabilities) != self.channels:
            raise ValueError(f"fitted to {self.channels} channels, not {len(log_probabilities)}")

    def _voxels(
        self, z: np.ndarray, target: np.ndarray, valid: np.ndarray | None, weights: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The voxels that count: logits (C, N) float64, reference (N,) or (C, N), weights (N,) of sum 1."""
        shape = z.shape[1:]
        if target.shape != (z.shape if self.multilabel else shape):
            raise ValueError(f"target {target.shape} does not fit log_probabilities {z.shape}")
        w = voxel_weights(shape, valid, weights)
        counts = w > 0
        z, w = z[:, counts].astype(np.float64), w[counts]
        if not np.isfinite(z).all():
            raise ValueError("log_probabilities must be finite; clip probabilities first (log_probabilities does)")
        y = target[:, counts].astype(bool) if self.multilabel else target[counts].astype(np.intp)
        if not self.multilabel and not (y.min() >= 0 and y.max() < len(z)):
            raise ValueError(f"target holds classes outside 0 to {len(z) - 1}")
        return z, y, w / w.sum()


class VoxelwiseCalibrator(Calibrator):
    """A calibrator that looks at every voxel on its own.

    To add one: a file with a subclass that has ``key``, ``keeps_labels`` and the three abstract methods, an entry in
    ``CALIBRATORS``, a test.
    """

    @abstractmethod
    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        """Parameters from log p (C, N) float64, class indices (N,), and weights (N,) > 0 whose sum is 1."""

    @abstractmethod
    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        """Probabilities (C, N) from log p (C, N)."""

    def _about(self) -> list[str]:
        """First notes of every fit: what the penalties make of the method."""
        return []

    def fit(
        self,
        log_probabilities: np.ndarray,
        target: np.ndarray,
        valid: np.ndarray | None = None,
        *,
        weights: np.ndarray | None = None,
    ) -> Self:
        """As ``Calibrator.fit``."""
        z, y, w = self._voxels(np.asarray(log_probabilities), np.asarray(target), valid, weights)
        self.channels, self.notes = len(z), self._about()
        self.parameters = []
        for r, problem in enumerate(self._problems(z, y, w)):
            told = len(self.notes)
            self.parameters.append(self._estimate(*problem))
            if self.multilabel and not self.shared_by_regions:
                self.notes[told:] = [f"region {r}: {note}" for note in self.notes[told:]]
        return self

    def apply(self, log_probabilities: np.ndarray) -> np.ndarray:
        """As ``Calibrator.apply``."""
        self._check_fitted(log_probabilities)
        z = np.asarray(log_probabilities, dtype=np.float64).reshape(len(log_probabilities), -1)
        if not self.multilabel:
            calibrated = self._calibrate(log_softmax(z), self.parameters[0])
        elif self.shared_by_regions:
            calibrated = self._calibrate(_two_classes(z.reshape(-1)), self.parameters[0])[1]
        else:
            pairs = zip(z, self.parameters, strict=True)
            calibrated = np.stack([self._calibrate(_two_classes(region), own)[1] for region, own in pairs])
        return calibrated.reshape(np.shape(log_probabilities))

    def _check_works(self) -> None:
        """Try the parameters on logits whose order is known."""
        assert self.channels is not None
        z = np.linspace(-1, 1, self.channels)[:, None] * np.ones(2)
        with np.errstate(all="ignore"):  # what is wrong is told in one line
            tried = self.apply(z)
        if not (np.isfinite(tried).all() and tried.min() >= 0 and tried.max() <= 1 + 1e-6):
            raise ValueError("parameters that make no probabilities")
        if self.keeps_order and (np.diff(tried, axis=0) < 0).any():
            raise ValueError("parameters that turn the order of the classes round")
        if self.keeps_labels and not self.multilabel and (tried[-1] < tried.max(axis=0)).any():
            raise ValueError("parameters that change the predicted class")

    def _problems(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        if not self.multilabel:
            return [(log_softmax(z), y, w)]
        if self.shared_by_regions:
            return [(_two_classes(z.reshape(-1)), y.reshape(-1).astype(np.intp), np.tile(w, len(z)) / len(z))]
        return [(_two_classes(region), inside.astype(np.intp), w) for region, inside in zip(z, y, strict=True)]


def _two_classes(log_odds: np.ndarray) -> np.ndarray:
    """Log probabilities (2, N) of outside and inside."""
    return -np.logaddexp(0, np.stack([log_odds, -log_odds]))
