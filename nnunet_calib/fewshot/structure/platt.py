"""Calibrated probabilities: every support predicted by the others, and two numbers fitted to that.

    p = 1 / (1 + exp(-(slope s + bias)))

slope and bias minimise the NLL of logits from left-out supports, with every support counting the same; slope = 1 / T of
temperature scaling (Guo et al., ICML 2017), and with the bias it is Platt's scaling. A head is always too sure on what
it was fitted to, so with one support nothing can be fitted that holds for others: its probabilities stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.heads.base import Head
from nnunet_calib.fewshot.structure.logistic import fit_logistic

_CELLS = 1000
_SLAB = 1 << 20  # voxels counted at once
_LEAST = 0.25
_RIDGE = 1e-6  # towards slope 1 and bias 0, for supports that are told apart without error


@dataclass(frozen=True)
class PlattScaling:
    """A map from log odds to calibrated probabilities.

    Attributes:
        slope: above 0; below 1 the head was too sure.
        bias: added to the log odds.
    """

    slope: float = 1.0
    bias: float = 0.0

    def __post_init__(self):
        if not (0 < self.slope < np.inf and np.isfinite(self.bias)):
            raise ValueError(f"a slope above 0 and a finite bias, not {self.slope} and {self.bias}")

    def probability(self, logit: Tensor) -> Tensor:
        """Probabilities of log odds, of the same shape and type."""
        return torch.sigmoid(self.slope * logit + self.bias)

    @property
    def threshold(self) -> float:
        """The probability of log odds 0: where the volume prior draws the line between structure and background.

        It is below one half where a head that finds the right volume does not find the right voxels: labels are cut
        here, for at one half of a calibrated probability most of such a structure would be missing.
        """
        return float(torch.sigmoid(torch.tensor(self.bias, dtype=torch.float64)))

    def cut(self, logit: np.ndarray, weight: np.ndarray | None = None) -> float:
        """The probability above which the voxels of a volume are labelled, from their log odds and ``weight``.

        Only of calibrated probabilities an expected Dice means something; where nothing was fitted the volume prior
        draws the line.
        """
        return self.threshold if self == PlattScaling() else best_threshold(logit, self, weight)


def best_threshold(
    logit: np.ndarray, calibration: PlattScaling | None = None, weight: np.ndarray | None = None
) -> float:
    """The probability to cut at for the largest Dice that calibrated probabilities let expect.

        t* = argmax_t  2 sum_{p > t} p / (n_{p > t} + sum p)

    It is half of the Dice reached there, so below one half: where much is unsure, the volume prior's cut and one half
    leave most of the structure out. Lipton et al., Optimal thresholding of classifiers to maximize F1 measure, ECML
    2014.

    Args:
        logit: log odds of every voxel, any shape.
        calibration: gives their probabilities p, and where the volume prior cuts; the identity if None.
        weight: voxels that each stands for, of the shape of ``logit``; one if None.

    Returns:
        At most 1/2. At least 1/4, for what is three times as likely not to be the structure is better not labelled; or
        where the prior cuts, if that is lower: a weak head is nowhere sure, and would leave the structure out.
    """
    calibration = calibration or PlattScaling()
    dice = _dice_by_cut(logit, calibration, weight)
    best = 1 - (int(dice.argmax()) + 1) / _CELLS
    return min(0.5, max(min(_LEAST, calibration.threshold), best))


def expected_dice(logit: np.ndarray, calibration: PlattScaling, threshold: float) -> float:
    """The Dice that a volume's probabilities let expect of a cut: 2 sum_{p > t} p / (n_{p > t} + sum p).

    Args:
        logit: log odds of every voxel, any shape.
        calibration: gives their probabilities.
        threshold: t, to a thousandth.

    Returns:
        In [0, 1]; 0 where nothing is above the cut. As true as the probabilities are.
    """
    cell = min(max(round((1 - threshold) * _CELLS) - 1, 0), _CELLS - 1)
    return float(_dice_by_cut(logit, calibration, None)[cell])


def _dice_by_cut(logit: np.ndarray, calibration: PlattScaling, weight: np.ndarray | None) -> np.ndarray:
    """Expected Dice (1000,) of cuts at 0.999, 0.998, ..., 0."""
    counts, found = np.zeros(_CELLS), np.zeros(_CELLS)
    flat, weights = np.ravel(logit), None if weight is None else np.ravel(weight)
    for first in range(0, flat.size, _SLAB):
        part = slice(first, first + _SLAB)
        p = calibration.probability(torch.from_numpy(flat[part])).numpy()
        w = None if weights is None else weights[part]
        cell = (p * _CELLS).astype(np.int64).clip(max=_CELLS - 1)
        counts += np.bincount(cell, w, minlength=_CELLS)
        found += np.bincount(cell, p if w is None else p * w, minlength=_CELLS)
    above, inside = counts[::-1].cumsum(), found[::-1].cumsum()
    return 2 * inside / np.maximum(above + inside[-1], 1)


def out_of_fold(
    fit: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Head],
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    position: Tensor,
    chunk: Tensor,
    support: Tensor,
) -> Tensor:
    """Log odds of every voxel by a head that has not seen its volume.

    Args:
        fit: ``Head.fit`` of a head, its settings bound; the other arguments are its own.
        features: float (N, F).
        target: bool (N,).
        weight: float (N,).
        position: float (N, 3).
        chunk: float (N, n).
        support: integer (N,).

    Returns:
        float32 (N,).

    Raises:
        ValueError: fewer than two supports with the structure: there is nothing to leave out.
    """
    if len(support[target].unique()) < 2:
        raise ValueError("leaving a support out takes two supports with the structure")
    logit = torch.empty(len(features), dtype=torch.float32, device=features.device)
    for one in support.unique():
        own, others = support == one, support != one
        head = fit(*(part[others] for part in (features, target, weight, position, chunk, support)))
        logit[own] = head(features[own], position[own], chunk[own])
    return logit


def fit_platt(logit: Tensor, target: Tensor, weight: Tensor, support: Tensor) -> PlattScaling:
    """Slope and bias of smallest NLL, every support counting the same.

    Args:
        logit: float (N,), of left-out supports.
        target: bool (N,).
        weight: float (N,), voxels that each stands for; 0 leaves a voxel out.
        support: integer (N,).

    Returns:
        The calibration; as it is without fit where the logits do not even point the right way.
    """
    w = weight.double()
    per_support = torch.zeros_like(w)
    there = support[w > 0].unique()
    for one in there:
        own = support == one
        per_support[own] = w[own] / w[own].sum() / len(there)
    x = torch.stack([logit.double(), torch.ones_like(logit, dtype=torch.float64)], dim=1)
    centre = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    found = fit_logistic(x, target, per_support, torch.full_like(centre, _RIDGE), centre).tolist()
    return PlattScaling(*found) if found[0] > 0 else PlattScaling()
