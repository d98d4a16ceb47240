"""Trainers for nnU-Net; all knowledge of the host is in `nnunet_calib.training.base`.

They are imported when one is asked for: with them come torch and nnU-Net's trainer, which take seconds, and settings
are checked before these are needed.
"""

from typing import Any

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nnunet_calib.training import trainers

    return getattr(trainers, name)
