"""Calibration losses for segmentation: pure torch, 2D and 3D, ignore mask, sigmoid regions.

A loss is one class in one file. To add one: write the file, list it here, write its test. The classes are imported when
one is asked for: torch takes seconds, and settings are checked before it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_calib.losses.ace import ACELoss as ACELoss
    from nnunet_calib.losses.base import CalibrationLoss as CalibrationLoss
    from nnunet_calib.losses.ce import CrossEntropyLoss as CrossEntropyLoss
    from nnunet_calib.losses.cpc import CPCLoss as CPCLoss
    from nnunet_calib.losses.crac import CRaCLoss as CRaCLoss
    from nnunet_calib.losses.dca import DCALoss as DCALoss
    from nnunet_calib.losses.ecp import ECPLoss as ECPLoss
    from nnunet_calib.losses.focal import FLSDLoss as FLSDLoss
    from nnunet_calib.losses.focal import FocalLoss as FocalLoss
    from nnunet_calib.losses.ls import LabelSmoothingLoss as LabelSmoothingLoss
    from nnunet_calib.losses.mbls import MbLSLoss as MbLSLoss
    from nnunet_calib.losses.meep import MEEPLoss as MEEPLoss
    from nnunet_calib.losses.nacl import NACLLoss as NACLLoss
    from nnunet_calib.losses.svls import SVLSLoss as SVLSLoss

    LOSSES: dict[str, type[CalibrationLoss]]
    """Key to class; the keys are the names used in settings, tables and documents."""

KEYS = {
    "ce": "CrossEntropyLoss",
    "focal": "FocalLoss",
    "flsd": "FLSDLoss",
    "ecp": "ECPLoss",
    "ls": "LabelSmoothingLoss",
    "svls": "SVLSLoss",
    "mbls": "MbLSLoss",
    "nacl": "NACLLoss",
    "meep": "MEEPLoss",
    "cpc": "CPCLoss",
    "crac": "CRaCLoss",
    "ace": "ACELoss",
    "dca": "DCALoss",
}
"""Keys of ``LOSSES`` and the names of the classes."""

FILES = {name: key for key, name in KEYS.items()} | {"FLSDLoss": "focal", "CalibrationLoss": "base"}
"""Modules of the classes, which are called as the keys but for these two."""

__all__ = ["LOSSES", *FILES]


def __getattr__(name: str) -> Any:
    if name == "LOSSES":
        globals()[name] = {key: __getattr__(of) for key, of in KEYS.items()}
    elif name in FILES:
        globals()[name] = getattr(import_module(f"{__name__}.{FILES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
