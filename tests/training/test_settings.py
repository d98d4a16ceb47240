"""Settings in the plans: what is refused before a training starts, the defaults, and that they arrive in the loss."""

import os
from pathlib import Path

import pytest
import torch

from nnunet_calib.losses import (
    LOSSES,
    ACELoss,
    CPCLoss,
    CRaCLoss,
    DCALoss,
    ECPLoss,
    FLSDLoss,
    FocalLoss,
    LabelSmoothingLoss,
    MbLSLoss,
    MEEPLoss,
    NACLLoss,
    SVLSLoss,
)
from nnunet_calib.training.settings import RefusedSettings, resolve_settings
from nnunet_calib.training.trainers import TRAINERS

from .toy import PATCH, architecture, build, construct, prepare_folders, target

SCHEDULE = {
    "num_epochs": 1000,
    "num_iterations_per_epoch": 250,
    "num_val_iterations_per_epoch": 50,
    "initial_lr": 1e-2,
    "save_every": 50,
    "finetune_from": None,
}
"""nnU-Net's own values (its trainer's constructor)."""


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)


def names_of_settings(name: str) -> list[str]:
    return list(resolve_settings({}, TRAINERS[name].LOSS, TRAINERS[name].FIXED, [3, 3, 3]))


FLAGS = {"class_mean", "binary", "balanced", "ignore_absent_classes", "include_background"}
EVERY_SETTING = [(name, key) for name in TRAINERS for key in names_of_settings(name)]


def refusal(name: str, settings, **options) -> str:
    with pytest.raises(RefusedSettings) as caught:
        construct(name, settings, **options)
    message = str(caught.value)
    assert message.startswith("nnunet-calib: ")
    assert "\n" not in message
    assert not Path(os.environ["nnUNet_results"]).exists(), "a refused training leaves no folder"
    return message


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("name", "key"), EVERY_SETTING, ids="-".join)
def test_a_wrong_type_or_value_is_refused_by_name(name, key):
    for wrong in ({}, "no such value", -1, float("nan"), 1 if key in FLAGS else True):
        assert key in refusal(name, {key: wrong})
    if key != "finetune_from":
        assert key in refusal(name, {key: None})


@pytest.mark.parametrize(
    ("name", "settings", "allowed"),
    [
        ("MbLSTrainer", {"num_epochs": 0}, "num_epochs must be a whole number of at least 1, got 0"),
        ("MbLSTrainer", {"num_iterations_per_epoch": 2.5}, "a whole number of at least 1, got 2.5"),
        ("MbLSTrainer", {"initial_lr": 0}, "initial_lr must be above 0, got 0"),
        ("MbLSTrainer", {"dice_weight": -0.1}, "dice_weight must be a number of at least 0, got -0.1"),
        ("MbLSTrainer", {"calibrate_from": 1.5}, "calibrate_from must be a number from 0 to 1, got 1.5"),
        ("MbLSTrainer", {"calibrate_from": 75}, "calibrate_from must be a number from 0 to 1, got 75"),
        ("MbLSTrainer", {"deep_supervision": "none"}, "one of 'all', 'full_resolution', got 'none'"),
        ("MbLSTrainer", {"finetune_from": "no name!"}, "the name of a trainer, such as nnUNetTrainer, or null"),
        ("MbLSTrainer", {"penalty": "l3"}, "penalty must be one of 'l1', 'l2', got 'l3'"),
        ("MbLSTrainer", {"margin": "5"}, "margin must be a number of at least 0, got '5'"),
        ("MbLSTrainer", {"weight": float("inf")}, "weight must be a number of at least 0, got inf"),
        ("LSTrainer", {"alpha": 1.5}, "alpha must be a number from 0 to 1, got 1.5"),
        ("NACLTrainer", {"border": "mirror"}, "one of 'replicate', 'background', 'zero', got 'mirror'"),
        ("NACLTrainer", {"on": "labels"}, "on must be one of 'logits', 'probabilities', got 'labels'"),
        ("NACLTrainer", {"kernel_size": 4}, "kernel_size must be a positive odd integer or one for each axis, got 4"),
        ("SVLSTrainer", {"kernel_size": [3, 3, 2]}, "positive odd integer or one for each axis, got [3, 3, 2]"),
        ("CRaCTrainer", {"rho": 20.0}, "rho_max must be a number of at least 20, got 10.0"),
        ("ACETrainer", {"bins": 0}, "bins must be a whole number of at least 1, got 0"),
        ("SVLSTrainer", {"sigma": 0.0}, "sigma must be at least 0.3 voxels, got 0.0"),
    ],
)
def test_the_refusal_names_what_is_allowed(name, settings, allowed):
    assert allowed in refusal(name, settings)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_unknown_setting_is_refused_with_all_allowed_ones(name):
    message = refusal(name, {"marign": 5})
    assert "unknown setting 'marign'" in message
    assert ("did you mean margin?" in message) == ("margin" in names_of_settings(name))
    assert message.endswith(", ".join(sorted(names_of_settings(name))))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MEEPTrainer", "variant"),  # fixed: it is what tells MEEPTrainer and MEEPKLTrainer apart
        ("MEEPKLTrainer", "variant"),
        ("ACETrainer", "soft"),
        ("SoftACETrainer", "soft"),
        ("CETrainer", "margin"),
        ("StockTrainer", "dice_weight"),
        ("MbLSTrainer", "multilabel"),  # follows from dataset.json
    ],
)
def test_a_setting_of_another_trainer_is_unknown(name, key):
    assert f"unknown setting '{key}'" in refusal(name, {key: 1})


