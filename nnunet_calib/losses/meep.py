"""Maximum entropy on erroneous predictions.

    L = CE - weight * R,    W = voxels whose most likely class is wrong
    entropy:  R =  mean over W of -sum_c p_c log p_c
    kl:       R = -mean over W and classes of -log p_c       (KL(uniform || p) up to a constant)

Larrazabal et al., Maximum entropy on erroneous predictions: improving model calibration for medical image segmentation,
MICCAI 2023.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.ecp import entropy, entropy_term
from nnunet_calib.losses.ls import uniform, uniform_term
from nnunet_calib.losses.processes import mean_over_processes
from nnunet_calib.losses.values import choice, flag, number
from nnunet_calib.losses.voxelwise import Batch, Regions, Term, Voxels, cross_entropy_term, equal

_KERAS_EPSILON = 1e-7
_LEAST_WRONG = 1e-6  # less than one voxel over any number of processes


class MEEPLoss(CalibrationLoss):
    """Cross-entropy minus a measure of doubt on the wrong voxels; the measure is 0 where none is wrong.

    The wrong voxels are pooled over the batch (over regions too), in multi-GPU training over the batches of all
    processes: each wrong voxel weighs the same, wherever it is.

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

    def _weights(self) -> dict[str, float]:
        return {"cross_entropy": 1.0, "doubt": -self.weight}

    def _shared(self, batch: Batch) -> tuple[Tensor, Iterator[Tensor]]:
        """What a wrong voxel weighs, voxels over wrong voxels, and the masks of the wrong ones, slab by slab."""
        wrong = [wrong_voxels(v) for v in batch]
        number_wrong = mean_over_processes(torch.stack([mask.sum() for mask in wrong]).sum())
        # None is wrong: nothing is weighed. With several processes the mean can be a fraction of a voxel.
        weight = batch.voxel_count() * (number_wrong > 0) / number_wrong.clamp(min=_LEAST_WRONG)
        return weight.to(batch.dtype), iter(wrong)

    def _formula(self, v: Voxels, shared: tuple[Tensor, Iterator[Tensor]]) -> dict[str, Tensor]:
        average, wrong = shared
        if self.variant == "kl":
            doubt = -uniform(v)
        else:
            doubt = _class_mean(_keras_bce(v.p, v.p), v) if self.binary else entropy(v)
        cross_entropy = _class_mean(_keras_bce(v.p, -v.minus_onehot(torch.zeros_like(v.p))), v)
        return {
            "cross_entropy": cross_entropy if self.binary else -v.log_p_y,
            "doubt": average * next(wrong) * doubt,
        }

    def _terms(self, v: Voxels, shared: tuple[Tensor, Iterator[Tensor]]) -> dict[str, Term]:
        if self.variant == "kl":
            measure = uniform_term(v)
        else:
            measure = _binary_entropy_term(v) if self.binary else entropy_term(v)
        average, wrong = shared
        weight = (-average if self.variant == "kl" else average) * next(wrong).to(average.dtype)
        return {
            "cross_entropy": _binary_cross_entropy_term(v) if self.binary else cross_entropy_term(v),
            "doubt": Term(weight * measure.values, lambda: measure.slope().mul_(weight)),
        }


def wrong_voxels(v: Voxels) -> Tensor:
    """Valid voxels whose most likely class, the first of several, is not the label."""
    if isinstance(v, Regions):  # logits (0, z)
        wrong = (v.z > 0) != (v.target > 0)
        return wrong if v.valid is None else wrong & v.valid
    # Not argmax: along a strided axis it takes a hundred times as long as amax on CPU.
    most_likely = equal(v.z, v.z.amax(dim=1, keepdim=True))
    countdown = torch.arange(v.classes, 0, -1, device=v.z.device).to(v.z.dtype)
    first = (most_likely * countdown.view(1, -1, *[1] * (v.z.ndim - 2))).amax(dim=1, keepdim=True)
    wrong = first != v.classes - v.target
    return wrong if v.valid is None else wrong & v.valid


def _keras_bce(p: Tensor, t: Tensor) -> Tensor:
    """Binary cross-entropy of probabilities p with targets t, with Keras' clipping of p in both places."""
    t = t.clamp(_KERAS_EPSILON, 1 - _KERAS_EPSILON) if t is p else t
    p = p.clamp(_KERAS_EPSILON, 1 - _KERAS_EPSILON)
    return -(t * torch.log(p + _KERAS_EPSILON) + (1 - t) * torch.log(1 - p + _KERAS_EPSILON))


def _binary_cross_entropy_term(v: Voxels) -> Term:
    """Mean over classes of the binary cross-entropy of p_c, with Keras' clipping."""
    p = v.p.clamp(_KERAS_EPSILON, 1 - _KERAS_EPSILON)
    onehot = v.minus_onehot(torch.zeros_like(p)).neg_()
    p_of_truth = torch.where(onehot == 1, p, 1 - p) + _KERAS_EPSILON

    def slope() -> Tensor:
        return v.through_softmax((1 - 2 * onehot).div_(p_of_truth).mul_((p == v.p) / v.classes))

    return Term(_class_mean(-torch.log(p_of_truth), v), slope)


def _binary_entropy_term(v: Voxels) -> Term:
    """Mean over classes of the binary entropy of p_c, with Keras' clipping."""
    p = v.p.clamp(_KERAS_EPSILON, 1 - _KERAS_EPSILON)
    q = 1 - p
    log_p, log_q = torch.log(p + _KERAS_EPSILON), torch.log(q + _KERAS_EPSILON)

    def slope() -> Tensor:
        each = log_q - log_p + q / (q + _KERAS_EPSILON) - p / (p + _KERAS_EPSILON)
        return v.through_softmax(each.mul_((p == v.p) / v.classes))

    return Term(_class_mean(-p * log_p - q * log_q, v), slope)


def _class_mean(values: Tensor, v: Voxels) -> Tensor:
    """Mean over classes; the two of a region have the same binary values."""
    return values if isinstance(v, Regions) else values.mean(dim=1, keepdim=True)
