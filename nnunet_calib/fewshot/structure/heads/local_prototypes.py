"""Local prototypes: averages of the features over cells of a grid, beside the one over all of a class.

    s_c(v) = sum_i softmax_i(alpha cos(f(v), p_i)) alpha cos(f(v), p_i),    i over the prototypes of class c
    s(v) = s_novel(v) - s_background(v),    alpha = 20

A cell is a prototype of the class that fills more than 95 % of it. The novel structure has its local prototypes and the
masked average over all of it, which stays alone where the structure fills no cell; background has local ones only.
Ouyang et al., Self-supervision with superpixels: training few-shot medical image segmentation without annotation
(ALPNet), ECCV 2020; there the cells are windows of a slice, here boxes of the frame of the task.

Every prototype costs one projection of the whole volume, so where there are many they are grouped by k-means on the
sphere. The length of f(v) is taken as in ``heads.prototype``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nnunet_calib.fewshot.structure.heads.base import Head, absence, check_sample, chunks_with
from nnunet_calib.fewshot.structure.heads.prototype import ALPHA, feature_length, masked_averages

CELLS = 16
FILLED = 0.95
MOST = 32
_ROUNDS = 10


class LocalPrototypeHead(Head):
    """A set of prototypes for each chunk; one of all voxels where no support has the structure in the chunk.

    Args:
        projections: float32 (R, F), alpha p / (|p| |f|).
        group: int64 (R,), the set of each prototype.
        novel: bool (R,), of the structure, not of background.
        row: int64 (n,), the set that each chunk uses.
        offset: float32 (n,), log odds of absence.

    Options of ``fit``:
        alpha: scale of the cosine.
        cells: along each axis of the frame.
        filled: share of a cell that a class must have more of.
        most: prototypes in all, but for two in each set.
    """

    key = "local_prototypes"
    parts = ("projections", "group", "novel", "row", "offset")

    def __init__(self, projections: Tensor, group: Tensor, novel: Tensor, row: Tensor, offset: Tensor):
        if not len(projections) == len(group) == len(novel) or len(row) != len(offset):
            raise ValueError("parts of a head of local prototypes that do not fit")
        for one in row.unique():
            if len(novel[group == one].unique()) < 2:
                raise ValueError("a chunk without prototypes of both classes")
        self.projections, self.offset = projections.float(), offset.float()
        self.group, self.novel, self.row = group.long(), novel.bool(), row.long()

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
        cells: int = CELLS,
        filled: float = FILLED,
        most: int = MOST,
    ) -> LocalPrototypeHead:
        """As ``Head.fit``, with the options of the class."""
        check_sample(features, target, weight, position, chunk, support)
        f, w = features.float(), weight.double()
        counts = chunks_with(target, chunk, support)
        own = counts.nonzero()[:, 0].tolist() if chunk.shape[1] > 1 else []
        member = chunk.argmax(dim=1)
        sets = [] if len(own) == chunk.shape[1] else [torch.ones_like(target)]
        sets += [member == i for i in own]
        each = max(1, most // (2 * len(sets)))
        cell = _cell_of(position, support, cells)
        everywhere = masked_averages(f, target, w, support, torch.zeros_like(cell), 1)[0]
        prototypes, group, novel = [], [], []
        for number, inside in enumerate(sets):
            own_f, own_y, own_w = f[inside], target[inside], w[inside]
            pair = masked_averages(own_f, own_y, own_w, support[inside], torch.zeros_like(cell[inside]), 1)[0]
            pair = torch.where(pair.isnan(), everywhere, pair)  # a chunk that is the structure's alone
            for c, means in enumerate(_cell_means(own_f, own_y, own_w, cell[inside], filled)):
                local = _grouped(means, each - c)
                # the structure has its masked average beside the local ones; background only for want of any
                found = torch.cat([pair[c : c + 1], local]) if c or not len(local) else local
                prototypes.append(found)
                group += [number] * len(found)
                novel += [bool(c)] * len(found)
        row = torch.zeros(chunk.shape[1], dtype=torch.long)
        row[own] = torch.arange(len(sets) - len(own), len(sets))
        projections = alpha * normalize(torch.cat(prototypes), dim=1) / feature_length(f, w)
        where = f.device
        return cls(
            projections,
            torch.tensor(group, device=where),
            torch.tensor(novel, device=where),
            row.to(where),
            absence(counts, len(support.unique())).to(where),
        )

    def logit(self, projected: Tensor, position: Tensor, chunk: Tensor) -> Tensor:
        """As ``Head.logit``."""
        logit = projected.new_zeros(len(projected))
        for one in self.row.unique():
            scores = [projected[:, (self.group == one) & (self.novel == c)] for c in (True, False)]
            novel, background = (_soft_maximum(s) for s in scores)
            users = self.row == one
            a = chunk[:, users].to(projected)
            logit += a.sum(dim=1) * (novel - background) + a @ self.offset[users]
        return logit


def _soft_maximum(scores: Tensor) -> Tensor:
    """sum_i softmax_i(s) s_i over the last axis."""
    return (scores.softmax(dim=-1) * scores).sum(dim=-1)


def _cell_of(position: Tensor, support: Tensor, cells: int) -> Tensor:
    """Number of the cell of the grid of each support, int64 (N,), from 0 without gaps."""
    place = (position.clamp(0, 1) * cells).long().clamp_max(cells - 1)
    number = (place * torch.tensor([cells * cells, cells, 1], device=place.device)).sum(dim=1)
    return (number + support.long() * cells**3).unique(return_inverse=True)[1]


def _cell_means(f: Tensor, target: Tensor, w: Tensor, cell: Tensor, filled: float) -> tuple[Tensor, Tensor]:
    """Mean features of the cells that background fills and of those that the structure fills, (m, F) each."""
    cell = cell.unique(return_inverse=True)[1]
    size = int(cell.max()) + 1
    total = torch.zeros(size, dtype=torch.float64, device=f.device).index_add_(0, cell, w)
    share = torch.zeros_like(total).index_add_(0, cell, w * target) / total
    part = (w / total[cell]).to(f.dtype)[:, None]
    means = f.new_zeros(size, f.shape[1]).index_add_(0, cell, f * part)
    return means[1 - share > filled], means[share > filled]


def _grouped(prototypes: Tensor, most: int) -> Tensor:
    """At most so many directions (m, F) for those given, by k-means on the sphere, begun far from each other."""
    unit = normalize(prototypes, dim=1)
    if len(unit) <= most:
        return unit
    if not most:
        return unit[:0]
    centres = normalize(unit.mean(dim=0, keepdim=True), dim=1)
    while len(centres) < most:
        farthest = (unit @ centres.T).amax(dim=1).argmin()
        centres = torch.cat([centres, unit[farthest][None]])
    for _ in range(_ROUNDS):
        nearest = (unit @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, unit)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
    return centres
