"""Heads: what turns the features of a voxel into the log odds of a novel structure. One file each, one interface."""

from nnunet_calib.fewshot.structure.heads.adapter import AdapterHead
from nnunet_calib.fewshot.structure.heads.base import Head
from nnunet_calib.fewshot.structure.heads.linear import LinearHead
from nnunet_calib.fewshot.structure.heads.local_prototypes import LocalPrototypeHead
from nnunet_calib.fewshot.structure.heads.prototype import PrototypeHead

HEADS: dict[str, type[Head]] = {head.key: head for head in (LinearHead, LocalPrototypeHead, PrototypeHead, AdapterHead)}
"""Key to class, the default first; the keys are the names used in commands, files and tables."""

__all__ = ["HEADS", "AdapterHead", "Head", "LinearHead", "LocalPrototypeHead", "PrototypeHead"]
