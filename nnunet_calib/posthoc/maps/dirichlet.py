"""Dirichlet calibration: every class hears all classes. Matrix scaling on z = log p.

    p = softmax(W log p + b)
    minimising NLL + lambda / (C (C - 1)) sum_{i != j} W_ij^2 + mu / C sum_i b_i^2          (ODIR)

Kull et al., Beyond temperature scaling, NeurIPS 2019, equations 5 and 7. For a region it is beta calibration. ODIR's
lambda and mu are theirs to choose; 1e-3 is the smallest of the values they searched, for voxels are many.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_calib.posthoc.maps.calibrator import VoxelwiseCalibrator, check_numbers, softmax
from nnunet_calib.posthoc.maps.likelihood import RIDGE, fit_linear, note_absent, present_classes


class DirichletCalibration(VoxelwiseCalibrator):
    """A full matrix and offsets, pulled to the diagonal. It can change labels.

    A class absent from the fit set keeps its row and column of the unit matrix and offset 0.

    Args:
        multilabel: sigmoid regions; one 2 x 2 matrix each.
        off_diagonal: lambda.
        intercept: mu.
    """

    key = "dirichlet"
    keeps_labels = False

    def __init__(self, *, multilabel: bool = False, off_diagonal: float = 1e-3, intercept: float = 1e-3):
        super().__init__(multilabel=multilabel)
        if min(off_diagonal, intercept) < 0:
            raise ValueError("off_diagonal and intercept must not be negative")
        self.off_diagonal, self.intercept = off_diagonal, intercept

    @classmethod
    def _names(cls):
        return ("matrix", "offset")

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        classes = len(z)
        theta = np.eye(classes, classes + 1)
        z, y, there = present_classes(z, y)
        note_absent(self, there)
        k = len(z)
        penalty = np.full((k, k + 1), self.off_diagonal / max(1, k * (k - 1)))
        penalty[:, k] = self.intercept / k
        np.fill_diagonal(penalty, RIDGE)
        place = np.ix_(there, np.append(there, classes))
        theta[place] = fit_linear(np.vstack([z, np.ones_like(z[:1])]), theta[place], penalty, y, w)
        return {"matrix": theta[:, :-1].tolist(), "offset": theta[:, -1].tolist()}

    def _check_parameters(self, parameters, classes):
        check_numbers(parameters["matrix"], (classes, classes))
        check_numbers(parameters["offset"], (classes,))

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        matrix, offset = (np.asarray(parameters[name], dtype=np.float64) for name in self._names())
        return softmax(matrix @ z + offset[:, None])
