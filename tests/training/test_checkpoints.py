"""What a training records, what ``--c`` refuses, and what ``finetune_from`` loads."""

import copy
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_calib.training import StockTrainer
from nnunet_calib.training.checkpoint import load_weights
from nnunet_calib.training.settings import RESOLVED_KEY, RefusedSettings

from .toy import PATCH, PLANS, architecture, build, construct, dataset_json, plans, prepare_folders

MARGIN_2 = {"margin": 2.0, "calibrate_from": 0, "num_epochs": 3, "dice_weight": 1}


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    # It would start data loaders; there are no data.
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)


def log_an_epoch(trainer) -> None:
    """What nnU-Net's logger holds after an epoch, numpy numbers included."""
    for key in ("epoch_start_timestamps", "lrs", "train_losses", "val_losses", "epoch_end_timestamps"):
        trainer.logger.log(key, np.float32(0.5), 0)
    trainer.logger.log("mean_fg_dice", np.float64(0.5), 0)
    trainer.logger.log("dice_per_class_or_region", [np.float64(0.25), np.float32(0.75)], 0)
    trainer._best_ema = trainer.logger.get_value("ema_fg_dice", step=-1)


def saved(trainer, name: str = "checkpoint_final.pth") -> str:
    log_an_epoch(trainer)
    file = os.path.join(trainer.output_folder, name)
    trainer.save_checkpoint(file)
    return file


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.network.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------------------ recorded


def test_resolved_settings_are_in_the_plans_the_checkpoint_and_the_log():
    trainer = build("MbLSTrainer", MARGIN_2, axes=2)
    expected = {"trainer": "MbLSTrainer", **trainer.settings}
    assert expected["margin"] == 2.0
    assert trainer.plans_manager.plans[RESOLVED_KEY] == expected
    assert trainer.my_init_kwargs["plans"][RESOLVED_KEY] == expected
    assert torch.load(saved(trainer), weights_only=False)["init_args"]["plans"][RESOLVED_KEY] == expected
    assert str(expected) in Path(trainer.log_file).read_text()


def test_resolved_settings_are_json():
    resolved = construct("NACLTrainer").plans_manager.plans[RESOLVED_KEY]
    assert json.loads(json.dumps(resolved)) == resolved


# ----------------------------------------------------------------------------------------------------------- drift, --c


def test_a_training_continues_with_the_settings_it_had():
    first = build("MbLSTrainer", MARGIN_2, axes=2)
    checkpoint = saved(first)
    trainer = construct("MbLSTrainer", MARGIN_2, axes=2, continued=True)
    trainer.load_checkpoint(checkpoint)
    assert same(weights_of(trainer), weights_of(first))
    assert trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("settings", "drift"),
    [
        ({**MARGIN_2, "margin": 3.0}, "margin was 2.0, now 3.0"),
        ({**MARGIN_2, "num_epochs": 4}, "num_epochs was 3, now 4"),
        ({**MARGIN_2, "dice_weight": 0.5}, "dice_weight was 1.0, now 0.5"),
    ],
)
def test_continuing_with_other_settings_is_refused_in_one_line(settings, drift):
    checkpoint = saved(build("MbLSTrainer", MARGIN_2, axes=2))
    trainer = construct("MbLSTrainer", settings, axes=2, continued=True)
    with pytest.raises(RefusedSettings) as caught:
        trainer.load_checkpoint(checkpoint)
    assert drift in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_from_before_an_argument_was_there_had_the_loss_as_its_class_has_it():
    """The trainer's own default is newer: NACL had no balanced means, and its trainer 0.6 of nnU-Net's Dice."""
    former = {"num_epochs": 3, "dice_weight": 0.6}
    checkpoint = saved(build("NACLTrainer", {**former, "balanced": False}, axes=2))
    content = torch.load(checkpoint, weights_only=False)
    del content["init_args"]["plans"][RESOLVED_KEY]["balanced"]
    torch.save(content, checkpoint)
    construct("NACLTrainer", {**former, "balanced": False}, axes=2, continued=True).load_checkpoint(checkpoint)
    with pytest.raises(RefusedSettings, match="balanced was False, now True"):
        construct("NACLTrainer", former, axes=2, continued=True).load_checkpoint(checkpoint)


def test_validation_with_other_settings_is_no_drift():
    checkpoint = saved(build("MbLSTrainer", MARGIN_2, axes=2))
    construct("MbLSTrainer", {**MARGIN_2, "margin": 3.0}, axes=2, continued=False).load_checkpoint(checkpoint)


