"""Adapters: a branch beside the frozen decoder that learns the new structure (for three volumes or more).

The last two decoder stages are copied; in the copy every convolution W gets a parallel one of a single voxel,

    y = W * x + A x,        A = 0 at the start, W frozen

and A, the scale and shift of the norms and one row of logits for the new structure are trained. At the start the copy
gives the base logits z_c exactly. The base network itself is not touched: what it predicts stays as it is. With
p = softmax(z, s) over base classes and novel structure, y the annotation and q the frozen network's softmax,

    L = Dice(p_novel, y) + CE(p_novel, y) + l_KD mean_{y=0} KL(q || softmax(z)) + l_size [ |e| - margin ]_+
    e = (V - V_hat) / max(V, V_hat),    V_hat = sum_v p_novel(v) over an image without annotation, V its expected volume

The novel logit is s - logsumexp_c z_c, the log-odds of the structure against all base classes.

Silva-Rodriguez et al., Towards foundation models and few-shot parameter-efficient fine-tuning for volumetric organ
segmentation, MedAGI 2023 and MedIA 2025 (parallel adapters, norm affine, Dice on few volumes, size constraint with
margin 0.3 and weight 0.1 from half of the steps on). Self-distillation of the base classes: Hajimiri et al., DIaM,
CVPR 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, conv3d, kl_div, softplus
from torch.nn.modules.conv import _ConvNd

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.heads.base import Head, check_sample

if TYPE_CHECKING:
    from typing_extensions import Self


class ParallelAdapter(nn.Module):
    """``y = conv(x) + A x`` with A of one voxel, zero at the start.

    Args:
        conv: of stride 1 whose padding keeps the size; frozen.
    """

    def __init__(self, conv: _ConvNd):
        super().__init__()
        self.conv = conv
        self.weight = nn.Parameter(conv.weight.new_zeros(*conv.weight.shape[:2], *[1] * len(conv.kernel_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C_in, *S) to (B, C_out, *S)."""
        pointwise = conv3d if self.weight.ndim == 5 else conv2d
        return self.conv(x) + pointwise(x, self.weight)


