"""``nnunet-calib evaluate``: what it prints, its exit codes, and one line for every kind of bad input."""

import argparse
import shutil

import numpy as np
import pytest
import torch

from nnunet_calib.cli.evaluate import add_arguments
from nnunet_calib.cli.main import main
from nnunet_calib.evaluation.folder import ENGINES
from nnunet_calib.metrics import RULES, SURFACES

from ..folders import Folders, ambiguous, write_labels

SHAPE = (6, 14, 12)


@pytest.fixture
def folders(tmp_path):
    made = Folders(tmp_path)
    for seed in range(2):
        made.add_ambiguous(f"case_{seed}", seed)
    return made


def error_lines(capsys) -> list[str]:
    """Lines of our own on stderr; the progress bar shares it."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith("nnunet-calib")]


def test_scores_a_folder_and_prints_the_means(folders, capsys):
    assert main(folders.words) == 0
    printed = capsys.readouterr().out
    for word in ("2 cases scored", "HD95", "foreground", "CECE", "reference_foreground", "summary.json"):
        assert word in printed
    files = ["cases", "cases.csv", "reliability.json", "summary.json"]
    assert sorted(path.name for path in folders.output.iterdir()) == files


def test_calibration_of_some_of_the_cases_is_said_to_be_that(folders, capsys):
    assert main(folders.words) == 0
    assert "calibration of" not in capsys.readouterr().out
    (folders.prediction / "case_0.npz").unlink()
    assert main(folders.words) == 0
    assert "calibration of 1 of 2 cases" in capsys.readouterr().out


def test_options_reach_the_protocol(folders):
    words = [*folders.words, "--nsd", "2.5", "--bins", "10", "--dilate", "1.5", "--boundary"]
    assert main([*words, "-djfile", str(folders.dataset_json)]) == 0
    protocol = folders.summary()["protocol"]
    assert (protocol["bins"], protocol["NSD_tolerance_mm"], protocol["dilate_mm"]) == (10, 2.5, 1.5)
    assert "boundary" in protocol["regions"]


def test_dataset_json_beside_the_references_is_found(folders):
    shutil.move(folders.dataset_json, folders.reference.parent / "dataset.json")
    assert main(folders.words) == 0


def test_chill_leaves_out_what_was_not_predicted(folders, capsys):
    (folders.prediction / "case_0.nii.gz").unlink()
    assert main(folders.words) == 1
    assert "case_0.nii.gz: no prediction" in error_lines(capsys)[0]
    assert not folders.output.exists()
    assert main([*folders.words, "--chill"]) == 0
    assert len(folders.summary()["metric_per_case"]) == 1


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def prediction_of_other_shape(folders):
    write_labels(folders.prediction / "case_0.nii.gz", np.zeros((6, 14, 11), dtype=np.uint8))


def prediction_of_other_spacing(folders):
    labels = ambiguous(0, SHAPE)[1].argmax(axis=0)
    write_labels(folders.prediction / "case_0.nii.gz", labels, (1.0, 1.0, 1.2))


def prediction_with_unknown_label(folders):
    labels = ambiguous(0, SHAPE)[1].argmax(axis=0)
    labels[0, 0, 0] = 7
    write_labels(folders.prediction / "case_0.nii.gz", labels)


def reference_with_unknown_label(folders):
    write_labels(folders.reference / "case_0.nii.gz", np.full(SHAPE, 9, dtype=np.uint8))


def prediction_with_fractions(folders):
    write_labels(folders.prediction / "case_0.nii.gz", np.full(SHAPE, 0.25, dtype=np.float32))


def save_probabilities(change):
    def spoil(folders):
        np.savez_compressed(folders.prediction / "case_0.npz", probabilities=change(ambiguous(0, SHAPE)[1]))

    return spoil


BAD_CASES = {
    "shapes that differ": (prediction_of_other_shape, "case_0.nii.gz: shape (6, 14, 11) differs from (6, 14, 12)"),
    "spacings that differ": (prediction_of_other_spacing, "case_0.nii.gz: spacing (1, 1, 1.2) differs from (1, 1, 1)"),
    "label outside dataset.json": (prediction_with_unknown_label, "predicted/case_0.nii.gz: label values not in"),
    "reference label outside": (reference_with_unknown_label, "labelsTs/case_0.nii.gz: label values not in"),
    "fractions": (prediction_with_fractions, "case_0.nii.gz: holds values that are not integers"),
    "truncated label map": (lambda f: truncate(f.prediction / "case_0.nii.gz"), "case_0.nii.gz: truncated"),
    "truncated reference": (lambda f: truncate(f.reference / "case_0.nii.gz"), "labelsTs/case_0.nii.gz: truncated"),
    "truncated probabilities": (lambda f: truncate(f.prediction / "case_0.npz"), "case_0.npz: truncated"),
    "too few channels": (save_probabilities(lambda p: p[:2]), "case_0.npz: 2 channels, but dataset.json has 3"),
    "another grid": (save_probabilities(lambda p: p[..., :-1]), "case_0.npz: shape (6, 14, 11) differs from"),
    "reordered axes": (save_probabilities(lambda p: p.swapaxes(1, 3)), "its axes are in another order"),
    "logits": (save_probabilities(lambda p: np.log(p) * 3), "case_0.npz: values from"),
    "nan": (save_probabilities(lambda p: p * np.nan), "case_0.npz: values from nan"),
}


@pytest.mark.parametrize("name", BAD_CASES)
def test_a_bad_case_is_one_line_and_exit_code_1_and_the_rest_is_scored(folders, capsys, name):
    spoil, message = BAD_CASES[name]
    spoil(folders)
    assert main(folders.words) == 1
    (line,) = error_lines(capsys)
    assert line.startswith("nnunet-calib evaluate: case case_0: ")
    assert message in line
    summary = folders.summary()
    assert [record["case"] for record in summary["metric_per_case"]] == ["case_1"]
    assert [failure["case"] for failure in summary["failed"]] == ["case_0"]


def test_a_prediction_without_reference(folders, capsys):
    (folders.reference / "case_0.nii.gz").unlink()
    assert main(folders.words) == 1
    (line,) = error_lines(capsys)
    assert "predicted/case_0.nii.gz: no reference of that name" in line
    assert "look like images" not in line


def test_images_in_place_of_references(folders, capsys):
    for path in folders.reference.glob("case_*"):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    assert main(folders.words) == 1
    (line,) = error_lines(capsys)
    assert line.endswith("the files there look like images, name the folder of labels")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bins", "0"], "bins"),
        (["--nsd", "-1"], "NSD tolerance"),
        (["--dilate", "inf"], "dilation"),
        (["-np", "0"], "processes"),
    ],
)
def test_bad_usage_is_exit_code_2(folders, capsys, words, message):
    assert main([*folders.words, *words]) == 2
    (line,) = error_lines(capsys)
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nsd", "abc"], "--nsd: 'abc' is neither MM nor LABEL=MM"),
        (["--nsd", "1="], "--nsd: '1=' is neither"),
        (["--hd95", "foo"], "--hd95: invalid choice: 'foo' (choose from 'directed', 'pooled')"),
        (["--surface", "foo"], "--surface: invalid choice"),
        (["--engine", "foo"], "--engine: invalid choice"),
        (["--bins", "many"], "--bins: invalid int value: 'many'"),
    ],
)
def test_words_that_cannot_be_read_are_one_line_too(folders, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main([*folders.words, *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith("(see nnunet-calib evaluate --help)")


def test_choices_are_those_of_the_library():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    assert choices == {
        "surface": list(SURFACES),
        "hd95": list(RULES),
        "engine": list(ENGINES),
        "protocol": ["default", "nacl"],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(folders, capsys):
    assert main([*folders.words, "-device", "cuda"]) == 2
    (line,) = error_lines(capsys)
    assert "the device 'cuda' cannot be used here" in line


def test_folders_that_are_not_there(folders, capsys):
    words = folders.words
    assert main([words[0], "nowhere", *words[2:]]) == 2
    assert main([*words[:2], "nowhere", *words[3:]]) == 2
    folders.dataset_json.unlink()
    assert main(words) == 2
    assert ["not a folder" in line or "-djfile" in line for line in error_lines(capsys)] == [True] * 3


def test_output_that_cannot_be_a_folder(folders, capsys):
    folders.output.write_text("a file")
    assert main(folders.words) == 2
    assert "cannot be made a folder" in error_lines(capsys)[0]


def test_a_result_that_cannot_be_written(folders, capsys):
    (folders.output / "summary.json").mkdir(parents=True)
    assert main(folders.words) == 1
    (line,) = error_lines(capsys)
    assert "summary.json is a directory" in line
    assert [path.name for path in folders.output.iterdir()] == ["summary.json"]


def test_broken_dataset_json(folders, capsys):
    folders.dataset_json.write_text("{")
    assert main(folders.words) == 1
    assert "dataset.json: not valid JSON" in error_lines(capsys)[0]


def test_nothing_left_to_score_still_says_so(folders, capsys):
    for name in ("case_0", "case_1"):
        truncate(folders.prediction / f"{name}.npz")
    assert main(folders.words) == 1
    assert len(error_lines(capsys)) == 2
    summary = folders.summary()
    assert summary["metric_per_case"] == []
    assert len(summary["failed"]) == 2