@pytest.mark.parametrize("settings", [[], 5, "margin", None, True])
def test_settings_that_are_no_object_are_refused(settings):
    given = {"nnunet_calib": settings}
    with pytest.raises(RefusedSettings, match="'nnunet_calib' of configuration small must hold settings by name"):
        construct("MbLSTrainer", **given)


@pytest.mark.parametrize(("axes", "sizes"), [(3, [3, 3]), (2, [1, 3, 3])])
@pytest.mark.parametrize("name", ["NACLTrainer", "SVLSTrainer", "CRaCTrainer"])
def test_a_kernel_of_another_number_of_axes_is_refused(name, axes, sizes):
    message = refusal(name, {"kernel_size": sizes}, axes=axes)
    assert f"kernel_size {sizes} does not fit images of {axes} axes" in message


def test_two_ways_to_put_the_stock_loss_first_are_refused():
    message = refusal("MbLSTrainer", {"finetune_from": "nnUNetTrainer", "calibrate_from": 0.5})
    assert "calibrate_from and finetune_from are two ways" in message


def test_a_training_without_an_epoch_of_the_objective_is_refused():
    assert "calibrate_from 1 leaves no epoch to the objective" in refusal("MbLSTrainer", {"calibrate_from": 1})


def test_plans_without_the_configuration_are_refused_with_those_there_are():
    message = refusal("MbLSTrainer", None, configuration="3d_fullres_m5")
    assert "configuration 3d_fullres_m5 is not in the plans; nnUNetPlans has base, small" in message


def test_a_refusal_is_a_value_error_and_ends_a_command_in_one_line():
    error = RefusedSettings("margin must be a number")
    assert isinstance(error, ValueError)
    assert isinstance(error, SystemExit)
    # The interpreter prints a SystemExit's code and ends with status 1 where it is no number.
    assert error.code == "nnunet-calib: margin must be a number"


# ------------------------------------------------------------------------------------------------------------ defaults


@pytest.mark.parametrize("name", TRAINERS)
def test_the_schedule_is_nnunets_own(name):
    trainer = construct(name)
    assert {key: trainer.settings[key] for key in SCHEDULE} == SCHEDULE
    assert all(getattr(trainer, key) == value for key, value in SCHEDULE.items() if key != "finetune_from")


def test_a_training_from_a_finished_network_is_shorter_with_a_smaller_step_and_calibrates_at_once():
    settings = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}).settings
    assert (settings["num_epochs"], settings["initial_lr"], settings["calibrate_from"]) == (250, 1e-3, 0.0)


def test_given_values_win_over_those_of_a_fine_tuning():
    given = {"finetune_from": "nnUNetTrainer", "num_epochs": 7, "initial_lr": 0.5}
    trainer = construct("MbLSTrainer", given)
    assert (trainer.num_epochs, trainer.initial_lr) == (7, 0.5)


def test_the_schedule_reaches_the_trainer():
    given = {
        "num_epochs": 3,
        "num_iterations_per_epoch": 4,
        "num_val_iterations_per_epoch": 5,
        "initial_lr": 0.02,
        "save_every": 6,
    }
    trainer = construct("StockTrainer", given)
    assert {key: getattr(trainer, key) for key in given} == given


def test_settings_are_inherited_with_the_configuration():
    assert construct("MbLSTrainer", base={"nnunet_calib": {"margin": 2}}).settings["margin"] == 2


def test_settings_of_a_configuration_replace_those_it_inherits():
    settings = construct("MbLSTrainer", {"weight": 0.5}, base={"nnunet_calib": {"margin": 2}}).settings
    assert (settings["weight"], settings["margin"]) == (0.5, 5.0)


