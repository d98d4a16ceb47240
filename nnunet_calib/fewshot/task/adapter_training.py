"""The training of adapters on a few annotated volumes.

With p = softmax(z, s) over base classes and novel structure, y the annotation and q the frozen network's softmax,

    L = Dice(p_novel, y) + CE(p_novel, y) + l_KD mean_{y=0} KL(q || softmax(z)) + l_size [ |e| - margin ]_+
    e = (V - V_hat) / max(V, V_hat),    V_hat = sum_v p_novel(v) over an image without annotation, V its expected volume

Silva-Rodriguez et al., MedAGI 2023 and MedIA 2025 (Dice on few volumes, size constraint with margin 0.3 and weight 0.1
from half of the steps on). Self-distillation of the base classes: Hajimiri et al., DIaM, CVPR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import kl_div, softplus

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.network.branch import AdapterBranch, against_base


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
    device = next(network.parameters()).device
    branch = AdapterBranch(decoder, multilabel).to(device)
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
            image, target, valid = (part.to(device) for part in _crops(usable, patch, settings.batch, generator))
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
    tiles, device = _tiles(image.shape[1:], patch), next(network.parameters()).device

    def probability(corner: tuple[int, ...], shares: torch.Tensor) -> torch.Tensor:
        place = (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
        with torch.no_grad():
            network(image[place][None].to(device))
        return (torch.sigmoid(branch.logit(*_both(inputs)))[0, 0] * shares.to(device)).sum()

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
