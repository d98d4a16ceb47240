"""4D NIfTI probabilities: the order of nnU-Net's arrays, the place of the segmentation, headers that lie."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import read_labels
from nnunet_calib.data.probabilities import ProbabilityFile

P = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5, 6)).transpose(3, 0, 1, 2).astype(np.float32)
AFFINE = np.array([[-0.5, 0, 0, 10], [0, -0.6, 0, 20], [0, 0, 3.0, -30], [0, 0, 0, 1]])


def save(path, values=P, affine=AFFINE, kind=nibabel.Nifti1Image):
    """Values (C, z, y, x) as (x, y, z, C)."""
    nibabel.save(kind(values.transpose(3, 2, 1, 0), affine), path)
    return path


def read(path):
    return np.stack(list(ProbabilityFile(path).channels()))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_channels_come_one_by_one_in_the_order_of_the_array(tmp_path, ending, kind, dtype):
    path = tmp_path / f"a_probabilities{ending}"
    image = kind(P.transpose(3, 2, 1, 0).astype(dtype), AFFINE)
    image.header.set_data_dtype(dtype)
    nibabel.save(image, path)
    stored = ProbabilityFile(path)
    assert (stored.shape, stored.dtype) == (P.shape, np.dtype(dtype).newbyteorder("="))
    assert np.array_equal(read(path), P)


def test_the_vectors_that_itk_writes(tmp_path):
    image = sitk.GetImageFromArray(P.transpose(1, 2, 3, 0), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "a_probabilities.nii.gz"))
    assert np.array_equal(read(tmp_path / "a_probabilities.nii.gz"), P)


def test_scaled_values(tmp_path):
    path = save(tmp_path / "a_probabilities.nii")
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, 0.25], dtype="<f4").tobytes()  # scl_slope and scl_inter
    path.write_bytes(content)
    assert np.allclose(read(path), P * 0.5 + 0.25, atol=1e-7)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
def test_they_must_lie_where_the_segmentation_lies(tmp_path, reader):
    """``AFFINE`` turned to the axes of NibabelIOWithReorient is another one, with another order of voxels."""
    labels = np.zeros((4, 5, 6), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels.T, AFFINE), tmp_path / "a.nii.gz")
    place = read_labels(tmp_path / "a.nii.gz", reader, (0,)).place.affine
    stored = ProbabilityFile(save(tmp_path / "a_probabilities.nii.gz"))
    if reader is NibabelIOWithReorient:
        with pytest.raises(InputError, match="origin, spacing or direction"):
            stored.check_fits(3, (4, 5, 6), place)
    else:
        stored.check_fits(3, (4, 5, 6), place)
    for change in (np.diag([1, 1, 1.01, 1]), np.diag([-1, 1, 1, 1])):
        moved = ProbabilityFile(save(tmp_path / "b_probabilities.nii.gz", affine=AFFINE @ change))
        with pytest.raises(InputError, match="b_probabilities.*origin, spacing or direction"):
            moved.check_fits(3, (4, 5, 6), AFFINE)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_truncated(tmp_path, ending):
    path = save(tmp_path / f"a_probabilities{ending}")
    content = path.read_bytes()
    for keep in (0, 10, 347, 352, 360, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match="truncated or damaged"):
            read(path)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = save(tmp_path / "a_probabilities.nii")
    content = bytearray(path.read_bytes())
    packed = bytearray(gzip.compress(bytes(content), compresslevel=0))
    packed[len(packed) // 2] ^= 1
    (tmp_path / "a_probabilities.nii.gz").write_bytes(packed)
    with pytest.raises(InputError, match="truncated or damaged"):
        read(tmp_path / "a_probabilities.nii.gz")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_of_more_than_the_file_can_hold(tmp_path, ending):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"] = [4, 32767, 32767, 32767, 14, 1, 1, 1]
    header["vox_offset"] = 352
    content = header.binaryblock + bytes(1000)
    path = tmp_path / f"a_probabilities{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(InputError, match="cannot hold the volume"):
        ProbabilityFile(path)
    with pytest.raises(InputError, match="cannot hold the volume"):
        read_labels(path, SimpleITKIO, (0,))


def test_labels_are_no_probabilities(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5, 2), np.uint8), np.eye(4)), tmp_path / "a_probabilities.nii")
    with pytest.raises(InputError, match="a float array"):
        ProbabilityFile(tmp_path / "a_probabilities.nii")
