"""Isotonic regression: for every class the best ascending map of its probability, then all made to sum to one.

    q_c = f_c(p_c),  f_c ascending, minimising sum w (f_c(p_c) - y_c)^2;    p = q / sum_c q_c

Zadrozny and Elkan, Transforming classifier scores into accurate multiclass probability estimates, KDD 2002.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_calib.posthoc.maps.calibrator import VoxelwiseCalibrator, check_numbers

_KNOTS = 500  # of a curve in the file; between them it is a straight line


class IsotonicCalibration(VoxelwiseCalibrator):
    """An ascending curve for each class, or each region. It can change labels.

    Curves keep off 0 and 1 by half a voxel of the fit set: what was never seen is rare, not impossible. A class absent
    from the fit set, or everywhere in it, keeps its probabilities, as does a voxel all of whose curves end at 0.
    """

    key = "isotonic"
    keeps_labels = False

    @classmethod
    def _names(cls):
        return ("curves",)

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        p = np.exp(z)
        return {"curves": [self._curve(c, p[c], y == c, w) for c in range(len(z))]}

    def _curve(self, c: int, p: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, list[float]]:
        if y.all() or not y.any():
            self.notes.append(f"class {c} is nowhere, or everywhere, in the fit set: it keeps its probabilities")
            return {"p": [0.0, 1.0], "q": [0.0, 1.0]}
        from sklearn.isotonic import IsotonicRegression  # not needed to apply

        fitted = IsotonicRegression(out_of_bounds="clip").fit(p, y, sample_weight=w)
        knots, values = fitted.X_thresholds_, fitted.y_thresholds_
        if knots.size > _KNOTS:
            kept = np.unique(np.linspace(0, knots.size - 1, _KNOTS).round().astype(int))
            knots, values = knots[kept], values[kept]
        smallest = 0.5 / (y.size + 1)
        return {"p": knots.tolist(), "q": values.clip(smallest, 1 - smallest).tolist()}

    def _check_parameters(self, parameters, classes):
        curves = parameters["curves"]
        if not isinstance(curves, list) or len(curves) != classes:
            raise ValueError("a curve for each class is needed")
        for curve in curves:
            if not curve["p"]:
                raise ValueError("a curve has points")
            p, q = (check_numbers(curve[axis], (len(curve["p"]),)) for axis in ("p", "q"))
            if (np.diff(p) < 0).any() or (np.diff(q) < 0).any() or q.min() < 0 or q.max() > 1:
                raise ValueError("a curve ascends between 0 and 1")

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        p = np.exp(z)
        pairs = zip(p, parameters["curves"], strict=True)
        q = np.stack([np.interp(own, curve["p"], curve["q"]) for own, curve in pairs])
        total = q.sum(axis=0)
        q[:, total <= 0] = p[:, total <= 0]
        return q / q.sum(axis=0)
