"""Logits whose calibration is known, for they made their own reference."""

import numpy as np
from scipy import ndimage

from nnunet_calib.posthoc.maps.calibrator import log_softmax, softmax


def drawn(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A class for every voxel, drawn from its probabilities (C, ...)."""
    return (p.cumsum(axis=0) < rng.uniform(size=p.shape[1:]) * p.sum(axis=0)).sum(axis=0)


def logits(voxels: int, classes: int = 4, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """Log probabilities (C, N)."""
    return log_softmax(np.random.default_rng(seed).normal(0, spread, (classes, voxels)))


def ece(p: np.ndarray, y: np.ndarray) -> float:
    """Of the top label, 15 bins; the textbook's loop."""
    top, confidence, error = p.argmax(axis=0), p.max(axis=0), 0.0
    for k in range(15):
        inside = (confidence >= k / 15) & ((confidence < (k + 1) / 15) | (k == 14))
        if inside.any():
            error += abs((top == y)[inside].mean() - confidence[inside].mean()) * inside.mean()
    return error


def floor_of_ece(p: np.ndarray, draws: int = 20) -> float:
    """The largest ECE that perfectly honest probabilities show in so many draws of their reference."""
    rng = np.random.default_rng(99)
    return max(ece(p, drawn(p, rng)) for _ in range(draws))


def smooth_temperature(shape: tuple[int, ...] = (24, 32, 32), seed: int = 0):
    """A volume with a smooth temperature map that its image shows: logits, reference, image, map."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 5, mode="wrap")
    field = (field - field.min()) / np.ptp(field)
    temperature = 1 + 3 * field
    z = ndimage.gaussian_filter(rng.normal(0, 30, (3, *shape)), (0, 1, 1, 1))
    return log_softmax(z), drawn(softmax(z / temperature), rng), field[None], temperature
