"""The pass over the probabilities that fills the statistics, and what all ways of counting share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from nnunet_calib.metrics.counting.bins import empty_bins
from nnunet_calib.metrics.counting.rules import CELLS, Rules, negligible_bins
from nnunet_calib.metrics.overlap import Structure, label_map, labels_of

_MAX_SETS = 8  # one bit each of a uint8
_KEPT = 1 << 24  # bytes: more than the temporaries of a slab, less than glibc's limit of 32 MiB


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
            inside = mask.reshape(-1).astype(bool, copy=False).view(np.uint8)
            self.code |= inside << np.uint8(bit) if bit else inside
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

    def labels(self, part: slice) -> np.ndarray:
        """A map that is the same wherever no class begins or ends."""
        return self._labels[part] if self.multilabel else self._channel[part]

    def slabs(self, size: int) -> list[slice]:
        """Slices of the flat volume, of so many voxels, that hold a voxel of any set."""
        parts = (slice(start, min(start + size, self.size)) for start in range(0, self.size, size))
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
        self.negligible = empty_bins(*by_code, negligible_bins(threshold, bins))
        self.squared_error, self.log_loss = np.zeros(by_code), np.zeros(by_code)
        self.top = empty_bins(volume.codes, bins)
        self.ranked = empty_bins(*(by_code if volume.multilabel else by_code[1:]), CELLS)

    def __iadd__(self, other: Tally) -> Tally:
        for name, mine in vars(self).items():
            setattr(self, name, mine + getattr(other, name))
        return self


class Slab:
    """Some voxels of a volume and what is found out about them, class after class; maps are flat.

    Attributes:
        code: as the volume's.
        notes: what a way of counting found out before the first class.
        top: the channel with the largest probability so far; empty if multilabel.
        largest: that probability.
    """

    def __init__(self, volume: Volume, part: slice, counting: Counting, top: np.ndarray, largest: np.ndarray):
        self._volume, self._part = volume, part
        self.code = volume.code[part]
        self.notes = counting.look(volume.labels(part), self.code)
        self.top, self.largest = top, largest

    def truth(self, c: int) -> tuple[np.ndarray, int]:
        """A map and the value it has on the voxels of class ``c``."""
        return self._volume.truth(c, self._part)


class Counting(Protocol):
    """How one slab is counted.

    Attributes:
        voxels: of a slab.
    """

    voxels: int

    def look(self, labels: np.ndarray, code: np.ndarray) -> Any:
        """What helps with all classes of a slab; ``labels`` is the same wherever no class begins or ends."""

    def add_class(self, tally: Tally, c: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        """Count the binary problem of class ``c`` of exclusive classes, all but ``top`` and ``ranked``.

        Where its p exceeds the largest so far, it becomes the top label. The first class of a slab is 0.
        """

    def add_region(self, tally: Tally, r: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        """Count region ``r``: as a class, the logarithm of its complement and ``ranked`` besides."""

    def add_top(self, tally: Tally, slab: Slab, rules: Rules) -> None:
        """Count the top label: ``top`` and ``ranked``."""


def gather(
    channels: Iterable[np.ndarray], volume: Volume, counting: Counting, bins: int, threshold: float, threads: int
) -> tuple[Tally, np.ndarray | None]:
    """The sums of a volume, and its top label unless multilabel.

    An array is read slab after slab, all channels of one before the next, so that it passes through memory once;
    other iterables channel after channel.
    """
    # Until a block of this size has been freed once, the C library (glibc) gives every slab's temporaries back to the
    # system and waits for new pages each time: twice the time in all.
    np.empty(_KEPT, np.uint8)
    top = np.zeros(0 if volume.multilabel else volume.size, dtype=np.min_scalar_type(volume.classes))
    parts = volume.slabs(counting.voxels)
    share = -(-len(parts) // threads) or 1
    workers = [
        _Worker(volume, parts[i : i + share], counting, Tally(volume, bins, threshold), top)
        for i in range(0, len(parts), share)
    ]
    flat = checked_channels(channels, volume)
    with ThreadPoolExecutor(threads) as pool:
        run = map if threads == 1 else pool.map
        if isinstance(channels, np.ndarray):
            whole = list(flat)
            rules = Rules.of(channels.dtype, bins, threshold)
            list(run(lambda worker: worker.add_array(whole, rules), workers))
        else:
            for c, channel in enumerate(flat):
                rules = Rules.of(channel.dtype, bins, threshold)
                list(run(functools.partial(_Worker.add_channel, c=c, channel=channel, rules=rules), workers))
            list(run(functools.partial(_Worker.finish, rules=rules), workers))
    total = Tally(volume, bins, threshold)
    for worker in workers:
        total += worker.tally
    return total, None if volume.multilabel else top.reshape(volume.shape)


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


class _Worker:
    """One thread's share of the slabs."""

    def __init__(self, volume: Volume, parts: list[slice], counting: Counting, tally: Tally, top: np.ndarray):
        self._volume, self._parts, self._counting, self._top = volume, parts, counting, top
        self._slabs: list[Slab] = []
        self.tally = tally

    def add_array(self, channels: list[np.ndarray], rules: Rules) -> None:
        """Count slab after slab."""
        largest = np.empty(self._counting.voxels, dtype=_counted(channels[0].dtype))
        for part in self._parts:
            slab = self._slab(part, largest)
            for c, channel in enumerate(channels):
                self._add(c, channel[part], slab, rules)
            self._finish(slab, rules)

    def add_channel(self, c: int, channel: np.ndarray, rules: Rules) -> None:
        """Count one channel of all slabs; ``finish`` follows the last."""
        if c == 0:
            kind = _counted(channel.dtype)
            self._slabs = [self._slab(part, np.empty(self._top[part].size, kind)) for part in self._parts]
        for part, slab in zip(self._parts, self._slabs, strict=True):
            self._add(c, channel[part], slab, rules)

    def finish(self, rules: Rules) -> None:
        """Count what is known only after the last channel."""
        for slab in self._slabs:
            self._finish(slab, rules)

    def _slab(self, part: slice, largest: np.ndarray) -> Slab:
        top = self._top[part]
        return Slab(self._volume, part, self._counting, top, largest[: top.size])

    def _add(self, c: int, p: np.ndarray, slab: Slab, rules: Rules) -> None:
        add = self._counting.add_region if self._volume.multilabel else self._counting.add_class
        add(self.tally, c, _in_full(p), slab, rules)

    def _finish(self, slab: Slab, rules: Rules) -> None:
        if not self._volume.multilabel:
            self._counting.add_top(self.tally, slab, rules)


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