@pytest.mark.parametrize("name", ["NACLTrainer", "SVLSTrainer", "CRaCTrainer"])
@pytest.mark.parametrize(
    ("axes", "first_kernel", "expected"), [(3, 3, [3, 3, 3]), (3, 1, [1, 3, 3]), (3, 7, [3, 3, 3]), (2, 3, [3, 3])]
)
def test_the_neighbourhood_follows_the_first_convolution(name, axes, first_kernel, expected):
    trainer = construct(name, axes=axes, architecture=architecture(axes, first_kernel))
    assert trainer.settings["kernel_size"] == expected


@pytest.mark.parametrize("kernel_sizes", [3, [3, 3, 3, 3]])
def test_kernels_given_as_one_number_are_understood(kernel_sizes):
    network = architecture(3)
    network["arch_kwargs"]["kernel_sizes"] = kernel_sizes
    assert construct("NACLTrainer", architecture=network).settings["kernel_size"] == [3, 3, 3]


def test_an_architecture_without_kernels_has_neighbourhoods_of_three():
    network = architecture(3)
    del network["arch_kwargs"]["kernel_sizes"]
    assert construct("NACLTrainer", architecture=network).settings["kernel_size"] == [3, 3, 3]


# -------------------------------------------------------------------------------------------------- arrive in the loss


@pytest.mark.parametrize(
    ("name", "arguments", "loss"),
    [
        ("FLTrainer", {"gamma": 1.0}, FocalLoss),
        ("FLSDTrainer", {"gamma": 1.0}, FLSDLoss),
        ("ECPTrainer", {"weight": 0.7, "class_mean": True}, ECPLoss),
        ("LSTrainer", {"alpha": 0.3}, LabelSmoothingLoss),
        ("SVLSTrainer", {"sigma": 0.7, "kernel_size": [1, 3, 5]}, SVLSLoss),
        ("MbLSTrainer", {"margin": 1, "weight": 0.5, "penalty": "l2"}, MbLSLoss),
        (
            "NACLTrainer",
            {
                "weight": 0.5,
                "on": "probabilities",
                "prior": "gaussian",
                "sigma": 0.8,
                "border": "zero",
                "balanced": False,
            },
            NACLLoss,
        ),
        ("MEEPTrainer", {"weight": 0.7, "binary": True}, MEEPLoss),
        ("CPCTrainer", {"discrimination_weight": 0.5, "exclusion_weight": 0.2}, CPCLoss),
        ("CRaCTrainer", {"margin": 3, "kernel_size": [1, 3, 3], "border": "background", "rho": 0.5}, CRaCLoss),
        ("ACETrainer", {"weight": 0.5, "bins": 10, "include_background": False}, ACELoss),
        ("DCATrainer", {"weight": 2}, DCALoss),
    ],
)
def test_loss_arguments_of_the_plans_arrive_in_the_loss(name, arguments, loss):
    trainer = build(name, arguments | {"dice_weight": 0})
    logits = torch.randn(2, 3, *[PATCH] * 3)
    reference = target("labels", (PATCH,) * 3)
    value = trainer.loss.loss(logits, reference)
    assert value == loss(**arguments)(logits, reference)
    assert value != loss()(logits, reference)


def test_the_two_ace_trainers_differ_in_the_bins():
    logits, reference = torch.randn(2, 3, *[PATCH] * 3), target("labels", (PATCH,) * 3)
    for name, soft in (("ACETrainer", False), ("SoftACETrainer", True)):
        value = build(name, {"dice_weight": 0}).loss.loss(logits, reference)
        assert value == ACELoss(soft=soft)(logits, reference)


def test_the_two_meep_trainers_differ_in_the_variant():
    logits, reference = torch.randn(2, 3, *[PATCH] * 3), target("labels", (PATCH,) * 3)
    for name, variant in (("MEEPTrainer", "entropy"), ("MEEPKLTrainer", "kl")):
        value = build(name, {"dice_weight": 0}).loss.loss(logits, reference)
        assert value == MEEPLoss(variant=variant)(logits, reference)


@pytest.mark.parametrize("name", ["MbLSTrainer", "NACLTrainer"])
def test_beside_nnunets_dice_the_penalty_weighs_less_than_in_the_paper_unless_set(name):
    settings = TRAINERS[name].check_settings
    assert (settings({})["weight"], settings({"weight": 0.1})["weight"]) == (0.03, 0.1)
    assert LOSSES[TRAINERS[name].LOSS]().weight == 0.1
