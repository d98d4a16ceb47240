"""nnU-Net's checkpoints, read without running what a checkpoint could contain."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from nnunet_calib.data.errors import InputError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read nnU-Net's ``checkpoint_*.pth`` with ``weights_only``, on the CPU.

    Returns:
        Its content; ``network_weights`` is there.

    Raises:
        InputError: the file holds more than weights and plain values, or is no whole checkpoint.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        raise InputError(f"{path}: reading it safely needs torch 2.6 or newer, this is {torch.__version__}")
    try:
        # nnU-Net logs numpy numbers; their constructors are the only classes allowed besides torch's own.
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        content["network_weights"]
    except UnpicklingError as error:
        # Not in torch's words, which are many lines and advise to load the file without care.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{found[1]}, " if found else ""
        raise InputError(f"{path} holds {what}more than weights and numbers, and is not loaded") from error
    except (EOFError, LookupError, OSError, RuntimeError, TypeError) as error:
        raise InputError(f"{path} is not a whole checkpoint of nnU-Net; train it again") from error
    return content


def _numpy_scalars() -> list:
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float16", "float32", "float64")]
    # Under the names of numpy 1 and 2, for a checkpoint may be older than the numpy that reads it.
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [*((scalar, name) for name in names), np.dtype, *dtypes]
