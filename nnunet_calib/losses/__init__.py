"""Calibration losses for segmentation: pure torch, 2D and 3D, ignore mask, sigmoid regions.

A loss is one class in one file. To add one: write the file, list it in `LOSSES`, write its test.
"""

from nnunet_calib.losses.ace import ACELoss
from nnunet_calib.losses.base import CalibrationLoss
from nnunet_calib.losses.ce import CrossEntropyLoss
from nnunet_calib.losses.cpc import CPCLoss
from nnunet_calib.losses.crac import CRaCLoss
from nnunet_calib.losses.dca import DCALoss
from nnunet_calib.losses.ecp import ECPLoss
from nnunet_calib.losses.focal import FLSDLoss, FocalLoss
from nnunet_calib.losses.ls import LabelSmoothingLoss
from nnunet_calib.losses.mbls import MbLSLoss
from nnunet_calib.losses.meep import MEEPLoss
from nnunet_calib.losses.nacl import NACLLoss
from nnunet_calib.losses.svls import SVLSLoss

LOSSES: dict[str, type[CalibrationLoss]] = {
    "ce": CrossEntropyLoss,
    "focal": FocalLoss,
    "flsd": FLSDLoss,
    "ecp": ECPLoss,
    "ls": LabelSmoothingLoss,
    "svls": SVLSLoss,
    "mbls": MbLSLoss,
    "nacl": NACLLoss,
    "meep": MEEPLoss,
    "cpc": CPCLoss,
    "crac": CRaCLoss,
    "ace": ACELoss,
    "dca": DCALoss,
}
"""Key to class; the keys are the names used in settings, tables and documents."""

__all__ = [
    "LOSSES",
    "ACELoss",
    "CPCLoss",
    "CRaCLoss",
    "CalibrationLoss",
    "CrossEntropyLoss",
    "DCALoss",
    "ECPLoss",
    "FLSDLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "MEEPLoss",
    "MbLSLoss",
    "NACLLoss",
    "SVLSLoss",
]
