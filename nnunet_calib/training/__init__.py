"""Trainers for nnU-Net; all knowledge of the host is in `nnunet_calib.training.base`."""

from nnunet_calib.training.trainers import (
    ACETrainer,
    CETrainer,
    CPCTrainer,
    CRaCTrainer,
    DCATrainer,
    ECPTrainer,
    FLSDTrainer,
    FLTrainer,
    LSTrainer,
    MbLSTrainer,
    MEEPKLTrainer,
    MEEPTrainer,
    NACLTrainer,
    SoftACETrainer,
    StockTrainer,
    SVLSTrainer,
)

__all__ = [
    "ACETrainer",
    "CETrainer",
    "CPCTrainer",
    "CRaCTrainer",
    "DCATrainer",
    "ECPTrainer",
    "FLSDTrainer",
    "FLTrainer",
    "LSTrainer",
    "MEEPKLTrainer",
    "MEEPTrainer",
    "MbLSTrainer",
    "NACLTrainer",
    "SVLSTrainer",
    "SoftACETrainer",
    "StockTrainer",
]