# ------------------------------------------------------------------------------------------------------- finetune_from


def stock(**options) -> nnUNetTrainer:
    """A stock trainer with weights that no other network here starts with."""
    trainer = build("nnUNetTrainer", axes=2, **options)
    with torch.no_grad():
        for weights in trainer.network.parameters():
            weights.add_(1)
    return trainer


@pytest.mark.parametrize("configuration", ["small", "base"], ids=["same configuration", "inherited one"])
@pytest.mark.parametrize("kind", ["labels", "regions_ignore"])
def test_fine_tuning_starts_from_every_weight_of_the_stock_checkpoint(configuration, kind):
    first = stock(kind=kind, configuration=configuration)
    saved(first)
    trainer = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2, kind=kind)
    trainer.on_train_start()
    assert any("seg_layers" in key for key in weights_of(trainer))
    assert same(weights_of(trainer), weights_of(first))


def test_fine_tuning_starts_anew_what_is_not_weights():
    first = stock()
    saved(first)
    trainer = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2)
    trainer.on_train_start()
    assert trainer.current_epoch == 0
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    assert not trainer.optimizer.state


def test_the_configurations_own_checkpoint_is_nearer_than_the_inherited_one():
    far, near = stock(configuration="base"), stock(configuration="small")
    with torch.no_grad():
        next(far.network.parameters()).zero_()
    saved(far)
    saved(near)
    trainer = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2)
    trainer.on_train_start()
    assert same(weights_of(trainer), weights_of(near))


def test_a_continued_fine_tuning_keeps_its_own_weights():
    saved(stock())
    settings = {"finetune_from": "nnUNetTrainer"}
    tuned = build("MbLSTrainer", settings, axes=2)
    checkpoint = saved(tuned, "checkpoint_latest.pth")
    trainer = construct("MbLSTrainer", settings, axes=2, continued=True)
    trainer.load_checkpoint(checkpoint)
    trainer.on_train_start()
    assert same(weights_of(trainer), weights_of(tuned))


def test_a_trainer_can_start_from_its_own_kind_in_the_inherited_configuration():
    first = build("MbLSTrainer", configuration="base", axes=2)
    saved(first)
    trainer = construct("MbLSTrainer", {"finetune_from": "MbLSTrainer"}, axes=2)
    trainer.on_train_start()
    assert same(weights_of(trainer), weights_of(first))


def test_without_the_checkpoint_the_command_that_makes_it_is_named():
    trainer = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2)
    with pytest.raises(RefusedSettings) as caught:
        trainer.on_train_start()
    message = str(caught.value)
    assert f"nnUNetTrainer__{PLANS}__small/fold_0 or nnUNetTrainer__{PLANS}__base/fold_0" in message
    assert "nnUNetv2_train Dataset001_Toy CONFIGURATION 0 -tr nnUNetTrainer -p nnUNetPlans" in message


def test_pretrained_weights_beside_fine_tuning_are_refused():
    saved(stock())
    trainer = build("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2)  # -pretrained_weights initializes
    with pytest.raises(RefusedSettings, match="-pretrained_weights and finetune_from are two starts"):
        trainer.on_train_start()


def test_weights_of_another_architecture_are_refused():
    saved(stock(architecture=architecture(2, features=8)))
    trainer = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2)
    with pytest.raises(RefusedSettings, match=r"checkpoint_final\.pth does not fit this network: .*size mismatch"):
        trainer.on_train_start()


# ----------------------------------------------------------------------------------------------- another set of classes


def tuned(labels: dict, first: nnUNetTrainer, trainer: str = "StockTrainer", **more) -> nnUNetTrainer:
    """A training that starts from the file of another's checkpoint, on data with these labels."""
    given = {"finetune_from": saved(first)} | more
    made = construct(trainer, given, axes=2)
    made.dataset_json["labels"] = labels
    made.label_manager = made.plans_manager.get_label_manager(made.dataset_json)
    made.on_train_start()
    return made


def probabilities(trainer: nnUNetTrainer, image: torch.Tensor) -> list[torch.Tensor]:
    trainer.network.eval()
    with torch.no_grad():
        return [logits.softmax(dim=1) for logits in trainer.network(image)]


