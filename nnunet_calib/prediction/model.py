"""A trained model: a folder that ``nnUNetv2_train`` left, read without unpickling what it does not need."""

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_calib.data.checkpoints import read_checkpoint
from nnunet_calib.data.dataset import key, read_dataset
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.model import CHECKPOINT, checkpoints_of, file_sha256, json_sha256
from nnunet_calib.data.plans import read_plans, resolve_configuration


class TrainedModel:
    """A trained model: plans, labels, configuration, and the weights of its folds.

    Args:
        folder: with ``plans.json``, ``dataset.json`` and ``fold_*``.
        folds: which of them; all that hold the checkpoint if None.
        checkpoint: name of the checkpoint in each fold.

    Attributes:
        folder: as given.
        folds: their names, such as ``"0"`` or ``"all"``.
        dataset: the labels.
        plans_manager: nnU-Net's.
        configuration_name: such as ``3d_fullres``.
        configuration_manager: nnU-Net's, of the configuration.
        trainer_name: the trainer's class.
        mirroring_axes: of the test-time augmentation; None if there is none.
        weights: of each fold, on the CPU.

    Raises:
        UsageError: not the folder of a trained model, or folds that are not there.
        InputError: files that cannot be used.
    """

    def __init__(self, folder: str | Path, folds: Sequence[str | int] | None = None, checkpoint: str = CHECKPOINT):
        self.folder = Path(folder)
        self._files = checkpoints_of(self.folder, folds, checkpoint)
        self.dataset = read_dataset(self.folder / "dataset.json", self.folder / "plans.json")
        self.folds = tuple(self._files)
        contents = [read_checkpoint(file) for file in self._files.values()]
        plans = read_plans(self.folder / "plans.json")
        self.plans_manager = PlansManager(plans)
        try:
            self.trainer_name = str(contents[0]["trainer_name"])
            self.configuration_name = str(contents[0]["init_args"]["configuration"])
        except (LookupError, TypeError) as error:
            file = next(iter(self._files.values()))
            raise InputError(f"{file} is not a checkpoint of a training with nnU-Net v2") from error
        resolve_configuration(plans, self.configuration_name)
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)
        axes = contents[0].get("inference_allowed_mirroring_axes")
        self.mirroring_axes = None if axes is None else tuple(axes)
        self.weights = [content["network_weights"] for content in contents]

    @cached_property
    def network(self) -> nn.Module:
        """The network, built as the trainer builds it, with the weights of the first fold."""
        trainer = recursive_find_trainer_class_by_name(self.trainer_name)
        build, configuration = trainer.build_network_architecture, self.configuration_manager
        sizes = (self.input_channels, self.label_manager.num_segmentation_heads)
        if "plans_manager" in inspect.signature(build).parameters:
            network = build(self.plans_manager, configuration, *sizes, enable_deep_supervision=False)
        else:  # of trainers before nnU-Net 2.6
            network = build(
                configuration.network_arch_class_name,
                configuration.network_arch_init_kwargs,
                configuration.network_arch_init_kwargs_req_import,
                *sizes,
                enable_deep_supervision=False,
            )
        for fold, weights in zip(self._files.values(), self.weights, strict=True):
            try:
                network.load_state_dict(weights)
            except (RuntimeError, TypeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"{fold} does not fit the network of {self.trainer_name}: {reason}") from error
        network.load_state_dict(self.weights[0])
        return network.eval()

    @property
    def label_manager(self) -> Any:
        """nnU-Net's label manager."""
        return self.plans_manager.get_label_manager(self.dataset.content)

    @property
    def input_channels(self) -> int:
        """Channels that the network takes."""
        return determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset.content)

    @property
    def previous_stage(self) -> str | None:
        """Configuration whose segmentations a cascade takes besides the image."""
        return self.configuration_manager.previous_stage_name

    def check_previous_stage(self, segmentations: Path | None) -> None:
        """Refuse a cascade without the segmentations of its previous stage, and these without a cascade.

        Args:
            segmentations: where they are; None: there are none.

        Raises:
            UsageError: as said.
        """
        if segmentations is not None and self.previous_stage is None:
            raise UsageError(f"{self.folder} is not a cascade; leave -prev_stage_predictions out")
        if segmentations is None and self.previous_stage is not None:
            raise UsageError(
                f"{self.folder} continues {self.previous_stage}; name the folder of its segmentations with "
                "-prev_stage_predictions, or use a model that is no cascade"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model, for files that were made by it; JSON types."""
        return {
            "dataset": self.plans_manager.dataset_name,
            "classes": [key(channel) for channel in self.dataset.channels],
            "labels": self.dataset.content["labels"],
            "plans": json_sha256(self.plans_manager.plans),
            "trainer": self.trainer_name,
            "configuration": self.configuration_name,
            "checkpoints": dict(self._checksums),
        }

    @cached_property
    def _checksums(self) -> dict[str, str]:
        return {fold: file_sha256(file) for fold, file in self._files.items()}
