"""Maximum entropy on erroneous predictions.

    L = CE - weight * R,    W = voxels whose most likely class is wrong
    entropy:  R =  mean over W of -sum_c p_c log p_c
    kl:       R = -mean over W and classes of -log p_c       (KL(uniform || p) up to a constant)

Larrazabal et al., Maximum entropy on erroneous predictions: improving model calibration for medical image segmentation,
MICCAI 2023.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_calib.losses.base import (
    CalibrationLoss,
    at_target,
    choice,
    flag,
    masked_mean,
    masked_sum,
    number,
    sum_over_classes,
    voxel_count,
)
from nnunet_calib.losses.ecp import mean_entropy

_KERAS_EPSILON = 1e-7


class MEEPLoss(CalibrationLoss):
    """Cross-entropy minus a measure of doubt on the wrong voxels; the measure is 0 where none is wrong.

    The wrong voxels are pooled over the batch (over regions too), in multi-GPU training over the rank's own batch.

    Args:
        weight: of the measure.
        variant: "entropy" or "kl".
        binary: the authors' code for more than two classes: each class's softmax probability is a binary problem, in
            the cross-entropy and in the entropy (means over classes). For two classes that is the same.
        multilabel: sigmoid regions.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, weight: float = 0.3, variant: str = "entropy", binary: bool = False, *, multilabel: bool = False
    ):
        super().__init__(multilabel=multilabel)
        self.weight = number("weight", weight)
        self.variant = choice("variant", variant, ("entropy", "kl"))
        self.binary = flag("binary", binary)

    def _parts(self, z: Tensor, target: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        log_p = log_softmax(z, dim=1)
        wrong = z.detach().argmax(dim=1, keepdim=True) != target
        if valid is not None:
            wrong = wrong & valid
        if self.binary:
            base = _binary_mean(
                lambda c, p: -torch.log(torch.where(target == c, p, 1 - p) + _KERAS_EPSILON), log_p, valid
            )
        else:
            base = masked_mean(-at_target(log_p, target), valid)
        if self.variant == "kl":
            doubt = masked_mean(log_p.mean(dim=1, keepdim=True), wrong)
        elif self.binary:
            doubt = _binary_mean(lambda _, p: _binary_entropy(p), log_p, wrong)
        else:
            doubt = mean_entropy(log_p, wrong)
        return {"cross_entropy": base, "doubt": doubt}

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["cross_entropy"] - self.weight * parts["doubt"]


def _binary_entropy(p: Tensor) -> Tensor:
    return -p * torch.log(p + _KERAS_EPSILON) - (1 - p) * torch.log(1 - p + _KERAS_EPSILON)


def _binary_mean(term: Callable[[int, Tensor], Tensor], log_p: Tensor, among: Tensor | None) -> Tensor:
    """Mean over classes and the voxels ``among`` of ``term(c, p_c)``, with p clipped as Keras does."""

    def summed(c: int, log_p_c: Tensor) -> Tensor:
        return masked_sum(term(c, log_p_c.exp().clamp(_KERAS_EPSILON, 1 - _KERAS_EPSILON)), among)

    return sum_over_classes(summed, log_p) / (voxel_count(log_p, among) * log_p.shape[1])
