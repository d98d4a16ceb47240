"""CRaC in nnU-Net's loop: what its multipliers follow, and that a continued training has them."""

import copy
import os

import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_calib.losses import CRaCLoss
from nnunet_calib.training.checkpoint import load_weights

from .toy import IGNORE, KINDS, batch, build, construct, prepare_folders

SETTINGS = {"calibrate_from": 0, "num_epochs": 3, "save_every": 1, "rho_every": 2}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)  # it would look for data
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)  # which takes a second


def multipliers(trainer) -> CRaCLoss:
    return trainer.loss.loss.calibration


def validate(trainer, kind: str, **options) -> None:
    """The second half of an epoch, as in nnU-Net's ``run_training``."""
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(batch(trainer, kind, **options))])


def train(trainer, kind: str) -> None:
    """One epoch with the data of its number, as in nnU-Net's ``run_training``."""
    seed = trainer.current_epoch
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch(trainer, kind, seed=seed))])
    validate(trainer, kind, seed=100 + seed)
    trainer.on_epoch_end()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@kinds
def test_multipliers_follow_the_full_resolution_of_the_validation_batches(kind):
    trainer = build("CRaCTrainer", SETTINGS, kind=kind, axes=2)
    trainer.on_train_epoch_start()
    trainer.train_step(batch(trainer, kind))
    validate(trainer, kind, seed=1)

    data = batch(trainer, kind, seed=1)
    with torch.no_grad():
        output, reference = trainer.network(data["data"])[0], data["target"][0]
    regions, valid = kind.startswith("regions"), None
    if kind.endswith("ignore"):
        valid = ~reference[:, -1:] if regions else reference != IGNORE
    expected = CRaCLoss(kernel_size=[3, 3], multilabel=regions)
    expected.observe(output, reference[:, :2] if regions else reference, valid)
    expected.update()
    assert (multipliers(trainer).multipliers > 1e-6).any()
    torch.testing.assert_close(multipliers(trainer).multipliers, expected.multipliers)


def test_training_batches_leave_the_multipliers_alone():
    trainer = build("CRaCTrainer", SETTINGS, axes=2)
    validate(trainer, "labels")
    before = copy.deepcopy(multipliers(trainer).state_dict())
    trainer.on_train_epoch_start()
    trainer.train_step(batch(trainer, "labels"))
    trainer.on_validation_epoch_start()
    multipliers(trainer).update()
    assert same(multipliers(trainer).state_dict(), before)


def test_until_calibrate_from_there_are_no_multipliers():
    trainer = build("CRaCTrainer", SETTINGS | {"calibrate_from": 0.5}, axes=2)
    seen = []
    for _ in range(3):
        train(trainer, "labels")
        seen.append(int(multipliers(trainer).updates) if multipliers(trainer).state_dict() else 0)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("scales", ["all", "full_resolution"])
def test_the_choice_of_scales_does_not_change_what_the_multipliers_follow(scales):
    trainer = build("CRaCTrainer", SETTINGS | {"deep_supervision": scales}, axes=2)
    validate(trainer, "labels")
    assert multipliers(trainer).updates == 1
    single = build("CRaCTrainer", SETTINGS, axes=2, deep_supervision=False)
    single.network.decoder.deep_supervision = False
    with torch.no_grad():
        single.on_validation_epoch_start()
        single.validation_step(batch(single, "labels"))
        single.loss.calibration.update()
    torch.testing.assert_close(multipliers(trainer).multipliers, single.loss.calibration.multipliers)


@kinds
def test_a_continued_training_is_exactly_the_uninterrupted_one(kind):
    uninterrupted = build("CRaCTrainer", SETTINGS, kind=kind, axes=2)
    train(uninterrupted, kind)
    continued = construct("CRaCTrainer", SETTINGS, kind=kind, axes=2, continued=True)
    continued.load_checkpoint(os.path.join(uninterrupted.output_folder, "checkpoint_latest.pth"))
    assert continued.current_epoch == 1
    for trainer in (uninterrupted, continued):
        train(trainer, kind)
        assert multipliers(trainer).updates == 2
    assert same(multipliers(continued).state_dict(), multipliers(uninterrupted).state_dict())
    assert same(continued.network.state_dict(), uninterrupted.network.state_dict())


def test_the_checkpoint_with_multipliers_is_loaded_with_weights_only():
    trainer = build("CRaCTrainer", SETTINGS, axes=2)
    train(trainer, "labels")
    other = build("CRaCTrainer", SETTINGS, axes=2)
    load_weights(other.network, os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
    assert same(other.network.state_dict(), trainer.network.state_dict())


def test_a_fine_tuning_starts_the_multipliers_anew():
    first = build("CRaCTrainer", SETTINGS, axes=2, configuration="base", base={"nnunet_calib": SETTINGS})
    train(first, "labels")
    first.save_checkpoint(os.path.join(first.output_folder, "checkpoint_final.pth"))
    trainer = construct("CRaCTrainer", {"finetune_from": "CRaCTrainer"}, axes=2)
    trainer.on_train_start()
    assert same(trainer.network.state_dict(), first.network.state_dict())
    assert multipliers(trainer).state_dict() == {}


@pytest.mark.parametrize("name", ["MbLSTrainer", "StockTrainer"])
def test_other_trainers_keep_nnunets_checkpoint(name):
    trainer = build(name, {"num_epochs": 2, "save_every": 1}, axes=2)
    train(trainer, "labels")
    checkpoint = torch.load(os.path.join(trainer.output_folder, "checkpoint_latest.pth"), weights_only=False)
    assert checkpoint["init_args"].keys() == {"plans", "configuration", "fold", "dataset_json", "device"}