class AdapterBranch(nn.Module):
    """A copy of a decoder's last two stages with adapters, and a row of logits for the new structure.

    Args:
        decoder: nnU-Net's ``UNetDecoder`` of a trained network, with two stages or more; copied, not changed.
        multilabel: the base classes are sigmoid regions; the novel logit then stands alone.

    Raises:
        InputError: a decoder of another build.
    """

    def __init__(self, decoder: nn.Module, multilabel: bool = False):
        super().__init__()
        stages, upsampling, rows = (
            list(getattr(decoder, name, ())) for name in ("stages", "transpconvs", "seg_layers")
        )
        if min(len(stages), len(upsampling), len(rows)) < 2:
            raise InputError("adapters need nnU-Net's decoder with two stages or more; use another head")
        self.multilabel = multilabel
        self.early, self.late = (_adapted(stage) for stage in (stages[-2], stages[-1]))
        self.up, self.base = copy.deepcopy(upsampling[-1]), copy.deepcopy(rows[-1])
        for part in (self.up, self.base):
            part.requires_grad_(False)
        self.novel = type(self.base)(self.base.in_channels, 1, 1)
        nn.init.zeros_(self.novel.weight)
        nn.init.zeros_(self.novel.bias)

    def forward(self, early: torch.Tensor, late: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits from what enters the two stages in the base network.

        Args:
            early: input of the last stage but one (B, C, *S).
            late: input of the last stage (B, C', *S'): the upsampled first half is replaced by the branch's own.

        Returns:
            Base logits z (B, K, *S') and the novel row s (B, 1, *S').
        """
        upsampled = self.up(self.early(early))
        x = self.late(torch.cat([upsampled, late[:, upsampled.shape[1] :]], dim=1))
        return self.base(x), self.novel(x)

    def logit(self, early: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """Log-odds of the new structure (B, 1, *S')."""
        base, novel = self(early, late)
        return against_base(base, novel, self.multilabel)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: adapters, norms and the novel row; all that a task file must hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what ``trained`` gave.

        Raises:
            InputError: it is of another network.
        """
        own = self.trained()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise InputError("the adapters of this task belong to a network of another build")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class AdapterHead(Head):
    """What is left to do for a head when a branch has given its log odds as the one feature of a voxel.

    Args:
        trained: of the branch, as ``AdapterBranch.trained``; empty until ``with_branch``.
    """

    key = "adapter"

    def __init__(self, trained: Mapping[str, torch.Tensor] | None = None):
        self.trained = dict(trained or {})
        self.projections = torch.ones(1, 1)

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        position: torch.Tensor,
        chunk: torch.Tensor,
        support: torch.Tensor,
    ) -> AdapterHead:
        """As ``Head.fit``, of features (N, 1): the fit was the branch's."""
        check_sample(features, target, weight, position, chunk, support)
        if features.shape[1] != 1:
            raise ValueError("adapters take the log odds of a branch as their one feature")
        return cls()

    def logit(self, projected: torch.Tensor, position: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """As ``Head.logit``; the same in all chunks."""
        return projected[:, 0]

    def state(self) -> dict[str, torch.Tensor]:
        """As ``Head.state``."""
        return {name: part.detach().cpu().contiguous() for name, part in self.trained.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Self:
        """As ``Head.from_state``."""
        if "novel.weight" not in state:
            raise ValueError("no adapters in it")
        return cls(state)


class BranchFeatures:
    """The log odds of a branch in the place of the features of a decoder.

    Args:
        network: the base, with the weights that the branch was trained beside.
        trained: of the branch.
        multilabel: the base classes are sigmoid regions.

    Attributes:
        size: 1.
    """

    size = 1

    def __init__(self, network: nn.Module, trained: Mapping[str, torch.Tensor], multilabel: bool = False):
        self._decoder: nn.Module = network.decoder  # type: ignore[assignment]
        self._branch = AdapterBranch(self._decoder, multilabel).eval()
        self._branch.load_trained(trained)

    @contextmanager
    def first_forward(self) -> Iterator[list[torch.Tensor]]:
        """As ``DecoderFeatures.first_forward``: what entered the last two stages the first time."""
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(seen) < 2:
                seen.append(inputs[0])

        last_two = list(self._decoder.stages)[-2:]  # type: ignore[arg-type]
        hooks = [stage.register_forward_pre_hook(keep) for stage in last_two]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def project(self, stages: Sequence[torch.Tensor], weight: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """As ``DecoderFeatures.project``, (B, R, *size) with W (R, 1)."""
        early, late = (stage.float() for stage in stages)
        logit = self._branch.logit(early, late)
        return logit * weight.to(logit).reshape(1, -1, *[1] * (logit.ndim - 2))

    def at(self, stages: Sequence[torch.Tensor], voxels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """As ``DecoderFeatures.at``, (N, 1)."""
        logit = self.project(stages, torch.ones(1, 1), size)[0, 0]
        return logit[tuple(voxels.unbind(1))][:, None]


def against_base(base: torch.Tensor, novel: torch.Tensor, multilabel: bool = False) -> torch.Tensor:
    """``s - logsumexp_c z_c`` over the class axis, (B, 1, *S); of regions s itself."""
    return novel if multilabel else novel - torch.logsumexp(base, dim=1, keepdim=True)


def _adapted(stage: nn.Module) -> nn.Module:
    """A copy of which only parallel adapters and the norms' scale and shift are trained."""
    stage = copy.deepcopy(stage)
    stage.requires_grad_(False)
    wrapped: dict[nn.Module, ParallelAdapter] = {}
    # nnU-Net's blocks hold every convolution twice, by its name and in a sequence: both must become the same adapter
    for parent in list(stage.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _ConvNd):
                setattr(parent, name, wrapped.setdefault(child, ParallelAdapter(child)))
    for module in stage.modules():
        if (
            isinstance(module, nn.modules.instancenorm._InstanceNorm | nn.modules.batchnorm._BatchNorm)
            and module.affine
        ):
            module.requires_grad_(True)
    return stage


@contextmanager
def stage_inputs(decoder: nn.Module) -> Iterator[list[torch.Tensor | None]]:
    """A list that holds, after each forward pass of the network, what entered the last two decoder stages."""
    seen: list[torch.Tensor | None] = [None, None]

    def keeper(which: int):
        def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[which] = inputs[0]

        return keep

    last_two = list(decoder.stages)[-2:]  # type: ignore[arg-type]
    hooks = [stage.register_forward_pre_hook(keeper(which)) for which, stage in enumerate(last_two)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class AdapterSettings:
    """How a branch is trained.

    Attributes:
        steps: of the optimiser.
        batch: crops in a step, half of them around a voxel of the structure.
        learning_rate: of AdamW, falling to 0 as a half cosine.
        distillation: l_KD.
        size_weight: l_size.
        size_margin: relative error of the volume that is free.
        size_from: share of the steps before the volume counts.
        seed: of the crops.
    """

    steps: int = 200
    batch: int = 2
    learning_rate: float = 3e-3
    distillation: float = 1.0
    size_weight: float = 0.1
    size_margin: float = 0.3
    size_from: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class AnnotatedImage:
    """A support as the network sees it.

    Attributes:
        image: preprocessed, float32 (C, *S), at least a patch large.
        target: bool (*S), the structure.
        valid: bool (*S), the voxels that count.
    """

    image: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor


def fit_adapters(
    network: nn.Module,
    supports: Sequence[AnnotatedImage],
    patch: Sequence[int],
    unlabelled: Sequence[tuple[torch.Tensor, float]] = (),
    settings: AdapterSettings | None = None,
    multilabel: bool = False,
) -> AdapterBranch:
    """Train a branch on k supports.

    Args:
        network: the base, with ``decoder`` (deep supervision off); its weights are left as they are.
        supports: at least one with a voxel of the structure.
        patch: voxels, the patch size the network was trained with.
        unlabelled: images as of a support, and the volume of the structure expected there, in voxels.
        settings: the defaults if None.
        multilabel: the base classes are sigmoid regions.

    Raises:
        InputError: no support has a voxel of the structure.
    """
    settings = settings or AdapterSettings()
    usable = [support for support in supports if support.target.any()]
    if not usable:
        raise InputError("no support has a voxel of the structure")
    decoder: nn.Module = network.decoder  # type: ignore[assignment]
    branch = AdapterBranch(decoder, multilabel).to(next(network.parameters()).device)
    optimizer = torch.optim.AdamW(branch.trained().values(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    generator = np.random.default_rng(settings.seed)
    sizes_from = round(settings.size_from * settings.steps)
    every = max(1, round(len(usable) / settings.batch))  # once an epoch, as the authors do
    was_training = network.training
    network.eval()
    with stage_inputs(decoder) as inputs:
        for step in range(settings.steps):
            image, target, valid = _crops(usable, patch, settings.batch, generator)
            optimizer.zero_grad()
            with torch.no_grad():
                frozen = network(image)
            _loss(branch(*_both(inputs)), frozen, target, valid, settings.distillation, multilabel).backward()
            if unlabelled and step >= sizes_from and step % every == 0:
                query, expected = unlabelled[(step // every) % len(unlabelled)]
                _pull_volume(network, branch, inputs, query, expected, patch, settings)
            nn.utils.clip_grad_norm_(branch.trained().values(), 12.0)  # nnU-Net's own bound
            optimizer.step()
            schedule.step()
    network.train(was_training)
    return branch.eval()


def _loss(
    logits: tuple[torch.Tensor, torch.Tensor],
    frozen: torch.Tensor,
    target: torch.Tensor,
    valid: torch.Tensor,
    distillation: float,
    multilabel: bool,
) -> torch.Tensor:
    """Dice + CE of the structure, and the divergence of the base classes where it is not."""
    base, novel = logits
    s = against_base(base, novel, multilabel)
    p, y, counted = torch.sigmoid(s), target.float(), valid.float()
    overlap = (p * y * counted).sum()
    dice = 1 - (2 * overlap + 1) / ((p * counted).sum() + (y * counted).sum() + 1)
    cross_entropy = (counted * (softplus(s) - y * s)).sum() / counted.sum().clamp(min=1)
    others = counted * (1 - y)
    if multilabel:
        q = torch.sigmoid(frozen)
        # KL of Bernoulli variables up to the entropy of q, which no parameter changes
        divergence = (softplus(base) - q * base).mean(dim=1, keepdim=True)
    else:
        divergence = kl_div(base.log_softmax(dim=1), frozen.log_softmax(dim=1), reduction="none", log_target=True)
        divergence = divergence.sum(dim=1, keepdim=True)
    kept = (others * divergence).sum() / others.sum().clamp(min=1)
    return dice + cross_entropy + distillation * kept


def _pull_volume(
    network: nn.Module,
    branch: AdapterBranch,
    inputs: list[torch.Tensor | None],
    image: torch.Tensor,
    expected: float,
    patch: Sequence[int],
    settings: AdapterSettings,
) -> None:
    """Add the gradient of the size term of one image; tile by tile, for a volume's graph would not fit."""
    tiles = _tiles(image.shape[1:], patch)

    def probability(corner: tuple[int, ...], shares: torch.Tensor) -> torch.Tensor:
        place = (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
        with torch.no_grad():
            network(image[place][None])
        return (torch.sigmoid(branch.logit(*_both(inputs)))[0, 0] * shares).sum()

    with torch.no_grad():
        predicted = sum(float(probability(corner, shares)) for corner, shares in tiles)
    error = (expected - predicted) / max(expected, predicted, 1.0)
    if abs(error) <= settings.size_margin:
        return
    # Slope of |e| at the predicted volume, the denominator held as the authors hold it.
    slope = -settings.size_weight * math.copysign(1.0, error) / max(expected, predicted, 1.0)
    for corner, shares in tiles:
        (slope * probability(corner, shares)).backward()


def _tiles(shape: Sequence[int], patch: Sequence[int]) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Corners of patches that cover an image, each with the voxels that are its own (float, patch)."""
    corners = [
        sorted({min(start, size - width) for start in range(0, size, width)})
        for size, width in zip(shape, patch, strict=True)
    ]
    free = torch.ones(tuple(shape))
    tiles = []
    for corner in np.stack(np.meshgrid(*corners, indexing="ij"), axis=-1).reshape(-1, len(patch)).tolist():
        here = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        tiles.append((tuple(corner), free[here].clone()))
        free[here] = 0
    return tiles


def _crops(
    supports: Sequence[AnnotatedImage], patch: Sequence[int], batch: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (B, C, *patch), targets and valid masks (B, 1, *patch); every other crop around the structure."""
    drawn = []
    for i in range(batch):
        support = supports[int(generator.integers(len(supports)))]
        shape = support.target.shape
        if i % 2 == 0:
            voxels = support.target.nonzero()
            centre = voxels[generator.integers(len(voxels))].tolist()
        else:
            centre = [int(generator.integers(size)) for size in shape]
        here = tuple(
            slice(corner := int(np.clip(c - p // 2, 0, size - p)), corner + p)
            for c, p, size in zip(centre, patch, shape, strict=True)
        )
        channels = (slice(None), *here)
        drawn.append((support.image[channels], support.target[here][None], support.valid[here][None]))
    image, target, valid = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return image, target, valid


def _both(inputs: list[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    early, late = inputs
    assert early is not None, "the network has not run"
    assert late is not None
    return early, late
