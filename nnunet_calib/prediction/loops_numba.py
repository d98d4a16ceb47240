"""Interpolation compiled by numba, for float16 logits on CPU. Import it only where it is wanted.

No freedoms are given to the compiler: products and sums are those of scipy, in its order.
"""

from __future__ import annotations

import math

import numpy as np

from nnunet_calib.metrics.compiled import compiled
from nnunet_calib.prediction.grid import Axis
from nnunet_calib.prediction.interpolation import half_table

_UNSURE = -1
_CLASSES = 0x7FFF  # at most so many and one
_LOWEST = (-0x7C00 << 16) | _CLASSES  # lower than all finite logits but the least
_TOGETHER = 1 << 14  # voxels whose ranks stay in the cache
_NORMAL = 2.0**-14  # below it float16 has a fixed step of 2^-24
_TO_STEP = 1.5 * 2.0**28  # added and taken away again, leaves multiples of 2^-24
_exact = compiled()


def interpolate(logits: np.ndarray, axes: tuple[Axis, ...], start: int, stop: int, out: np.ndarray) -> None:
    """``interpolation.interpolate`` of float16 logits (C, z, y, x) into float32 ``out`` (C, stop - start, Y, X)."""
    _interpolate(_bits(logits), half_table(), *_tables(axes), start, stop, out)


def label_map(logits: np.ndarray, axes: tuple[Axis, ...], out: np.ndarray) -> bool:
    """The class with the largest logit in every voxel, the first of equals, as export finds it.

    Where all neighbours of a voxel have the same winner by more than one step of float16, interpolation and rounding
    cannot change it, and nothing is interpolated. Elsewhere the winners of the neighbours are, and all classes only
    where the bound of the others says that one of them could win.

    Args:
        logits: float16 (C, z, y, x).
        axes: what each axis is interpolated from.
        out: unsigned integers (Z, Y, X).

    Returns:
        False if a logit is not finite; ``out`` is then worth nothing.
    """
    bits, table = _bits(logits), half_table()
    z, y, x = axes
    largest = _largest(bits)
    if largest >= 0x7C00:
        return False
    step = _step(float(table[largest]))
    plane = bits.shape[2:]
    seen: dict[int, tuple[np.ndarray, ...]] = {}  # planes of the logits, ranked
    tables = _tables(axes)
    pair = np.empty(plane, np.int16)
    known: tuple[int, int] | None = None
    for k in range(z.first.size):
        needed = (int(z.first[k]), int(z.second[k]))
        for source in needed:
            if source not in seen:
                for gone in [old for old in seen if old not in needed]:
                    del seen[gone]
                ranked = tuple(np.empty(plane, np.int32) for _ in range(3))
                _rank(*_contiguous(bits, source), *(part.reshape(-1) for part in ranked))
                seen[source] = ranked
        low, high = (seen[source] for source in needed)
        if needed != known:
            _unanimous(low, high, table, step, pair)
            known = needed
        _decide(bits, table, step, *tables, k, pair, low, high, out[k])
    return True


def _bits(logits: np.ndarray) -> np.ndarray:
    return logits.view(np.uint16)


def _contiguous(bits: np.ndarray, z: int) -> tuple[np.ndarray, int]:
    """An int16 array (C, z, voxels) and where the plane is in it: a copy of that plane if need be."""
    if not bits.flags.c_contiguous:
        bits, z = np.ascontiguousarray(bits[:, z : z + 1]), 0
    return bits.view(np.int16).reshape(*bits.shape[:2], -1), z


def _step(largest: float) -> float:
    """The distance of float16 numbers below the power of two above ``largest``, and a little more."""
    _, exponent = math.frexp(max(largest, 2.0**-14))
    return 2.0 ** (exponent - 11) * 1.0001


def _tables(axes: tuple[Axis, ...]) -> tuple[np.ndarray, ...]:
    return tuple(part for axis in axes for part in (axis.first, axis.second, axis.before, axis.after))


