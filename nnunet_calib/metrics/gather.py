"""The pass over the probabilities that fills the statistics, a slab of voxels at a time, in numpy."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnunet_calib.metrics.binning import Bins, bin_index, empty_bins
from nnunet_calib.metrics.overlap import Structure, label_map, labels_of
from nnunet_calib.metrics.ranked import CELLS, confidence_cell

SLAB = 1 << 16  # voxels handled at once: all that is made of them stays in the processor's cache
_MAX_SETS = 8  # one bit each of a uint8

LOWEST, HIGHEST = -1e-5, 1 + 1e-5
"""What is taken for a probability: sums of float32, as of an ensemble, may end a little beyond [0, 1]."""


def smallest_probability(dtype: np.dtype) -> float:
    """Where NLL clips p: the smallest positive number of a float type (float16: 2^-24; float32: 2^-126, normal)."""
    return float(np.finfo(dtype).smallest_subnormal if dtype == np.float16 else np.finfo(dtype).tiny)


@dataclass(frozen=True)
class Limits:
    """Where a float type's probabilities are cut.

    Attributes:
        bins: number B of equal-width bins.
        edges: float64 (B + 1,): bin k holds the p of the type with edges[k] <= p < edges[k + 1].
        threshold: p up to it are negligible; rounded to the type, as torch compares.
        smallest: where p is clipped in the logarithm.
        spacing: where 1 - p is clipped in the logarithm.
    """

    bins: int
    edges: np.ndarray
    threshold: float
    smallest: float
    spacing: float

    @classmethod
    def of(cls, dtype: np.dtype, bins: int, threshold: float) -> Limits:
        """The limits of a float type."""
        k = np.arange(1, bins)
        edges = (k / bins).astype(dtype)
        edges = np.where(bin_index(edges, bins) < k, np.nextafter(edges, dtype.type(2)), edges)
        below = np.nextafter(edges, dtype.type(0))
        beyond = np.nextafter(dtype.type(1), dtype.type(2))
        edges = np.concatenate([[0], np.where(bin_index(below, bins) < k, edges, below), [beyond]])
        rounded = float(dtype.type(threshold))
        return cls(bins, edges, rounded, smallest_probability(dtype), float(np.finfo(dtype).epsneg))


class Volume:
    """What the probabilities of one volume are held against; all maps are flat.

    Attributes:
        code: uint8, bit i set where the voxel belongs to set i; 0: it is never looked at.
        codes: number of possible codes.
        members: for each set, bool (codes,): the codes that belong to it.
        classes: number of channels.
        multilabel: the channels are regions, not exclusive classes.
    """

    def __init__(
        self, reference: np.ndarray, classes: Sequence[Structure], masks: Mapping[str, np.ndarray], multilabel: bool
    ):
        if not 0 < len(masks) <= _MAX_SETS:
            raise ValueError(f"between 1 and {_MAX_SETS} masks, not {len(masks)}")
        reference = label_map(reference)
        self.shape, self.size = reference.shape, reference.size
        self.classes, self.multilabel = len(classes), multilabel
        self.code = np.zeros(self.size, dtype=np.uint8)
        for bit, (name, mask) in enumerate(masks.items()):
            if mask.shape != self.shape:
                raise ValueError(f"mask {name!r} has shape {mask.shape}, the reference {self.shape}")
            self.code |= mask.reshape(-1).astype(bool, copy=False).view(np.uint8) << np.uint8(bit)
        self.codes = 1 << len(masks)
        patterns = np.arange(self.codes)
        self.members = {name: (patterns >> bit & 1).astype(bool) for bit, name in enumerate(masks)}
        member = _membership(classes, reference)
        if multilabel:
            self._labels, self._member = reference.reshape(-1), member
        else:
            if (member.sum(axis=0) > 1).any():
                raise ValueError("a label is in two classes; classes exclude each other unless multilabel")
            channel = np.where(member.any(axis=0), member.argmax(axis=0), self.classes)
            channel = channel.astype(np.min_scalar_type(self.classes))
            self._channel = reference.reshape(-1)
            if reference.dtype != channel.dtype or not np.array_equal(channel, np.arange(len(channel))):
                self._channel = channel[self._channel]  # in most maps the labels are the channels

    def truth(self, c: int, part: slice) -> tuple[np.ndarray, int]:
        """A map and the value it has on the voxels of class ``c``."""
        return (self._member[c][self._labels[part]].view(np.uint8), 1) if self.multilabel else (self._channel[part], c)

    def slabs(self) -> list[slice]:
        """Slices of the flat volume that hold a voxel of any set."""
        parts = (slice(start, min(start + SLAB, self.size)) for start in range(0, self.size, SLAB))
        return [part for part in parts if self.code[part].any()]


class Tally:
    """Running sums by class and code.

    Attributes:
        classes: ``Bins`` (C, codes, B).
        negligible: ``Bins`` (C, codes, K), those of ``classes`` with p up to the threshold.
        squared_error: float64 (C, codes).
        log_loss: float64 (C, codes).
        top: ``Bins`` (codes, B) of the top label.
        ranked: ``Bins`` (codes, cells) of the top label, or (R, codes, cells) of regions.
    """

    def __init__(self, volume: Volume, bins: int, threshold: float):
        by_code = (volume.classes, volume.codes)
        self.classes = empty_bins(*by_code, bins)
        rounded = max(threshold, *(float(kind(threshold)) for kind in (np.float16, np.float32)))
        self.negligible = empty_bins(*by_code, int(bin_index(np.array(rounded), bins)) + 1)
        self.squared_error, self.log_loss = np.zeros(by_code), np.zeros(by_code)
        self.top = empty_bins(volume.codes, bins)
        self.ranked = empty_bins(*(by_code if volume.multilabel else by_code[1:]), CELLS)

    def __iadd__(self, other: Tally) -> Tally:
        for name, mine in vars(self).items():
            setattr(self, name, mine + getattr(other, name))
        return self


class Counting(Protocol):
    """How one slab is counted; the arrays of a slab are flat and of equal length."""

    def add_class(
        self, tally: Tally, c: int, p: np.ndarray, truth: tuple[np.ndarray, int], code: np.ndarray, limits: Limits
    ) -> None:
        """Count the binary problem of class ``c`` of exclusive classes: all but ``top`` and ``ranked``."""

    def add_region(
        self, tally: Tally, r: int, p: np.ndarray, truth: tuple[np.ndarray, int], code: np.ndarray, limits: Limits
    ) -> None:
        """Count region ``r``: as a class, the logarithm of its complement and ``ranked`` besides."""

    def update_top(self, c: int, p: np.ndarray, largest: np.ndarray, top: np.ndarray) -> None:
        """Where class ``c`` exceeds the largest so far, it becomes the top label."""

    def add_top(
        self, tally: Tally, p: np.ndarray, top: np.ndarray, truth: np.ndarray, code: np.ndarray, limits: Limits
    ) -> None:
        """Count the top label: ``top`` and ``ranked``."""


def gather(
    channels: Iterable[np.ndarray], volume: Volume, counting: Counting, bins: int, threshold: float, threads: int
) -> tuple[Tally, np.ndarray | None]:
    """The sums of a volume, and its top label unless multilabel.

    An array is read slab after slab, all channels of one before the next, so that it passes through memory once;
    other iterables channel after channel.
    """
    top = None if volume.multilabel else np.zeros(volume.size, dtype=np.min_scalar_type(volume.classes))
    slabs = volume.slabs()
    share = -(-len(slabs) // threads) or 1
    workers = [
        _Worker(volume, slabs[i : i + share], counting, Tally(volume, bins, threshold), top)
        for i in range(0, len(slabs), share)
    ]
    flat = checked_channels(channels, volume)
    with ThreadPoolExecutor(threads) as pool:
        run = map if threads == 1 else pool.map
        if isinstance(channels, np.ndarray):
            whole = list(flat)
            list(run(lambda worker: worker.add_array(whole, bins, threshold), workers))
        else:
            streamed: dict[str, Any] = {}
            for c, channel in enumerate(flat):
                if not c:
                    size = 0 if volume.multilabel else volume.size
                    streamed["largest"] = np.full(size, -1, dtype=_counted(channel.dtype))
                streamed["limits"] = Limits.of(channel.dtype, bins, threshold)
                list(run(functools.partial(_Worker.add_channel, c=c, channel=channel, **streamed), workers))
            if not volume.multilabel:
                list(run(functools.partial(_Worker.add_top, **streamed), workers))
    total = Tally(volume, bins, threshold)
    for worker in workers:
        total += worker.tally
    return total, None if top is None else top.reshape(volume.shape)


def checked_channels(channels: Iterable[Any], volume: Volume) -> Iterator[Any]:
    """Flat channels.

    Raises:
        ValueError: a shape that does not fit, too many or too few, or no floats.
    """
    seen = 0
    for channel in channels:
        if seen == volume.classes or tuple(channel.shape) != volume.shape:
            raise ValueError(f"channel {seen}, {tuple(channel.shape)}, does not fit {volume.classes} of {volume.shape}")
        if str(channel.dtype).removeprefix("torch.") not in ("float16", "float32", "float64"):
            raise ValueError(f"probabilities are float16, float32 or float64, not {channel.dtype}")
        yield channel.reshape(-1)
        seen += 1
    if seen != volume.classes:
        raise ValueError(f"{seen} channels for {volume.classes} classes")


def check_probabilities(p: Any) -> None:
    """Refuse values that would be counted in bins that do not exist; p is an array or a tensor.

    Raises:
        ValueError: a value is below 0 or above 1 by more than rounding, or NaN.
    """
    if not bool(((p >= LOWEST) & (p <= HIGHEST)).all()):
        raise ValueError("probabilities are in [0, 1]; there are other values, or NaN, among those that count")


class _Worker:
    """One thread's share of the slabs."""

    def __init__(self, volume: Volume, slabs: list[slice], counting: Counting, tally: Tally, top: np.ndarray | None):
        self._volume, self._slabs, self._counting, self._top = volume, slabs, counting, top
        self.tally = tally

    def add_array(self, channels: list[np.ndarray], bins: int, threshold: float) -> None:
        limits = Limits.of(channels[0].dtype, bins, threshold)
        largest = np.empty(SLAB, dtype=_counted(channels[0].dtype))
        for part in self._slabs:
            largest[:] = -1
            for c, channel in enumerate(channels):
                self._add(c, part, channel, limits, largest[: part.stop - part.start])
            if self._top is not None:
                self._add_top(part, largest[: part.stop - part.start], limits)

    def add_channel(self, c: int, channel: np.ndarray, limits: Limits, largest: np.ndarray) -> None:
        for part in self._slabs:
            self._add(c, part, channel, limits, largest[part])

    def add_top(self, largest: np.ndarray, limits: Limits) -> None:
        for part in self._slabs:
            self._add_top(part, largest[part], limits)

    def _add(self, c: int, part: slice, channel: np.ndarray, limits: Limits, largest: np.ndarray) -> None:
        p = _in_full(channel[part])
        truth, code = self._volume.truth(c, part), self._volume.code[part]
        if self._top is None:
            self._counting.add_region(self.tally, c, p, truth, code, limits)
        else:
            self._counting.add_class(self.tally, c, p, truth, code, limits)
            self._counting.update_top(c, p, largest, self._top[part])

    def _add_top(self, part: slice, largest: np.ndarray, limits: Limits) -> None:
        assert self._top is not None
        truth, _ = self._volume.truth(0, part)
        self._counting.add_top(self.tally, largest, self._top[part], truth, self._volume.code[part], limits)


