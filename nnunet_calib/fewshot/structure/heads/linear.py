"""Linear head: logistic regression on features and position, a head for each chunk shrunk to the one for all.

    s(v) = sum_i a_i(v) [w_i . f(v) + g_i(u(v)) + b_i],    g_i(u) = q_i . (2u - 1, (2u - 1)^2)
    theta   = argmin  NLL(theta)                     + 1/2 (H / k) ridge |theta|^2,   NLL of all voxels
    theta_i = argmin  NLL of the voxels of chunk i   + 1/2 (H / k) chunk_ridge |theta_i - theta|^2

theta = (w, q, b), in coordinates where each term has mean 0 and variance 1 over the fit; H is the NLL of a head that
knows the structure's share and no more. Chunks where no support has the structure keep theta, and the log odds of its
absence (``base.absence``). In the NLL each of the k supports counts the same. The structure has its natural share: a
small one may then be nowhere above one half, but voxels are ranked best where the volume prior will cut them. A larger
share is an option; the natural one is put back into b.

With one chunk it is the linear probe of few-shot fine-tuning; Silva-Rodriguez et al., Towards foundation models and
few-shot parameter-efficient fine-tuning for volumetric organ segmentation, MedIA 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.heads.base import (
    Head,
    absence,
    balanced,
    bernoulli_entropy,
    check_sample,
    chunks_with,
    log_odds,
    natural_share,
)
from nnunet_calib.fewshot.structure.logistic import fit_logistic

RIDGE = 0.02
CHUNK_RIDGE = 0.02

_POSITION_TERMS = 6
_INTERCEPT_RIDGE = 1e-8  # only to keep the minimum unique


class LinearHead(Head):
    """One linear head for each chunk where a support has the structure, and one for all other chunks.

    Args:
        projections: float32 (R, F), w of each.
        position_terms: float32 (R, 6), q of each; 0 without position.
        bias: float32 (R,).
        row: int64 (n,), which of the R each chunk uses.
        offset: float32 (n,), log odds of absence.

    Options of ``fit``:
        ridge: of the head for all chunks.
        chunk_ridge: of what a chunk's head differs from it.
        foreground: smallest share of the structure in the fit; 0: the natural one.
        with_position: use g.
    """

    key = "linear"
    parts = ("projections", "position_terms", "bias", "row", "offset")

    def __init__(self, projections: Tensor, position_terms: Tensor, bias: Tensor, row: Tensor, offset: Tensor):
        heads, chunks = len(projections), len(row)
        if (position_terms.shape, bias.shape, offset.shape) != ((heads, _POSITION_TERMS), (heads,), (chunks,)):
            raise ValueError("parts of a linear head that do not fit")
        if not 0 <= int(row.min()) <= int(row.max()) < heads:
            raise ValueError("chunks that use heads that are not there")
        self.projections, self.position_terms, self.bias = projections.float(), position_terms.float(), bias.float()
        self.row, self.offset = row.long(), offset.float()

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
        ridge: float = RIDGE,
        chunk_ridge: float = CHUNK_RIDGE,
        foreground: float = 0.0,
        with_position: bool = True,
    ) -> LinearHead:
        """As ``Head.fit``, with the options of the class."""
        check_sample(features, target, weight, position, chunk, support)
        w = balanced(target, weight, support, foreground)
        terms = position_terms(position) if with_position else features.new_zeros(len(features), _POSITION_TERMS)
        x = torch.cat([features.float(), terms.to(features.device)], dim=1)
        mean, spread = _moments(x, w)
        x = torch.cat([(x - mean) / spread, x.new_ones(len(x), 1)], dim=1)

        share = float(w[target].sum())
        supports = len(support.unique())
        unit = bernoulli_entropy(share) / supports
        penalty = torch.full((x.shape[1],), ridge * unit, dtype=torch.float64, device=x.device)
        penalty[-1] = _INTERCEPT_RIDGE
        shared = fit_logistic(x, target, w, penalty)
        counts = chunks_with(target, chunk, support)
        own = counts.nonzero()[:, 0].tolist() if chunk.shape[1] > 1 else []
        heads = [] if len(own) == chunk.shape[1] else [shared]
        member = chunk.argmax(dim=1)
        for i in own:
            inside = (member == i).nonzero()[:, 0]
            heads.append(
                fit_logistic(x[inside], target[inside], w[inside], torch.full_like(penalty, chunk_ridge * unit), shared)
            )
        row = torch.zeros(chunk.shape[1], dtype=torch.long)
        row[own] = torch.arange(len(heads) - len(own), len(heads))

        theta = torch.stack(heads)
        slopes = theta[:, :-1] / spread.double()
        bias = theta[:, -1] - slopes @ mean.double()
        bias += log_odds(natural_share(target, weight)) - log_odds(share)
        cut = features.shape[1]
        offset = absence(counts, supports)
        return cls(slopes[:, :cut], slopes[:, cut:], bias, row.to(x.device), offset.to(x.device))

    def logit(self, projected: Tensor, position: Tensor, chunk: Tensor) -> Tensor:
        """As ``Head.logit``."""
        of_heads = projected + position_terms(position).to(projected) @ self.position_terms.T + self.bias
        a = chunk.to(projected)
        share = a @ torch.nn.functional.one_hot(self.row, len(self.bias)).to(a)  # of each head
        return torch.linalg.vecdot(share, of_heads) + a @ self.offset


def position_terms(position: Tensor) -> Tensor:
    """(2u - 1, (2u - 1)^2), (N, 6); beyond the frame they stay as at its end, for a parabola would run away."""
    v = 2 * position.clamp(0, 1) - 1
    return torch.cat([v, v**2], dim=1)


def _moments(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation (D,) of the columns; 1 for a column that does not vary."""
    share = w.to(x.dtype)
    mean = share @ x
    variance = (share @ (x - mean) ** 2).clamp_min(0)
    constant = variance <= 1e-10 * (1 + mean**2)
    return mean, torch.where(constant, torch.ones_like(variance), variance).sqrt()
