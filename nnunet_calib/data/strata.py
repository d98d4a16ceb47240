"""A few voxels that stand for all: drawn within strata, each with the number of voxels it stands for."""

import numpy as np


def draw(
    stratum: np.ndarray, valid: np.ndarray | None, voxels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the same number of voxels from each stratum, without replacement; small strata are taken whole.

    Args:
        stratum: small non-negative integers, any shape.
        valid: bool of that shape, voxels that may be drawn; all if None.
        voxels: to draw in total, about; all if there are fewer.
        rng: decides which.

    Returns:
        Indices into the flat array, int64 ascending, and weights float64: of a stratum, its voxels by those drawn.
    """
    flat = stratum.reshape(-1)
    inside = None if valid is None else valid.reshape(-1)
    sizes = np.bincount(flat if inside is None else flat[inside])
    shares = _equal_shares(sizes, voxels)
    drawn, weights = [], []
    for s in np.flatnonzero(shares):
        members = np.flatnonzero(flat == s) if inside is None else np.flatnonzero((flat == s) & inside)
        drawn.append(rng.choice(members, shares[s], replace=False, shuffle=False))
        weights.append(np.full(shares[s], sizes[s] / shares[s]))
    index = np.concatenate(drawn)
    order = np.argsort(index)
    return index[order], np.concatenate(weights)[order]


def _equal_shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """Integers up to ``sizes`` that add up to ``total`` or all there is: equal, but for those that cannot be.

    Nothing that is there has none, even where that is more than ``total``: it would have no voxel to stand for it.
    """
    shares = np.zeros_like(sizes)
    left = min(max(total, int(np.count_nonzero(sizes))), int(sizes.sum()))
    for done, s in enumerate(order := np.argsort(sizes, kind="stable")):
        shares[s] = min(int(sizes[s]), -(-left // (len(order) - done)))
        left -= int(shares[s])
    return shares
