"""The network of local temperature scaling: trained, and used. Apart from `local`, so that its file needs no torch."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_calib.posthoc.maps.local import DILATIONS, WIDTH

_COLDEST = 1e-6  # temperature: a softplus far below 0 ends at 0


def train(
    z: np.ndarray,
    inputs: np.ndarray,
    truth: np.ndarray,
    weight: np.ndarray,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    multilabel: bool,
) -> dict[str, Any]:
    """Weights that give the smallest weighted mean NLL, by Adam.

    Args:
        z: float (C, *S), S being (z, y, x) or (B, z, y, x).
        inputs: float (channels, *S), what the network sees.
        truth: integer (1, *S), or bool (C, *S) with ``multilabel``.
        weight: float (1, *S).
        steps: of Adam.
        batch: patches in each.
        learning_rate: the first; it falls to 0 along a cosine.
        seed: of the network's start and the order of the patches.
        multilabel: sigmoid regions.

    Returns:
        The network's state, as lists.
    """
    patches, seen, weights = (_patches_first(_tensor(array, np.float32)) for array in (z, inputs, weight))
    classes = _patches_first(_tensor(truth, np.float32 if multilabel else np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(inputs))
        optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        order: list[int] = []
        for _ in range(steps):
            while len(order) < min(batch, len(patches)):
                order += torch.randperm(len(patches)).tolist()
            chosen, order = order[:batch], order[batch:]
            scaled = patches[chosen] / _temperature(network, seen[chosen])
            if multilabel:
                nll = functional.binary_cross_entropy_with_logits(scaled, classes[chosen], reduction="none")
            else:
                nll = functional.cross_entropy(scaled, classes[chosen][:, 0], reduction="none")[:, None]
            loss = (nll * weights[chosen]).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return {name: value.tolist() for name, value in network.state_dict().items()}


def temperatures(state: Mapping[str, Any], inputs: np.ndarray) -> np.ndarray:
    """T float64 (B, 1, z, y, x) of what the network sees, (channels, z, y, x) or (channels, B, z, y, x)."""
    network = _network(len(inputs))
    network.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    with torch.inference_mode():
        patches = _patches_first(torch.from_numpy(inputs)).split(1)
        return torch.cat([_temperature(network, patch) for patch in patches]).double().numpy()


def _tensor(array: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=dtype))


def _network(channels: int) -> nn.Sequential:
    """Three dilated convolutions and one voxel-wise, which is zero; every voxel sees ``margin`` voxels around it."""
    layers: list[nn.Module] = []
    for dilation in DILATIONS:
        convolution = nn.Conv3d(channels, WIDTH, 3, padding=dilation, dilation=dilation, padding_mode="replicate")
        layers += [convolution, nn.LeakyReLU(0.1)]
        channels = WIDTH
    last = nn.Conv3d(channels, 1, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, last)


def _temperature(network: nn.Module, inputs: Tensor) -> Tensor:
    """T (B, 1, z, y, x); 1 where the network says 0."""
    one = torch.tensor(math.log(math.e - 1))
    return (functional.softplus(network(inputs) + one) / functional.softplus(one)).clamp(min=_COLDEST)


def _patches_first(volumes: Tensor) -> Tensor:
    """(C, z, y, x) or (C, B, z, y, x) to (B, C, z, y, x)."""
    return volumes[None] if volumes.ndim == 4 else volumes.transpose(0, 1)