@_exact
def _largest(bits):
    """Bits of the largest absolute value; of one that is not finite 0x7C00 or more."""
    most = np.uint16(0)
    for c in range(bits.shape[0]):
        for z in range(bits.shape[1]):
            for y in range(bits.shape[2]):
                row = bits[c, z, y]
                for x in range(row.size):
                    most = max(most, row[x] & np.uint16(0x7FFF))
    return most


@_exact
def _rank(bits, z, first, second, third):
    """The three largest logits of every voxel of a plane of (C, z, voxels), as int32 of key and class.

    Keys, the upper 16 bits, are in the order of the floats; that of -0 is just below that of 0. The lower ones are less
    the higher the class is, so the first of equals is the largest.
    """
    classes, _, size = bits.shape
    for start in range(0, size, _TOGETHER):
        stop = min(start + _TOGETHER, size)
        first[start:stop] = np.int32(_LOWEST)
        second[start:stop] = np.int32(_LOWEST)
        third[start:stop] = np.int32(_LOWEST)
        for c in range(classes):
            name = np.int32(_CLASSES - c)
            _rank_class(bits[c, z, start:stop], name, first[start:stop], second[start:stop], third[start:stop])


@_exact
def _rank_class(bits, name, first, second, third):
    """One class more. Compiled to minima and maxima of many voxels at once, as long as the arrays are contiguous."""
    for x in range(bits.size):
        value = np.int32(bits[x])
        key = value ^ ((value >> np.int32(15)) & np.int32(0x7FFF))
        rest = np.int32((key << np.int32(16)) | name)
        best, runner = first[x], second[x]
        first[x] = max(best, rest)
        rest = min(best, rest)
        second[x] = max(runner, rest)
        third[x] = max(third[x], min(runner, rest))


@_exact
def _class(ranked):
    return _CLASSES - (ranked & np.int32(_CLASSES))


@_exact
def _value(ranked, table):
    """The logit of a key and class."""
    key = ranked >> np.int32(16)
    return table[np.uint16(key ^ ((key >> np.int32(15)) & np.int32(0x7FFF)))]


@_exact
def _unanimous(low, high, table, step, out):
    """Class that wins by more than a step in both planes, else ``_UNSURE``."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            winner = _class(low[0][y, x])
            sure = winner == _class(high[0][y, x])
            sure = sure and _value(low[0][y, x], table) - _value(low[1][y, x], table) > step
            sure = sure and _value(high[0][y, x], table) - _value(high[1][y, x], table) > step
            out[y, x] = winner if sure else _UNSURE


@_exact
def _at(bits, table, c, zs, ys, xs, zw, yw, xw):
    """The interpolated logit of a class, before rounding."""
    total = 0.0
    for i in range(2):
        for j in range(2):
            for k in range(2):
                total += ((table[bits[c, zs[i], ys[j], xs[k]]] * zw[i]) * yw[j]) * xw[k]
    return total


@_exact
def _to_half(value):
    """A float64 rounded to float16, halves to even; its magnitude is within float16's range."""
    _, exponent = math.frexp(value)
    quantum = 2.0 ** max(exponent - 11, -24)
    shift = 1.5 * 2.0**52 * quantum
    return (value + shift) - shift


