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
    "MAMLTrainer",
    "MEEPKLTrainer",
    "MEEPTrainer",
    "MbLSTrainer",
    "NACLTrainer",
    "PANetTrainer",
    "SVLSTrainer",
    "SoftACETrainer",
    "StockTrainer",
]

YARDSTICKS = ("MAMLTrainer", "PANetTrainer")
"""Trainers to compare with, of `nnunet_calib.training.episodic`; nnU-Net finds them, lists do not have them."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in YARDSTICKS:
        from nnunet_calib.training import episodic

        return getattr(episodic, name)
    from nnunet_calib.training import trainers

    return getattr(trainers, name)
