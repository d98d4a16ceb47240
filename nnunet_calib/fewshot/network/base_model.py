"""The base model of few-shot: a trained model whose decoder's features can be read."""

from collections.abc import Sequence
from pathlib import Path

from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.fewshot.network.features import check_decoder
from nnunet_calib.prediction.model import TrainedModel


class BaseModel(TrainedModel):
    """A trained model with a decoder that features can be read from.

    Raises:
        UsageError: as ``TrainedModel``.
        InputError: files that cannot be used, or a network without that decoder.
    """

    def __init__(self, folder: str | Path, folds: Sequence[str | int] | None = None, checkpoint: str = CHECKPOINT):
        super().__init__(folder, folds, checkpoint)
        check_decoder(self.network, self.trainer_name)
