"""What nnU-Net gets from our trainers: its own loop, wrapper and batches, with another inner loss."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunet_calib.training
from nnunet_calib._autoload import trainers_folder
from nnunet_calib.losses import LOSSES, MbLSLoss
from nnunet_calib.training.trainers import TRAINERS

from .toy import IGNORE, KINDS, PATCH, batch, build, construct, logits, prepare_folders, scales

OURS = [name for name in TRAINERS if name != "StockTrainer"]
AT_ONCE = {"calibrate_from": 0}

every_trainer = pytest.mark.parametrize("name", TRAINERS)
every_objective = pytest.mark.parametrize("name", OURS)
kinds = pytest.mark.parametrize("kind", KINDS)
ignoring = pytest.mark.parametrize("kind", ["labels_ignore", "regions_ignore"])
dimensions = pytest.mark.parametrize("axes", [2, 3])


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)


def settings(name: str, **more) -> dict:
    """The objective from the first epoch on; StockTrainer has none."""
    return {} if name == "StockTrainer" else {**AT_ONCE, **more}


def inner(trainer):
    return trainer.loss.loss if isinstance(trainer.loss, DeepSupervisionWrapper) else trainer.loss


def targets(trainer, kind: str, **options):
    return batch(trainer, kind, **options)["target"]


# --------------------------------------------------------------------------------------------------------------- steps


@every_trainer
@kinds
@dimensions
def test_a_training_step_has_a_finite_loss_and_moves_the_weights(name, kind, axes):
    trainer = build(name, settings(name), kind=kind, axes=axes)
    before = [weights.detach().clone() for weights in trainer.network.parameters()]
    loss = trainer.train_step(batch(trainer, kind))["loss"]
    gradients = [weights.grad for weights in trainer.network.parameters() if weights.grad is not None]
    assert torch.as_tensor(loss).isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True)]
    # The head of the coarsest scale has weight 0 in nnU-Net's deep supervision.
    assert sum(moved) >= len(moved) - 4


@every_trainer
@ignoring
def test_a_validation_step_works(name, kind):
    trainer = build(name, settings(name), kind=kind, axes=2)
    result = trainer.validation_step(batch(trainer, kind))
    assert torch.as_tensor(result["loss"]).isfinite()
    assert len(result["tp_hard"]) == 2


@every_trainer
@ignoring
def test_a_training_step_works_without_deep_supervision(name, kind):
    trainer = build(name, settings(name), kind=kind, axes=2, deep_supervision=False)
    assert not isinstance(trainer.loss, DeepSupervisionWrapper)
    assert torch.as_tensor(trainer.train_step(batch(trainer, kind))["loss"]).isfinite()


@every_trainer
@ignoring
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_patch_that_is_ignored_entirely_has_a_finite_loss_and_no_gradient(name, kind, batch_dice):
    trainer = build(name, settings(name), kind=kind, axes=2, batch_dice=batch_dice)
    outputs = logits(trainer)
    loss = trainer.loss(outputs, targets(trainer, kind, all_ignored=True))
    loss.backward()
    assert loss.isfinite()
    assert all((output.grad == 0).all() for output in outputs if output.grad is not None)


@every_objective
@ignoring
def test_without_dice_a_patch_that_is_ignored_entirely_costs_nothing(name, kind):
    trainer = build(name, settings(name, dice_weight=0), kind=kind, axes=2)
    assert trainer.loss(logits(trainer), targets(trainer, kind, all_ignored=True)) == 0


@every_objective
@ignoring
def test_what_the_network_says_at_ignored_voxels_changes_nothing(name, kind):
    trainer = build(name, settings(name), kind=kind, axes=2)
    outputs, reference = logits(trainer), targets(trainer, kind)
    changed = []
    for output, scale in zip(outputs, reference, strict=True):
        ignored = scale[:, -1:] if kind.startswith("regions") else scale == IGNORE
        changed.append(torch.where(ignored, 7.0, output))
    torch.testing.assert_close(trainer.loss(changed, reference), trainer.loss(outputs, reference))


@every_trainer
@ignoring
def test_under_autocast_the_loss_is_finite_and_float32(name, kind):
    trainer = build(name, settings(name), kind=kind, axes=2)
    data = batch(trainer, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = trainer.network(data["data"])
        loss = trainer.loss(outputs, data["target"])
    assert outputs[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert all(w.grad.isfinite().all() for w in trainer.network.parameters() if w.grad is not None)


# ------------------------------------------------------------------------------------------------ what the objective is


@kinds
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("dice_weight", [0, 0.3, 1])
def test_the_objective_is_the_calibration_loss_plus_weighted_dice(kind, batch_dice, dice_weight):
    options = {"kind": kind, "axes": 2, "batch_dice": batch_dice}
    trainer = build("MbLSTrainer", {**AT_ONCE, "dice_weight": dice_weight, "margin": 2, "weight": 0.5}, **options)
    stock = inner(build("nnUNetTrainer", **options))
    output, reference = logits(trainer)[0], targets(trainer, kind)[0]
    regions, ignore = kind.startswith("regions"), kind.endswith("ignore")
    valid = None
    if ignore:
        valid = ~reference[:, -1:] if regions else reference != IGNORE
    labels = reference[:, :2] if regions else reference
    calibration = MbLSLoss(margin=2, weight=0.5, multilabel=regions)(output, labels, valid)
    dice = stock.dc(output, labels if valid is None or regions else torch.where(valid, labels, 0), loss_mask=valid)
    torch.testing.assert_close(inner(trainer)(output, reference), calibration + dice_weight * dice)


@kinds
def test_deep_supervision_sums_the_objective_over_scales_with_nnunets_weights(kind):
    trainer = build("MbLSTrainer", AT_ONCE, kind=kind)
    outputs, reference = logits(trainer), targets(trainer, kind)
    fine, half = (inner(trainer)(outputs[i], reference[i]) for i in range(2))
    # nnU-Net: 1, 1/2, 1/4, .., the last 0, divided by their sum
    torch.testing.assert_close(trainer.loss(outputs, reference), 2 / 3 * fine + 1 / 3 * half)


@every_trainer
def test_the_deep_supervision_wrapper_is_nnunets_with_its_weights(name):
    trainer, stock = build(name), build("nnUNetTrainer")
    assert type(trainer.loss) is DeepSupervisionWrapper
    assert list(trainer.loss.weight_factors) == list(stock.loss.weight_factors)
    assert trainer.loss.weight_factors[-1] == 0


@every_trainer
def test_with_several_gpus_the_coarsest_scale_keeps_a_trace_of_weight(name):
    trainer = build(name)
    trainer.is_ddp = True
    first, *_, last = trainer._build_loss().weight_factors
    assert last / first == pytest.approx(1e-6)


@every_objective
@ignoring
def test_full_resolution_leaves_coarser_scales_to_nnunet(name, kind):
    trainer = build(name, settings(name, deep_supervision="full_resolution"), kind=kind, axes=2)
    everywhere, stock = (inner(build(n, s, kind=kind, axes=2)) for n, s in ((name, AT_ONCE), ("nnUNetTrainer", None)))
    objective = inner(trainer)
    for scale, output, reference in zip(scales(trainer), logits(trainer), targets(trainer, kind), strict=True):
        expected = everywhere if scale == 1 else stock
        assert objective(output, reference) == expected(output, reference)


def test_full_resolution_works_without_deep_supervision():
    trainer = build("MbLSTrainer", {**AT_ONCE, "deep_supervision": "full_resolution"}, axes=2, deep_supervision=False)
    stock = build("nnUNetTrainer", axes=2, deep_supervision=False)
    output, reference = logits(trainer), targets(trainer, "labels")
    assert trainer.loss(output, reference) != stock.loss(output, reference)


@every_trainer
def test_nnunets_dump_of_all_attributes_works(name):
    """It is written before the first epoch, and looks at every property."""
    trainer = build(name, axes=2)
    trainer._save_debug_information()
    assert (Path(trainer.output_folder) / "debug.json").exists()


# ------------------------------------------------------------------------------------------------------ calibrate_from


@every_objective
@ignoring
def test_until_calibrate_from_the_loss_is_exactly_nnunets(name, kind):
    options = {"kind": kind, "axes": 2}
    objective = {"dice_weight": 0.5}  # with 1 CETrainer is nnU-Net's loss
    trainer = build(name, {"calibrate_from": 0.5, "num_epochs": 4, "ramp": 0, **objective}, **options)
    stock, at_once = build("nnUNetTrainer", **options), build(name, AT_ONCE | objective, **options)
    outputs, reference = logits(trainer), targets(trainer, kind)
    values = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        values.append(trainer.loss(outputs, reference))
    first, then = stock.loss(outputs, reference), at_once.loss(outputs, reference)
    assert values == [first, first, then, then]
    assert first != then


@kinds
def test_the_stock_trainer_keeps_nnunets_loss(kind):
    trainer, stock = (build(name, kind=kind, axes=2) for name in ("StockTrainer", "nnUNetTrainer"))
    trainer.on_train_epoch_start()
    outputs, reference = logits(trainer), targets(trainer, kind)
    assert trainer.loss(outputs, reference) == stock.loss(outputs, reference)


def test_the_switch_follows_the_epoch_that_a_resumed_training_starts_with():
    trainer = build("MbLSTrainer", {"calibrate_from": 0.5, "num_epochs": 4}, axes=2)
    for epoch in range(3):
        trainer.logger.log("lrs", 0.01, epoch)
    trainer.current_epoch = 3
    trainer.on_train_epoch_start()
    assert inner(trainer).share == 1


def test_a_training_of_one_epoch_is_the_objectives():
    trainer = build("MbLSTrainer", {"calibrate_from": 0.9, "num_epochs": 1}, axes=2)
    trainer.on_train_epoch_start()
    assert inner(trainer).share > 0


def shares(trainer, epoch: int) -> list[float]:
    """The objective's share at every step of an epoch, and in the validation after it."""
    trainer.current_epoch = epoch
    trainer.on_train_epoch_start()
    given = []
    for step in range(trainer.num_iterations_per_epoch):
        trainer.train_step(batch(trainer, "labels", seed=step))
        given.append(inner(trainer).share)
    trainer.on_validation_epoch_start()
    return [*given, inner(trainer).share]