class NumpyCounting:
    """Counting in numpy.

    Most voxels of most channels have a small p, are not of the class and are in the same sets as their neighbours:
    they go to bin 0 together, and only the others are sorted into bins one by one.
    """

    def add_class(
        self, tally: Tally, c: int, p: np.ndarray, truth: tuple[np.ndarray, int], code: np.ndarray, limits: Limits
    ) -> None:
        """Count the binary problem of class ``c``."""
        if not (p.min() >= LOWEST and p.max() <= HIGHEST):  # NaN fails too
            check_probabilities(p[code != 0])
        positive = truth[0] == truth[1]
        usual = int(code[0])
        single = (p >= p.dtype.type(limits.edges[1])) | positive
        alike = not (code != usual).any()
        if not alike:
            usual = int(np.bincount(code).argmax())
            single |= code != usual
        singles: Any = np.flatnonzero(single)
        if 2 * singles.size > p.size:
            singles = slice(None)
        elif usual:
            self._add_rest(tally, c, p, singles, usual, limits)
        codes: Any = usual if alike else code[singles]
        one, y = p[singles].astype(np.float64), positive[singles]
        if not alike and not codes.all():
            inside = codes != 0
            one, y, codes = one[inside], y[inside], codes[inside]
        index = bin_index(one, limits.bins)
        _count(tally.classes, c, codes, index, one, y)
        small = one <= limits.threshold
        if small.any():
            _count(tally.negligible, c, _of(codes, small), index[small], one[small], y[small])
        _sum(tally.squared_error, c, codes, np.square(one - y))
        if y.any():
            _sum(tally.log_loss, c, _of(codes, y), -np.log(np.maximum(one[y], limits.smallest)))

    def _add_rest(self, tally: Tally, c: int, p: np.ndarray, singles: np.ndarray, usual: int, limits: Limits) -> None:
        """Count all but ``singles``: voxels of code ``usual`` in bin 0, none of the class."""
        rest = p.astype(np.float64)
        rest[singles] = 0
        small = p <= p.dtype.type(limits.threshold)
        tally.classes.n[c, usual, 0] += p.size - singles.size
        tally.classes.confidence[c, usual, 0] += rest.sum()
        tally.squared_error[c, usual] += np.einsum("i,i->", rest, rest)
        tally.negligible.n[c, usual, 0] += np.count_nonzero(small) - np.count_nonzero(small[singles])
        rest *= small
        tally.negligible.confidence[c, usual, 0] += rest.sum()

    def add_region(
        self, tally: Tally, r: int, p: np.ndarray, truth: tuple[np.ndarray, int], code: np.ndarray, limits: Limits
    ) -> None:
        """Count region ``r``."""
        self.add_class(tally, r, p, truth, code, limits)
        inside = code != 0
        p, y, code = p[inside].astype(np.float64), truth[0][inside] == truth[1], code[inside]
        _sum(tally.log_loss, r, code[~y], -np.log(np.maximum(1 - p[~y], limits.spacing)))
        _count(tally.ranked, r, code, confidence_cell(np.minimum(p, 1 - p)), np.maximum(p, 1 - p), (p > 0.5) == y)

    def update_top(self, c: int, p: np.ndarray, largest: np.ndarray, top: np.ndarray) -> None:
        """Where class ``c`` exceeds the largest so far, it becomes the top label."""
        larger = p > largest
        np.copyto(top, c, where=larger, casting="unsafe")
        np.copyto(largest, p, where=larger)

    def add_top(
        self, tally: Tally, p: np.ndarray, top: np.ndarray, truth: np.ndarray, code: np.ndarray, limits: Limits
    ) -> None:
        """Count the top label."""
        hit, codes = top == truth, code if (code != code[0]).any() else int(code[0])
        if codes is code and not code.all():
            inside = code != 0
            p, hit, codes = p[inside], hit[inside], code[inside]
        confidence = p.astype(np.float64)
        _count(tally.top, ..., codes, bin_index(confidence, limits.bins), confidence, hit)
        _count(tally.ranked, ..., codes, confidence_cell(1 - confidence), confidence, hit)


