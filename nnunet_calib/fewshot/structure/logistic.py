"""Weighted logistic regression, shrunk towards a centre; all that is fitted by likelihood in this room.

    theta = argmin  sum_i w_i log(1 + exp(-s_i x_i . theta)) + 1/2 sum_j r_j (theta_j - c_j)^2,    s_i = +1 or -1

The objective is strictly convex for r > 0, so Newton's steps, halved where they go too far, end in its one minimum.
Products are taken in float32 (or the type of x) over blocks of rows, sums over blocks in float64.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

_ROWS = 8_192  # of x at once
_THINNED = 8  # every eighth row is enough to begin with
_STEPS = 50
_HALVINGS = 20
_CLOSE = 1e-6  # of the weight of the rarer class, of what a step still gains


def fit_logistic(
    x: Tensor, target: Tensor, weight: Tensor, ridge: Tensor, centre: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """The minimum.

    Args:
        x: float (N, D).
        target: bool (N,).
        weight: float64 (N,), not negative.
        ridge: float64 (D,), r > 0.
        centre: float64 (D,), c; 0 if None.
        start: float64 (D,), where to begin; the centre if None. It changes the number of steps, not the result.

    Returns:
        float64 (D,).
    """
    centre = torch.zeros_like(ridge) if centre is None else centre
    if start is None and len(x) > _THINNED * _ROWS:
        few = slice(None, None, _THINNED)  # most steps are taken where they cost little
        start = fit_logistic(x[few], target[few], weight[few] * (weight.sum() / weight[few].sum()), ridge, centre)
    close = _CLOSE * min(float(weight[target].sum()), float(weight[~target].sum()))
    theta = centre.clone() if start is None else start.clone()
    value, gradient, curvature = _expand(x, target, weight, ridge, centre, theta)
    for _ in range(_STEPS):
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(curvature))[:, 0]
        gain = float(gradient @ step)
        size = 1.0
        for _ in range(_HALVINGS):
            found = _value(x, target, weight, ridge, centre, theta - size * step)
            if found <= value - 1e-4 * size * gain:
                break
            size /= 2
        else:
            break  # no descent left above rounding
        theta = theta - size * step
        if gain <= close:
            break
        value, gradient, curvature = _expand(x, target, weight, ridge, centre, theta)
    return theta


def _value(x: Tensor, target: Tensor, weight: Tensor, ridge: Tensor, centre: Tensor, theta: Tensor) -> float:
    """The objective."""
    z = (x @ theta.to(x.dtype)).double()
    return float(weight @ softplus(torch.where(target, -z, z)) + (ridge * (theta - centre) ** 2).sum() / 2)


def _expand(
    x: Tensor, target: Tensor, weight: Tensor, ridge: Tensor, centre: Tensor, theta: Tensor
) -> tuple[float, Tensor, Tensor]:
    """The objective with its first and second derivatives."""
    away = theta - centre
    value, gradient, curvature = float((ridge * away**2).sum() / 2), ridge * away, torch.diag(ridge)
    for rows in (slice(first, first + _ROWS) for first in range(0, len(x), _ROWS)):
        part, y, w = x[rows], target[rows], weight[rows]
        z = (part @ theta.to(x.dtype)).double()
        p = torch.sigmoid(z)
        value += float(w @ softplus(torch.where(y, -z, z)))
        gradient = gradient + (part.T @ (w * (p - y.double())).to(x.dtype)).double()
        scaled = part * (w * p * (1 - p)).sqrt().to(x.dtype)[:, None]
        curvature = curvature + (scaled.T @ scaled).double()
    return value, gradient, curvature
