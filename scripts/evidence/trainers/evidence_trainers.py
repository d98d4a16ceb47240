"""Trainers with the optimiser of the papers on MbLS, NACL and CRaC: Adam, first step 1e-3."""

from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerVanillaAdam

from nnunet_calib.training.trainers import TRAINERS

for _trainer in TRAINERS.values():
    _name = f"{_trainer.__name__}Adam"
    globals()[_name] = type(_name, (_trainer, nnUNetTrainerVanillaAdam), {"__module__": __name__})
