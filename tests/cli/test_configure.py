"""``nnunet-calib configure``: what it writes, and what it refuses in one line."""

import json

import pytest

from nnunet_calib._autoload import trainers_folder
from nnunet_calib.cli.main import main


def architecture(kernel_sizes):
    arguments = {
        "kernel_sizes": kernel_sizes,
        "features_per_stage": [32, 64, 128][: len(kernel_sizes)],
        "strides": [[1] * len(kernel_sizes[0]), *[[2] * len(kernel_sizes[0])] * (len(kernel_sizes) - 1)],
    }
    return {"network_class_name": "n", "arch_kwargs": arguments, "_kw_requires_import": []}


NETWORK = {"patch_size": [32, 32, 32], "architecture": architecture([[1, 3, 3], [3, 3, 3]])}
PLANS = {
    "plans_name": "nnUNetPlans",
    "configurations": {
        "3d_lowres": {"next_stage": "3d_cascade_fullres", "batch_size": 2, **NETWORK},
        "3d_fullres": {"batch_size": 2, **NETWORK},
        "2d": {"batch_size": 2, "patch_size": [32, 32], "architecture": architecture([[3, 3]] * 3)},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
}


@pytest.fixture
def plans_file(tmp_path, monkeypatch):
    folder = tmp_path / "preprocessed" / "Dataset004_Toy"
    folder.mkdir(parents=True)
    file = folder / "nnUNetPlans.json"
    file.write_text(json.dumps(PLANS))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return file


def configure(*words: str) -> int:
    return main(["configure", "-d", "4", "-c", "3d_fullres", "--name", "new", *words])


def test_the_configuration_inherits_and_holds_the_settings(plans_file, capsys):
    assert configure("--set", "margin=10", "num_epochs=250", "penalty=l2") == 0
    written = json.loads(plans_file.read_text())["configurations"]["new"]
    assert written["inherits_from"] == "3d_fullres"
    assert written["nnunet_calib"] == {"margin": 10, "num_epochs": 250, "penalty": "l2"}
    assert "trainers that take these settings: MbLSTrainer" in capsys.readouterr().out


@pytest.mark.parametrize(("features", "expected"), [(["8", "12"], [8, 12]), (["48"], [48, 64])])
def test_network_patch_and_batch_are_set_without_editing_json(plans_file, features, expected):
    assert configure("--batch_size", "4", "--patch_size", "16", "32", "48", "--features", *features) == 0
    written = json.loads(plans_file.read_text())["configurations"]["new"]
    assert (written["batch_size"], written["patch_size"]) == (4, [16, 32, 48])
    network = NETWORK["architecture"]
    assert written["architecture"] == {
        **network,
        "arch_kwargs": {**network["arch_kwargs"], "features_per_stage": expected},
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--batch_size", "0"], "must be 1 or more"),
        (["--patch_size", "32", "32"], "give 3 numbers"),
        (["--patch_size", "32", "32", "31"], "a multiple of 2 2 2, not 32 32 31"),
        (["--patch_size", "2", "2", "2"], "single voxel"),
        (["--features", "8", "16", "32"], "3d_fullres has 2 stages"),
        (["--features", "0"], "of 1 or more"),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_one_line(plans_file, capsys, words, complaint):
    before = plans_file.read_text()
    assert configure(*words) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert plans_file.read_text() == before


def test_the_old_plans_stay_as_a_backup(plans_file):
    before = plans_file.read_text()
    configure("--set", "num_epochs=5")
    assert plans_file.with_name("nnUNetPlans.json.bak").read_text() == before
    main(["configure", "-d", "Dataset004_Toy", "-c", "new", "--name", "newer"])
    assert plans_file.with_name("nnUNetPlans.json.bak").read_text() == before
    assert "newer" not in plans_file.with_name("nnUNetPlans.json.bak1").read_text()


def test_a_cascade_is_linked_both_ways(plans_file):
    assert main(["configure", "-d", "4", "-c", "3d_lowres", "--name", "low_m5", "--set", "margin=5"]) == 0
    words = ["-c", "3d_cascade_fullres", "--name", "high_m5", "--set", "margin=5", "--previous-stage", "low_m5"]
    assert main(["configure", "-d", "4", *words]) == 0
    written = json.loads(plans_file.read_text())["configurations"]
    assert written["high_m5"]["previous_stage"] == "low_m5"
    assert written["low_m5"]["next_stage"] == ["high_m5"]
    assert written["3d_lowres"]["next_stage"] == "3d_cascade_fullres"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--set", "margn=3"], "'margn'"),
        (["--set", "margin=much"], "margin must be a number of at least 0, got 'much'"),
        (["--set", "num_epochs=2.5"], "num_epochs must be a whole number of at least 1"),
        (["--set", "dice_weight=-1"], "dice_weight must be a number of at least 0"),
        (["--set", "calibrate_from=2"], "calibrate_from must be a number from 0 to 1"),
        (["--set", "deep_supervision=none"], "'all', 'full_resolution'"),
        (["--set", "calibrate_from=0.5", "finetune_from=nnUNetTrainer"], "set one of them"),
        (["--set", "margin"], "--set wants K=V"),
        (["--set", "margin=5", "-tr", "NACLTrainer"], "NACLTrainer: unknown setting 'margin'"),
        (["-tr", "FooTrainer"], "no trainer 'FooTrainer'"),
    ],
)
def test_bad_settings_are_refused_in_one_line_and_change_nothing(plans_file, capsys, words, complaint):
    before = plans_file.read_text()
    assert configure(*words) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert plans_file.read_text() == before
    assert list(plans_file.parent.iterdir()) == [plans_file]


