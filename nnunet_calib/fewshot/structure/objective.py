"""A linear head refined on the query itself, without its labels.

    RePRI    CE(support) + l_prior D(mean p) + l_H mean H(p)
    TIM      0.1 CE(support) + D(mean p) + 0.1 mean H(p);  D = -H(mean p) as published, without a prior

mean p is the share of the query that is predicted, and D holds it against the share pi that the volume prior expects:

    D = KL(mean p || pi),    or as a hinge    D = max(|e| - margin, 0),    e = (pi - mean p) / max(pi, mean p)

TIM-ADM minimises the same by turns: the query's voxels are assigned, then the head is fitted to those and the supports,

    q_c ~ p_c^(1 + l_H) / (sum of p_c^(1 + l_H) over the query)^(1/2),      l_CE CE(support) + (1 + l_H) CE(query; q)

TIM's H(mean p) asks for classes of one size, which voxels never are: it is there to compare with. H sharpens what the
head is unsure of and costs calibration, so its weight is small, and only voxels within reach of the structure count:
over a whole volume it is the background's. The head is kept near where it was by a ridge, for its fit would go on.

Boudiaf et al., Few-shot segmentation without meta-learning (RePRI), CVPR 2021; Boudiaf et al., Transductive information
maximization for few-shot learning (TIM), NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from nnunet_calib.fewshot.structure.heads.base import balanced, bernoulli_entropy, log_odds, natural_share
from nnunet_calib.fewshot.structure.heads.linear import CHUNK_RIDGE, LinearHead
from nnunet_calib.fewshot.structure.prior import MARGIN

_STEPS = 50
_BEFORE_UPDATE = 10  # of the prior that RePRI takes from its own prediction
_TURNS = 15  # of ADM, each with a few steps of the head
_STEPS_A_TURN = 5
_TINY = 1e-12


@dataclass(frozen=True)
class Objective:
    """Weights of the terms.

    Attributes:
        support: of the cross-entropy.
        prior: of D.
        entropy: of H.
        margin: of the hinge; None: the KL divergence.
        uniform: D = -H(mean p), whatever is expected.
        alternating: with ``uniform``, minimised by turns (ADM).
        predicted: pi is not what the volume prior expects but what the head predicts, as published for RePRI.
    """

    support: float = 1.0
    prior: float = 1.0
    entropy: float = 0.1
    margin: float | None = MARGIN
    uniform: bool = False
    alternating: bool = False
    predicted: bool = False

    def __call__(
        self,
        support_logit: Tensor,
        target: Tensor,
        support_weight: Tensor,
        query_logit: Tensor,
        query_weight: Tensor,
        within: Tensor,
        share: float,
    ) -> Tensor:
        """The value.

        Args:
            support_logit: float (N,).
            target: bool (N,).
            support_weight: float (N,) of sum 1.
            query_logit: float (M,).
            query_weight: float (M,) of sum 1.
            within: bool (M,), voxels whose entropy counts.
            share: pi, in (0, 1).
        """
        cross_entropy = support_weight @ binary_cross_entropy_with_logits(
            support_logit, target.to(support_logit), reduction="none"
        )
        mean = query_weight @ query_logit.sigmoid()
        counted = query_weight * within
        entropy = counted @ _entropy(query_logit) / counted.sum().clamp_min(_TINY)
        return self.support * cross_entropy + self.prior * self._distance(mean, share) + self.entropy * entropy

    def _distance(self, mean: Tensor, share: float) -> Tensor:
        inside, outside = mean.clamp_min(_TINY), (1 - mean).clamp_min(_TINY)
        if self.uniform:
            return inside * inside.log() + outside * outside.log()
        if self.margin is None:
            return inside * (inside / share).log() + outside * (outside / (1 - share)).log()
        off = (share - mean) / mean.clamp_min(share)
        return (off.abs() - self.margin).clamp_min(0)


_TIM = Objective(support=0.1, prior=1.0, entropy=0.1, margin=None)

PUBLISHED: dict[str, Callable[[int], Objective]] = {
    "repri": lambda supports: Objective(prior=1 / supports, entropy=1 / supports, margin=None, predicted=True),
    "tim": lambda supports: replace(_TIM, uniform=True),
    "tim_adm": lambda supports: replace(_TIM, uniform=True, alternating=True),
    "tim_volume": lambda supports: _TIM,
}
"""Objectives with the weights of the papers, for k supports, to compare with: RePRI, its KL against shares that it
estimates itself; TIM by gradient descent (TIM-GD); TIM by turns (TIM-ADM: the published step of the weights is closed
for prototypes, here it is L-BFGS on the logistic head, and there are 15 turns, not 150); and TIM with its KL against
the volume prior for -H(mean p)."""


@dataclass(frozen=True)
class Query:
    """Sampled voxels of a query.

    Attributes:
        features: float (M, F).
        position: float (M, 3).
        chunk: float (M, n).
        weight: float (M,), voxels that each stands for.
        within: bool (M,), within reach of the structure, as ``Places.reach`` tells.
    """

    features: Tensor
    position: Tensor
    chunk: Tensor
    weight: Tensor
    within: Tensor


def refine(
    head: LinearHead,
    supports: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    query: Query,
    share: float | None,
    objective: Objective | None = None,
    *,
    anchor: float = CHUNK_RIDGE,
    foreground: float = 0.0,
    steps: int = _STEPS,
) -> LinearHead:
    """The head that minimises the objective, near the one given.

    Args:
        head: fitted to the supports.
        supports: what it was fitted to: features, target, weight, position, chunk, support.
        query: sampled voxels.
        share: pi, expected share of the query's volume; None: as RePRI, the share that the head predicts, taken again
            after 10 steps, from when on its weight is larger by 1.
        objective: RePRI with the volume prior as a hinge and little entropy if None.
        anchor: ridge on what the weights change, as ``chunk_ridge`` of the head.
        foreground: as in the fit of the head.
        steps: of L-BFGS, at most.
    """
    objective = objective or Objective()
    features, target, weight, position, chunk, support = supports
    w = balanced(target, weight, support, foreground).float()
    # the head's log odds are of natural shares, its cross-entropy was of others
    in_fit = float(w[target].double().sum())
    shift = log_odds(in_fit) - log_odds(natural_share(target, weight))
    unit = bernoulli_entropy(in_fit) / len(support.unique())
    f, spread = features.float(), features.float().std(dim=0).clamp_min(1e-6)
    q, q_weight = query.features.float(), (query.weight.double() / query.weight.double().sum()).float()
    parts = [part.clone().requires_grad_() for part in (head.projections, head.position_terms, head.bias)]
    start = [part.detach().clone() for part in parts]
    scales = [spread, torch.ones_like(head.position_terms[0]), torch.ones_like(head.bias)]

    def changed() -> LinearHead:
        return LinearHead(parts[0], parts[1], parts[2], head.row, head.offset)

    cross_entropy = partial(binary_cross_entropy_with_logits, reduction="none")

    def moved() -> Tensor:
        away = [((part - old) * scale).square().sum() for part, old, scale in zip(parts, start, scales, strict=True)]
        return torch.stack(away).sum()

    def value(pi: float, terms: Objective) -> Tensor:
        now = changed()
        return (
            terms(
                now(f, position, chunk) + shift,
                target,
                w,
                now(q, query.position, query.chunk),
                q_weight,
                query.within,
                pi,
            )
            + unit * anchor / 2 * moved()
        )

    def predicted() -> float:
        with torch.no_grad():
            return float((q_weight @ changed()(q, query.position, query.chunk).sigmoid()).clamp(_TINY, 1 - 1e-6))

    def to_assigned(targets: Tensor) -> Tensor:
        now = changed()
        on_support = cross_entropy(now(f, position, chunk) + shift, target.float())
        on_query = cross_entropy(now(q, query.position, query.chunk), targets)
        terms = objective.support * (w @ on_support) + (1 + objective.entropy) * (q_weight @ on_query)
        return terms + unit * anchor / 2 * moved()

    if objective.alternating:
        for _ in range(_TURNS):
            with torch.no_grad():
                targets = assigned(changed()(q, query.position, query.chunk), q_weight, objective.entropy)
            _minimise(parts, partial(to_assigned, targets), _STEPS_A_TURN)
    elif share is not None:
        _minimise(parts, lambda: value(share, objective), steps)
    else:
        first = predicted()
        _minimise(parts, lambda: value(first, objective), _BEFORE_UPDATE)
        second = predicted()
        firmer = replace(objective, prior=objective.prior + 1)
        _minimise(parts, lambda: value(second, firmer), steps - _BEFORE_UPDATE)
    projections, terms, bias = (part.detach() for part in parts)
    return LinearHead(projections, terms, bias, head.row, head.offset)


def _minimise(parts: list[Tensor], value, steps: int) -> None:
    optimiser = torch.optim.LBFGS(parts, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimiser.step(closure)


def assigned(logit: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The assignment of ADM: q of the structure, in [0, 1].

    Args:
        logit: float (M,).
        weight: float (M,) of sum 1.
        alpha: l_H.
    """
    inside, outside = (weight @ ((1 + alpha) * logsigmoid(z)).exp() for z in (logit, -logit))
    return ((1 + alpha) * logit - 0.5 * (inside.clamp_min(_TINY) / outside.clamp_min(_TINY)).log()).sigmoid()


def _entropy(logit: Tensor) -> Tensor:
    """H of a Bernoulli variable from its log odds, finite at any."""
    return softplus(logit) - logit * logit.sigmoid()
