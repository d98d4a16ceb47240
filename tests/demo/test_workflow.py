import gzip
import json
import os
import shlex
import zipfile

import nibabel as nib
import numpy as np
import pytest

from nnunet_calib.cli.main import _parser, main
from nnunet_calib.data.errors import UsageError
from nnunet_calib.demo import phantom
from nnunet_calib.demo.step import Step
from nnunet_calib.demo.workflow import NAMES, Row, Workflow


@pytest.fixture
def workflow(tmp_path):
    return Workflow(tmp_path / "demo", "cpu", seed=0)


def titles(workflow):
    return [step.title for step in workflow.steps()]


def test_the_steps_in_order(workflow):
    assert titles(workflow) == [
        "make the data set",
        "plan and preprocess",
        "train stock",
        "train meep",
        "predict with stock",
        "predict with meep",
        "fit temperature, apply it",
        "fit isotonic, apply it",
        "evaluate stock",
        "evaluate stock_temperature",
        "evaluate stock_isotonic",
        "evaluate meep",
        "evaluate readers",
        "compare and report",
    ]


def test_nothing_is_done_in_a_new_folder(workflow):
    assert not any(step.done() for step in workflow.steps())


def test_half_written_plans_do_not_count(workflow):
    workflow.preprocessed.mkdir(parents=True)
    (workflow.preprocessed / "nnUNetPlans.json").write_text('{"plans_name": "nnUNetPl')
    assert not workflow.steps()[1].done()


def test_the_script_holds_every_command_and_our_folders(workflow):
    lines = workflow.script().read_text().splitlines()
    assert f"export nnUNet_raw={workflow.folder}/nnUNet_raw" in lines
    assert lines[3:] == [shlex.join(command) for command in workflow.commands()]
    assert "nnUNetv2_train 999 demo_finetuned 0 -tr MEEPTrainer -device cpu" in lines


def test_our_own_commands_in_the_script_are_ones_that_the_parsers_take(workflow):
    own = [command[1:] for command in workflow.commands() if command[0] == "nnunet-calib"]
    assert [words[0] for words in own] == ["configure"] * 2 + ["calibrate"] * 4 + ["evaluate"] * 5 + [
        "compare",
        "report",
    ]
    for words in own:
        assert _parser(words[0]).parse_args(words).verb == words[0]


def test_with_few_shot_the_steps_and_commands_of_a_new_structure_come_last(tmp_path, workflow):
    more = Workflow(tmp_path / "more", "cpu", seed=0, fewshot=True)
    assert titles(more) == [
        *titles(workflow),
        "make volumes with a cyst",
        "fewshot fit",
        "fewshot apply",
        "evaluate the cyst",
    ]
    own = more.commands()[len(workflow.commands()) :]
    assert [command[1] for command in own] == ["fewshot", "fewshot", "evaluate"]
    for words in own:
        assert _parser(words[1]).parse_args(words[1:]).verb == words[1]


def test_the_volumes_with_a_new_structure(tmp_path):
    workflow = Workflow(tmp_path / "demo", "cpu", seed=0, fewshot=True)
    step = workflow.steps()[-4]
    step.run(lambda reached: None)
    assert step.done()
    for part, cases in (("Tr", phantom.SUPPORTS), ("Ts", phantom.QUERIES)):
        labels = sorted((workflow.new.folder / f"labels{part}").glob("*.nii.gz"))
        assert len(labels) == len(list((workflow.new.folder / f"images{part}").glob("*_0000.nii.gz"))) == cases
        for label in labels:
            assert set(np.unique(nib.load(label).get_fdata())) == {0, 1, 2, 3}


def test_the_callers_own_folders_are_not_touched(workflow, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/mine")
    assert workflow._environment()["nnUNet_raw"] == str(workflow.folder / "nnUNet_raw")
    assert os.environ["nnUNet_raw"] == "/mine"


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty and no demo's folder"):
        Workflow(tmp_path, "cpu", seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_with_another_seed_is_refused(workflow):
    with pytest.raises(UsageError, match="holds a demo with seed 0, not 1"):
        Workflow(workflow.folder, "cpu", seed=1)


def test_a_step_that_runs_removes_what_was_made_from_it(workflow):
    training = workflow.steps()[2]
    for folder in (workflow.predictions, workflow.evaluation):
        for run in ("stock", "stock_temperature", "meep", "readers"):
            (folder / run).mkdir(parents=True)
    with pytest.raises(RuntimeError):
        Step(training.title, training.done, _fail, training.ticks, training.voids).run(lambda ticks: None)
    # MEEP starts from the stock network, so its results go as well
    assert [path.name for path in workflow.evaluation.iterdir()] == ["readers"]


def _fail(tick):
    raise RuntimeError


@pytest.mark.parametrize("broken", [None, "demo_017.nii.gz", "demo_017.npz"])
def test_a_prediction_is_done_when_every_file_is_whole(workflow, broken):
    output = workflow.predictions / "meep"
    output.mkdir(parents=True)
    (workflow.raw / "labelsTs").mkdir(parents=True)
    (workflow.raw / "labelsTs" / "demo_017.nii.gz").touch()
    with gzip.open(output / "demo_017.nii.gz", "wb") as stream:
        stream.write(bytes(1000))
    with zipfile.ZipFile(output / "demo_017.npz", "w") as archive:
        archive.writestr("probabilities.npy", bytes(1000))
    if broken:
        file = output / broken
        file.write_bytes(file.read_bytes()[:-10])
    prediction = next(step for step in workflow.steps() if step.title == "predict with meep")
    assert prediction.done() is (broken is None)


def test_the_table_reads_infinite_distances(workflow):
    for run in NAMES:
        (workflow.evaluation / run).mkdir(parents=True)
        summary = {
            "foreground_mean": {"Dice": 0.5, "HD95": "inf"},
            "calibration_mean": {"foreground": {"ECE": 0.1, "CECE": 0.2, "NLL": 0.5}},
        }
        (workflow.evaluation / run / "summary.json").write_text(json.dumps(summary))
    rows = list(workflow.rows())
    assert [row.name for row in rows] == list(NAMES.values())
    assert rows[0] == Row("stock nnU-Net (Dice+CE)", 0.5, float("inf"), 0.1, 0.2, 0.5)


@pytest.mark.parametrize("words", [["--seed", "-1"], ["-device", "cuda"]])
def test_bad_usage_is_one_line_and_code_2(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", "-o", str(tmp_path / "demo"), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "demo").exists()
