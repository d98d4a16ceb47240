"""nnU-Net's own prediction, with features read on the way.

The logits are nnU-Net's, to the bit: nothing of how it computes, averages or exports them is changed. Features come
from the first, unmirrored forward pass of every window (mirrored views would blur left and right) and are averaged
over windows with nnU-Net's own Gaussian weights. Only projections of all voxels are kept, and features of a few.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.branch import BranchFeatures
from nnunet_calib.fewshot.network.features import DecoderFeatures
from nnunet_calib.fewshot.network.windows import Windows
from nnunet_calib.prediction.predictor import ModelPredictor

Reduce = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Prediction:
    """What one pass over a volume gives.

    Attributes:
        base: nnU-Net's logits, averaged over folds: (C, *S), on the CPU, of the type nnU-Net gives them.
        projected: of each fold float (R, *S), or what ``reduce`` made of them; empty if no projections were asked for.
        sampled: of each fold float32 (N, F) on the CPU; empty if no voxels were asked for.
    """

    base: Tensor
    projected: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)


class FeaturePredictor(ModelPredictor):
    """nnU-Net's predictor of a base model.

    Args:
        model: all its folds are used.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window, in patches.
        mirroring: nnU-Net's test-time augmentation, of the base logits.
        progress: show nnU-Net's progress bars.
        everything_on_device: keep results on the device while there is room.
    """

    def __init__(
        self,
        model: BaseModel,
        device: torch.device | str = "cpu",
        *,
        step_size: float = 0.5,
        mirroring: bool = True,
        progress: bool = False,
        everything_on_device: bool = True,
    ):
        super().__init__(
            model,
            device,
            step_size=step_size,
            mirroring=mirroring,
            progress=progress,
            everything_on_device=everything_on_device,
        )
        self.use_mirroring: bool = mirroring
        # Of a compiled network the stages cannot be seen.
        self.network: torch.nn.Module = getattr(self.network, "_orig_mod", model.network)
        self.features = DecoderFeatures(self.network)
        self._request: _Request | None = None
        self._windows: Windows | None = None
        self._adapters: Sequence[Mapping[str, Tensor]] | None = None

    @property
    def folds(self) -> int:
        """How many networks predict."""
        return len(self.list_of_parameters)

    def predict(
        self,
        data: Tensor,
        projections: Sequence[Tensor] | None = None,
        voxels: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> Prediction:
        """Predict a preprocessed volume.

        Args:
            data: float32 (channels, *S), S of three axes, as nnU-Net's preprocessor leaves it.
            projections: W of each fold, float (R, F).
            voxels: int64 (N, 3), indices into S of voxels whose features are wanted.
            reduce: called after each fold with its number, its logits (C, *S), on any device, and its projections
                (R, *S), on the CPU; what it returns is kept instead of the projections, whose memory is used again.

        Returns:
            Logits as ``nnUNetv2_predict`` computes them, and what was asked for.
        """
        if projections is not None and len(projections) != self.folds:
            raise ValueError(f"{len(projections)} projections for {self.folds} folds")
        self._request = _Request(projections, voxels, reduce, tuple(data.shape[1:]))
        try:
            base = self.predict_logits_from_preprocessed_data(data)
        finally:
            request, self._request, self._windows = self._request, None, None
        return Prediction(base, request.projected, request.sampled)

    def features_at(self, data: Tensor, voxels: Tensor) -> list[Tensor]:
        """Features float32 (N, F) of each fold at voxels (N, 3); one plain pass, without test-time augmentation."""
        with self._plain():
            return self.predict(data, None, voxels).sampled

    def project(self, data: Tensor, projections: Sequence[Tensor]) -> list[Tensor]:
        """Projections (R, *S) of each fold; one plain pass, without test-time augmentation."""
        with self._plain():
            return self.predict(data, projections).projected

    def project_adapted(self, data: Tensor, adapters: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Log odds (1, *S) of a branch beside each fold, as ``AdapterHead.trained``; one plain pass."""
        self._adapters = adapters
        try:
            return self.project(data, [torch.ones(1, 1)] * self.folds)
        finally:
            self._adapters = None

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        mirroring, self.use_mirroring = self.use_mirroring, False
        try:
            yield
        finally:
            self.use_mirroring = mirroring

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """One fold: nnU-Net's logits; the features of its windows go to the request."""
        base = super().predict_sliding_window_return_logits(input_image)
        if self._request is not None and self._windows is not None:
            self._request.finish(base, self._windows)
        return base

    def _internal_predict_sliding_window_return_logits(self, data: Tensor, slicers: list, do_on_device: bool = True):
        # A second call for the same fold, when nnU-Net ran out of the device's memory, starts again.
        self._windows = None
        if self._request is not None and self._request.wants_features:
            results = self.device if do_on_device else torch.device("cpu")
            patch = tuple(self.configuration_manager.patch_size)
            gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=results)
            # The windows come in this order: nnU-Net takes them from a queue that one thread fills.
            features: DecoderFeatures | BranchFeatures = self.features
            if self._adapters is not None:  # beside the weights of this fold, which the network has now
                regions = self.label_manager.has_regions
                features = BranchFeatures(self.network, self._adapters[self._request.fold], regions)
            request = self._request
            self._windows = Windows(
                features,
                [place[1:] for place in slicers],
                request.shape,
                data.shape[1:],
                gaussian.float(),
                None if request.projections is None else request.projections[request.fold],
                request.voxels,
                self.folds,
            )
        return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        if self._windows is None:
            return super()._internal_maybe_mirror_and_predict(x)
        with self._windows.features.first_forward() as stages:
            prediction = super()._internal_maybe_mirror_and_predict(x)
        self._windows.add(stages)
        return prediction


class _Request:
    """What is wanted of one volume, and what came of it, fold by fold."""

    def __init__(
        self,
        projections: Sequence[Tensor] | None,
        voxels: Tensor | None,
        reduce: Reduce | None,
        shape: tuple[int, ...],
    ):
        self.projections, self.voxels, self.reduce, self.shape = projections, voxels, reduce, shape
        self.projected: list[Tensor] = []
        self.sampled: list[Tensor] = []
        self.fold = 0

    @property
    def wants_features(self) -> bool:
        return self.projections is not None or self.voxels is not None

    def finish(self, base: Tensor, windows: Windows) -> None:
        """Take a fold's results; they are ordinary tensors, which can be part of a gradient's computation."""
        with torch.inference_mode(False), torch.no_grad():
            projected, sampled = windows.projected(), windows.sampled()
            if projected is not None:
                kept = projected if self.reduce is None else self.reduce(self.fold, base, projected)
                self.projected.append(kept.cpu())
            if sampled is not None:
                self.sampled.append(sampled)
        self.fold += 1