@_exact
def _decide(bits, table, step, z0, z1, zb, za, y0, y1, yb, ya, x0, x1, xb, xa, k, pair, low, high, out):
    """The label of every voxel of plane ``k``."""
    classes = bits.shape[0]
    asked = np.empty(classes, np.int64)
    values = np.empty(classes, np.float64)
    named = np.zeros(classes, np.bool_)
    zs, zw = (z0[k], z1[k]), (zb[k], za[k])
    planes = (low, high)
    for j in range(out.shape[0]):
        ys, yw = (y0[j], y1[j]), (yb[j], ya[j])
        above, below = pair[ys[0]], pair[ys[1]]
        for i in range(out.shape[1]):
            a, b = x0[i], x1[i]
            winner = above[a]
            if winner >= 0 and winner == above[b] and winner == below[a] and winner == below[b]:
                out[j, i] = winner
                continue
            xs, xw = (a, b), (xb[i], xa[i])
            # 1. Whoever wins at a neighbour, or is second there within a step.
            count = 0
            for u in range(2):
                ranked = planes[u]
                for v in range(2):
                    for w in range(2):
                        y, x = ys[v], xs[w]
                        c = _class(ranked[0][y, x])
                        if not named[c]:
                            named[c] = True
                            asked[count] = c
                            count += 1
                        c = _class(ranked[1][y, x])
                        if not named[c] and (_value(ranked[0][y, x], table) - _value(ranked[1][y, x], table) <= step):
                            named[c] = True
                            asked[count] = c
                            count += 1
            # 2. No other class is above the interpolated largest of the others.
            bound = 0.0
            for u in range(2):
                ranked = planes[u]
                for v in range(2):
                    for w in range(2):
                        y, x = ys[v], xs[w]
                        rest = ranked[2][y, x] if named[_class(ranked[1][y, x])] else ranked[1][y, x]
                        bound += zw[u] * yw[v] * xw[w] * _value(rest, table)
            most = -np.inf
            for n in range(count):
                values[n] = _at(bits, table, asked[n], zs, ys, xs, zw, yw, xw)
                most = max(most, values[n])
                named[asked[n]] = False
            if bound >= most - step and count < classes:
                count = classes
                most = -np.inf
                for c in range(classes):
                    asked[c] = c
                    values[c] = _at(bits, table, c, zs, ys, xs, zw, yw, xw)
                    most = max(most, values[c])
            # 3. The first of those that are equal once rounded.
            chosen, reached = classes, -np.inf
            for n in range(count):
                if values[n] < most - step:
                    continue
                value = _to_half(values[n])
                if value > reached or (value == reached and asked[n] < chosen):
                    chosen, reached = asked[n], value
            out[j, i] = chosen


@_exact
def _interpolate(bits, table, z0, z1, zb, za, y0, y1, yb, ya, x0, x1, xb, xa, start, stop, out):
    classes, _, rows, columns = bits.shape
    low, high = np.empty((rows, columns), np.float64), np.empty((rows, columns), np.float64)
    p, q, r, s = np.empty(columns), np.empty(columns), np.empty(columns), np.empty(columns)
    wide = out.shape[3]
    line = np.empty(wide, np.float64)
    pattern = line.view(np.int64)
    half = (np.int64(1) << np.int64(41)) - np.int64(1)
    kept = ~((np.int64(1) << np.int64(42)) - np.int64(1))
    for c in range(classes):
        for k in range(start, stop):
            single = za[k] == 0
            near, far = bits[c, z0[k]], bits[c, z1[k]]
            for y in range(rows):
                for x in range(columns):
                    low[y, x] = table[near[y, x]] * zb[k]
                if not single:
                    for x in range(columns):
                        high[y, x] = table[far[y, x]] * za[k]
            for j in range(out.shape[2]):
                a, b, u, v = y0[j], y1[j], yb[j], ya[j]
                for x in range(columns):
                    p[x] = low[a, x] * u
                    q[x] = low[b, x] * v
                if single:
                    for i in range(wide):
                        total = p[x0[i]] * xb[i]
                        total += p[x1[i]] * xa[i]
                        total += q[x0[i]] * xb[i]
                        total += q[x1[i]] * xa[i]
                        line[i] = total
                else:
                    for x in range(columns):
                        r[x] = high[a, x] * u
                        s[x] = high[b, x] * v
                    for i in range(wide):
                        total = p[x0[i]] * xb[i]
                        total += p[x1[i]] * xa[i]
                        total += q[x0[i]] * xb[i]
                        total += q[x1[i]] * xa[i]
                        total += r[x0[i]] * xb[i]
                        total += r[x1[i]] * xa[i]
                        total += s[x0[i]] * xb[i]
                        total += s[x1[i]] * xa[i]
                        line[i] = total
                target = out[c, k - start, j]
                for i in range(wide):
                    small = (line[i] + _TO_STEP) - _TO_STEP
                    tiny = abs(line[i]) < _NORMAL
                    pattern[i] = (pattern[i] + ((pattern[i] >> np.int64(42)) & np.int64(1)) + half) & kept
                    target[i] = np.float32(small if tiny else line[i])
