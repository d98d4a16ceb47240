"""Which files are cases."""

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_calib.data.cases import pair_cases
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import read_labels


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