def test_with_new_classes_a_network_begins_with_the_probabilities_it_had():
    first = build("nnUNetTrainer", axes=2)
    now = tuned({"background": 0, "new": 1, "a": 2, "b": 3, "other": 4}, first)
    image = torch.randn(1, 1, 16, 16)
    for before, after in zip(probabilities(first, image), probabilities(now, image), strict=True):
        assert after.shape[1] == 5
        torch.testing.assert_close(after[:, [2, 3]], before[:, [1, 2]])
        for channel in (0, 1, 4):  # background, and the new classes that were part of it
            torch.testing.assert_close(after[:, channel], before[:, 0] / 3)


def bright_voxels(axes: int = 2, rare: int = 3) -> dict:
    """A batch in which a few bright voxels are the class 3, and the others 0; the classes 1 and 2 are nowhere."""
    image = torch.randn(2, 1, *(PATCH,) * axes)
    label = torch.zeros(2, 1, *(PATCH,) * axes, dtype=torch.int16)  # as nnU-Net gives them
    for one in range(2):
        corner = torch.randint(PATCH - rare, (axes,)).tolist()
        place = tuple(slice(c, c + rare) for c in corner)
        image[one, 0][place] += 6
        label[one, 0][place] = 3
    return {"data": image, "target": [label, label[:, :, ::2, ::2], label[:, :, ::4, ::4]]}


def begun(first: nnUNetTrainer, trainer: str = "StockTrainer", **more) -> nnUNetTrainer:
    """A fine-tuning with one new class, at its first step."""
    now = tuned({"background": 0, "a": 1, "b": 2, "new": 3}, first, trainer, **more)
    now.dataloader_train = iter(bright_voxels, None)
    now.on_train_epoch_start()
    return now


def test_a_new_class_begins_where_it_is():
    torch.manual_seed(0)
    first = build("nnUNetTrainer", axes=2)
    now = begun(first, num_epochs=4)
    given = bright_voxels()
    finest, inside = probabilities(now, given["data"])[0][:, 3], given["target"][0][:, 0] == 3
    share = float(inside.float().mean())
    assert finest[inside].mean() > 2 * finest[~inside].mean()
    assert 0.5 * 0.1 / 1.1 < float(finest[~inside].mean()) + share < 0.3  # it counts as a tenth of the others
    # what was known is as it was, up to what the new class takes
    before, after = probabilities(first, given["data"])[0], probabilities(now, given["data"])[0][:, :3]
    torch.testing.assert_close(after / after.sum(dim=1, keepdim=True), before)
    assert "rows of new classes fitted" in Path(now.log_file).read_text()


