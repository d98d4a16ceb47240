"""The loops of temperatures compiled by numba: half the time of numpy's. Import it only where it is wanted.

    p^a = 2^(a log2 p),    p = 2^e (1 + m)

with polynomials for log2(1 + m) and 2^f, so that the compiler makes vector instructions of all of it, which it does not
of calls of log and exp. The error is that of float32.
"""

from collections.abc import Callable

import numba
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from nnunet_calib.metrics.compiled import compiled


def _coefficients(function: Callable[[np.ndarray], np.ndarray], degree: int, low: float, high: float):
    """Of the polynomial through a function's values at Chebyshev's points, the constant first."""
    found = Chebyshev.interpolate(function, degree, [low, high]).convert(kind=Polynomial)
    return tuple(map(np.float32, found.coef))


_f, _i = np.float32, np.int32
_ONE, _HALF, _LEAST = _f(1), _f(0.5), _f(-126)  # the exponent of the smallest normal number
_ROOT, _MANTISSA = _f(0.5**0.5).view(_i), _i(23)  # bits
# The interval of m is that of mantissas from sqrt(1/2) to sqrt(2). No degree's points include 0, where both are 0/0.
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7, _A8, _A9 = _coefficients(
    lambda m: np.log2(1 + m) / m, 9, 0.5**0.5 - 1, 2**0.5 - 1
)
_B0, _B1, _B2, _B3, _B4, _B5 = _coefficients(lambda f: (np.exp2(f) - 1) / f, 5, -0.5, 0.5)


def raise_to(p: np.ndarray, powers: np.ndarray) -> None:
    """Raise probabilities to a power, in place; what would end below 2^-126 ends there.

    Args:
        p: float32 (C, N), quickest with contiguous rows, from 2^-126 to 1.
        powers: float32, one (shape ()) or of each voxel (N,); positive.
    """
    for row in p:
        if powers.ndim:
            _raise_each(row, powers)
        else:
            _raise_all(row, _f(powers))


def keeps_largest(before: np.ndarray, after: np.ndarray, rounding: float) -> bool:
    """Whether in every voxel the first class of the largest probability still has it, but for rounding.

    Args:
        before: float (C, N), quickest with contiguous rows.
        after: likewise.
        rounding: how far below the largest it may end.
    """
    largest, own, most = before[0].copy(), after[0].copy(), after[0].copy()
    for one, other in zip(before[1:], after[1:], strict=True):
        _follow(one, other, largest, own, most)
    return bool((own >= most - most.dtype.type(rounding)).all())


@numba.njit(inline="always")
def _power(p, a):
    bits = _f(p).view(_i)
    e = _i(bits - _ROOT) >> _MANTISSA
    m = _i(bits - _i(e << _MANTISSA)).view(_f) - _ONE
    log = _A9 * m + _A8
    log = log * m + _A7
    log = log * m + _A6
    log = log * m + _A5
    log = log * m + _A4
    log = log * m + _A3
    log = log * m + _A2
    log = log * m + _A1
    log = log * m + _A0
    t = (_f(e) + m * log) * a
    t = t if t > _LEAST else _LEAST
    whole = _f(np.floor(t + _HALF))
    f = t - whole
    more = _B5 * f + _B4
    more = more * f + _B3
    more = more * f + _B2
    more = more * f + _B1
    more = more * f + _B0
    return _i(_f(more * f + _ONE).view(_i) + _i(_i(whole) << _MANTISSA)).view(_f)


@compiled("contract")
def _raise_all(p, power):
    for i in range(p.size):
        p[i] = _power(p[i], power)


@compiled("contract")
def _raise_each(p, powers):
    for i in range(p.size):
        p[i] = _power(p[i], powers[i])


@compiled()
def _follow(before, after, largest, own, most):
    """One more class: the largest so far, what became of it, and the largest of what all became."""
    for i in range(before.size):
        x, y, best, its, top = before[i], after[i], largest[i], own[i], most[i]  # a load in a branch is no vector's
        larger = x > best
        largest[i] = x if larger else best
        own[i] = y if larger else its
        most[i] = y if y > top else top
