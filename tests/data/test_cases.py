"""Pairing of references, predictions and probabilities."""

import pytest

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.errors import InputError, UsageError


@pytest.fixture
def folders(tmp_path):
    reference, prediction = tmp_path / "labelsTs", tmp_path / "predicted"
    for folder in (reference, prediction):
        folder.mkdir()
        for name in ("case_2", "case_1"):
            (folder / f"{name}.nii.gz").touch()
    return reference, prediction


def test_pairs_by_name_and_takes_probabilities_where_they_are(folders):
    reference, prediction = folders
    (prediction / "case_2.npz").touch()
    (prediction / "dataset.json").touch()
    (reference / "readme.txt").touch()
    assert pair_cases(reference, prediction, ".nii.gz") == [
        CaseFiles("case_1", reference / "case_1.nii.gz", prediction / "case_1.nii.gz", None),
        CaseFiles(
            "case_2", reference / "case_2.nii.gz", prediction / "case_2.nii.gz", prediction / "case_2.npz"
        ),
    ]  # fmt: skip


def test_a_prediction_without_reference_is_refused_by_name(folders):
    reference, prediction = folders
    (prediction / "stray.nii.gz").touch()
    for chill in (False, True):
        with pytest.raises(InputError, match=r"predicted/stray\.nii\.gz: no reference"):
            pair_cases(reference, prediction, ".nii.gz", chill=chill)


def test_a_reference_without_prediction_is_refused_unless_chill(folders):
    reference, prediction = folders
    (prediction / "case_1.nii.gz").unlink()
    with pytest.raises(InputError, match=r"labelsTs/case_1\.nii\.gz: no prediction .* --chill"):
        pair_cases(reference, prediction, ".nii.gz")
    assert [case.name for case in pair_cases(reference, prediction, ".nii.gz", chill=True)] == ["case_2"]


def test_nothing_to_score(folders):
    with pytest.raises(InputError, match=r"no file ends with \.png"):
        pair_cases(*folders, ".png")
    with pytest.raises(UsageError, match="is not a folder"):
        pair_cases(folders[0], folders[1] / "nowhere", ".nii.gz")


def test_of_several_probability_files_the_fastest_counts(folders):
    reference, prediction = folders
    found = []
    for ending in ("_probabilities.nii", "_probabilities.nii.gz", ".npz", ".nncp"):
        (prediction / f"case_1{ending}").touch()
        found.append(pair_cases(reference, prediction, ".nii.gz")[0].probabilities.name)
    assert found == ["case_1_probabilities.nii", "case_1_probabilities.nii.gz", "case_1.npz", "case_1.nncp"]


def test_a_label_map_may_end_as_probabilities_do(folders):
    reference, prediction = folders
    for folder in folders:
        (folder / "case_1_probabilities.nii.gz").touch()
    names = [case.name for case in pair_cases(reference, prediction, ".nii.gz")]
    assert names == ["case_1", "case_1_probabilities", "case_2"]
