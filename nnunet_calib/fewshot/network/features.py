"""Features of a voxel: the last decoder stages of the network, each of length 1, side by side.

    F(v) = concat_s  up(f_s / |f_s|)(v),      P(v) = W F(v) = sum_s  up(W_s f_s / |f_s|)(v)

f_s is the output of decoder stage s, ``up`` linear interpolation to the patch. Both are linear, so projections are
computed at each stage's own resolution and only they are interpolated.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_calib.data.errors import InputError

STAGES = 3
_SMALLEST = 1e-12  # a voxel where every feature is 0 has the feature vector 0


class DecoderFeatures:
    """Reads the last decoder stages of a network while it predicts.

    Args:
        network: nnU-Net's plain or residual encoder U-Net, or another with ``decoder.stages`` and
            ``decoder.seg_layers``.

    Attributes:
        channels: features of each stage, coarsest first.
        size: their sum F.

    Raises:
        InputError: a network without such a decoder.
    """

    def __init__(self, network: nn.Module):
        check_decoder(network, type(network).__name__)
        decoder: nn.Module = network.decoder  # type: ignore[assignment]
        self._stages = list(decoder.stages)[-STAGES:]  # type: ignore[arg-type]
        layers = list(decoder.seg_layers)[-STAGES:]  # type: ignore[arg-type]
        self.channels = tuple(int(layer.in_channels) for layer in layers)
        self.size = sum(self.channels)

    @contextlib.contextmanager
    def first_forward(self) -> Iterator[list[Tensor]]:
        """Within it, the first forward pass fills the list with the stages (B, C_s, *S_s), coarsest first.

        Later passes add nothing: those of nnU-Net's test-time augmentation see mirrored patches.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if len(seen) < len(self._stages):
                seen.append(output)

        handles = [stage.register_forward_hook(keep) for stage in self._stages]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def project(self, stages: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> Tensor:
        """Projections P = W F of a patch.

        Args:
            stages: (B, C_s, *S_s) from ``first_forward``, any float type.
            weight: W, float32 (R, F), on the same device.
            size: of the patch.

        Returns:
            float32 (B, R, *size).
        """
        total: Tensor | None = None
        with full_precision(weight):
            for stage, part in zip(stages, weight.split(self.channels, dim=1), strict=True):
                features = stage.float()
                low = (part @ features.flatten(2)).unflatten(2, features.shape[2:]).div_(_length(features))
                high = _upsampled(low, size)
                total = high if total is None else total.add_(high)
        assert total is not None
        return total

    def at(self, stages: Sequence[Tensor], voxels: Tensor, size: Sequence[int]) -> Tensor:
        """Features F of some voxels of a patch.

        Args:
            stages: of one patch, (1, C_s, *S_s).
            voxels: int64 (N, axes), indices into the patch.
            size: of the patch.

        Returns:
            float32 (N, F).
        """
        axes = len(size)
        # The corners of the patch are at -1 and 1, whatever the resolution of a stage.
        place = (2 * voxels.float() + 1) / torch.tensor(size, dtype=torch.float32, device=voxels.device) - 1
        grid = place.flip(1).reshape(1, -1, *[1] * (axes - 1), axes)
        parts = []
        with full_precision(stages[0]):
            for stage in stages:
                if stage.shape[2:] == torch.Size(size):
                    chosen = stage[0].movedim(0, -1)[voxels.unbind(1)].float()
                    parts.append(functional.normalize(chosen, dim=1, eps=_SMALLEST))
                    continue
                features = stage.float()
                features = features / _length(features)
                sampled = functional.grid_sample(
                    features, grid, mode="bilinear", padding_mode="border", align_corners=False
                )
                parts.append(sampled.reshape(features.shape[1], -1).T)
        return torch.cat(parts, dim=1)


def check_decoder(network: nn.Module, name: str) -> None:
    """Refuse a network whose features cannot be read.

    Raises:
        InputError: it has no ``decoder`` with ``stages`` and ``seg_layers``.
    """
    decoder = getattr(network, "decoder", None)
    if not all(isinstance(getattr(decoder, part, None), nn.ModuleList) for part in ("stages", "seg_layers")):
        raise InputError(
            f"the network of {name} has no decoder.stages and decoder.seg_layers to read features from; "
            "use a model with nnU-Net's plain or residual encoder U-Net"
        )


def _upsampled(low: Tensor, size: Sequence[int]) -> Tensor:
    """(B, R, *S) interpolated linearly to a size."""
    # an axis at a time, as products with small matrices: in a third of the time of torch's own on the CPU
    for axis in reversed(range(len(size))):
        here = axis + 2
        if low.shape[here] == size[axis]:
            continue
        one_hot = torch.eye(low.shape[here], device=low.device)[None]
        matrix = functional.interpolate(one_hot, size[axis], mode="linear")[0].T
        if here + 1 == low.ndim:
            low = low @ matrix.T
        else:
            after = low.shape[here + 1 :]
            low = (matrix @ low.flatten(here + 1)).unflatten(here + 1, after)
    return low


def _length(features: Tensor) -> Tensor:
    """|f| (B, 1, *S) of (B, C, *S)."""
    # channel by channel: torch's own norm over a dimension that is not the last takes twenty times as long on the CPU
    squares = features[:, :1].square()
    for channel in range(1, features.shape[1]):
        one = features[:, channel : channel + 1]
        squares.addcmul_(one, one)
    return squares.sqrt_().clamp_(min=_SMALLEST)


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager:
    """nnU-Net predicts in half precision on CUDA; features are float32."""
    if tensor.device.type == "cuda":
        return torch.autocast("cuda", enabled=False)
    return contextlib.nullcontext()
