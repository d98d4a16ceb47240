"""Trainers that only the evidence needs.

With the optimiser of the papers on MbLS, NACL and CRaC (Adam, first step 1e-3), and with losses under trial.
"""

from evidence_losses import ForegroundDCALoss, MEEPDCALoss
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerVanillaAdam

from nnunet_calib.losses import LOSSES
from nnunet_calib.training.base import CalibrationTrainer
from nnunet_calib.training.trainers import TRAINERS

LOSSES |= {"foreground_dca": ForegroundDCALoss, "meep_dca": MEEPDCALoss}


class BalancedNACLTrainer(CalibrationTrainer):
    """NACL with balanced means, and the weights that trainers had where it was under trial."""

    LOSS = "nacl"
    FIXED = {"balanced": True}


class ForegroundDCATrainer(CalibrationTrainer):
    """DCA over the foreground."""

    LOSS = "foreground_dca"


class MEEPDCATrainer(CalibrationTrainer):
    """MEEP and DCA."""

    LOSS = "meep_dca"


for _trainer in TRAINERS.values():
    _name = f"{_trainer.__name__}Adam"
    globals()[_name] = type(_name, (_trainer, nnUNetTrainerVanillaAdam), {"__module__": __name__})
