"""A fitted structure's heads refined on a query: which of its voxels, and what volume is expected there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.fitted import FittedStructure, chunk_weights, expected_volume
from nnunet_calib.fewshot.structure.heads import Head, LinearHead
from nnunet_calib.fewshot.structure.objective import Objective, Query, refine
from nnunet_calib.fewshot.volume.scan import Scan

_SLAB = 1 << 19  # voxels whose places are looked at at once
_QUERY_VOXELS = 20_000  # of a query that a head is refined on
_NEAR = 0.8  # share of them near where the supports have the structure


def refine_on_query(
    fitted: FittedStructure,
    scan: Scan,
    sampled: Callable[[np.ndarray], list[Tensor]],
    objective: Objective,
    seed: int = 0,
) -> list[Head]:
    """Heads refined on a query without its labels.

    Args:
        fitted: linear heads.
        scan: the query.
        sampled: features of each fold, float (N, F), at indices (N,) into its flat volume.
        objective: what is minimised.
        seed: of the voxels drawn.
    """
    alignment = fitted.frame.align(scan.size, scan.landmarks)
    expected = expected_volume(fitted, scan, alignment)
    every = np.arange(scan.base.size)
    near = np.concatenate(
        [
            fitted.places.reach(fitted.frame.position(alignment(scan.mm(index))))
            for index in np.array_split(every, max(1, every.size // _SLAB))
        ]
    )
    rng = np.random.default_rng(seed)
    index, weight = [], []
    for members, share in ((every[near], _NEAR), (every[~near], 1 - _NEAR)):
        if members.size:
            drawn = rng.choice(members, min(members.size, round(share * _QUERY_VOXELS)), replace=False)
            index.append(drawn)
            weight.append(np.full(drawn.size, members.size / drawn.size))
    chosen, weights = np.concatenate(index), torch.from_numpy(np.concatenate(weight))
    position = torch.from_numpy(fitted.frame.position(alignment(scan.mm(chosen))).astype(np.float32))
    chunk = chunk_weights(fitted.settings, position)
    within = torch.from_numpy(near[chosen])
    share_expected = None if not expected or objective.predicted else expected / (scan.base.size * scan.voxel_mm3)
    if objective.uniform:
        share_expected = 0.5  # it has no part in the objective, and no second stage as RePRI's
    refined: list[Head] = []
    for head, sample, features in zip(fitted.heads, fitted.samples, sampled(chosen), strict=True):
        assert isinstance(head, LinearHead)
        query = Query(features, position, chunk, weights, within)
        refined.append(refine(head, sample, query, share_expected, objective))
    return refined
