"""What nnU-Net finds in the folder ``nnUNet_extTrainer`` points at.

Re-exports only: nnU-Net imports this file as a top-level module and forgets it again after the search, so classes
defined here could not be pickled and would not be the same object twice.
"""

from nnunet_calib.training import *  # noqa: F403
from nnunet_calib.training import __all__  # noqa: F401
