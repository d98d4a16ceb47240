"""Prototypes: the masked average of the features of each class, compared by the cosine.

    p_c = mean over supports of  sum_v f(v) y_c(v) / sum_v y_c(v)
    s(v) = alpha cos(f(v), p_novel) - alpha cos(f(v), p_background),    alpha = 20

the log odds of the papers' softmax over alpha cos; the distance of prototypical networks is 1 - cos. Snell et al.,
Prototypical networks for few-shot learning, NeurIPS 2017; Wang et al., PANet: few-shot image semantic segmentation with
prototype alignment, ICCV 2019.

The features come normalised from the network, and |f| is no linear function of them, so the cosine's |f(v)| is the root
mean square over the fit: the same for features of one length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from nnunet_calib.fewshot.heads.base import Head, absence, balanced, check_sample, chunks_with

ALPHA = 20.0


class PrototypeHead(Head):
    """A pair of prototypes for each chunk; one pair of all voxels where no support has the structure in the chunk.

    Args:
        projections: float32 (n, F), alpha (p_novel / |p_novel| - p_background / |p_background|) / |f| of each chunk.
        offset: float32 (n,), log odds of absence.

    Options of ``fit``:
        alpha: scale of the cosine.
        aligned: refine the prototypes by ``align_prototypes``.
    """

    key = "prototype"
    parts = ("projections", "offset")

    def __init__(self, projections: Tensor, offset: Tensor):
        if len(projections) != len(offset):
            raise ValueError("parts of a prototype head that do not fit")
        self.projections, self.offset = projections.float(), offset.float()

    @classmethod
    def fit(
        cls,
        features: Tensor,
        target: Tensor,
        weight: Tensor,
        position: Tensor,
        chunk: Tensor,
        support: Tensor,
        *,
        alpha: float = ALPHA,
        aligned: bool = False,
    ) -> PrototypeHead:
        """As ``Head.fit``, with the options of the class."""
        check_sample(features, target, weight, position, chunk, support)
        f, w, member = features.float(), weight.double(), chunk.argmax(dim=1)
        everywhere = masked_averages(f, target, w, support, torch.zeros_like(member), 1)[0]
        pairs = masked_averages(f, target, w, support, member, chunk.shape[1])
        counts = chunks_with(target, chunk, support)
        pairs[counts == 0] = everywhere
        pairs = torch.where(pairs.isnan(), everywhere, pairs)  # a chunk that is the structure's alone
        length = feature_length(f, w)
        if aligned:
            for i in range(len(pairs)):
                inside = member == i
                if len(target[inside].unique()) < 2:
                    inside = torch.ones_like(target)
                parts = f[inside], target[inside], w[inside], support[inside]
                pairs[i] = align_prototypes(pairs[i], *parts, length, alpha)
        return cls(
            alpha * _difference(normalize(pairs, dim=-1)) / length,
            absence(counts, len(support.unique())).to(f.device),
        )

    def logit(self, projected: Tensor, position: Tensor, chunk: Tensor) -> Tensor:
        """As ``Head.logit``."""
        return (chunk.to(projected) * (projected + self.offset)).sum(dim=1)


def masked_averages(
    features: Tensor, target: Tensor, weight: Tensor, support: Tensor, group: Tensor, groups: int
) -> Tensor:
    """Weighted mean features of background and structure, (groups, 2, F); NaN where a group has none.

    The mean over the voxels of each support first, then the plain mean over the supports that have any.

    Args:
        features: float (N, F).
        target: bool (N,).
        weight: float64 (N,).
        support: integer (N,).
        group: int64 (N,), below ``groups``.
        groups: how many there are.
    """
    names, number = support.unique(return_inverse=True)
    cell = (group * 2 + target.long()) * len(names) + number
    cells = groups * 2 * len(names)
    total = torch.zeros(cells, dtype=torch.float64, device=features.device).index_add_(0, cell, weight)
    part = (weight / total[cell]).to(features.dtype)[:, None]
    means = features.new_zeros(cells, features.shape[1]).index_add_(0, cell, features * part)
    there = (total > 0).view(groups, 2, -1, 1)
    return (means.view(groups, 2, len(names), -1) * there).sum(dim=2) / there.sum(dim=2)


def align_prototypes(
    pair: Tensor,
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    support: Tensor,
    length: Tensor,
    alpha: float = ALPHA,
    steps: int = 20,
) -> Tensor:
    """Prototypes that segment the supports, and whose own segmentation of one support segments the next.

        min  CE(y, p) + CE(y, p'),    p = sigmoid(alpha (cos_novel - cos_background))

    p' is of prototypes made from p in another support (the same one if there is no other), which is PANet's prototype
    alignment. There it trains the network with p rounded to 0 or 1; here the features are fixed and the prototypes
    learn, so p stays as it is.

    Args:
        pair: float (2, F), background and structure, where to begin.
        features: float (N, F).
        target: bool (N,), both classes there.
        weight: float64 (N,).
        support: integer (N,).
        length: of a feature, as ``feature_length`` gives it.
        alpha: scale of the cosine.
        steps: of L-BFGS, at most.

    Returns:
        float (2, F).
    """
    w = balanced(target, weight, support, foreground=0.5).to(features.dtype)
    y = target.to(features.dtype)
    names = support.unique()
    turn = [(support == q, support == s) for q, s in zip(names, names.roll(-1), strict=True)]
    learned = pair.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([learned], max_iter=steps, line_search_fn="strong_wolfe")

    def logit(prototypes: Tensor, f: Tensor) -> Tensor:
        return f @ (alpha * _difference(normalize(prototypes, dim=-1)) / length)

    def closure() -> Tensor:
        optimiser.zero_grad()
        s = logit(learned, features)
        loss = w @ binary_cross_entropy_with_logits(s, y, reduction="none")
        for query, other in turn:
            p = s[query].sigmoid() * w[query]
            masks = torch.stack([w[query] - p, p])
            swapped = masks @ features[query] / masks.sum(dim=1, keepdim=True).clamp_min(1e-12)
            again = logit(swapped, features[other])
            loss = loss + w[other] @ binary_cross_entropy_with_logits(again, y[other], reduction="none")
        loss.backward()
        return loss

    optimiser.step(closure)
    return learned.detach()


def _difference(pair: Tensor) -> Tensor:
    """Structure less background, of (..., 2, F)."""
    return pair[..., 1, :] - pair[..., 0, :]


def feature_length(features: Tensor, weight: Tensor) -> Tensor:
    """Root mean square of |f| over the volumes of the supports."""
    return ((weight @ features.square().sum(dim=1).double()) / weight.sum()).sqrt().to(features.dtype)
