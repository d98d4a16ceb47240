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

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nnunet_calib.fewshot.heads.base import Head, absence, check_sample, chunks_with

ALPHA = 20.0


class PrototypeHead(Head):
    """A pair of prototypes for each chunk; one pair of all voxels where no support has the structure in the chunk.

    Args:
        projections: float32 (n, F), alpha (p_novel / |p_novel| - p_background / |p_background|) / |f| of each chunk.
        offset: float32 (n,), log odds of absence.
    """

    key = "prototype"

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
        """As ``Head.fit``.

        Args:
            features: as there.
            target: as there.
            weight: as there.
            position: as there; not used.
            chunk: as there.
            support: as there.
            alpha: scale of the cosine.
        """
        check_sample(features, target, weight, position, chunk, support)
        f, w = features.float(), weight.double()
        everywhere = torch.stack([masked_average(f, ~target, w, support), masked_average(f, target, w, support)])
        pairs = everywhere.repeat(chunk.shape[1], 1, 1)
        member = chunk.argmax(dim=1)
        counts = chunks_with(target, chunk, support)
        for i in counts.nonzero()[:, 0].tolist():
            for c, inside in enumerate((~target & (member == i), target & (member == i))):
                if inside.any():
                    pairs[i, c] = masked_average(f, inside, w, support)
        unit = normalize(pairs, dim=-1)
        projections = alpha * (unit[:, 1] - unit[:, 0]) / feature_length(f, w)
        return cls(projections, absence(counts, len(support.unique())).to(f.device))

    def logit(self, projected: Tensor, position: Tensor, chunk: Tensor) -> Tensor:
        """As ``Head.logit``."""
        return (chunk.to(projected) * (projected + self.offset)).sum(dim=1)

    def state(self) -> dict[str, Tensor]:
        """As ``Head.state``."""
        return {name: getattr(self, name).cpu().contiguous() for name in ("projections", "offset")}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> PrototypeHead:
        """As ``Head.from_state``."""
        return cls(state["projections"], state["offset"])


def masked_average(features: Tensor, inside: Tensor, weight: Tensor, support: Tensor) -> Tensor:
    """Weighted mean feature (F,) of the voxels inside; of each support first, then the plain mean over supports.

    Args:
        features: float (N, F).
        inside: bool (N,), at least one.
        weight: float64 (N,).
        support: integer (N,).
    """
    means = []
    for one in support[inside].unique():
        own = inside & (support == one)
        w = weight[own] / weight[own].sum()
        means.append(w.to(features.dtype) @ features[own])
    return torch.stack(means).mean(dim=0)


def feature_length(features: Tensor, weight: Tensor) -> Tensor:
    """Root mean square of |f| over the volumes of the supports."""
    return ((weight @ features.square().sum(dim=1).double()) / weight.sum()).sqrt().to(features.dtype)
