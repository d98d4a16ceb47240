"""Class-conditional scaling that keeps the decision: every predicted class has a map of its own, on the gaps to it.

    p = softmax(-E),    E = 0 for the predicted class c = argmax z, and for the others

    arg-max preserving (CMSap):  E_k = e_k,                    e = B_c d + m_c,    d_k = z_c - z_k
    order preserving (CMSop):    E_(r) = e_1 + ... + e_r,      e = B_c d + m_c,    d_r = z_(r-1) - z_(r)

    B_c, m_c >= 0, the diagonal of B_c above 0;  z_(0) >= z_(1) >= ... the logits of the voxel in order

minimising NLL + off_diagonal mean (B_c off the diagonal)^2 + intercept mean m_c^2 + spread mean (b - mean b)^2, b the
diagonal. Since all gaps stay above 0, the predicted class keeps the largest probability (ap), or all classes their
order (op). The objective is convex in (B_c, m_c) and the bounds are a box, so the fit is the best there is, found
without step sizes or early stopping. One class' voxels have no part in another's map: the fits are separate.

From few cases a matrix for every class learns those cases. Without its off-diagonal it is a slope and an offset for
every gap, then a slope alone, and with slopes that are alike the class-wise temperature: ``choices`` are the steps of
that way, and cross-fitting over cases (``folders.crossfit.fit_cases``) says how far to go.

Rethinking post-hoc calibration in semantic segmentation, TMLR 2026, arXiv 2607.01902.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize

from nnunet_calib.posthoc.maps.calibrator import VoxelwiseCalibrator, check_numbers, softmax
from nnunet_calib.posthoc.maps.likelihood import RIDGE

if TYPE_CHECKING:
    from typing_extensions import Self

_SMALLEST = 1e-3  # of the diagonal: a gap above 0 stays above 0
_MAX_STEPS = 500
_PENALTY = 1e-4  # voxels are many
_FLAT = 1e-2
_ALIKE = 1e3  # spread of slopes that hardly differ


class PreservingScaling(VoxelwiseCalibrator):
    """A matrix and offsets for every predicted class, none of them negative, on gaps between logits.

    A class that is predicted nowhere in the fit set keeps its probabilities. A region is the two-class problem: a slope
    and an offset inside, others outside; what is above 1/2 stays above.

    Args:
        multilabel: sigmoid regions.
        off_diagonal: penalty of what a gap owes to other classes' gaps; infinite: nothing.
        intercept: penalty of the offsets; infinite: none.
        spread: penalty of slopes, the diagonal, that differ.
    """

    keeps_labels = True

    def __init__(
        self,
        *,
        multilabel: bool = False,
        off_diagonal: float = _PENALTY,
        intercept: float = _PENALTY,
        spread: float = 0.0,
    ):
        super().__init__(multilabel=multilabel)
        if not (off_diagonal >= 0 and intercept >= 0 and 0 <= spread < math.inf):
            raise ValueError("off_diagonal, intercept and spread must not be negative, and spread is finite")
        self.off_diagonal, self.intercept, self.spread = off_diagonal, intercept, spread

    def choices(self, cases: int, channels: int) -> Sequence[Self]:
        """From one slope a predicted class to all of the matrix, which is not tried from fewer cases than classes.

        One case alone has the first step; penalties that are not the default stay.
        """
        if (self.off_diagonal, self.intercept, self.spread) != (_PENALTY, _PENALTY, 0.0):
            return [self]
        classes = 2 if self.multilabel else channels
        steps = [(math.inf, math.inf, _ALIKE)]
        if cases > 1:
            steps += [(math.inf, math.inf, 1e-2), (math.inf, math.inf, 0.0)] if classes > 2 else []
            steps += [(math.inf, _PENALTY, 0.0)]
        make = partial(type(self), multilabel=self.multilabel)
        whole = [make()] if cases >= classes > 2 else []
        return [
            make(off_diagonal=of_others, intercept=offset, spread=spread) for of_others, offset, spread in steps
        ] + whole

    def _about(self):
        if not math.isinf(self.off_diagonal):
            fitted = "the whole matrix"
        elif not math.isinf(self.intercept):
            fitted = "a slope and an offset for every gap"
        else:
            fitted = "a slope for every gap" + (", drawn together" if self.spread else "")
        return [f"fitted for every predicted class: {fitted}"]

    @classmethod
    def _names(cls):
        return ("matrix", "offset")

    @staticmethod
    @abstractmethod
    def _gaps(z: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
        """Gaps (C-1, N) of logits (C, N) of voxels with predicted class c, and which class each is of, (C-1, N)."""

    @staticmethod
    @abstractmethod
    def _distances(e: np.ndarray) -> np.ndarray:
        """E (C-1, N) from e."""

    @staticmethod
    @abstractmethod
    def _distances_transposed(slope: np.ndarray) -> np.ndarray:
        """Slope by e (C-1, N) from that by E."""

    def _estimate(self, z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, Any]:
        k = len(z) - 1
        matrix, offset = np.tile(np.eye(k), (len(z), 1, 1)), np.zeros((len(z), k))
        top = z.argmax(axis=0)
        for c in range(len(z)):
            own = top == c
            if not own.any():
                self.notes.append(f"class {c} is predicted nowhere in the fit set: it keeps its probabilities there")
            elif k:
                gaps, classes = self._gaps(z[:, own], c)
                matrix[c], offset[c] = self._fit_one(gaps, classes == y[own], w[own])
        return {"matrix": matrix.tolist(), "offset": offset.tolist()}

    def _fit_one(self, gaps: np.ndarray, true: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and offsets of smallest NLL and penalty; ``true`` (C-1, N) marks the reference's class."""
        k, whole = len(gaps), not math.isinf(self.off_diagonal)
        scale = np.sqrt(np.square(gaps) @ w / w.sum())  # to step alike in all; gaps of ties are near 0
        scale = np.maximum(scale, max(_FLAT * scale.max(), 1e-12))
        if self.spread:  # which ties the slopes to each other
            scale[:] = scale.max()
        x = gaps / scale[:, None]
        intercept = 0.0 if math.isinf(self.intercept) else self.intercept / k
        off_diagonal = self.off_diagonal / max(1, k * (k - 1)) if whole else 0.0
        diagonal = np.eye(k, dtype=bool)

        def parts(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """Diagonal and offsets (k,), and the matrix without its diagonal (k, k), or nothing where that is 0."""
            return flat[:k], flat[k : 2 * k], flat[2 * k :].reshape(k if whole else 0, k)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            slopes, offsets, others = parts(flat)
            e = slopes[:, None] * x + offsets[:, None]
            if whole:
                e += others @ x
            distance = self._distances(e)
            p = np.exp(-distance)
            total = 1 + p.sum(axis=0)
            nll = float(w @ (np.log(total) + (distance * true).sum(axis=0)))
            residual = self._distances_transposed((true - p / total) * w)
            b, others = slopes / scale, others / scale
            apart, away = b - b.mean(), b - 1
            penalty = self.spread / k * (apart @ apart) + RIDGE / k * (away @ away)
            penalty += intercept * (offsets @ offsets) + off_diagonal * np.square(others).sum()
            by_others = np.where(diagonal, 0, residual @ x.T + 2 * off_diagonal * others / scale) if whole else others
            return nll + float(penalty), np.concatenate(
                [
                    (residual * x).sum(axis=1) + 2 / k * (self.spread * apart + RIDGE * away) / scale,
                    residual.sum(axis=1) + 2 * intercept * offsets,
                    by_others.ravel(),
                ]
            )

        start = np.concatenate([scale, np.zeros(k + k * k * whole)])
        highest = np.concatenate(
            [np.full(k, np.inf), np.full(k, 0.0 if math.isinf(self.intercept) else np.inf)]
            + [np.where(diagonal, 0.0, np.inf).ravel()] * whole
        )
        bounds = np.stack([np.append(_SMALLEST * scale, np.zeros(len(start) - k)), highest], axis=1)
        options = {"maxiter": _MAX_STEPS, "maxfun": 2 * _MAX_STEPS, "ftol": 1e-11, "gtol": 1e-9, "maxcor": 20}
        found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
        slopes, offsets, others = parts(found.x)
        matrix = others / scale if whole else np.zeros((k, k))
        np.fill_diagonal(matrix, np.maximum(slopes / scale, _SMALLEST))
        return matrix, offsets

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        if len(z) == 1:
            return np.ones_like(z)
        top, logits = z.argmax(axis=0), np.zeros_like(z)
        for c, (matrix, offset) in enumerate(zip(parameters["matrix"], parameters["offset"], strict=True)):
            own = np.flatnonzero(top == c)
            if own.size:
                gaps, classes = self._gaps(z[:, own], c)
                e = np.asarray(matrix, dtype=np.float64) @ gaps + np.asarray(offset, dtype=np.float64)[:, None]
                logits[classes, own] = -self._distances(e)
        return softmax(logits)

    def _check_parameters(self, parameters, classes):
        k = classes - 1
        matrix = check_numbers(parameters["matrix"], (classes, k, k))
        offset = check_numbers(parameters["offset"], (classes, k))
        if not (matrix.min(initial=0) >= 0 and offset.min(initial=0) >= 0):
            raise ValueError("parameters that may change labels")
        if not (np.diagonal(matrix, axis1=1, axis2=2) > 0).all():
            raise ValueError("parameters that may change labels")


class ArgmaxPreservingScaling(PreservingScaling):
    """CMSap: the predicted class stays; the others may change places."""

    key = "cmsap"

    @staticmethod
    def _gaps(z, c):
        others = np.delete(np.arange(len(z)), c)
        return z[c] - z[others], np.tile(others[:, None], (1, z.shape[1]))

    @staticmethod
    def _distances(e):
        return e

    @staticmethod
    def _distances_transposed(slope):
        return slope


class OrderPreservingScaling(PreservingScaling):
    """CMSop: all classes keep their order. What the map sees of a class is its rank."""

    key = "cmsop"
    keeps_order = True

    def _calibrate(self, z: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
        """As the base class, but sorts all voxels at once: their ranks do not depend on the map."""
        if len(z) == 1:
            return np.ones_like(z)
        top, (gaps, classes) = z.argmax(axis=0), self._gaps(z, 0)
        e, logits = np.empty_like(gaps), np.zeros_like(z)
        for c, (matrix, offset) in enumerate(zip(parameters["matrix"], parameters["offset"], strict=True)):
            own = np.flatnonzero(top == c)
            e[:, own] = np.asarray(matrix, dtype=np.float64) @ gaps[:, own] + np.asarray(offset, dtype=float)[:, None]
        np.put_along_axis(logits, classes, -self._distances(e), axis=0)
        return softmax(logits)

    @staticmethod
    def _gaps(z, c):
        order = np.argsort(-z, axis=0)
        ranked = np.take_along_axis(z, order, axis=0)
        gaps = ranked[:-1] - ranked[1:]
        equal = np.flatnonzero((gaps == 0).any(axis=0))  # of those the first class is the predicted one
        order[:, equal] = np.argsort(-z[:, equal], axis=0, kind="stable")  # the stable sort takes twice the time
        return gaps, order[1:]

    @staticmethod
    def _distances(e):
        return e.cumsum(axis=0)

    @staticmethod
    def _distances_transposed(slope):
        return slope[::-1].cumsum(axis=0)[::-1]
