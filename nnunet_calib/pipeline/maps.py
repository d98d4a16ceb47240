"""Maps of how sure a prediction is, a voxel a number.

With p the probabilities (C, ...) of a voxel, M members (folds) and H the entropy in nats:

    confidence          max_c p_c; regions: the smallest over regions of max(p_r, 1 - p_r)
    entropy             H(p) = -sum_c p_c log p_c; regions: the mean over regions of the two-class entropy
    mutual_information  H(mean of the members' p) - mean of the members' H: what the members disagree about
    disagreement        1 - (members with the most frequent label) / M
"""

from collections.abc import Sequence

import numpy as np
import torch


def confidence(probabilities: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Float32 (...) of float32 (C, ...)."""
    if multilabel:
        return np.maximum(probabilities, 1 - probabilities).min(axis=0)
    return probabilities.max(axis=0)


def entropy(probabilities: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Float32 (...) in nats, of float32 (C, ...)."""
    p = torch.from_numpy(probabilities)
    if multilabel:
        return (torch.special.entr(p) + torch.special.entr(1 - p)).mean(dim=0).numpy()
    return torch.special.entr(p).sum(dim=0).numpy()


def mutual_information(members: Sequence[np.ndarray], *, multilabel: bool) -> np.ndarray:
    """Float32 (...) in nats, of each member's float32 (C, ...); rounding below 0 is 0."""
    whole = entropy(np.asarray(np.mean(members, axis=0, dtype=np.float32)), multilabel=multilabel)
    return np.maximum(whole - np.mean([entropy(p, multilabel=multilabel) for p in members], axis=0), 0)


def disagreement(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Float32 (...) in [0, 1), of each member's label map."""
    votes = np.zeros(labels[0].shape, dtype=np.int16)
    for one in labels:
        votes = np.maximum(votes, sum((one == other).astype(np.int16) for other in labels))
    return (1 - votes / len(labels)).astype(np.float32)
