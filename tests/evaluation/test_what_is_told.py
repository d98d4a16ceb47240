"""No silent wrong number: what is refused, and what is said on the console and in the files."""

import csv
import math

import numpy as np
import pytest

from nnunet_calib.cli.main import main

from ..folders import Folders, ambiguous


@pytest.fixture
def folders(tmp_path):
    made = Folders(tmp_path / "one")
    for seed in range(2):
        made.add_ambiguous(f"case_{seed}", seed)
    return made


def test_probabilities_that_do_not_add_up_fail_their_case_only(folders, capsys):
    reference, p = ambiguous(7, (6, 14, 12))
    folders.add("sigmoids", reference, p.argmax(axis=0), p * 0.8)
    assert main(folders.words) == 1
    assert "case sigmoids" in capsys.readouterr().err
    summary = folders.summary()
    assert [record["case"] for record in summary["metric_per_case"]] == ["case_0", "case_1"]
    assert "sigmoids.npz: the probabilities of a voxel add up to 0.8" in summary["failed"][0]["error"]


def test_references_and_predictions_in_the_wrong_order(folders, capsys):
    swapped = ["evaluate", str(folders.prediction), str(folders.reference), "-o", str(folders.output), "-np", "1"]
    swapped += ["-djfile", str(folders.dataset_json)]
    assert main(swapped) == 2
    error = capsys.readouterr().err
    assert "case_0.npz" in error
    assert "evaluate REF PRED" in error
    assert "--force" in error
    assert not folders.output.exists()
    assert main([*swapped, "--force"]) == 0


def test_results_of_another_data_set_are_not_mixed_with(folders, tmp_path, capsys):
    assert main(folders.words) == 0
    other = Folders(tmp_path / "other")
    other.output = folders.output
    other.add_ambiguous("patient_9", 9)
    capsys.readouterr()
    assert main(other.words) == 2
    error = capsys.readouterr().err
    assert "2 other cases" in error
    assert str(folders.reference) in error
    assert main([*other.words, "--fresh"]) == 0
    assert [path.name for path in (folders.output / "cases").iterdir()] == ["patient_9.json"]


def test_a_case_that_is_no_more_does_not_stop_the_others(folders):
    assert main(folders.words) == 0
    for folder in (folders.reference, folders.prediction):
        (folder / "case_1.nii.gz").unlink()
    assert main(folders.words) == 0
    assert [record["case"] for record in folders.summary()["metric_per_case"]] == ["case_0"]


def test_notes_are_told_with_counts(folders, capsys):
    reference, p = ambiguous(5, (6, 14, 12))
    predicted = p.argmax(axis=0)
    predicted[0, 0, 0] = (predicted[0, 0, 0] + 1) % 3
    folders.add("edited", reference, predicted, p)
    _, others = ambiguous(99, (6, 14, 12))
    folders.add("mixed", reference, p.argmax(axis=0), others)
    assert main(folders.words) == 0
    told = capsys.readouterr().out
    assert "note on 1 of 4 cases: 1 voxels of the segmentation differ from its probabilities' decision (post" in told
    assert "decision (of another model?)" in told


def test_one_case_is_a_case(tmp_path, capsys):
    one = Folders(tmp_path)
    one.add_ambiguous("only", 1)
    assert main(one.words) == 0
    assert "1 case scored" in capsys.readouterr().out


def test_after_a_miss_the_mean_of_the_other_cases_stands_beside_the_infinite_one(tmp_path, capsys):
    """Two cases 2 mm and 4 mm apart, one missed: HD95 is inf as mean, 3 mm over the two, 4 mm as median of three."""
    folders = Folders(tmp_path, labels={"background": 0, "a": 1})
    for name, shift in (("near", 2), ("far", 4), ("missed", None)):
        reference, prediction = np.zeros((5, 5, 20), np.uint8), np.zeros((5, 5, 20), np.uint8)
        reference[2, 2, 3] = 1
        if shift is not None:
            prediction[2, 2, 3 + shift] = 1
        folders.add(name, reference, prediction)
    assert main(folders.words) == 0
    summary = folders.summary()
    assert summary["mean"]["1"]["HD95"] == "inf"
    assert summary["mean_in_both"]["1"] | {"cases": 2} == summary["mean_in_both"]["1"]
    assert summary["mean_in_both"]["1"]["HD95"] == pytest.approx(3)
    assert summary["median"]["1"]["HD95"] == pytest.approx(4)
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if "2 of 3" in line)
    assert row.split()[2:] == ["3.0000", "3.0000", "3.0000", "3.0000", "2", "of", "3", "4.0000"]
    with (folders.output / "cases.csv").open() as stream:
        found = {line["case"]: (line["found_in"], float(line["HD95"])) for line in csv.DictReader(stream)}
    assert found == {"near": ("both", 2), "far": ("both", 4), "missed": ("reference", math.inf)}


def test_columns_of_long_numbers_do_not_touch(folders, capsys):
    (folders.prediction / "case_0.nii.gz").unlink()
    reference, _ = ambiguous(5, (6, 14, 12))
    folders.add("far", reference, np.zeros_like(reference), spacing=(1000.0, 1000.0, 1000.0))
    main([*folders.words, "--chill"])
    (header,) = [line for line in capsys.readouterr().out.splitlines() if "med HD95" in line]
    assert "cases med HD95" in header
