"""All that is known of nnU-Net's trainer, in one class; the trainers are in `nnunet_calib.training.trainers`."""

import warnings
from collections.abc import Mapping
from os.path import isfile, join
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_calib.data.errors import UsageError
from nnunet_calib.data.plans import SETTINGS_KEY, lineage, resolve_configuration
from nnunet_calib.losses import LOSSES
from nnunet_calib.training.checkpoint import load_weights
from nnunet_calib.training.objective import Objective
from nnunet_calib.training.settings import RESOLVED_KEY, RefusedSettings, loss_arguments, resolve_settings

_CUDA = torch.device("cuda")
_STATE_KEY = "nnunet_calib_state"
_STILL_RISING = 0.05  # of Dice; what a network that has learned its structures does by chance is less
_SCHEDULE = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "save_every")


class CalibrationTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a calibration loss, configured by the key ``nnunet_calib`` of the plans configuration.

    Deep supervision, ignore label, regions, cascade, batch Dice, DDP, mixed precision, compile, ``--c`` and
    ``-pretrained_weights`` are nnU-Net's own and stay so: only the inner loss changes, and when.

    Raises:
        RefusedSettings: on construction, for settings that are wrong or make no sense together.
    """

    LOSS: ClassVar[str | None] = None
    """Key of `nnunet_calib.losses.LOSSES`; None for nnU-Net's own loss."""
    FIXED: ClassVar[Mapping[str, Any]] = {}
    """Loss arguments that make this trainer what it is; no setting changes them."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = _CUDA,
    ):
        # Before nnU-Net creates a results folder: settings that are refused leave nothing behind.
        self.settings = self.check_settings(
            _given_settings(plans, configuration), default_kernel_size(plans, configuration)
        )
        self._continue = plans.get("continue_training", False)
        self._loaded_checkpoint = False
        self._steps = 0  # of this epoch
        # In the plans they land in the checkpoint, the results folder's plans.json, the log and wandb.
        plans[RESOLVED_KEY] = {"trainer": type(self).__name__, **self.settings}
        super().__init__(plans, configuration, fold, dataset_json, device)
        for name in _SCHEDULE:
            setattr(self, name, self.settings[name])
        self.print_to_log_file(f"nnunet-calib settings: {plans[RESOLVED_KEY]}", add_timestamp=False)

    @classmethod
    def check_settings(cls, given: Mapping[str, Any], kernel_size: int | list[int] = 3) -> dict[str, Any]:
        """Complete ``given`` settings as a training would.

        Args:
            given: what the plans configuration says.
            kernel_size: default for losses with a neighbourhood; see `default_kernel_size`.

        Raises:
            RefusedSettings: they are wrong or make no sense together.
        """
        return resolve_settings(given, cls.LOSS, cls.FIXED, kernel_size)

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.LOSS is None:
            return loss
        supervised = isinstance(loss, DeepSupervisionWrapper)
        objective = Objective(
            stock=loss.loss if supervised else loss,
            calibration=LOSSES[self.LOSS](
                **loss_arguments(self.settings, self.LOSS, self.FIXED), multilabel=self.label_manager.has_regions
            ),
            dice_weight=self.settings["dice_weight"],
            ignore_label=self.label_manager.ignore_label,
            patch_size=tuple(self.configuration_manager.patch_size),
            all_scales=self.settings["deep_supervision"] == "all",
        )
        if not supervised:
            return objective
        loss.loss = objective
        return loss

    def on_train_start(self) -> None:
        """Start from another trainer's network where ``finetune_from`` asks for it, unless a checkpoint was loaded."""
        if self.settings["finetune_from"] is not None and not self._loaded_checkpoint:
            if self.was_initialized:  # by -pretrained_weights, which nothing else tells
                raise RefusedSettings("-pretrained_weights and finetune_from are two starts; use one of them")
            source = self._finetune_source()
            self.initialize()
            load_weights(_plain(self.network), source)
            self.print_to_log_file(f"nnunet-calib: fine-tuning from {source}")
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """Choose nnU-Net's loss or the objective for this epoch."""
        super().on_train_epoch_start()
        if self.LOSS is None:
            return
        self._objective().calibration.train()
        self._steps = 0
        if self.current_epoch == self._first_calibrated():
            self._warn_of_late_learning()
        first, last = (self._share(steps) for steps in (0, self.num_iterations_per_epoch - 1))
        self._objective().share = first
        coming = "" if first == last else f", its share {first:.2f} to {last:.2f}"
        self.print_to_log_file(f"Objective: {self.LOSS + coming if last > 0 else 'nnU-Net (until calibrate_from)'}")

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, with the objective's share of the loss that this step has."""
        if self.LOSS is not None:
            self._objective().share = self._share(self._steps)
            self._steps += 1
        return super().train_step(batch)

    def on_validation_epoch_start(self) -> None:
        """Let the loss take note of the validation batches."""
        super().on_validation_epoch_start()
        if self.LOSS is not None:
            self._objective().calibration.eval()

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Let the loss follow what it took note of, before nnU-Net saves the epoch's checkpoint."""
        super().on_validation_epoch_end(val_outputs)
        if self.LOSS is not None:
            self._objective().calibration.update()

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint, with the state of the loss among the trainer's arguments if it has one."""
        if self.LOSS is not None and (state := self._objective().calibration.state_dict()):
            self.my_init_kwargs[_STATE_KEY] = state
        super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load nnU-Net's checkpoint; on ``--c`` refuse one that was trained with other settings."""
        super().load_checkpoint(filename_or_checkpoint)
        self._loaded_checkpoint = True
        recorded = self.my_init_kwargs["plans"].get(RESOLVED_KEY, {})
        current = self.plans_manager.plans[RESOLVED_KEY]
        drift = [f"{k} was {v!r}, now {current.get(k)!r}" for k, v in recorded.items() if current.get(k) != v]
        if self._continue and drift:
            raise RefusedSettings(
                f"--c: the settings of {self.configuration_name} changed since {self.output_folder} was trained "
                f"({'; '.join(drift)}); put them back, or train a configuration with another name"
            )
        if self.LOSS is not None and _STATE_KEY in self.my_init_kwargs:
            self._objective().calibration.load_state_dict(self.my_init_kwargs[_STATE_KEY])

    def _first_calibrated(self) -> int:
        """The first epoch of the objective; rounded down, so that even one epoch is the objective's."""
        return int(self.settings["calibrate_from"] * self.num_epochs)

    def _share(self, steps: int) -> float:
        """The objective's share of the loss after so many steps of this epoch.

        All at once, its slopes are far from those that the network had settled on: structures are lost.
        """
        behind = (self.current_epoch - self._first_calibrated()) * self.num_iterations_per_epoch + steps
        ramp = self.settings["ramp"] * (self.num_epochs - self._first_calibrated()) * self.num_iterations_per_epoch
        return min(1.0, (behind + 1) / max(ramp, 1)) if behind >= 0 else 0.0

    def _warn_of_late_learning(self) -> None:
        """Say so if a structure is still being learned when the objective takes over: it can be lost then.

        Measured by nnU-Net's own Dice of its validation patches, the last tenth of the epochs so far against the tenth
        before.
        """
        dice = np.array(self.logger.get_value("dice_per_class_or_region", step=None), dtype=np.float64)
        tenth = max(1, len(dice) // 10)
        if len(dice) < 2 * tenth:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a structure in none of these patches: NaN, never rising
            before, now = np.nanmean(dice[-2 * tenth : -tenth], axis=0), np.nanmean(dice[-tenth:], axis=0)
        manager = self.label_manager
        names = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        each = zip(names, before, now, strict=False)
        late = [f"{name} (Dice {b:.2f}, now {n:.2f})" for name, b, n in each if n - b > _STILL_RISING]
        if late:
            self.print_to_log_file(
                f"WARNING nnunet-calib: still being learned: {', '.join(late)}. An objective that begins now can lose "
                "such a structure; train more epochs, or finish with nnU-Net's loss and use finetune_from"
            )

    def _objective(self) -> Objective:
        return self.loss.loss if isinstance(self.loss, DeepSupervisionWrapper) else self.loss

    def _finetune_source(self) -> str:
        """Final checkpoint of ``finetune_from``, in this configuration or the nearest one that it inherits from.

        Raises:
            RefusedSettings: there is none.
        """
        trainer = self.settings["finetune_from"]
        results = join(self.output_folder_base, "..")
        looked = []
        for configuration in lineage(self.plans_manager.plans, self.configuration_name):
            if (trainer, configuration) == (type(self).__name__, self.configuration_name):
                continue
            folder = f"{trainer}__{self.plans_manager.plans_name}__{configuration}"
            source = join(results, folder, f"fold_{self.fold}", "checkpoint_final.pth")
            if isfile(source):
                return source
            looked.append(f"{folder}/fold_{self.fold}")
        raise RefusedSettings(
            f"finetune_from {trainer}: no checkpoint_final.pth in {' or '.join(looked) or 'another trainer'}; train it "
            f"first: nnUNetv2_train {self.plans_manager.dataset_name} CONFIGURATION {self.fold} -tr {trainer} "
            f"-p {self.plans_manager.plans_name}"
        )


def _given_settings(plans: dict, configuration: str) -> dict[str, Any]:
    try:
        given = resolve_configuration(plans, configuration).get(SETTINGS_KEY, {})
    except UsageError as error:
        raise RefusedSettings(f"{error}; make one with: nnunet-calib configure") from error
    if not isinstance(given, dict):
        raise RefusedSettings(
            f"{SETTINGS_KEY!r} of configuration {configuration} must hold settings by name, got {given!r}"
        )
    return given


def default_kernel_size(plans: dict, configuration: str) -> list[int]:
    """3 voxels along every axis, 1 where nnU-Net's first convolution has 1 because the slices are far apart."""
    manager = PlansManager(plans).get_configuration(configuration)
    kernels = manager.network_arch_init_kwargs.get("kernel_sizes", 3)
    first = kernels if isinstance(kernels, int) else kernels[0]
    sizes = [first] * len(manager.patch_size) if isinstance(first, int) else first
    return [1 if size == 1 else 3 for size in sizes]


def _plain(network: nn.Module) -> nn.Module:
    """The network inside DDP and compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network
