"""What is read from the source without importing it is what the classes have."""

import inspect

import pytest

from nnunet_calib.losses import FILES, KEYS, LOSSES
from nnunet_calib.training import YARDSTICKS
from nnunet_calib.training import __all__ as exported
from nnunet_calib.training.catalogue import check_may_be_ours, listed_trainers, loss_arguments
from nnunet_calib.training.settings import RefusedSettings, check_of_any, check_settings, resolve_settings
from nnunet_calib.training.trainers import TRAINERS


def test_every_trainer_is_listed_as_it_is():
    said = {name: (t.LOSS, dict(t.FIXED), t.__doc__.splitlines()[0]) for name, t in TRAINERS.items()}
    assert {name: (t.loss, t.fixed, t.summary) for name, t in listed_trainers().items()} == said
    assert list(listed_trainers()) == list(TRAINERS)
    assert sorted(exported) == sorted([*TRAINERS, *YARDSTICKS])


@pytest.mark.parametrize("key", KEYS)
def test_every_argument_of_a_loss_has_the_default_of_its_constructor(key):
    assert LOSSES[key].__name__ == KEYS[key]
    assert LOSSES[key].__module__ == f"nnunet_calib.losses.{FILES[KEYS[key]]}"
    parameters = inspect.signature(LOSSES[key]).parameters.items()
    assert loss_arguments(key).defaults == {name: p.default for name, p in parameters if name != "multilabel"}


@pytest.mark.parametrize("key", KEYS)
def test_every_argument_of_a_loss_is_checked_without_it(key):
    defaults = loss_arguments(key).defaults
    check_arguments(key, defaults)
    for name in defaults:
        with pytest.raises(ValueError, match=name):
            check_arguments(key, {**defaults, name: {}})


def check_arguments(key, given):
    for check in loss_arguments(key).checks:
        check(given)


def test_what_only_the_constructor_knows_is_refused_by_the_full_check():
    check_settings({"sigma": 0.1}, "svls", {})
    with pytest.raises(RefusedSettings, match="sigma must be at least 0.3 voxels, got 0.1"):
        resolve_settings({"sigma": 0.1}, "svls", {}, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"margn": 3}, "unknown setting 'margn'; did you mean margin (of MbLSTrainer, CRaCTrainer)?"),
        ({"Num_Epochs": 3}, "unknown setting 'Num_Epochs'; did you mean num_epochs (of every trainer)?"),
        ({"dice": 0}, "did you mean dice_weight (of every trainer but StockTrainer)?"),
        ({"xyzzy": 3}, "unknown setting 'xyzzy'; there are alpha, balanced, binary, bins, border"),
        (
            {"margin": 3, "alpha": 0.1, "num_epochs": 5},
            "no trainer has all of these settings: margin is of MbLSTrainer, CRaCTrainer; alpha is of LSTrainer",
        ),
        ({"margin": -1}, "margin must be a number of at least 0, got -1"),
        ({"kernel_size": 2}, "kernel_size must be a positive odd integer or one for each axis, got 2"),
    ],
)
def test_a_wrong_setting_names_the_nearest_and_the_trainers_that_have_it(given, told):
    with pytest.raises(RefusedSettings) as refused:
        check_of_any(given)
    assert told in str(refused.value)


def test_a_setting_of_another_trainer_names_it():
    with pytest.raises(RefusedSettings, match="'margin', which is of MbLSTrainer, CRaCTrainer"):
        check_settings({"margin": 3}, "nacl", {})
    assert check_of_any({"alpha": 0.2}) == ["LSTrainer"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mblstrainer", "did you mean MbLSTrainer"),
        ("NonesuchTrainer", "no trainer 'NonesuchTrainer'; there are StockTrainer, CETrainer"),
        ("nnUNetTrainer", "takes no settings; derive it from one of ours"),
    ],
)
def test_a_trainer_that_cannot_be_ours_is_refused_unsearched(name, told, monkeypatch):
    from nnunet_calib.data.errors import UsageError

    monkeypatch.setenv("nnUNet_extTrainer", "")
    with pytest.raises(UsageError, match=told):
        check_may_be_ours(name)


def test_a_trainer_of_a_user_is_left_to_nnunets_search(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("from nnunet_calib.training import CETrainer\nclass Mine(CETrainer): pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    check_may_be_ours("Mine")
