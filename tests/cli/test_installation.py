"""``trainers``, ``trainers-path``, ``doctor`` and what all verbs share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_calib.cli.main import VERBS, main
from nnunet_calib.training.trainers import TRAINERS


def test_every_trainer_is_listed_with_its_loss_and_paper(capsys):
    assert main(["trainers"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TRAINERS)
    assert "Murugesan et al., MICCAI 2023" in out


def test_the_settings_of_one_trainer_are_listed_with_defaults(capsys):
    assert main(["trainers", "MbLSTrainer"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if "margin " in line] == [["margin", "5.0"]]
    assert "dice_weight" in out


def test_an_unknown_trainer_is_bad_usage(capsys):
    assert main(["trainers", "FooTrainer"]) == 2
    assert "MbLSTrainer" in capsys.readouterr().err


def test_trainers_path_is_a_folder_with_one_module(capsys):
    assert main(["trainers-path"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert [file.name for file in folder.glob("*.py")] == ["nnunet_calib_trainers.py"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))


def test_doctor_finds_every_trainer_through_nnunet(folders, monkeypatch, capsys):
    from nnunet_calib._autoload import trainers_folder

    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder() + os.sep)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "PROBLEM" not in out
    assert all(name in out for name in TRAINERS)


def test_doctor_names_a_missing_folder(folders, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor"]) == 1
    assert "nnUNet_results       PROBLEM" in capsys.readouterr().out


def test_doctor_says_what_to_do_where_the_trainers_are_not_found(folders, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_extTrainer", "/elsewhere")
    assert main(["doctor"]) == 1
    assert "export nnUNet_extTrainer=$(nnunet-calib trainers-path)" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"nnunet-calib {verb}" in re.split("examples?:", capsys.readouterr().out)[1]


def test_help_does_not_import_torch():
    code = (
        "import sys; from nnunet_calib.cli.main import main\n"
        "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
