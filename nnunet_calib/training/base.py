"""All that is known of nnU-Net's trainer, in one class; the trainers are in `nnunet_calib.training.trainers`."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os.path import isfile, join
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import distributed, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.plans import SETTINGS_KEY, lineage, resolve_configuration
from nnunet_calib.data.quiet import quiet
from nnunet_calib.losses import LOSSES
from nnunet_calib.pipeline.scored_export import scored_export
from nnunet_calib.pipeline.validation import score_exported, summarise_validation, validation_means
from nnunet_calib.training.catalogue import no_trainer
from nnunet_calib.training.checkpoint import load_weights
from nnunet_calib.training.curves import append, draw
from nnunet_calib.training.new_classes import BATCHES, begin_new_classes
from nnunet_calib.training.objective import Objective
from nnunet_calib.training.settings import (
    CHECKPOINT_ENDING,
    RESOLVED_KEY,
    SCHEDULE,
    EndedTraining,
    RefusedSettings,
    asked_schedule,
    default_kernel_size,
    loss_arguments,
    loss_defaults,
    resolve_settings,
)

_CUDA = torch.device("cuda")
_STATE_KEY = "nnunet_calib_state"
_WEIGHTS_KEY = "nnunet_calib_class_weights"
_WEIGHED = 0.5  # of the epochs, in which new classes weigh more
_STILL_RISING = 0.05  # of Dice; what a network that has learned its structures does by chance is less


class CalibrationTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a calibration loss, configured by the key ``nnunet_calib`` of the plans configuration.

    Deep supervision, ignore label, regions, cascade, batch Dice, DDP, mixed precision, compile, ``--c`` and
    ``-pretrained_weights`` are nnU-Net's own and stay so: only the inner loss changes, and when.

    Combined with another class (``class Mine(NACLTrainer, nnUNetTrainerNoMirroring)``) its schedule stays unless a
    setting was given; what the trainer has is what is recorded.

    Raises:
        RefusedSettings: on construction, for settings that are wrong or make no sense together.
    """

    my_init_kwargs: dict[str, Any]
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
        given = _given_settings(plans, configuration)
        self.settings = self.check_settings(given, default_kernel_size(plans, configuration))
        self._set_by_user = asked_schedule(given)
        self._continue = plans.get("continue_training", False)
        self._loaded_checkpoint = False
        self._steps = 0  # of this epoch
        self._mirrored: tuple[int, ...] | None = None  # axes, by the training that this one starts from
        self._new: list[int] = []  # channels of classes that it did not know
        self._class_weights: list[float] = []  # of cross-entropy at the start, if there are such classes
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.plans_manager.plans.pop(_WEIGHTS_KEY, None)  # of another training, whose plans these were
        self._settle_schedule()

    def initialize(self) -> None:
        """Build network, optimizer and loss.

        Raises:
            RefusedSettings: another class took the loss away, or its loss has no Dice part for the objective.
        """
        # Again: a class before this one among the bases sets its own schedule after our constructor.
        self._settle_schedule()
        self.print_to_log_file(f"nnunet-calib settings: {self.plans_manager.plans[RESOLVED_KEY]}", add_timestamp=False)
        with self._nothing_left_if_refused():
            super().initialize()
            if self.LOSS is not None and not isinstance(self._objective(), Objective):
                raise RefusedSettings(
                    f"{type(self).__name__}: another class among its bases builds the loss and {self.LOSS} is not in "
                    f"it; name our trainer first: class {type(self).__name__}({_ours(type(self)).__name__}, OTHER)"
                )
        self.logger.update_config({"nnunet_calib": self.plans_manager.plans[RESOLVED_KEY]})

    @contextmanager
    def _nothing_left_if_refused(self) -> Iterator[None]:
        """Remove the log of a training that is refused before it began, and the folders made for it, if empty.

        nnU-Net's constructor makes them, and what other classes do is known only after it.
        """
        try:
            yield
        except RefusedSettings:
            if self.local_rank == 0:
                Path(self.log_file).unlink(missing_ok=True)
                fold, model = Path(self.output_folder), Path(self.output_folder_base)
                with suppress(OSError):  # one that is not empty ends it
                    for folder in (fold, model, model.parent):
                        folder.rmdir()
            raise

    def _settle_schedule(self) -> None:
        """Set what the user set; all else is nnU-Net's or of another class among the bases, and recorded as it is."""
        for name in self._set_by_user:
            setattr(self, name, self.settings[name])
        self.settings |= {name: getattr(self, name) for name in SCHEDULE}
        # In the plans they land in the checkpoint, the results folder's plans.json, the log and wandb.
        self.plans_manager.plans[RESOLVED_KEY] = {"trainer": type(self).__name__, **self.settings}

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
        if self.enable_deep_supervision and not self._get_deep_supervision_scales():
            raise RefusedSettings(
                f"the network of configuration {self.configuration_name} has one stage; nnU-Net needs two or more"
            )
        with np.errstate(invalid="ignore"):  # 0 / 0 of a network with one scale
            loss = super()._build_loss()
        supervised = isinstance(loss, DeepSupervisionWrapper)
        if supervised and len(loss.weight_factors) == 1:
            # A network of two stages. nnU-Net gives its coarsest scale no weight and divides by their sum.
            loss.weight_factors = (1.0,)
        if self.LOSS is None:
            return loss
        stock = loss.loss if supervised else loss
        if self.settings["dice_weight"] != 0 and not isinstance(getattr(stock, "dc", None), nn.Module):
            raise RefusedSettings(
                f"{type(self).__name__}: dice_weight is {self.settings['dice_weight']:g}, but the loss that another "
                f"class among its bases builds, {type(stock).__name__}, has no Dice part; set dice_weight to 0, or "
                "leave that class out"
            )
        objective = Objective(
            stock=stock,
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
            with self._nothing_left_if_refused():
                if self.was_initialized:  # by -pretrained_weights, which nothing else tells
                    raise RefusedSettings("-pretrained_weights and finetune_from are two starts; use one of them")
                source = self._finetune_source()
            self.initialize()
            with self._nothing_left_if_refused():
                self._mirrored, self._new = load_weights(plain(self.network), source, self.dataset_json["labels"])
            self.print_to_log_file(f"nnunet-calib: fine-tuning from {source}")
        elif self.settings["finetune_from"] is not None:  # its own checkpoint has them
            self._mirrored = tuple(self.inference_allowed_mirroring_axes or ())
        super().on_train_start()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's, but mirroring only along axes that the network one starts from was mirrored along.

        One that tells left from right by where they are would forget it.
        """
        rotation, dummy_2d, patch_size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self._mirrored is not None and axes is not None:
            axes = tuple(axis for axis in axes if axis in self._mirrored) or None
            self.inference_allowed_mirroring_axes = axes
        return rotation, dummy_2d, patch_size, axes

    def on_train_epoch_start(self) -> None:
        """Choose nnU-Net's loss or the objective for this epoch; begin with new classes before the first."""
        if self._new and not self._class_weights:
            self._begin_new_classes()
        super().on_train_epoch_start()
        self._weigh_classes()
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

    def _begin_new_classes(self) -> None:
        def batches() -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
            for _ in range(BATCHES):
                batch = next(self.dataloader_train)
                target = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
                yield batch["data"].to(self.device), [scale.to(self.device) for scale in target]

        network = plain(self.network)
        known = [i for i in range(self.label_manager.num_segmentation_heads) if i not in self._new]
        weights = begin_new_classes(network, batches(), known, self._new)
        if self.is_ddp:  # each process has seen other batches
            for shared in (weights, *network.parameters()):
                distributed.broadcast(shared.data, 0)
        # In the plans they are in the checkpoint, from which an interrupted training goes on.
        self._class_weights = self.plans_manager.plans[_WEIGHTS_KEY] = weights.tolist()
        told = ", ".join(f"{weight:.1f}" for weight in self._class_weights)
        self.print_to_log_file(f"nnunet-calib: rows of new classes fitted; weights in nnU-Net's cross-entropy: {told}")

    def _weigh_classes(self) -> None:
        """Weights of the classes in nnU-Net's cross-entropy: those of the start at first, 1 from ``_WEIGHED`` on."""
        if not self._class_weights:
            return
        left = max(0.0, 1 - self.current_epoch / (_WEIGHED * self.num_epochs))
        now = torch.tensor([1 + (weight - 1) * left for weight in self._class_weights], device=self.device)
        for part in self.loss.modules():
            if isinstance(part, nn.CrossEntropyLoss):
                part.weight = now

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, with the objective's share of the loss that this step has."""
        if self.LOSS is not None:
            self._objective().share = self._share(self._steps)
            self._steps += 1
        result = super().train_step(batch)
        if self.LOSS is not None and not self._objective().seen_full_resolution:
            raise RefusedSettings(
                f"{type(self).__name__}: no output of the network has the shape of the patch, "
                f"{self.configuration_manager.patch_size}, so {self.LOSS} has nothing to act on; use a network with an "
                "output at full resolution"
            )
        return result

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """End a training whose loss was not a finite number in any step of an epoch, on any process."""
        finite = any(np.isfinite(output["loss"]).all() for output in train_outputs)
        if self.is_ddp:
            of_all: list[bool] = [False] * distributed.get_world_size()
            distributed.all_gather_object(of_all, finite)
            finite = any(of_all)
        if not finite:
            raise EndedTraining(
                f"the loss was not a finite number in any step of epoch {self.current_epoch}: the training ends, "
                f"checkpoints before it are kept in {self.output_folder}; look for images that hold no finite numbers, "
                "try a smaller initial_lr, or nnU-Net's own loss (-tr nnUNetTrainer)"
            )
        super().on_train_epoch_end(train_outputs)

    def on_epoch_end(self) -> None:
        """Let nnU-Net choose ``checkpoint_best`` among the epochs in which the objective has its full share."""
        if self.LOSS is not None and self._is_first_with_full_share():
            # Its moving average of Dice starts anew too: most of it is of epochs with the other loss.
            self._best_ema = None
            self.logger.get_value("ema_fg_dice", step=None)[-1] = self.logger.get_value("mean_fg_dice", step=-1)
            if self.current_epoch > 0:
                self.print_to_log_file("nnunet-calib: checkpoint_best starts anew, the objective has its full share")
        super().on_epoch_end()

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
            self._record_curves()

    def _record_curves(self) -> None:
        """Append what the validation batches of this epoch showed to the curves, and hand it to nnU-Net's loggers."""
        objective = self._objective()
        values = objective.counts.scores(self.is_ddp)
        if not values or self.local_rank != 0:
            return
        values["share"] = objective.share
        state = objective.calibration.state_dict()
        if "multipliers" in state:
            for region, row in zip(("boundary", "inside"), state["multipliers"].tolist(), strict=True):
                values |= {f"multiplier/{region}_{c}": value for c, value in enumerate(row)}
        rows = append(Path(self.output_folder), self.current_epoch, values)
        for logger in self.logger.loggers:  # not nnU-Net's local one, which takes no other keys than its own
            for name, value in values.items():
                logger.log(f"nnunet_calib/{name}", value, self.current_epoch)
        draw(Path(self.output_folder), rows)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, whose ``summary.json`` has all of ``evaluate``'s numbers, from logits in memory."""
        with scored_export(self, score_exported):
            super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:  # all ranks have written their cases: nnU-Net waits for them
            try:
                _, cases = self.do_split()
                summary = summarise_validation(self.output_folder, cases, self.plans_manager, self.print_to_log_file)
            except (InputError, UsageError) as error:  # nnU-Net's own summary is there
                self.print_to_log_file(f"WARNING nnunet-calib: the validation could not be scored: {error}")
                return
            for name, value in validation_means(summary).items():
                self.print_to_log_file(f"validation {name}: {value:.4f}", add_timestamp=False)
                self.logger.log_summary(f"final_val/{name}", value)

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint, with the state of the loss in its plans if it has one."""
        arguments = self.my_init_kwargs
        if self.LOSS is not None and (state := self._objective().calibration.state_dict()):
            # As plain numbers: who reads a checkpoint's plans expects JSON.
            numbers = {name: value.tolist() for name, value in state.items()}
            self.my_init_kwargs = arguments | {"plans": arguments["plans"] | {_STATE_KEY: numbers}}
        try:
            super().save_checkpoint(filename)
        finally:
            self.my_init_kwargs = arguments

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load nnU-Net's checkpoint; on ``--c`` refuse one that was trained with other settings."""
        super().load_checkpoint(filename_or_checkpoint)
        self._loaded_checkpoint = True
        recorded = self.my_init_kwargs["plans"].get(RESOLVED_KEY)
        if self._continue and recorded is None:
            raise RefusedSettings(
                f"--c: {self.output_folder} was not trained by a trainer of nnunet-calib; train under another name"
            )
        drift = self._drift(recorded or {})
        if self._continue and drift:
            raise RefusedSettings(
                f"--c: the settings of {self.configuration_name} changed since {self.output_folder} was trained "
                f"({'; '.join(drift)}); put them back, or train a configuration with another name"
            )
        self._class_weights = self.my_init_kwargs["plans"].get(_WEIGHTS_KEY, [])
        # Until 2026-11 it was among the arguments.
        state = self.my_init_kwargs["plans"].pop(_STATE_KEY, None) or self.my_init_kwargs.pop(_STATE_KEY, None)
        if self.LOSS is not None and state is not None:
            tensors = {name: torch.as_tensor(value, device=self.device) for name, value in state.items()}
            self._objective().calibration.load_state_dict(tensors)

    def _drift(self, recorded: Mapping[str, Any]) -> list[str]:
        """What differs from the settings of the checkpoint; what it does not know was the loss' own default."""
        current = self.plans_manager.plans[RESOLVED_KEY]
        kernel_size = default_kernel_size(self.plans_manager.plans, self.configuration_name)
        defaults = self.check_settings({"finetune_from": recorded.get("finetune_from")}, kernel_size)
        if self.LOSS is not None:  # an argument may be newer than the training: then the loss was as its class has it
            defaults |= loss_defaults(self.LOSS, self.FIXED, kernel_size)
        before = {"trainer": None, **defaults, **recorded}
        return [f"{k} was {v!r}, now {current.get(k)!r}" for k, v in before.items() if current.get(k) != v]

    def _first_calibrated(self) -> int:
        """The first epoch of the objective; rounded down, so that even one epoch is the objective's."""
        return int(self.settings["calibrate_from"] * self.num_epochs)

    def _share(self, steps: int) -> float:
        """The objective's share of the loss after so many steps of this epoch.

        All at once, its slopes are far from those that the network had settled on: structures are lost.
        """
        behind = (self.current_epoch - self._first_calibrated()) * self.num_iterations_per_epoch + steps
        # nnU-Net's cross-entropy, which alone weighs new classes, is left step by step while they weigh more
        ramp = max(self.settings["ramp"], _WEIGHED) if self._class_weights else self.settings["ramp"]
        ramp *= (self.num_epochs - self._first_calibrated()) * self.num_iterations_per_epoch
        return min(1.0, (behind + 1) / max(ramp, 1)) if behind >= 0 else 0.0

    def _is_first_with_full_share(self) -> bool:
        """Whether this epoch is the first that ends with the objective alone, as its validation sees it."""
        per_epoch = self.num_iterations_per_epoch
        return self._share(per_epoch - 1) == 1 and (self.current_epoch == 0 or self._share(-1) < 1)

    def _warn_of_late_learning(self) -> None:
        """Say so if a structure is still being learned when the objective begins: it can be lost then.

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
        """The file of ``finetune_from``, or of a trainer the final checkpoint.

        That is in this configuration or the nearest one that it inherits from.

        Raises:
            RefusedSettings: there is none.
        """
        trainer = self.settings["finetune_from"]
        if trainer.endswith(CHECKPOINT_ENDING):
            if not isfile(trainer):
                raise RefusedSettings(f"finetune_from {trainer}: there is no such file")
            return trainer
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


def find_trainer(name: str) -> type[CalibrationTrainer]:
    """A trainer with a calibration loss, ours or a user's, as ``nnUNetv2_train -tr`` finds it.

    Raises:
        UsageError: nnU-Net finds no class of that name, or it takes no settings.
    """
    try:
        with quiet():  # where nnU-Net tells its search
            found = recursive_find_trainer_class_by_name(name)
    except Exception as error:  # modules of others are imported in the search
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if name in reason:  # nnU-Net's own words, a path and a page long, for one that is not there
            raise UsageError(no_trainer(name)) from error
        raise UsageError(f"no trainer {name!r} could be looked for: {reason}; see nnunet-calib trainers") from error
    if not issubclass(found, CalibrationTrainer):
        raise UsageError(f"{name} is no trainer of nnunet-calib and takes no settings; derive it from one of ours")
    return found


def _ours(trainer: type[CalibrationTrainer]) -> type[CalibrationTrainer]:
    """The nearest base that this package defines."""
    return next(base for base in trainer.__mro__ if base.__module__.startswith("nnunet_calib."))


def plain(network: nn.Module) -> nn.Module:
    """The network inside DDP and compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network
