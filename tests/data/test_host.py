"""Settings of nnU-Net's environment that end its commands are named before they do."""

import os

import pytest

from nnunet_calib.data.host import folder_problem, modules_with_trainers, variable_problems


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    for name in [name for name in os.environ if name.startswith("nnUNet_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("nnUNet_n_proc_DA", "0", "'0' ends planning"),  # torch.set_num_threads(0) in nnU-Net's planner
        ("nnUNet_n_proc_DA", "twelve", "'twelve' ends planning"),
        ("nnUNet_def_n_proc", "0", "ends every command"),
        ("nnUNet_def_n_proc", "8.0", "ends every command"),
        ("nnUNet_npp", "0", "no number of processes"),
        ("nnUNet_nps", "many", "no number of processes"),
        ("nnUNet_compile", "yes", "switches compilation off"),
        ("nnUNet_wandb_enabled", "on", "ends every training"),
        ("nnUNet_extTrainer", "/no/such/folder", "/no/such/folder does not exist"),
    ],
)
def test_a_value_that_ends_nnunet_is_named(monkeypatch, variable, value, told):
    monkeypatch.setenv(variable, value)
    ((name, problem),) = variable_problems()
    assert name == variable
    assert told in problem


def test_values_that_nnunet_takes_are_no_problem(monkeypatch, tmp_path):
    for variable, value in {
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "2",
        "nnUNet_npp": "0",
        "nnUNet_nps": "0",  # both: one after the other
        "nnUNet_compile": "F",
        "nnUNet_wandb_enabled": "0",
        "nnUNet_extTrainer": f"{tmp_path}{os.pathsep}",
    }.items():
        monkeypatch.setenv(variable, value)
    assert not list(variable_problems())


def test_folders_that_are_not_there_or_cannot_be_written_are_named(monkeypatch, tmp_path):
    assert "not set; export nnUNet_results=" in folder_problem("nnUNet_results")
    (tmp_path / "file").touch()
    for value, told in {
        str(tmp_path / "no"): "does not exist; mkdir -p",
        str(tmp_path / "file"): "is no folder",
        "~/results": "does not expand ~",
    }.items():
        monkeypatch.setenv("nnUNet_results", value)
        assert told in folder_problem("nnUNet_results")
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert folder_problem("nnUNet_results") is None
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # as for another user than root
    assert "cannot be written to" in folder_problem("nnUNet_results")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert folder_problem("nnUNet_raw") is None


def test_a_module_that_may_define_a_trainer_is_found_by_its_text(tmp_path):
    (tmp_path / "a.py").write_text("class MyTrainer: ...\n")
    (tmp_path / "b.py").write_text("class MyTrainer2: ...\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.py").write_text("from elsewhere import *\n")
    assert [file.name for file in modules_with_trainers(["MyTrainer"], [tmp_path])] == ["a.py", "d.py"]
