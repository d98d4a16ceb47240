"""The head of adapters: the branch beside the decoder has learned everything (``network.branch``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from nnunet_calib.fewshot.structure.heads.base import Head, check_sample

if TYPE_CHECKING:
    from typing_extensions import Self


class AdapterHead(Head):
    """What is left to do for a head when a branch has given its log odds as the one feature of a voxel.

    Args:
        trained: of the branch, as ``AdapterBranch.trained``; empty until ``with_branch``.
    """

    key = "adapter"

    def __init__(self, trained: Mapping[str, torch.Tensor] | None = None):
        self.trained = dict(trained or {})
        self.projections = torch.ones(1, 1)

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        position: torch.Tensor,
        chunk: torch.Tensor,
        support: torch.Tensor,
    ) -> AdapterHead:
        """As ``Head.fit``, of features (N, 1): the fit was the branch's."""
        check_sample(features, target, weight, position, chunk, support)
        if features.shape[1] != 1:
            raise ValueError("adapters take the log odds of a branch as their one feature")
        return cls()

    def logit(self, projected: torch.Tensor, position: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """As ``Head.logit``; the same in all chunks."""
        return projected[:, 0]

    def state(self) -> dict[str, torch.Tensor]:
        """As ``Head.state``."""
        return {name: part.detach().cpu().contiguous() for name, part in self.trained.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Self:
        """As ``Head.from_state``."""
        if "novel.weight" not in state:
            raise ValueError("no adapters in it")
        return cls(state)
