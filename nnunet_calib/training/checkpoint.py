"""Weights out of nnU-Net's checkpoints into a network that a training starts from."""

from torch import nn

from nnunet_calib.data.checkpoints import read_checkpoint
from nnunet_calib.data.errors import InputError
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
    try:
        network.load_state_dict(read_checkpoint(checkpoint)["network_weights"])
    except InputError as error:
        raise RefusedSettings(str(error)) from error
    except (RuntimeError, TypeError) as error:
        raise RefusedSettings(
            f"{checkpoint} does not fit this network: {' '.join(str(error).split())[:300]}"
        ) from error
