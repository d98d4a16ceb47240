"""What the methods with many parameters share: the NLL's gradient, its minimum, and classes without a voxel."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from nnunet_calib.posthoc.base import Calibrator, log_softmax

_MAX_STEPS = 1000


def residual_and_nll(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, float]:
    """Gradient w (p - onehot(y)) of the weighted NLL of logits (C, N) by the logits, and the NLL."""
    voxels = np.arange(y.size)
    log_p = log_softmax(z)
    nll = -float(w @ log_p[y, voxels])
    p = np.exp(log_p, out=log_p)
    p[y, voxels] -= 1
    p *= w
    return p, nll


def minimise(objective: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray) -> np.ndarray:
    """Where a convex function that gives its gradient too is smallest; an array of the shape of ``start``."""

    def flat(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(theta.reshape(start.shape))
        return value, gradient.ravel()

    options = {"maxiter": _MAX_STEPS, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 30}
    return minimize(flat, start.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(start.shape)


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
