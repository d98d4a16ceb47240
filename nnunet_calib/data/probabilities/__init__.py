"""Class and region probabilities on disk: nnU-Net's ``.npz``, our compact format, 4D NIfTI."""

from nnunet_calib.data.probabilities.compact import write_compact, write_compact_slabs
from nnunet_calib.data.probabilities.file import ENDINGS, ProbabilityFile
from nnunet_calib.data.probabilities.npz import write_npz

__all__ = ["ENDINGS", "ProbabilityFile", "write_compact", "write_compact_slabs", "write_npz"]
