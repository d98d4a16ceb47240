"""Local temperature scaling: a small network gives every voxel its own temperature.

    p(x) = softmax(z(x) / T(x)),    T = softplus(h(x) + k) / softplus(k),    k = log(e - 1)

h is a 3D network on z, and on the image if there is one; its last layer starts at zero, so T starts at exactly 1.
Ding et al., Local temperature scaling for probability calibration, ICCV 2021. Theirs is 2D, starts at T = 2 and can
give T = 1e-8, since it is relu(h + 1) of maps that start at 1. The order of the classes in a voxel stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nnunet_calib.posthoc.maps.calibrator import MAX_CHANNELS, Calibrator, check_numbers, probabilities, voxel_weights

if TYPE_CHECKING:
    from typing_extensions import Self

WIDTH = 8
"""Channels between the layers of the network."""

DILATIONS = (1, 2, 4)
"""Of its convolutions but the last, which looks at one voxel."""

_LARGEST = 1e3  # weight: those of a fit are of the order of 1; sums of products stay finite in float32
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
    margin = sum(DILATIONS)

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
        from nnunet_calib.posthoc.maps.local_network import train

        self.channels, self.notes = len(z), []
        state = train(
            z,
            inputs,
            target if self.multilabel else target[None],
            (w / w.mean())[None],
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            seed=self.seed,
            multilabel=self.multilabel,
        )
        self.parameters = [{"network": state, "image_channels": self.image_channels}]
        return self

    def temperature_map(self, log_probabilities: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
        """T of every voxel, float64 of shape S; computed in float32, exact to 1e-6."""
        from nnunet_calib.posthoc.maps.local_network import temperatures

        self._check_fitted(log_probabilities)
        maps = temperatures(self.parameters[0]["network"], self._inputs(np.asarray(log_probabilities), image))
        return maps.reshape(np.shape(log_probabilities)[1:])

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
        for layer in range(len(DILATIONS)):
            shapes |= {f"{2 * layer}.weight": (WIDTH, width, 3, 3, 3), f"{2 * layer}.bias": (WIDTH,)}
            width = WIDTH
        last = 2 * len(DILATIONS)
        shapes |= {f"{last}.weight": (1, WIDTH, 1, 1, 1), f"{last}.bias": (1,)}
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
