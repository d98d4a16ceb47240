"""The loss nnU-Net calls at each scale: its own until calibration begins, then more and more the objective."""

import torch
from torch import Tensor, nn

from nnunet_calib.losses import CalibrationLoss
from nnunet_calib.training.curves import ValidationCounts


class Objective(nn.Module):
    """nnU-Net's own loss, the calibration loss plus nnU-Net's Dice, or a mean of both, as nnU-Net calls its loss.

    Args:
        stock: nnU-Net's loss, with its Dice as ``dc``.
        calibration: the loss that the objective adds.
        dice_weight: of nnU-Net's Dice in the objective.
        ignore_label: of the label map; None without one. For regions any value says that the last channel of the target
            marks what to ignore.
        patch_size: spatial shape of the full resolution.
        all_scales: False leaves scales coarser than the patch to nnU-Net's loss.

    ``share`` in [0, 1] is the objective's weight in that mean; nnU-Net's own loss has the rest.
    In evaluation mode (``eval()``) the calibration loss takes note of what it sees at full resolution.
    """

    def __init__(
        self,
        stock: nn.Module,
        calibration: CalibrationLoss,
        dice_weight: float,
        ignore_label: int | None,
        patch_size: tuple[int, ...],
        all_scales: bool,
    ):
        super().__init__()
        self.stock = stock
        self.calibration = calibration
        self.dice_weight = dice_weight
        self.ignore_label = ignore_label
        self.patch_size = patch_size
        self.all_scales = all_scales
        self.share = 1.0
        self.seen_full_resolution = False
        """Whether an output of the network had the shape of the patch."""
        self.counts = ValidationCounts()
        """Of the validation batches at full resolution."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of one scale.

        Args:
            output: logits (B, C, *S).
            target: (B, 1, *S) labels, or (B, R, *S) bool regions with the ignore mask as one more channel.
        """
        full_resolution = tuple(output.shape[2:]) == self.patch_size
        self.seen_full_resolution |= full_resolution
        watched = full_resolution and not self.calibration.training
        if watched:
            self.counts.add(output, *self._labels_and_valid(target), self.calibration.multilabel)
        if self.share == 0 or not (full_resolution or self.all_scales):
            return self.stock(output, target)
        labels, valid = self._labels_and_valid(target)
        if watched:
            self.calibration.observe(output, labels, valid)
            terms = self.calibration.parts(output, labels, valid)
            self.counts.add_terms(terms)
            weights = self.calibration._weights()
            loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        else:
            loss = self.calibration(output, labels, valid)
        if self.dice_weight != 0:
            known = labels if valid is None else labels.masked_fill(~valid, 0)
            loss = loss + self.dice_weight * self.stock.get_submodule("dc")(output, known, loss_mask=valid)
        return loss if self.share == 1 else self.share * loss + (1 - self.share) * self.stock(output, target)

    def _labels_and_valid(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.calibration.multilabel:
            regions = target.bool()
            return (regions, None) if self.ignore_label is None else (regions[:, :-1], ~regions[:, -1:])
        return target, None if self.ignore_label is None else target != self.ignore_label
