"""Our trainers with other classes of nnU-Net among the bases, and losses that nnU-Net itself gets wrong."""

import copy
import os
from pathlib import Path

import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerCELoss import nnUNetTrainerCELoss
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerTopkLoss import (
    nnUNetTrainerDiceTopK10Loss,
    nnUNetTrainerTopk10Loss,
)
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam3en4
from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_250epochs
from torch import nn

from nnunet_calib.data.errors import UsageError
from nnunet_calib.training import MbLSTrainer, NACLTrainer
from nnunet_calib.training.base import find_trainer
from nnunet_calib.training.objective import Objective
from nnunet_calib.training.settings import RESOLVED_KEY, EndedTraining, RefusedSettings

from .toy import architecture, batch, build, construct, logits, prepare_folders

AT_ONCE = {"calibrate_from": 0}


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)  # which takes a second


def both_orders(other: type) -> list[type]:
    return [type("Mine", bases, {}) for bases in ((NACLTrainer, other), (other, NACLTrainer))]


def recorded(trainer) -> dict:
    return trainer.my_init_kwargs["plans"][RESOLVED_KEY]


@pytest.mark.parametrize("mine", both_orders(nnUNetTrainer_250epochs))
@pytest.mark.parametrize(("given", "epochs"), [({}, 250), ({"num_epochs": 7}, 7)])
def test_the_others_schedule_stays_unless_a_setting_is_given(mine, given, epochs):
    trainer = build("NACLTrainer", given, trainer=mine, axes=2)
    assert trainer.num_epochs == recorded(trainer)["num_epochs"] == trainer.settings["num_epochs"] == epochs
    assert trainer.lr_scheduler.max_steps == epochs
    assert f"'num_epochs': {epochs}," in Path(trainer.log_file).read_text()


@pytest.mark.parametrize("mine", both_orders(nnUNetTrainerAdam3en4))
@pytest.mark.parametrize(("given", "rate"), [({}, 3e-4), ({"initial_lr": 0.002}, 0.002)])
def test_the_others_learning_rate_and_optimizer_stay(mine, given, rate):
    trainer = build("NACLTrainer", given, trainer=mine, axes=2)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.param_groups[0]["lr"] == recorded(trainer)["initial_lr"] == rate


def test_a_fine_tuning_keeps_its_own_schedule_in_any_company():
    mine = both_orders(nnUNetTrainerAdam3en4)[0]
    assert build("NACLTrainer", {"finetune_from": "nnUNetTrainer"}, trainer=mine, axes=2).initial_lr == 1e-3


@pytest.mark.parametrize("mine", both_orders(nnUNetTrainerNoDeepSupervision))
def test_without_deep_supervision_the_objective_is_the_loss(mine):
    trainer = construct("NACLTrainer", AT_ONCE, trainer=mine, axes=2)
    trainer.initialize()
    assert isinstance(trainer.loss, Objective)
    assert torch.as_tensor(trainer.train_step(batch(trainer, "labels"))["loss"]).isfinite()


@pytest.mark.parametrize("other", [nnUNetTrainerCELoss, nnUNetTrainerTopk10Loss])
def test_a_loss_without_dice_is_refused_at_the_start_where_dice_is_wanted(other):
    mine = type("Mine", (NACLTrainer, other), {})
    with pytest.raises(RefusedSettings, match="has no Dice part; set dice_weight to 0, or leave that class out"):
        build("NACLTrainer", trainer=mine, axes=2)
    assert list(Path(os.environ["nnUNet_results"]).glob("*")) == [], "a training that is refused leaves nothing behind"
    trainer = build("NACLTrainer", {"dice_weight": 0}, trainer=mine, axes=2)
    assert torch.as_tensor(trainer.train_step(batch(trainer, "labels"))["loss"]).isfinite()


def test_another_loss_with_dice_is_the_one_before_the_objective():
    mine = type("Mine", (NACLTrainer, nnUNetTrainerDiceTopK10Loss), {})
    trainer = build("NACLTrainer", {"calibrate_from": 0.5, "num_epochs": 4}, trainer=mine, axes=2)
    other = build("nnUNetTrainer", trainer=nnUNetTrainerDiceTopK10Loss, axes=2)
    trainer.on_train_epoch_start()
    reference = batch(trainer, "labels")["target"]
    assert trainer.loss(logits(trainer), reference) == other.loss(logits(trainer), reference)


