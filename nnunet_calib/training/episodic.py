"""Episodic training, the published way to networks for few-shot: PANet, and first-order MAML. Yardsticks.

Each step is nnU-Net's own, with its own loss on the base classes, plus the loss of one episode made of the same batch:
of a class that two patches hold, drawn at random, one patch is the support and the other the query, and the class is
the structure in both, all else its background. The network is that of the plans, and an episode reads the features
that few-shot heads read (`nnunet_calib.fewshot.network.features`), so the model is used like any other:

    nnUNetv2_train DATASET CONFIGURATION FOLD -tr PANetTrainer      with finetune_from in the configuration
    nnunet-calib fewshot fit MODEL --head prototype --chunks 1 --registration none ...

Not measured yet; nothing else here is trained in this way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.network.features import STAGES, check_decoder, full_precision
from nnunet_calib.fewshot.structure.heads.linear import LinearHead
from nnunet_calib.fewshot.structure.heads.prototype import ALPHA
from nnunet_calib.training.base import CalibrationTrainer, plain
from nnunet_calib.training.settings import RefusedSettings

FEWEST = 20
"""Voxels of a class, and of what is not it, that a patch must hold to be a support or a query of it."""

_SAMPLED = 4000  # voxels of a support, at most a half of them of the structure

Stages = Sequence[Tensor]
"""Outputs (C_s, *S_s) of the last decoder stages for one patch, each voxel's vector of length 1, coarsest first."""

Episode = Callable[[Stages, Tensor, Stages, Tensor, Tensor], Tensor]
"""Loss of an episode: stages and structure (bool, *S) of the support, of the query, and what counts (2, *S)."""


class EpisodicTrainer(CalibrationTrainer):
    """What both have in common: the stages that are seen, and the loss that is added."""

    @staticmethod
    def episode(support: Stages, inside: Tensor, query: Stages, reference: Tensor, counted: Tensor) -> Tensor:
        """Loss of an episode, a scalar.

        Args:
            support: of the support.
            inside: bool (*S), the structure in the support.
            query: of the query.
            reference: bool (*S), the structure in the query.
            counted: bool (2, *S), voxels whose label is known, of both.
        """
        raise NotImplementedError

    def _do_i_compile(self) -> bool:
        return False  # of a compiled network the stages cannot be seen

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_regions:
            raise RefusedSettings(f"{type(self).__name__}: episodes are made of labels; this data set has regions")
        network = plain(self.network)
        try:
            check_decoder(network, type(network).__name__)
        except InputError as error:
            raise RefusedSettings(str(error)) from error
        return WithEpisodes(super()._build_loss(), self.episode, network.decoder, self.label_manager.ignore_label)


class PANetTrainer(EpisodicTrainer):
    """Prototypes with alignment, episodes of base classes (PANet; Wang et al., ICCV 2019).

    L = CE(query; p_support) + CE(support; p_predicted query),    logits alpha cos(f(v), p_c), c structure or not

    p_c is the masked average of the features and alpha = 20. The second term is the prototype alignment regularisation,
    with the weight of the paper.
    """

    @staticmethod
    def episode(support: Stages, inside: Tensor, query: Stages, reference: Tensor, counted: Tensor) -> Tensor:
        """As ``EpisodicTrainer.episode``."""
        logits = _cosines(query, _prototypes(support, inside, counted[0]), reference.shape)
        loss = _cross_entropy(logits, reference, counted[1])
        predicted = logits[1] > logits[0]
        if (predicted & counted[1]).any() and (~predicted & counted[1]).any():
            back = _cosines(support, _prototypes(query, predicted, counted[1]), inside.shape)
            loss = loss + _cross_entropy(back, inside, counted[0])
        return loss


class MAMLTrainer(EpisodicTrainer):
    """First-order MAML whose inner loop fits the linear head, episodes of base classes (Finn et al., ICML 2017).

    w* = argmin_w NLL(support; w . f),    L = CE(query; w* . f) + 1 - Dice(query),    dL/d(network) with w* held

    The inner loop adapts the head on the last three stages and nothing below it (Raghu et al., Rapid learning or
    feature reuse (ANIL), ICLR 2020) and runs to its end, as ``fewshot fit`` will run it; the first-order gradient
    leaves out how w* depends on the network.
    """

    @staticmethod
    def episode(support: Stages, inside: Tensor, query: Stages, reference: Tensor, counted: Tensor) -> Tensor:
        """As ``EpisodicTrainer.episode``."""
        head = _fitted(support, inside, counted[0])
        z = _projected(query, head.projections, reference.shape)[0] + head.bias
        z, y = z[counted[1]], reference[counted[1]].float()
        p = z.sigmoid()
        dice = 2 * (p * y).sum() / (p.sum() + y.sum()).clamp_min(1)
        return functional.binary_cross_entropy_with_logits(z, y) + 1 - dice