def test_rare_classes_weigh_more_at_first_and_as_others_from_the_middle_on():
    now = begun(build("nnUNetTrainer", axes=2), num_epochs=4)
    weighted = next(part for part in now.loss.modules() if isinstance(part, torch.nn.CrossEntropyLoss))
    first = 0.1 * PATCH**2 / 9
    seen = []
    for epoch in range(4):
        now.current_epoch = epoch
        now.on_train_epoch_start()
        seen.append(weighted.weight.tolist())
    half = 1 + (first - 1) / 2
    expected = [[1, 1, 1, first], [1, 1, 1, half], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert [pytest.approx(one, rel=0.05) for one in expected] == seen
    assert np.isfinite(now.train_step(bright_voxels())["loss"])


def test_a_fine_tuning_that_goes_on_keeps_the_weights_of_its_start():
    now = begun(build("nnUNetTrainer", axes=2), num_epochs=4)
    continued = construct("StockTrainer", now.settings, axes=2, continued=True)
    continued.dataset_json["labels"] = now.dataset_json["labels"]
    continued.label_manager = continued.plans_manager.get_label_manager(continued.dataset_json)
    continued.load_checkpoint(saved(now, "checkpoint_latest.pth"))
    before = weights_of(continued)
    continued.on_train_start()
    continued.on_train_epoch_start()
    assert same(weights_of(continued), before)
    weights = [part.weight for part in continued.loss.modules() if isinstance(part, torch.nn.CrossEntropyLoss)]
    assert weights[0].tolist() == pytest.approx([1 + (w - 1) * 0.5 for w in now._class_weights])


def test_weights_of_another_training_in_the_plans_are_not_ones_own():
    given = plans(2) | {"nnunet_calib_class_weights": [1.0, 9.0]}
    trainer = StockTrainer(given, "small", 0, dataset_json("labels"), torch.device("cpu"))
    trainer.initialize()
    continued = construct("StockTrainer", axes=2, continued=True)
    continued.load_checkpoint(saved(trainer, "checkpoint_latest.pth"))
    assert continued._class_weights == []


def test_without_new_classes_nothing_is_fitted_or_weighted():
    now = tuned({"background": 0, "a": 1, "b": 2}, first := stock())
    now.on_train_epoch_start()
    assert same(weights_of(now), weights_of(first))
    assert all(part.weight is None for part in now.loss.modules() if isinstance(part, torch.nn.CrossEntropyLoss))


def test_with_a_calibration_loss_the_rows_are_fitted_too():
    now = begun(build("nnUNetTrainer", axes=2), "NACLTrainer", num_epochs=4)
    assert np.isfinite(now.train_step(bright_voxels())["loss"])
    assert now._class_weights[3] > 1
    shares = []
    for epoch in range(4):  # the weights are those of nnU-Net's cross-entropy, which the loss takes over step by step
        now.current_epoch = epoch
        shares.append(now._share(0))
    assert shares[0] < 0.1
    assert shares == sorted(shares)
    assert shares[2:] == [1, 1]


def test_calibration_losses_start_from_a_file_too():
    first = stock()
    now = tuned({"background": 0, "a": 1, "b": 2}, first, "NACLTrainer")
    assert same(weights_of(now), weights_of(first))


def test_classes_are_not_left_out():
    with pytest.raises(RefusedSettings, match=r"checkpoint_final\.pth knows a class 'b' that this data set lacks"):
        tuned({"background": 0, "a": 1, "c": 2}, stock())


def test_no_class_is_added_to_regions():
    with pytest.raises(RefusedSettings, match="with regions, or other labels .*, no class can be added"):
        tuned({"background": 0, "a": 1}, stock(kind="regions"))


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(RefusedSettings, match=r"finetune_from nowhere\.pth: there is no such file"):
        construct("StockTrainer", {"finetune_from": "nowhere.pth"}, axes=2).on_train_start()


@pytest.mark.parametrize(("axes", "mirrored"), [(None, None), ((1,), (1,)), ((0, 1), (0, 1))])
def test_a_network_that_was_not_mirrored_stays_so(axes, mirrored):
    first = build("nnUNetTrainer", axes=2)
    first.inference_allowed_mirroring_axes = axes
    now = tuned({"background": 0, "a": 1, "b": 2}, first)
    assert now.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == mirrored
    assert now.inference_allowed_mirroring_axes == mirrored
    continued = construct("StockTrainer", now.settings, axes=2, continued=True)
    continued.load_checkpoint(saved(now, "checkpoint_latest.pth"))
    continued.on_train_start()
    assert continued.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == mirrored


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("place", ["network_weights", "logging", "extra"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(place, tmp_path):
    checkpoint = torch.load(saved(first := stock()), weights_only=False)
    ran = tmp_path / "ran"
    if place == "network_weights":
        checkpoint[place]["more"] = Malicious(ran)
    else:
        checkpoint[place] = Malicious(ran)
    torch.save(checkpoint, Path(first.output_folder) / "checkpoint_final.pth")
    trainer = construct("MbLSTrainer", {"finetune_from": "nnUNetTrainer"}, axes=2)
    with pytest.raises(RefusedSettings, match=r"holds \w+\.mkdir, more than weights and numbers, and is not loaded$"):
        trainer.on_train_start()
    assert not ran.exists()
    # It is what it seems: loaded without care it does run.
    torch.load(Path(first.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert ran.exists()


def test_a_checkpoint_written_with_numpy_1_is_loaded(tmp_path):
    first = stock()
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(saved(first)) as source, zipfile.ZipFile(old, "w") as copied:
        for entry in source.infolist():
            content = source.read(entry)
            # numpy 1 called this module numpy.core
            copied.writestr(entry, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    trainer = build("MbLSTrainer", axes=2)
    load_weights(trainer.network, str(old))
    assert same(weights_of(trainer), weights_of(first))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    file.write_bytes(content)
    with pytest.raises(
        RefusedSettings, match=r"checkpoint_final\.pth (is not a whole checkpoint|holds more than weights)"
    ):
        load_weights(torch.nn.Linear(1, 1), str(file))


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"epoch": 1}, file)
    with pytest.raises(
        RefusedSettings, match=r"checkpoint_final\.pth (is not a whole checkpoint|holds more than weights)"
    ):
        load_weights(torch.nn.Linear(1, 1), str(file))
