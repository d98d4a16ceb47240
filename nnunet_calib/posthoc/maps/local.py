"""Local temperature scaling: a small network gives every voxel its own temperature.

    p(x) = softmax(z(x) / T(x)),    T = softplus(h(x) + k) / softplus(k),    k = log(e - 1)

h is a 3D network on z, and on the image if there is one; its last layer starts at zero, so T starts at exactly 1.
Ding et al., Local temperature scaling for probability calibration, ICCV 2021. Theirs is 2D, starts at T = 2 and can
give T = 1e-8, since it is relu(h + 1) of maps that start at 1. The order of the classes in a voxel stays.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_calib.posthoc.maps.calibrator import MAX_CHANNELS, Calibrator, check_numbers, probabilities, voxel_weights

if TYPE_CHECKING:
    from typing_extensions import Self

_WIDTH = 8
_DILATIONS = (1, 2, 4)
_LARGEST = 1e3  # weight: those of a fit are of the order of 1; sums of products stay finite in float32
_COLDEST = 1e-6  # temperature: a softplus far below 0 ends at 0
_LEAST, _SCALE = -16.0, 8.0  # log p as the network sees it: floors of float16, and numbers of the order of 1


class LocalTemperature(Calibrator):
    """One temperature for each voxel.

    Volumes, or equal patches of volumes, are needed, not samples of voxels: S is (z, y, x) or (B, z, y, x).

    Args:
        multilabel: sigmoid regions; they share the temperature of a voxel.
        image_channels: image channels that ``fit`` and ``apply`` are given too, each of about unit variance.
        steps: of Adam.
        batch: patches in each.
        learning_rate: the first; it falls to 0 along a cosine.
        seed: of the network's start and the order of the patches.
    """

    key = "local"
    keeps_labels = True
    keeps_order = True
    shared_by_regions = True
    margin = sum(_DILATIONS)

    def __init__(
        self,
        *,
        multilabel: bool = False,
        image_channels: int = 0,
        steps: int = 300,
        batch: int = 4,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ):
        super().__init__(multilabel=multilabel)
        if min(steps, batch) < 1 or image_channels < 0 or not 0 < learning_rate < np.inf:
            raise ValueError("steps, batch and learning_rate must be positive")
        self.image_channels, self.steps, self.batch = image_channels, steps, batch
        self.learning_rate, self.seed = learning_rate, seed

    @classmethod
    def _names(cls):
        return ("network", "image_channels")

    def fit(
        self,
        log_probabilities: np.ndarray,
        target: np.ndarray,
        valid: np.ndarray | None = None,
        *,
        weights: np.ndarray | None = None,
        image: np.ndarray | None = None,
    ) -> Self:
        """Train the network; arguments as ``Calibrator.fit``, S being (z, y, x) or (B, z, y, x).

        Args:
            log_probabilities: float (C, *S).
            target: integer (*S), or bool (C, *S).
            valid: bool (*S) or None.
            weights: float (*S) or None.
            image: float (image_channels, *S).

        Raises:
            ValueError: shapes or values that do not fit, or no voxel that counts.
        """
        z, target = np.asarray(log_probabilities), np.asarray(target)
        self._voxels(z, target, valid, weights)  # for its checks
        inputs = self._inputs(z, image)
        w = voxel_weights(z.shape[1:], valid, weights)
        patches, seen = (_patches_first(torch.from_numpy(np.asarray(a, dtype=np.float32))) for a in (z, inputs))
        truth = torch.from_numpy(target.astype(np.float32 if self.multilabel else np.int64))
        truth = _patches_first(truth if self.multilabel else truth[None])
        voxel_weight = _patches_first(torch.from_numpy((w / w.mean()).astype(np.float32))[None])
        self.channels, self.notes = len(z), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = _network(len(inputs))
            self._train(network, patches, seen, truth, voxel_weight)
        state = {name: value.tolist() for name, value in network.state_dict().items()}
        self.parameters = [{"network": state, "image_channels": self.image_channels}]
        return self

    def temperature_map(self, log_probabilities: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
        """T of every voxel, float64 of shape S; computed in float32, exact to 1e-6."""
        self._check_fitted(log_probabilities)
        network = _network(self.channels + self.image_channels if self.channels else 0)
        network.load_state_dict({name: torch.tensor(v) for name, v in self.parameters[0]["network"].items()})
        inputs = _patches_first(torch.from_numpy(self._inputs(np.asarray(log_probabilities), image)))
        with torch.inference_mode():
            maps = torch.cat([_temperature(network, patch) for patch in inputs.split(1)])
        return maps.double().numpy().reshape(np.shape(log_probabilities)[1:])

    def apply(self, log_probabilities: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
        """Calibrated probabilities float64 (C, *S); arguments as ``fit``.

        Raises:
            ValueError: not fitted, or fitted to another number of channels.
        """
        z = np.asarray(log_probabilities, dtype=np.float64) / self.temperature_map(log_probabilities, image)
        return probabilities(z, multilabel=self.multilabel)

    def _check_works(self) -> None:
        self.image_channels = int(self.parameters[0]["image_channels"])
        assert self.channels is not None
        shape = (1, 2, 2)
        tried = self.temperature_map(np.zeros((self.channels, *shape)), np.zeros((self.image_channels, *shape)))
        if not np.isfinite(tried).all():
            raise ValueError("weights that make no temperature")

    def _check_parameters(self, parameters, classes):
        images, state = parameters["image_channels"], parameters["network"]
        if type(images) is not int or not 0 <= images <= MAX_CHANNELS:
            raise ValueError("image_channels is no number of channels")
        width: int = (self.channels or 0) + images
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(len(_DILATIONS)):
            shapes |= {f"{2 * layer}.weight": (_WIDTH, width, 3, 3, 3), f"{2 * layer}.bias": (_WIDTH,)}
            width = _WIDTH
        last = 2 * len(_DILATIONS)
        shapes |= {f"{last}.weight": (1, _WIDTH, 1, 1, 1), f"{last}.bias": (1,)}
        if not isinstance(state, dict) or state.keys() != shapes.keys():
            raise ValueError("not the layers of this network")
        for name, shape in shapes.items():
            if np.abs(check_numbers(state[name], shape)).max() > _LARGEST:
                raise ValueError("weights that make no temperature")

    def _inputs(self, z: np.ndarray, image: np.ndarray | None) -> np.ndarray:
        """What the network sees: float32 (C + image channels, *S)."""
        if z.ndim not in (4, 5):
            raise ValueError(f"volumes (C, z, y, x) or patches (C, B, z, y, x) are needed, not {z.shape}")
        if not self.multilabel:
            z = z - z.max(axis=0)
        seen = (z.astype(np.float32).clip(_LEAST, -_LEAST)) / _SCALE
        images = np.empty((0, *z.shape[1:])) if image is None else np.asarray(image)
        if images.shape != (self.image_channels, *z.shape[1:]):
            raise ValueError(f"image {images.shape} does not fit {self.image_channels} channels of {z.shape[1:]}")
        return np.concatenate([seen, images.astype(np.float32)])

    def _train(self, network: nn.Module, z: Tensor, inputs: Tensor, truth: Tensor, weight: Tensor) -> None:
        """Adam on the weighted mean NLL; patches first, channels second."""
        optimiser = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        order: list[int] = []
        for _ in range(self.steps):
            while len(order) < min(self.batch, len(z)):
                order += torch.randperm(len(z)).tolist()
            chosen, order = order[: self.batch], order[self.batch :]
            scaled = z[chosen] / _temperature(network, inputs[chosen])
            if self.multilabel:
                nll = functional.binary_cross_entropy_with_logits(scaled, truth[chosen], reduction="none")
            else:
                nll = functional.cross_entropy(scaled, truth[chosen][:, 0], reduction="none")[:, None]
            loss = (nll * weight[chosen]).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()


def _network(channels: int) -> nn.Sequential:
    """Three dilated convolutions and one voxel-wise, which is zero; every voxel sees ``margin`` voxels around it."""
    layers: list[nn.Module] = []
    for dilation in _DILATIONS:
        convolution = nn.Conv3d(channels, _WIDTH, 3, padding=dilation, dilation=dilation, padding_mode="replicate")
        layers += [convolution, nn.LeakyReLU(0.1)]
        channels = _WIDTH
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