@pytest.mark.parametrize("name", ["3d_fullres", "a__b", "a/b", "", "ü"])
def test_a_name_that_cannot_be_is_refused(plans_file, name):
    assert main(["configure", "-d", "4", "-c", "3d_fullres", "--name", name]) == 2


def test_a_base_that_is_not_there_is_refused_with_those_that_are(plans_file, capsys):
    assert main(["configure", "-d", "4", "-c", "3d_full", "--name", "new"]) == 2
    assert "3d_lowres, 3d_fullres, 2d, 3d_cascade_fullres" in capsys.readouterr().err


def test_settings_of_the_base_stay_unless_set_anew(plans_file):
    configure("--set", "margin=10", "num_epochs=250")
    assert main(["configure", "-d", "4", "-c", "new", "--name", "newer", "--set", "weight=0.2", "num_epochs=50"]) == 0
    written = json.loads(plans_file.read_text())["configurations"]["newer"]["nnunet_calib"]
    assert written == {"margin": 10, "num_epochs": 50, "weight": 0.2}


def test_a_kernel_of_other_axes_than_the_configuration_is_refused(plans_file, capsys):
    words = ["--name", "new", "--set", "sigma=1", "kernel_size=[1,3,3]"]
    assert main(["configure", "-d", "4", "-c", "2d", *words]) == 2
    assert "kernel_size" in capsys.readouterr().err
    assert main(["configure", "-d", "4", "-c", "3d_fullres", *words]) == 0


def test_no_configuration_can_come_to_inherit_from_itself(plans_file):
    configure()
    main(["configure", "-d", "4", "-c", "new", "--name", "newer"])
    assert main(["configure", "-d", "4", "-c", "newer", "--name", "new", "--replace"]) == 2


def test_a_configuration_of_nnunet_is_never_replaced(plans_file, capsys):
    assert main(["configure", "-d", "4", "-c", "2d", "--name", "3d_fullres", "--replace"]) == 2
    assert "nnU-Net's own" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["", "Dataset*", "/data/Dataset004_Toy", "../Dataset004_Toy", "four"])
def test_a_data_set_is_a_number_or_a_full_name(plans_file, dataset):
    assert main(["configure", "-d", dataset, "-c", "3d_fullres", "--name", "new"]) == 2


def test_a_folder_that_cannot_be_written_is_one_line(plans_file, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(plans_file))

    monkeypatch.setattr("nnunet_calib.data.plans.write_whole", full)
    assert configure() == 1
    assert capsys.readouterr().err == f"nnunet-calib configure: {plans_file}: No space left on device\n"


def test_a_configuration_is_not_replaced_once_it_was_trained(plans_file, tmp_path, capsys):
    configure()
    assert configure() == 2
    assert configure("--replace", "--set", "num_epochs=3") == 0
    fold = tmp_path / "results" / "Dataset004_Toy" / "MbLSTrainer__nnUNetPlans__new" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_best.pth").touch()
    assert configure("--replace") == 2
    assert "holds trainings" in capsys.readouterr().err


def test_missing_variables_and_plans_are_one_line(plans_file, monkeypatch, capsys):
    assert main(["configure", "-d", "5", "-c", "3d_fullres", "--name", "new"]) == 2
    plans_file.write_text("{")
    assert configure() == 1
    plans_file.unlink()
    assert configure() == 1
    monkeypatch.delenv("nnUNet_preprocessed")
    assert configure() == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert "nnUNet_preprocessed is not set" in errors[3]


def test_trainers_to_compare_with_are_configured_though_no_list_has_them(plans_file, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    assert configure("--set", "num_epochs=10", "finetune_from=StockTrainer", "-tr", "PANetTrainer") == 0
    assert configure("--set", "margin=3", "-tr", "MAMLTrainer") == 2
    assert "unknown setting 'margin'" in capsys.readouterr().err
