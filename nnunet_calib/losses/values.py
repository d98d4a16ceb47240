"""Checks of the arguments that losses take; without torch, for what checks settings before it is imported."""

import sys
from collections.abc import Sequence

BORDERS = ("replicate", "background", "zero")
"""What lies beyond the edge of an image, for losses that look at neighbours: `nnunet_calib.losses.neighbours`."""

PRIORS = ("mean", "gaussian")
"""How they weigh neighbours."""


def number(name: str, value: float, minimum: float = 0.0, maximum: float = float("inf")) -> float:
    """``value`` as a float.

    Raises:
        ValueError: not a finite number within [minimum, maximum].
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or value > sys.float_info.max:
        allowed = f"of at least {minimum:g}" if maximum == float("inf") else f"from {minimum:g} to {maximum:g}"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return float(value)


def count(name: str, value: int) -> int:
    """``value`` if it is a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def flag(name: str, value: bool) -> bool:
    """``value`` if it is a bool.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def odd(name: str, value: int | Sequence[int]) -> int | Sequence[int]:
    """``value`` if it is a positive odd integer, or a list of them.

    Raises:
        ValueError: it is not.
    """
    sizes = value if isinstance(value, (list, tuple)) else [value]
    if not sizes or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 or k % 2 == 0 for k in sizes):
        raise ValueError(f"{name} must be a positive odd integer or one for each axis, got {value!r}")
    return value