def test_a_loss_that_is_not_ours_is_refused_with_the_order_that_works():
    mine = type("Mine", (nnUNetTrainerCELoss, NACLTrainer), {})
    with pytest.raises(RefusedSettings, match=r"name our trainer first: class Mine\(NACLTrainer, OTHER\)"):
        build("NACLTrainer", trainer=mine, axes=2)
    assert list(Path(os.environ["nnUNet_results"]).glob("*")) == []


def test_a_refused_training_leaves_the_folders_of_others_as_they_were():
    construct("MbLSTrainer", axes=2)
    results = Path(os.environ["nnUNet_results"])
    kept = sorted(results.rglob("*"))
    with pytest.raises(RefusedSettings, match="no checkpoint_final"):
        construct("NACLTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2).on_train_start()
    assert sorted(results.rglob("*")) == kept != []


def test_a_network_without_full_resolution_is_refused_at_the_first_step():
    class Coarse(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 3, 2, 2)

        def forward(self, x):
            return self.layer(x)

    trainer = construct("MbLSTrainer", AT_ONCE, axes=2)
    trainer.enable_deep_supervision = False
    trainer.initialize()
    trainer.network = Coarse()
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    data = batch(trainer, "labels")
    data["target"] = data["target"][..., ::2, ::2]
    with pytest.raises(RefusedSettings, match="no output of the network has the shape of the patch"):
        trainer.train_step(data)


def test_a_users_trainer_is_found_and_checked_as_ours(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_trainers.py").write_text(
        "from nnunet_calib.training import NACLTrainer\n"
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class MineTrainer(NACLTrainer): pass\n"
        "class TheirsTrainer(nnUNetTrainer): pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    assert issubclass(find_trainer("MineTrainer"), NACLTrainer)
    with pytest.raises(UsageError, match="TheirsTrainer is no trainer of nnunet-calib"):
        find_trainer("TheirsTrainer")
    with pytest.raises(UsageError, match="no trainer 'NobodysTrainer'"):
        find_trainer("NobodysTrainer")


# ----------------------------------------------------------------------------------------------------- checkpoint_best


def epoch(trainer, number: int, dice: float) -> float | None:
    """Log an epoch and end it; the moving average of Dice that a new ``checkpoint_best`` was saved for."""
    trainer.current_epoch = number
    for key in ("epoch_start_timestamps", "lrs", "train_losses", "val_losses"):
        trainer.logger.log(key, 0.5, number)
    trainer.logger.log("mean_fg_dice", dice, number)
    trainer.logger.log("dice_per_class_or_region", [dice, dice], number)
    best = Path(trainer.output_folder) / "checkpoint_best.pth"
    best.unlink(missing_ok=True)
    trainer.on_epoch_end()
    return trainer._best_ema if best.exists() else None


def test_the_best_is_chosen_among_epochs_in_which_the_objective_has_its_full_share():
    """Epochs 0 and 1 are nnU-Net's, in epoch 2 the objective grows, from the end of epoch 3 on it is alone."""
    trainer = build("MbLSTrainer", {"num_epochs": 6, "calibrate_from": 1 / 3, "ramp": 0.5}, axes=2)
    saved = [epoch(trainer, number, dice) for number, dice in enumerate([0.9, 0.9, 0.8, 0.7, 0.6, 0.8])]
    assert saved[0] == 0.9
    assert saved[1:3] == [None, None]
    assert saved[3] == pytest.approx(0.7), "lower than before, yet the first of the objective"
    assert saved[4] is None
    assert saved[5] == pytest.approx(0.9 * (0.9 * 0.7 + 0.1 * 0.6) + 0.1 * 0.8)


@pytest.mark.parametrize("name", ["StockTrainer", "nnUNetTrainer"])
def test_the_best_of_other_trainers_is_nnunets(name):
    trainer = build(name, axes=2)
    assert [epoch(trainer, n, dice) is not None for n, dice in enumerate([0.9, 0.8, 0.95])] == [True, False, False]


# ------------------------------------------------------------------------------------------------- losses not a number


def shallow(stages: int) -> dict:
    network = copy.deepcopy(architecture(2))
    arguments = network["arch_kwargs"]
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[name] = arguments[name][:stages]
    arguments["n_stages"], arguments["n_conv_per_stage_decoder"] = stages, [1] * (stages - 1)
    return network


@pytest.mark.parametrize("name", ["MbLSTrainer", "StockTrainer"])
@pytest.mark.parametrize(("stages", "weights"), [(2, [1.0]), (3, [1.0, 0.0])])
def test_the_scales_of_a_shallow_network_have_weights_that_sum_to_one(name, stages, weights):
    trainer = build(name, axes=2, architecture=shallow(stages))
    assert list(trainer.loss.weight_factors) == weights
    assert torch.as_tensor(trainer.train_step(batch(trainer, "labels"))["loss"]).isfinite()


@pytest.mark.parametrize("name", ["MbLSTrainer", "StockTrainer"])
def test_a_network_of_one_stage_is_refused(name, monkeypatch):
    trainer = construct(name, axes=2)
    monkeypatch.setattr(type(trainer.configuration_manager), "pool_op_kernel_sizes", [[1, 1]])
    with pytest.raises(RefusedSettings, match="has one stage; nnU-Net needs two or more"):
        trainer._build_loss()


@pytest.mark.parametrize("name", ["MbLSTrainer", "StockTrainer"])
def test_a_training_ends_in_one_line_when_no_step_of_an_epoch_had_a_finite_loss(name):
    trainer = build(name, axes=2)
    trainer.on_train_epoch_end([{"loss": float("nan")}, {"loss": 0.5}])  # mixed precision has such steps
    with pytest.raises(EndedTraining) as caught:
        trainer.on_train_epoch_end([{"loss": float("nan")}, {"loss": float("inf")}])
    assert str(caught.value).startswith("nnunet-calib: the loss was not a finite number in any step of epoch 0")
    assert "\n" not in str(caught.value)
    assert caught.value.code not in (0, None)


# ------------------------------------------------------------------------------------------------------------ resuming


def saved(trainer) -> str:
    file = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    return file


def test_the_state_of_a_loss_is_no_argument_of_the_trainer():
    trainer = build("CRaCTrainer", AT_ONCE, axes=2)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.validation_step(batch(trainer, "labels"))
    arguments = torch.load(saved(trainer), weights_only=False)["init_args"]
    assert "nnunet_calib_state" in arguments["plans"]
    again = type(trainer)(**{**arguments, "plans": arguments["plans"] | {"continue_training": False}})
    assert isinstance(again, nnUNetTrainer)
    assert "nnunet_calib_state" not in trainer.my_init_kwargs["plans"], "plans.json stays as it was"


@pytest.mark.parametrize(("given", "refused"), [({"penalty": "l2"}, True), ({}, False)])
def test_a_setting_that_the_checkpoint_does_not_know_had_its_default(given, refused):
    first = build("MbLSTrainer", AT_ONCE, axes=2)
    del recorded(first)["penalty"]
    checkpoint = saved(first)
    trainer = construct("MbLSTrainer", AT_ONCE | given, axes=2, continued=True)
    if not refused:
        trainer.load_checkpoint(checkpoint)
        return
    with pytest.raises(RefusedSettings, match="penalty was 'l1', now 'l2'"):
        trainer.load_checkpoint(checkpoint)


def test_a_training_of_nnunets_own_is_not_continued_as_ours():
    first = build("MbLSTrainer", axes=2)
    del first.my_init_kwargs["plans"][RESOLVED_KEY]
    checkpoint = saved(first)
    with pytest.raises(RefusedSettings, match="was not trained by a trainer of nnunet-calib"):
        construct("MbLSTrainer", axes=2, continued=True).load_checkpoint(checkpoint)


def test_combined_classes_keep_the_checks_of_settings():
    assert issubclass(both_orders(nnUNetTrainer_250epochs)[0], NACLTrainer)
    with pytest.raises(RefusedSettings, match="unknown setting 'marign'"):
        construct("MbLSTrainer", {"marign": 2}, trainer=type("Mine", (MbLSTrainer, nnUNetTrainer_250epochs), {}))
