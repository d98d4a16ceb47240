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
from torch.nn.functional import normalize

from nnunet_calib.fewshot.structure.heads.base import Head, absence, check_sample, chunks_with

ALPHA = 20.0


class PrototypeHead(Head):
    """A pair of prototypes for each chunk; one pair of all voxels where no support has the structure in the chunk.

    Args:
        projections: float32 (n, F), alpha (p_novel / |p_novel| - p_background / |p_background|) / |f| of each chunk.
        offset: float32 (n,), log odds of absence.

    Options of ``fit``:
        alpha: scale of the cosine.
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


def _difference(pair: Tensor) -> Tensor:
    """Structure less background, of (..., 2, F)."""
    return pair[..., 1, :] - pair[..., 0, :]


def feature_length(features: Tensor, weight: Tensor) -> Tensor:
    """Root mean square of |f| over the volumes of the supports."""
    return ((weight @ features.square().sum(dim=1).double()) / weight.sum()).sqrt().to(features.dtype)
