"""New classes in a trained network: where their rows of the segmentation heads begin, and what they weigh at first.

A class that begins as background (MiB, see `checkpoint.widened_heads`) is as probable outside as inside. What a few
hundred steps of nnU-Net's loss do with one of few voxels is to make it improbable everywhere, where Dice has no slope
left. So its rows are fitted before the first step, to what each head sees of training batches, all other rows held:

    (w_c, b_c) = argmin  mean_v a_y CE(softmax(z_v), y_v) + r/2 |w_c - w_background|^2,    z_c = w_c . f_v + b_c
    a_c = share * (all voxels) / (voxels of class c), in [1, 300]

for coordinates of f with standard deviation 1. nnU-Net's cross-entropy has the weights a too, so that it does not undo
that at once; they fall to 1 in the first half of the training. Known classes have them as well: new ones lie beside
those, and would else take what is rare.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nnunet_calib.training.checkpoint import HEADS

BATCHES = 30
"""Training batches that the rows are fitted to."""

SHARE = 0.1
"""Of all voxels, what a class of fewer counts as."""

_MOST = 300.0  # what a voxel counts as; a class that is rarer stays rare
_DRAWN = 3000  # voxels that a head sees in a batch: so many of known classes, and of all new ones
_RIDGE = 1e-3  # of coordinates with standard deviation 1
_UNLIKELY = -3.0  # log odds against background that the fit begins at
_STEPS = 200


def begin_new_classes(
    network: nn.Module, batches: Iterable[tuple[Tensor, Sequence[Tensor]]], known: Sequence[int], new: Sequence[int]
) -> Tensor:
    """Fit the rows of new classes in every segmentation head that the network uses, in place.

    Args:
        network: with the heads of `checkpoint.widened_heads`; background is the first of ``known``.
        batches: of the training: images (B, channels, *S) and labels (B, 1, *S) of each output, the finest first.
        known: channels, and labels, of the classes that it knows.
        new: those of the others.

    Returns:
        a, float32 (classes,), at full resolution.
    """
    heads = [module for name, module in network.named_modules() if HEADS in f".{name}"]
    samples = [_Sample() for _ in heads]
    training = network.training
    network.eval()
    seen: dict[int, Tensor] = {}
    hooks = [
        head.register_forward_pre_hook(lambda _head, inputs, i=i: seen.__setitem__(i, inputs[0]))
        for i, head in enumerate(heads)
    ]
    try:
        for image, labels in batches:
            with torch.no_grad():
                network(image)
            for i, own in zip(sorted(seen, reverse=True), labels, strict=False):  # the last head is the finest
                samples[i].add(seen[i], own, known, new)
    finally:
        for hook in hooks:
            hook.remove()
    network.train(training)
    weights = torch.ones(len(known) + len(new), device=next(network.parameters()).device)
    for head, sample in zip(heads, samples, strict=True):
        if sample.labels:
            weights = sample.class_weights(len(weights))
            _fit(head, sample, weights, known, new)
    return weights


class _Sample:
    """What a head sees: its inputs, their labels, and how many voxels each stands for."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.voxels: list[Tensor] = []

    def add(self, features: Tensor, labels: Tensor, known: Sequence[int], new: Sequence[int]) -> None:
        """Draw from features (B, C, *S) with labels (B, 1, *S)."""
        flat, y = features.movedim(1, -1).flatten(0, -2), labels.flatten().long()
        for classes in (known, new):
            members = torch.isin(y, torch.as_tensor(classes, device=y.device)).nonzero()[:, 0]
            drawn = members[torch.randperm(len(members), device=members.device)[:_DRAWN]]
            if len(drawn):
                self.features.append(flat[drawn].float())
                self.labels.append(y[drawn])
                self.voxels.append(torch.full((len(drawn),), len(members) / len(drawn), device=y.device))

    def class_weights(self, classes: int) -> Tensor:
        """The weights a; 1 of a class that is not there."""
        counts = torch.bincount(torch.cat(self.labels), torch.cat(self.voxels), classes)
        weights = (SHARE * counts.sum() / counts.clamp_min(1)).clamp(1, _MOST)
        return torch.where(counts > 0, weights, torch.ones_like(weights))


def _fit(head: nn.Module, sample: _Sample, weights: Tensor, known: Sequence[int], new: Sequence[int]) -> None:
    """Fit the rows of the new classes of a convolution of one voxel."""
    x, y = torch.cat(sample.features), torch.cat(sample.labels)
    w, bias = head.weight.detach().flatten(1).float(), head.bias.detach().float()  # type: ignore[operator]
    bias[known[0]] += math.log(len(new) + 1)  # the fit says what of background is theirs
    counted = torch.cat(sample.voxels) * weights[y]
    counted = counted / counted.sum()
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    scaled = (x - mean) / spread
    logits = x @ w.T + bias
    background = logits[:, known[:1]]
    slopes = torch.zeros(len(new), x.shape[1], device=x.device, requires_grad=True)
    offset = torch.full((len(new),), _UNLIKELY, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([slopes, offset], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")
    places = torch.as_tensor(new, device=x.device)

    def loss() -> Tensor:
        optimiser.zero_grad()
        z = logits.index_copy(1, places, background + scaled @ slopes.T + offset)
        value = counted @ cross_entropy(z, y, reduction="none") + _RIDGE / 2 * slopes.square().sum() / x.shape[1]
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    with torch.no_grad():
        own = slopes / spread
        w[new] = w[known[0]] + own
        bias[new] = bias[known[0]] + offset - own @ mean
        head.weight.copy_(w.view_as(head.weight))  # type: ignore[operator, arg-type]
        head.bias.copy_(bias)  # type: ignore[operator]