def test_the_objective_takes_over_step_by_step():
    """Half of its two epochs: nothing in epochs 0 and 1, a quarter more with each step of epoch 2, then all."""
    schedule = {"num_epochs": 4, "num_iterations_per_epoch": 4, "calibrate_from": 0.5, "ramp": 0.5}
    trainer = build("MbLSTrainer", schedule, axes=2)
    assert [shares(trainer, epoch) for epoch in range(4)] == [
        [0] * 5,
        [0] * 5,
        [0.25, 0.5, 0.75, 1, 1],
        [1] * 5,
    ]
    log = Path(trainer.log_file).read_text()
    assert "Objective: mbls, its share 0.25 to 1.00" in log
    resumed = build("MbLSTrainer", schedule | {"ramp": 1}, axes=2)
    assert shares(resumed, 3) == [0.625, 0.75, 0.875, 1, 1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 0.5), ({"calibrate_from": 0}, 0), ({"calibrate_from": 0, "ramp": 0.2}, 0.2), ({"finetune_from": "A"}, 0)],
)
def test_an_objective_that_is_there_from_the_start_has_no_ramp_unless_asked(given, expected):
    assert TRAINERS["MbLSTrainer"].check_settings(given)["ramp"] == expected


@every_objective
@ignoring
def test_on_the_way_the_loss_is_the_mean_of_nnunets_and_the_objective(name, kind):
    options = {"kind": kind, "axes": 2}
    trainer = build(name, AT_ONCE, **options)
    outputs, reference = logits(trainer), targets(trainer, kind)
    values = []
    for share in (0, 0.25, 1):
        inner(trainer).share = share
        values.append(trainer.loss(outputs, reference))
    torch.testing.assert_close(values[1], 0.75 * values[0] + 0.25 * values[2])


