"""Compilation by numba, which is optional: imported only by modules that are themselves imported on request."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(*freedoms: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call and keep the machine code on disk, where any folder can be written to.

    Args:
        freedoms: what the compiler may take for granted of floats (numba's ``fastmath``), none unless given.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": set(freedoms)}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache folder
            return numba.njit(**options)(function)

    return decorate
