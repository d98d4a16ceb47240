"""Which files are cases."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_calib.cli.main import main
from nnunet_calib.data.cases import find_images, pair_cases
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import read_labels

from ..folders import Folders


def folders(tmp_path, *names):
    for folder in ("reference", "prediction"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    return tmp_path / "reference", tmp_path / "prediction"


def test_hidden_files_are_no_cases(tmp_path):
    pairs = pair_cases(*folders(tmp_path, "x.nii.gz", "._x.nii.gz", ".nii.gz"), ".nii.gz")
    assert [pair.name for pair in pairs] == ["x"]


def test_links_to_nothing_are_cases(tmp_path):
    reference, prediction = folders(tmp_path, "x.nii.gz")
    for folder in (reference, prediction):
        (folder / "y.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    assert [pair.name for pair in pair_cases(reference, prediction, ".nii.gz")] == ["x", "y"]


def stored(path, values):
    sitk.WriteImage(sitk.GetImageFromArray(np.array(values, np.float32).reshape(1, 2, 2)), str(path))
    return path


def test_labels_stored_as_floats_are_rounded(tmp_path):
    path = stored(tmp_path / "x.nii.gz", [0, 0.9999999, 2.0005, -1e-7])
    assert read_labels(path, SimpleITKIO, [0, 1, 2]).labels.tolist() == [[[0, 1], [2, 0]]]


def test_values_between_labels_are_shown_with_their_digits(tmp_path):
    path = stored(tmp_path / "x.nii.gz", [0, 1, 1.0625, 1])
    with pytest.raises(InputError, match="not integers, such as 1.0625"):
        read_labels(path, SimpleITKIO, [0, 1])


def save_nifti(path, array):
    """(z, y, x) or (C, z, y, x)."""
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)


P = np.full((2, 4, 5, 6), 0.5, np.float32)


def test_the_label_map_of_a_case_called_x_probabilities_is_not_the_probabilities_of_x(tmp_path):
    reference, prediction = folders(tmp_path)
    for folder in (reference, prediction):
        for name in ("x", "x_probabilities"):
            save_nifti(folder / f"{name}.nii.gz", np.zeros((4, 5, 6), np.uint8))
    np.savez(prediction / "x_probabilities.npz", probabilities=P)
    found = {pair.name: pair.probabilities for pair in pair_cases(reference, prediction, ".nii.gz")}
    assert found == {"x": None, "x_probabilities": prediction / "x_probabilities.npz"}
    assert main(["convert", str(prediction), "-o", str(tmp_path / "compact"), "--to", "compact"]) == 0
    assert [path.name for path in (tmp_path / "compact").iterdir()] == ["x_probabilities.nncp"]


def test_probabilities_of_x_in_nifti_are_no_case(tmp_path):
    _, prediction = folders(tmp_path)
    save_nifti(prediction / "x.nii.gz", np.zeros((4, 5, 6), np.uint8))
    save_nifti(prediction / "x_probabilities.nii.gz", P)
    (pair,) = pair_cases(prediction, prediction, ".nii.gz")  # as calibrate apply, which has no references
    assert (pair.name, pair.probabilities) == ("x", prediction / "x_probabilities.nii.gz")


@pytest.mark.parametrize("ending", [".nncp", ".npz", "_probabilities.nii.gz"])
def test_links_to_nothing_are_reported_as_such_by_all_that_read_probabilities(tmp_path, ending, capsys):
    made = Folders(tmp_path)
    for name in ("x", "y"):
        made.add_ambiguous(name)
    (made.prediction / "x.npz").unlink()
    (made.prediction / f"x{ending}").symlink_to(tmp_path / "gone")
    said = rf"x{ending}: a link to {tmp_path / 'gone'}, which is not there"
    assert main(made.words) == 1
    assert said in capsys.readouterr().err
    assert [case["case"] for case in made.summary()["metric_per_case"]] == ["y"]
    to = "npz" if ending == ".nncp" else "compact"
    if ending == ".nncp":
        (made.prediction / "y.npz").unlink()
    assert main(["convert", str(made.prediction), "-o", str(tmp_path / "c"), "--to", to]) == 1
    assert said in capsys.readouterr().err
    fit = ["calibrate", "fit", str(made.prediction), "--reference", str(made.reference), "-o", str(tmp_path / "f")]
    assert main(fit) == 1
    assert said in capsys.readouterr().err


def test_images_are_listed_without_hidden_files_and_with_links_to_nothing(tmp_path):
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "._b_0000.nii.gz", "a.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "a_0000.nii.gz").symlink_to(tmp_path / "gone")
    found = find_images(tmp_path, ".nii.gz")
    assert {case: [path.name for path in paths] for case, paths in found.items()} == {
        "a": ["a_0000.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }
    assert list(found) == ["a", "b"]
