"""What the methods with many parameters share: logits that are linear in them, and classes without a voxel.

    p_r = softmax over r of theta_r . x_r,    minimising NLL + sum penalty (theta - start)^2

The NLL is convex in theta. One column of theta, the last, is an offset; the common part of the offsets changes no
probability.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from nnunet_calib.posthoc.maps.calibrator import Calibrator, log_softmax, softmax

RIDGE = 1e-6
"""Penalty that only decides where the data do not: classes that never err stay finite."""

_MAX_STEPS = 1000


def fit_linear(
    features: np.ndarray, start: np.ndarray, penalty: np.ndarray, y: np.ndarray, w: np.ndarray
) -> np.ndarray:
    """Theta of smallest NLL and penalty.

    Args:
        features: x (K, N), the same for each class, or (R, K, N); the last of K is 1.
        start: (R, K), theta that leaves probabilities as they are.
        penalty: (R, K), not negative.
        y: classes (N,).
        w: weights (N,) of sum 1.

    Returns:
        (R, K), the offsets, its last column, without their mean; the start for one class alone.
    """
    if len(start) == 1:
        return start
    own = features.ndim == 3

    def logits(theta: np.ndarray) -> np.ndarray:
        return np.matmul(theta[:, None], features)[:, 0] if own else theta @ features

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        away = theta - start
        residual, nll = _residual_and_nll(logits(theta), y, w)
        gradient = np.matmul(features, residual[..., None])[..., 0] if own else residual @ features.T
        return nll + float((penalty * np.square(away)).sum()), gradient + 2 * penalty * away

    theta = _minimise(objective, start, _curvature(softmax(logits(start)), features, w, np.maximum(penalty, RIDGE)))
    theta[:, -1] -= theta[:, -1].mean()
    return theta


def _residual_and_nll(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, float]:
    """Gradient w (p - onehot(y)) of the weighted NLL of logits (C, N) by the logits, and the NLL."""
    voxels = np.arange(y.size)
    log_p = log_softmax(z)
    nll = -float(w @ log_p[y, voxels])
    p = np.exp(log_p, out=log_p)
    p[y, voxels] -= 1
    p *= w
    return p, nll


def _minimise(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, curvature: np.ndarray
) -> np.ndarray:
    """Where a convex function is smallest.

    Args:
        objective: its value and gradient at an array of the shape of ``start``, (R, K).
        start: where to begin.
        curvature: (R, K, K), second derivatives by each row at the start, positive definite. The search is in
            coordinates in which they are 1 in every direction: it changes the number of steps, not the result.
    """
    lower = np.linalg.cholesky(curvature)
    unit = np.linalg.inv(lower)

    def flat(t: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(np.einsum("rk,rkj->rj", t.reshape(start.shape), unit))
        return value, np.einsum("rj,rkj->rk", gradient, unit).ravel()

    options = {"maxiter": _MAX_STEPS, "ftol": 1e-11, "gtol": 1e-8, "maxcor": 20}
    begin = np.einsum("rk,rkj->rj", start, lower).ravel()
    found = minimize(flat, begin, jac=True, method="L-BFGS-B", options=options).x
    return np.einsum("rk,rkj->rj", found.reshape(start.shape), unit)


def _curvature(p: np.ndarray, features: np.ndarray, w: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Second derivatives of NLL + penalty * theta^2 by theta_r, for logits theta_r . features.

    Args:
        p: probabilities (R, N).
        features: (K, N); or (R, K, N), each row's own.
        w: (N,).
        penalty: (R, K).

    Returns:
        (R, K, K).
    """
    uncertain = w * p * (1 - p)
    rows = features if features.ndim == 3 else [features] * len(p)
    return np.stack([(x * u) @ x.T + np.diag(2 * own) for x, u, own in zip(rows, uncertain, penalty, strict=True)])


def present_classes(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits and classes with the absent classes taken out, and the indices of those that are there."""
    there = np.unique(y)
    return z[there], np.searchsorted(there, y), there


def note_absent(calibrator: Calibrator, there: np.ndarray) -> None:
    """Tell which classes have no voxel to be fitted on; of a region, that it or its outside has none."""
    if calibrator.multilabel:
        if there.size < 2:
            calibrator.notes.append(
                f"{'everywhere' if there[0] else 'nowhere'} in the fit set: it keeps its probabilities"
            )
        return
    assert calibrator.channels is not None
    for c in set(range(calibrator.channels)) - set(there.tolist()):
        calibrator.notes.append(f"class {c} is absent from the fit set: it keeps its logits")
