"""nnU-Net's prediction, streamed: the logits of a case become planes of the image's grid, exactly as stock export."""

from nnunet_calib.prediction.case import Part, PredictedCase
from nnunet_calib.prediction.grid import Grid

__all__ = ["Grid", "Part", "PredictedCase"]