@kinds
@pytest.mark.parametrize(("last", "warned"), [(0.59, True), (0.44, False), (float("nan"), False)])
def test_a_structure_that_is_still_being_learned_at_the_switch_is_named(kind, last, warned):
    """0.42 and then 0.59 is what a run had that lost the structure when NACL began: docs/results.md."""
    trainer = build("NACLTrainer", {"num_epochs": 8}, kind=kind)
    manager = trainer.label_manager
    names = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    for epoch, dice in enumerate([0.0, 0.0, 0.0, 0.01, 0.42, last]):
        trainer.logger.log("lrs", 0.01, epoch)
        trainer.logger.log("dice_per_class_or_region", [0.8] * (len(names) - 1) + [dice], epoch)
    trainer.current_epoch = 6
    trainer.on_train_epoch_start()
    log = Path(trainer.log_file).read_text()
    assert (f"still being learned: {names[-1]} (Dice 0.42, now 0.59)." in log) == warned
    assert ("WARNING" in log) == warned


# ----------------------------------------------------------------------------------------------------------- discovery


def test_there_is_a_trainer_for_every_loss():
    assert {trainer.LOSS for trainer in TRAINERS.values()} == {None, *LOSSES}


@every_trainer
def test_nnunet_finds_the_same_class_twice(name, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    found = [recursive_find_trainer_class_by_name(name) for _ in range(2)]
    assert found[0] is found[1] is TRAINERS[name] is getattr(nnunet_calib.training, name)


@every_trainer
def test_classes_can_be_pickled(name):
    assert pickle.loads(pickle.dumps(TRAINERS[name])) is TRAINERS[name]


@every_trainer
def test_losses_can_be_pickled_and_keep_their_value(name):
    trainer = build(name, settings(name), axes=2)
    stream = io.BytesIO(pickle.dumps(inner(trainer)))
    output, reference = logits(trainer)[0], targets(trainer, "labels")[0]
    assert pickle.load(stream)(output, reference) == inner(trainer)(output, reference)


def test_the_trainers_folder_holds_one_module():
    assert [file.name for file in Path(trainers_folder()).glob("*.py")] == ["nnunet_calib_trainers.py"]


def test_inference_needs_no_more_than_the_static_network_builder():
    trainer = construct("NACLTrainer", axes=2)
    network = TRAINERS["NACLTrainer"].build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    assert network(torch.zeros(1, 1, PATCH, PATCH)).shape == (1, 3, PATCH, PATCH)
