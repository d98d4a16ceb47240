"""The novel structures among the base classes, whose logits stay as they are.

    p = softmax(log b_1, ..., log b_C, s_1, ..., s_T)

of the base model's probabilities b and the calibrated log odds s of each novel structure: with one structure its own
calibrated probability, and b (1 - p) for the rest. Hajimiri et al., A strong baseline for generalized few-shot semantic
segmentation (DIaM), CVPR 2023, with the base classifier frozen.
"""

from collections.abc import Collection, Sequence

import numpy as np

_CERTAIN = 2.0**-60  # 1 - p of a probability of 1: the odds of many such structures still have a sum


def merge_probabilities(base: np.ndarray, novel: np.ndarray, *, regions: bool = False) -> np.ndarray:
    """Probabilities of the base classes and the novel structures together.

    Args:
        base: float (C, *S), of sum 1 over C; ``regions``: sigmoid regions.
        novel: float (T, *S), the calibrated probability of each structure.
        regions: regions do not exclude each other, and nothing competes.

    Returns:
        float32 (C + T, *S).
    """
    merged = np.empty((len(base) + len(novel), *base.shape[1:]), dtype=np.float32)
    if regions:
        return np.concatenate([base, novel], out=merged)
    for plane, own in enumerate(novel.swapaxes(0, 1)):  # of a whole volume float64 would be many times as large
        p = own.astype(np.float64)
        odds = p / np.maximum(1 - p, _CERTAIN)
        rest = 1 / (1 + odds.sum(axis=0))
        merged[: len(base), plane] = base[:, plane] * rest
        merged[len(base) :, plane] = odds * rest
    return merged


def merge_labels(
    base: np.ndarray,
    confidence: np.ndarray,
    novel: np.ndarray,
    values: Sequence[int],
    thresholds: Sequence[float],
    inside: Sequence[Collection[int]] | None = None,
) -> np.ndarray:
    """Labels of the base classes and the novel structures together.

    A structure is there where its probability is above its threshold, and the base model says background, or a class
    that the structure lies inside of, or is less sure than the structure's probability. Of two structures the one of
    the larger probability.

    Args:
        base: integer (*S), the base model's labels.
        confidence: float (*S), the base model's probability of that label.
        novel: float (T, *S), the calibrated probability of each structure.
        values: label of each structure.
        thresholds: of each, as ``PlattScaling.threshold``.
        inside: base labels that each may always override (a tumour's organ); none if None.

    Returns:
        Integer (*S), of the type of ``base`` or the smallest that holds all values.
    """
    merged = base.astype(np.promote_types(base.dtype, np.min_scalar_type(max(values))))
    best = np.zeros(base.shape, dtype=np.float32)
    allowed = inside if inside is not None else [()] * len(values)
    for p, value, threshold, under in zip(novel, values, thresholds, allowed, strict=True):
        free = np.isin(base, [0, *under]) | (p > confidence)
        wins = free & (p > threshold) & (p > best)
        merged[wins] = value
        best[wins] = p[wins]
    return merged
