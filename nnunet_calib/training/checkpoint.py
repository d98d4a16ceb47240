"""Weights out of nnU-Net's checkpoints, without running what a checkpoint could contain."""

import re
from pickle import UnpicklingError

import numpy as np
import torch
from torch import nn

from nnunet_calib.training.settings import RefusedSettings


def load_weights(network: nn.Module, checkpoint: str) -> None:
    """Load every weight of an nnU-Net checkpoint, segmentation heads included.

    Args:
        network: of the same architecture, in place.
        checkpoint: nnU-Net's ``checkpoint_*.pth``; read with ``weights_only``.

    Raises:
        RefusedSettings: the file holds more than weights and plain values, or weights of another architecture, or is no
            whole checkpoint.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        raise RefusedSettings(f"finetune_from needs torch 2.6 or newer, this is {torch.__version__}")
    try:
        # nnU-Net logs numpy numbers; their constructors are the only classes allowed besides torch's own.
        with torch.serialization.safe_globals(_numpy_scalars()):
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["network_weights"]
    except UnpicklingError as error:
        # Not in torch's words, which are many lines and advise to load the file without care.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{found[1]}, " if found else ""
        raise RefusedSettings(f"{checkpoint} holds {what}more than weights and numbers, and is not loaded") from error
    except (EOFError, LookupError, OSError, RuntimeError, TypeError) as error:
        raise RefusedSettings(f"{checkpoint} is not a whole checkpoint of nnU-Net; train it again") from error
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise RefusedSettings(
            f"{checkpoint} does not fit this network: {' '.join(str(error).split())[:300]}"
        ) from error


def _numpy_scalars() -> list:
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float16", "float32", "float64")]
    # Under the names of numpy 1 and 2, for a checkpoint may be older than the numpy that reads it.
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [*((scalar, name) for name in names), np.dtype, *dtypes]
