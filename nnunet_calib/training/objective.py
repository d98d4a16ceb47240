"""The loss nnU-Net calls at each scale: its own until calibration begins, then the calibration objective."""

from torch import Tensor, nn

from nnunet_calib.losses import CalibrationLoss


class Objective(nn.Module):
    """nnU-Net's own loss, or the calibration loss plus nnU-Net's Dice, for outputs and targets as nnU-Net has them.

    Args:
        stock: nnU-Net's loss, with its Dice as ``dc``.
        calibration: the loss that takes over.
        dice_weight: of nnU-Net's Dice in the objective.
        ignore_label: of the label map; None without one. For regions any value says that the last channel of the target
            marks what to ignore.
        only_at: spatial shape at which the objective applies, coarser scales keep nnU-Net's loss; None for all scales.
    """

    def __init__(
        self,
        stock: nn.Module,
        calibration: CalibrationLoss,
        dice_weight: float,
        ignore_label: int | None,
        only_at: tuple[int, ...] | None,
    ):
        super().__init__()
        self.stock = stock
        self.calibration = calibration
        self.dice_weight = dice_weight
        self.ignore_label = ignore_label
        self.only_at = only_at
        self.calibrating = True

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of one scale.

        Args:
            output: logits (B, C, *S).
            target: (B, 1, *S) labels, or (B, R, *S) bool regions with the ignore mask as one more channel.
        """
        if not self.calibrating or (self.only_at is not None and tuple(output.shape[2:]) != self.only_at):
            return self.stock(output, target)
        labels, valid = self._labels_and_valid(target)
        loss = self.calibration(output, labels, valid)
        if self.dice_weight == 0:
            return loss
        known = labels if valid is None else labels.masked_fill(~valid, 0)
        return loss + self.dice_weight * self.stock.get_submodule("dc")(output, known, loss_mask=valid)

    def _labels_and_valid(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.calibration.multilabel:
            regions = target.bool()
            return (regions, None) if self.ignore_label is None else (regions[:, :-1], ~regions[:, -1:])
        return target, None if self.ignore_label is None else target != self.ignore_label
