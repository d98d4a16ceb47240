"""Trainers for nnU-Net; all knowledge of the host is in `nnunet_calib.training.base`."""

from nnunet_calib.training.trainers import (
    CETrainer,
    ECPTrainer,
    FLSDTrainer,
    FLTrainer,
    LSTrainer,
    MbLSTrainer,
    MEEPKLTrainer,
    MEEPTrainer,
    NACLTrainer,
    StockTrainer,
    SVLSTrainer,
)

__all__ = [
    "CETrainer",
    "ECPTrainer",
    "FLSDTrainer",
    "FLTrainer",
    "LSTrainer",
    "MEEPKLTrainer",
    "MEEPTrainer",
    "MbLSTrainer",
    "NACLTrainer",
    "SVLSTrainer",
    "StockTrainer",
]