def _count(
    bins: Bins, problem: Any, code: np.ndarray | int, index: np.ndarray, confidence: np.ndarray, correct: np.ndarray
) -> None:
    """Add voxels to the bins (codes, B) of one binary problem; ``code`` is one number where all have the same."""
    codes, size = bins.n[problem].shape
    row: Any = ...
    if isinstance(code, np.ndarray):
        index = code.astype(np.intp) * size + index
    else:
        codes, row = 1, slice(code, code + 1)
    both = np.bincount(2 * index + correct, minlength=2 * codes * size).reshape(codes, size, 2)
    bins.n[problem][row] += both.sum(axis=-1)
    bins.correct[problem][row] += both[..., 1]
    sums = np.bincount(index, weights=confidence, minlength=codes * size)
    bins.confidence[problem][row] += sums.reshape(codes, size)


def _sum(total: np.ndarray, problem: int, code: np.ndarray | int, values: np.ndarray) -> None:
    """Add values to the sums (codes,) of one binary problem."""
    if isinstance(code, np.ndarray):
        total[problem] += np.bincount(code, weights=values, minlength=total.shape[1])
    else:
        total[problem, code] += values.sum()


def _of(code: np.ndarray | int, chosen: np.ndarray) -> np.ndarray | int:
    return code[chosen] if isinstance(code, np.ndarray) else code


def _counted(dtype: np.dtype) -> np.dtype:
    """The type a float type's slabs are counted in, which holds its values exactly."""
    return np.promote_types(dtype, np.float32)


def _in_full(p: np.ndarray) -> np.ndarray:
    """float16 as float32; other types as they are. Values are exact, numpy's own way takes three times as long.

    The bits of one type are moved to where the other has them, which leaves the exponent too small by 112. What is not
    finite becomes a number beyond 65535, no probability either.
    """
    if p.dtype != np.float16:
        return p
    bits = p.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # copies of the sign
    full = bits.view(np.float32)
    full *= np.float32(2.0**112)
    return full


def _membership(classes: Sequence[Structure], reference: np.ndarray) -> np.ndarray:
    """Bool (C, largest label + 1): whether a label belongs to a class."""
    highest = int(reference.max()) if reference.size else 0
    members = [np.array(labels_of(structure)) for structure in classes]
    table = np.zeros((len(classes), max(highest, *(int(m.max()) for m in members)) + 1), dtype=bool)
    for row, member in zip(table, members, strict=True):
        row[member] = True
    return table
