"""``nnunet-calib fewshot`` as it is called."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_calib.cli.main import main

from ..fewshot.conftest import STRUCTURE, Supports, write_case


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Supports:
    supports = Supports(tmp_path_factory.mktemp("cli"), cases=2)
    write_case(supports.root / "queries", "query_10", 10)
    return supports


def fit(made: Supports, output, *more: str) -> list[str]:
    words = ["fewshot", "fit", str(made.model), "--images", str(made.root / "images")]
    words += ["--labels", str(made.root / "labels"), "--label", str(STRUCTURE), "--name", "ball"]
    return [*words, "-o", str(output), "-device", "cpu", *more]


def apply(made: Supports, output, *more: str) -> list[str]:
    words = ["fewshot", "apply", str(made.model), str(made.task), "-i", str(made.root / "queries" / "images")]
    return [*words, "-o", str(output), "-device", "cpu", *more]


def test_two_commands_segment_a_new_structure(made, tmp_path, capsys):
    assert main(fit(made, tmp_path / "ball", "--chunks", "4", "--head", "linear")) == 0
    printed = capsys.readouterr().out
    assert "case_0" in printed
    assert "Dice by the others 0." in printed
    assert "note: the task holds the images and label maps of its supports" in printed  # registered by default
    assert f"written to {tmp_path / 'ball.fewshot'}" in printed
    words = apply(made, tmp_path / "out")
    words[words.index(str(made.task))] = str(tmp_path / "ball.fewshot")
    assert main(words) == 0
    assert "query_10" in (printed := capsys.readouterr().out)
    assert "1 case; written to" in printed
    merged = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "query_10.nii.gz")))
    assert (merged == 3).sum() > 100
    assert json.loads((tmp_path / "out" / "query_10.fewshot.json").read_text())["structures"]["ball"]["label"] == 3


def test_structures_alone_with_probabilities(made, tmp_path):
    flags = ["--alone", "--save_probabilities", "--disable_tta", "-step_size", "1", "-npp", "0", "-f", "0"]
    assert main(apply(made, tmp_path / "out", *flags)) == 0
    with np.load(tmp_path / "out" / "ball" / "query_10.npz") as file:
        assert file["probabilities"].shape == (2, 20, 26, 24)
    assert json.loads((tmp_path / "out" / "ball" / "dataset.json").read_text())["labels"] == {
        "background": 0,
        "ball": 1,
    }


def test_what_was_written_can_be_evaluated(made, tmp_path):
    assert main(apply(made, tmp_path / "out", "--alone", "--save_probabilities")) == 0
    references = tmp_path / "references"
    references.mkdir()
    labels = sitk.ReadImage(str(made.root / "queries" / "labels" / "query_10.nii.gz"))
    sitk.WriteImage(labels > 0, str(references / "query_10.nii.gz"))
    words = ["evaluate", str(references), str(tmp_path / "out" / "ball"), "-o", str(tmp_path / "scores"), "-np", "1"]
    assert main(words) == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] > 0.6
    assert summary["calibration_mean"]["volume"]["ECE"] < 0.1


def test_warnings_go_to_the_error_stream(made, tmp_path, capsys):
    assert main(fit(made, tmp_path / "x", "--chunks", "50")) == 0
    assert "note: 50 chunks for 20 slices: reduced to 20" in capsys.readouterr().out
    write_case(tmp_path / "turned", "query_10", 10, "RAS")
    words = apply(made, tmp_path / "out")
    words[words.index("-i") + 1] = str(tmp_path / "turned" / "images")
    assert main(words) == 0
    assert "query_10, ball: stored RAS, turned into LPS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--label", "9"], 1, "no support can be used; case_0: 0 voxels of the structure"),
        (["--name", "a/b"], 2, "'a/b' cannot name a structure"),
        (["--name", "a"], 2, "the model has a class 'a' already"),
        (["--chunks", "0"], 2, "--chunks 0: it must be 1 or more"),
        (["--refine", "--head", "prototype"], 2, "--refine works with head linear"),
        (["--unlabelled", "images"], 2, "--unlabelled works with head adapter, not linear"),
        (["-prev_stage_predictions", "."], 2, "is not a cascade; leave -prev_stage_predictions out"),
        (["-f", "4"], 2, "no checkpoint_final.pth in fold 4; there are 0"),
        (["-step_size", "2"], 2, "-step_size 2: it must be above 0"),
        (["--images", "nowhere"], 2, "nowhere is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_fitted_is_told_in_one_line(made, tmp_path, capsys, more, code, said):
    assert main(fit(made, tmp_path, *more)) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-calib")]
    assert len(told) == 1
    assert said in told[0]
    assert not list(tmp_path.glob("*.fewshot"))


def test_what_cannot_be_applied_is_told_in_one_line(made, tmp_path, capsys):
    (tmp_path / "bad.fewshot").write_bytes(b"no task")
    words = apply(made, tmp_path / "out")
    words[words.index(str(made.task))] = str(tmp_path / "bad.fewshot")
    assert main(words) == 1
    assert "bad.fewshot: not a task file of fewshot fit, or damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "images"
    broken.mkdir()
    (broken / "x_0000.nii.gz").write_bytes(b"no image")
    words = apply(made, tmp_path / "out")
    words[words.index("-i") + 1] = str(broken)
    assert main(words) == 1
    assert "x_0000.nii.gz: truncated or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--label", "0"], "--label 0"),
        (["--ignore", str(STRUCTURE)], "is the structure"),
        (["--voxels", "1"], "--voxels 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--chunks", "0"], "--chunks 0"),
        (["--chunks", "100000"], "--chunks 100000"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(made, tmp_path, capsys, flags, told):
    assert main(fit(made, tmp_path, *flags)) == 2
    assert told in capsys.readouterr().err