class WithEpisodes(nn.Module):
    """nnU-Net's loss, and that of an episode of the same batch if two patches share a class.

    Args:
        stock: the loss as the trainer builds it.
        episode: the loss of an episode.
        decoder: of the network; its last stages are looked at in every pass.
        ignore_label: of the label maps; None without one.
    """

    def __init__(self, stock: nn.Module, episode: Episode, decoder: Any, ignore_label: int | None):
        super().__init__()
        self.stock, self.episode, self.ignore_label = stock, episode, ignore_label
        last = list(decoder.stages)[-STAGES:]
        self._seen: list[Tensor] = [torch.empty(0)] * len(last)
        for number, stage in enumerate(last):
            stage.register_forward_hook(lambda _module, _inputs, output, number=number: self._see(number, output))

    def _see(self, number: int, output: Tensor) -> None:
        self._seen[number] = output

    def forward(self, output: Any, target: Any) -> Tensor:
        """As the stock loss, of the pass that the network has just made."""
        loss = self.stock(output, target)
        labels = (target[0] if isinstance(target, list) else target)[:, 0]  # the finest
        if (drawn := _drawn(labels, self.ignore_label)) is None:
            return loss
        label, pair = drawn
        with full_precision(labels):
            support, query = ([functional.normalize(seen[one].float(), dim=0) for seen in self._seen] for one in pair)
            both = labels[pair]
            inside, counted = both == label, both != (-1 if self.ignore_label is None else self.ignore_label)
            return loss + self.episode(support, inside[0], query, inside[1], counted)


def _drawn(labels: Tensor, ignore_label: int | None) -> tuple[int, list[int]] | None:
    """A class, and two of the patches (B, *S) that hold it; None if no class is in two."""
    values, number = labels.unique(return_inverse=True)
    counts = torch.stack([torch.bincount(one.flatten(), minlength=len(values)) for one in number])
    known = counts if ignore_label is None else counts * (values != ignore_label)
    usable = (counts >= FEWEST) & (known.sum(dim=1, keepdim=True) - counts >= FEWEST)  # structure and background
    shared = [
        i
        for i, value in enumerate(values.tolist())
        if value > 0 and value != ignore_label and int(usable[:, i].sum()) > 1
    ]
    if not shared:
        return None
    i = shared[int(torch.randint(len(shared), ()))]
    there = usable[:, i].nonzero()[:, 0]
    return int(values[i]), there[torch.randperm(len(there))[:2].to(there.device)].tolist()


def _projected(stages: Stages, weight: Tensor, size: Sequence[int]) -> Tensor:
    """W F of a patch, (R, *S), with W (R, F); as ``DecoderFeatures.project``, for gradients."""
    mode = "trilinear" if len(size) == 3 else "bilinear"
    total = weight.new_zeros(())
    for stage, part in zip(stages, weight.split([len(stage) for stage in stages], dim=1), strict=True):
        low = (part @ stage.flatten(1)).unflatten(1, stage.shape[1:])
        total = total + functional.interpolate(low[None], tuple(size), mode=mode)[0]
    return total


def _prototypes(stages: Stages, inside: Tensor, counted: Tensor) -> Tensor:
    """Masked averages of background and structure, (2, F), of length 1."""
    masks = torch.stack([~inside & counted, inside & counted]).float()
    pool: Callable[[Tensor, Any], Tensor] = (
        functional.adaptive_avg_pool3d if inside.ndim == 3 else functional.adaptive_avg_pool2d
    )
    parts = []
    for stage in stages:
        shares = pool(masks[None], stage.shape[1:])[0].flatten(1)
        parts.append(shares @ stage.flatten(1).T / shares.sum(dim=1, keepdim=True).clamp_min(1e-6))
    return functional.normalize(torch.cat(parts, dim=1), dim=1)


def _cosines(stages: Stages, prototypes: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (2, *S); |F| is the root of the number of stages, each of which has length 1."""
    return ALPHA / len(stages) ** 0.5 * _projected(stages, prototypes, size)


def _cross_entropy(logits: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, counted].T, inside[counted].long())


@torch.no_grad()
def _fitted(stages: Stages, inside: Tensor, counted: Tensor) -> LinearHead:
    """The head of ``fewshot fit`` on a sample of a patch, without position and in one chunk."""
    inside, known = inside.flatten(), counted.flatten()
    index, weight = [], []
    for members in ((inside & known).nonzero()[:, 0], (~inside & known).nonzero()[:, 0]):
        drawn = members[torch.randperm(len(members))[: _SAMPLED // 2].to(members.device)]
        index.append(drawn)
        weight.append(torch.full((len(drawn),), len(members) / max(len(drawn), 1), device=drawn.device))
    chosen = torch.cat(index)
    size = counted.shape
    mode = "trilinear" if len(size) == 3 else "bilinear"
    features = torch.cat(
        [functional.interpolate(stage[None], tuple(size), mode=mode)[0].flatten(1)[:, chosen] for stage in stages]
    ).T
    n = len(chosen)
    return LinearHead.fit(
        features,
        inside[chosen],
        torch.cat(weight),
        features.new_zeros(n, 3),
        features.new_ones(n, 1),
        torch.zeros(n, dtype=torch.long, device=features.device),
        with_position=False,
    )
