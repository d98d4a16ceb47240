"""How far a mean over cases would move with other cases: bootstrap confidence intervals."""

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of bootstrap samples of cases (Efron and Tibshirani, An introduction to the bootstrap, 1993).

    Args:
        values: float (cases, numbers). NaN: the number does not exist for that case and is left out; inf is kept.

    Returns:
        float64 (resamples, numbers); all columns of a row come from the same sample of cases.
    """
    cases = len(values)
    drawn = np.random.default_rng(SEED).multinomial(cases, np.full(cases, 1 / cases), size=RESAMPLES)
    exists, infinite = ~np.isnan(values), np.isinf(values)
    count = drawn @ exists.astype(np.int64)
    means = np.full(count.shape, np.nan)
    np.divide(drawn @ np.where(np.isfinite(values), values, 0.0), count, out=means, where=count > 0)
    means[drawn @ infinite.astype(np.int64) > 0] = np.inf
    return means


def percentile_interval(means: np.ndarray) -> tuple[float, float]:
    """The central interval of one column of ``resampled_means``; NaN if no sample has a value."""
    known = np.sort(means[~np.isnan(means)])
    if not known.size:
        return float("nan"), float("nan")
    # order statistics, without interpolation: between a number and inf there is nothing to interpolate
    tail = (1 - LEVEL) / 2 * (known.size - 1)
    return float(known[int(np.floor(tail))]), float(known[int(np.ceil(known.size - 1 - tail))])
