"""Weights out of nnU-Net's checkpoints into a network that a training starts from."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnunet_calib.data.checkpoints import read_checkpoint
from nnunet_calib.data.errors import InputError
from nnunet_calib.training.settings import RefusedSettings

HEADS = ".seg_layers."
"""In the names of the weights that make the segmentation; nnU-Net's own rule for what depends on the labels."""


def load_weights(
    network: nn.Module, checkpoint: str, labels: Mapping[str, Any] | None = None
) -> tuple[tuple[int, ...], list[int]]:
    """Load every weight of an nnU-Net checkpoint, segmentation heads included.

    Where the checkpoint knows fewer classes than ``labels``, its heads are widened by `widened_heads`.

    Args:
        network: of the same architecture but for the number of classes, in place.
        checkpoint: nnU-Net's ``checkpoint_*.pth``; read with ``weights_only``.
        labels: of the network to be trained, as in ``dataset.json``; None: the checkpoint's.

    Returns:
        The axes that the checkpoint's training mirrored, and the channels of classes that it does not know.

    Raises:
        RefusedSettings: the file holds more than weights and plain values, or weights of another architecture or of
            classes that ``labels`` has not, or is no whole checkpoint.
    """
    try:
        content = read_checkpoint(checkpoint)
        weights = content["network_weights"]
        known = content.get("init_args", {}).get("dataset_json", {}).get("labels", labels)
        new: list[int] = []
        if labels is not None and list(known.items()) != list(labels.items()):  # regions are heads in their order
            weights = widened_heads(weights, known, labels, checkpoint)
            new = [i for i, name in enumerate(class_names(labels, checkpoint)) if name not in known]
        network.load_state_dict(weights)
    except InputError as error:
        raise RefusedSettings(str(error)) from error
    except (AttributeError, RuntimeError, TypeError) as error:
        raise RefusedSettings(
            f"{checkpoint} does not fit this network: {' '.join(str(error).split())[:300]}"
        ) from error
    return tuple(content.get("inference_allowed_mirroring_axes") or ()), new


def widened_heads(
    weights: Mapping[str, Tensor], known: Mapping[str, Any], labels: Mapping[str, Any], checkpoint: str
) -> dict[str, Tensor]:
    """Weights whose segmentation heads have a row for each class of ``labels``.

    Classes of the same name keep their row. A new class begins as background, and shares its probability:

        w_new = w_background,    b_new = b_background = b - log(n + 1)    for n new classes,

    so the probabilities of all other classes are those of before, until `new_classes` fits its row. Cermelli et al.,
    Modeling the background for incremental learning in semantic segmentation (MiB), CVPR 2020, section 3.3.

    Args:
        weights: of a checkpoint, by name.
        known: labels of the checkpoint, as in its ``dataset.json``.
        labels: of the network to be trained.
        checkpoint: its file, for messages.

    Raises:
        RefusedSettings: a class of ``known`` is not in ``labels``, or there are regions.
    """
    before, now = class_names(known, checkpoint), class_names(labels, checkpoint)
    if missing := [name for name in before if name not in now]:
        raise RefusedSettings(
            f"{checkpoint} knows a class {missing[0]!r} that this data set lacks; classes can be added, not left out"
        )
    rows = [before.index(name if name in before else "background") for name in now]
    new = len(now) - len(before)
    shared = [i for i, name in enumerate(now) if name == "background" or name not in before]
    widened = dict(weights)
    for name, weight in weights.items():
        if HEADS in name:
            widened[name] = weight[rows]
            if name.endswith(".bias"):
                widened[name][shared] -= math.log(new + 1)
    return widened


def class_names(labels: Mapping[str, Any], checkpoint: str) -> list[str]:
    """Names of the classes in the order of the network's channels.

    Args:
        labels: as in ``dataset.json``.
        checkpoint: its file, for the message.

    Raises:
        RefusedSettings: there are regions.
    """
    if any(not isinstance(value, int) for value in labels.values()):
        raise RefusedSettings(
            f"{checkpoint}: with regions, or other labels than this data set's, no class can be added"
        )
    return sorted((name for name in labels if name != "ignore"), key=lambda name: labels[name])
