"""``trainers``, ``trainers-path``, ``doctor`` and what all verbs share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_calib.cli import doctor
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


def test_doctor_has_one_line_for_all_trainers_of_one_file(folders, monkeypatch, capsys):
    from nnunet_calib._autoload import trainers_folder

    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    main(["doctor"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MbLSTrainer" in line]
    assert line.startswith(f"  {len(TRAINERS)} trainers in {trainers_folder()}")
    assert all(name in line for name in TRAINERS)


def test_doctor_names_the_file_that_ends_nnunets_search(folders, tmp_path, monkeypatch, capsys):
    from nnunet_calib._autoload import trainers_folder

    (tmp_path / "broken.py").write_text("import there_is_no_such_module\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), trainers_folder()]))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"PROBLEM: nnU-Net's search ends in {tmp_path / 'broken.py'}: No module named" in out
    assert "nnUNet_n_proc_DA     PROBLEM: '0' ends planning" in out


def test_doctor_says_where_another_class_is_found_first(folders, tmp_path, monkeypatch, capsys):
    from nnunet_calib._autoload import trainers_folder

    (tmp_path / "theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class FLTrainer(nnUNetTrainer): pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), trainers_folder()]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"finds another class of that name in {tmp_path / 'theirs.py'} (FLTrainer)" in out
    assert f"  {len(TRAINERS) - 1} trainers in " in out


@pytest.mark.skipif(sys.platform != "linux", reason="builds are mixed up under Linux")
@pytest.mark.parametrize(("torch", "torchvision"), [("2.13.0+cpu", "0.28.0"), ("2.13.0", "0.28.0+cpu")])
def test_doctor_tells_builds_of_torch_and_torchvision_apart(folders, monkeypatch, capsys, torch, torchvision):
    monkeypatch.setattr(doctor, "version", {"nnunetv2": "2.8.1", "torch": torch, "torchvision": torchvision}.get)
    assert main(["doctor"]) == 1
    assert f"PROBLEM: {torchvision} and torch {torch} are of different builds" in capsys.readouterr().out


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
