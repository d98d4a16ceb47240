"""What all heads share: the shapes they take, and what they are fitted on.

A head is linear in the features up to R projections, and then a cheap function of those and of the voxel's position:

    s(v) = logit(W f(v), u(v), a(v)),    W (R, F),    u in [0, 1]^3 the position,    a (n,) the weights of the chunks

so the projections can be averaged over the patches of a sliding window like the logits of any other class. s is the log
odds of the novel structure in natural shares, before the volume prior and the calibration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

ABSENCE = 1.0
"""a = b of the Beta prior on a chunk's holding the structure."""


class Head(ABC):
    """A classifier of one novel structure. Immutable once made; to add one, write a file and list it in ``HEADS``.

    Attributes:
        key: its name in commands, files and tables.
        parts: names of the tensors that it is made of, in the order in which they make it.
        projections: W, float32 (R, F).
    """

    key: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    projections: Tensor

    @classmethod
    @abstractmethod
    def fit(
        cls, features: Tensor, target: Tensor, weight: Tensor, position: Tensor, chunk: Tensor, support: Tensor
    ) -> Self:
        """Fit on sampled voxels of all supports; heads have options of their own besides.

        Args:
            features: float (N, F).
            target: bool (N,), the novel structure.
            weight: float (N,), voxels that each stands for.
            position: float (N, 3), in the frame of the task, [0, 1] over its extent.
            chunk: float (N, n), weights of the chunks; a voxel belongs to the chunk of its largest.
            support: integer (N,), the volume that each comes from.

        Raises:
            ValueError: shapes that do not fit, or a sample without the structure or without background.
        """

    @abstractmethod
    def logit(self, projected: Tensor, position: Tensor, chunk: Tensor) -> Tensor:
        """Log odds (N,) of the structure, from W f (N, R), positions (N, 3) and weights of the chunks (N, n)."""

    def state(self) -> dict[str, Tensor]:
        """All that ``from_state`` needs; tensors only, so that it can be written to a safetensors file."""
        return {name: getattr(self, name).cpu().contiguous() for name in self.parts}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The head that gave the state.

        Raises:
            KeyError, ValueError: not a state of this head.
        """
        return cls(*(state[name] for name in cls.parts))

    def __call__(self, features: Tensor, position: Tensor, chunk: Tensor) -> Tensor:
        """Log odds (N,) straight from features (N, F), as for sampled voxels."""
        return self.logit(features.float() @ self.projections.T, position, chunk)


def check_sample(
    features: Tensor, target: Tensor, weight: Tensor, position: Tensor, chunk: Tensor, support: Tensor
) -> None:
    """Refuse samples that ``Head.fit`` cannot take (ValueError)."""
    n = len(features)
    lengths = [len(part) for part in (target, weight, position, chunk, support)]
    if features.ndim != 2 or position.shape[1:] != (3,) or chunk.ndim != 2 or lengths != [n] * 5:
        raise ValueError(f"features {tuple(features.shape)} do not fit the other parts of the sample, {lengths}")
    if target.dtype != torch.bool:
        raise ValueError(f"target must be bool, not {target.dtype}")
    if not (target.any() and not target.all()):
        raise ValueError("the sample must hold the structure and background")


def balanced(target: Tensor, weight: Tensor, support: Tensor, foreground: float) -> Tensor:
    """Weights by which every support counts the same, and the structure has a given share.

    Args:
        target: bool (N,).
        weight: float (N,).
        support: integer (N,).
        foreground: share of the structure; the natural one where that is larger.

    Returns:
        float64 (N,) of sum 1.
    """
    w = weight.double()
    foreground = max(foreground, natural_share(target, weight))
    shares = torch.zeros_like(w)
    for inside, share in ((target, foreground), (~target, 1 - foreground)):
        there = support[inside].unique()
        for one in there:
            own = inside & (support == one)
            shares[own] = share / len(there) * w[own] / w[own].sum()
    return shares


def natural_share(target: Tensor, weight: Tensor) -> float:
    """Share of the structure in the volumes of the supports."""
    w = weight.double()
    return float(w[target].sum() / w.sum())


def log_odds(share: float) -> float:
    """The logit of a share."""
    return float(torch.logit(torch.tensor(share, dtype=torch.float64)))


def bernoulli_entropy(share: float) -> float:
    """NLL of a share that is all one knows."""
    return float(torch.special.entr(torch.tensor([share, 1 - share], dtype=torch.float64)).sum())


def chunks_with(target: Tensor, chunk: Tensor, support: Tensor) -> Tensor:
    """How many supports have the structure in each chunk, int64 (n,)."""
    inside = torch.stack([chunk[target].argmax(dim=1), support[target]], dim=1).unique(dim=0)
    return torch.bincount(inside[:, 0], minlength=chunk.shape[1])


def absence(supports_with: Tensor, supports: int, strength: float = ABSENCE) -> Tensor:
    """Log odds float64 (n,) of a chunk's holding the structure: 0 where any support has it there.

    Where none has, the mean of Beta(a, b + k), the posterior after k supports without it: soft, and surer with k.
    """
    without = torch.full((len(supports_with),), log_odds(strength / (2 * strength + supports)), dtype=torch.float64)
    return torch.where(supports_with > 0, torch.zeros_like(without), without)
