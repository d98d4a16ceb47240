"""Folders of predictions to cases, to records, to a summary."""

from nnunet_calib.evaluation.case import CaseResult, evaluate_case
from nnunet_calib.evaluation.folder import evaluate_folder
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.evaluation.write import read_reliability

__all__ = ["CaseResult", "Protocol", "evaluate_case", "evaluate_folder", "read_reliability"]
