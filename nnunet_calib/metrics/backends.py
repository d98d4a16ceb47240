"""What the numbers are computed with: the same numbers, sooner or on a graphics card."""

import importlib.util

BACKENDS = ("auto", "numpy", "numba", "torch")


def available(backend: str) -> str:
    """The backend to use: the one asked for; for ``auto`` the faster of numba and numpy that is installed.

    Raises:
        ValueError: there is no such backend.
        ImportError: numba is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("auto", "numba"):
        if importlib.util.find_spec("numba") is not None:
            return "numba"
        if backend == "numba":
            raise ImportError('numba is not installed: pip install "nnunet-calib[fast]", or choose another backend')
        return "numpy"
    return backend
