"""Label maps from disk: what is read, and what is refused in one line that names the file."""

import gzip
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import check_same_geometry, choose_reader, read_labels

from ..folders import write_labels

LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 3


def read(path, allowed=(0, 1, 2)):
    return read_labels(path, SimpleITKIO, allowed)


def test_reads_axes_spacing_and_place_in_the_order_of_the_array(tmp_path):
    write_labels(tmp_path / "a.nii.gz", LABELS, spacing=(3.0, 2.0, 0.5), origin=(7.0, 8.0, 9.0))
    image = read(tmp_path / "a.nii.gz")
    assert np.array_equal(image.labels, LABELS)
    assert image.labels.dtype == np.uint8
    assert image.spacing == pytest.approx((3.0, 2.0, 0.5))
    assert image.place.geometry["origin"] == pytest.approx((7.0, 8.0, 9.0))


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.97])
def test_a_truncated_file_is_refused_though_simpleitk_would_read_it(tmp_path, keep):
    path = tmp_path / "a.nii.gz"
    write_labels(path, np.random.default_rng(0).integers(0, 3, (20, 20, 20), dtype=np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=r"a\.nii\.gz: truncated or damaged"):
        read(path)


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"a\.nii\.gz: truncated or damaged"):
        read(path)
    with pytest.raises(InputError, match=r"b\.nii\.gz: cannot be read \(No such file"):
        read(tmp_path / "b.nii.gz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + np.uint8(5), "label values not in dataset.json: 5, 6, 7"),
        (LABELS.astype(np.float32) + 0.5, "not integers, such as 0.5"),
        (LABELS.astype(np.float32) - 1, "label values from -1 to 1"),
    ],
)
def test_values_that_are_no_labels_of_the_data_set(tmp_path, labels, message):
    write_labels(tmp_path / "a.nii.gz", labels)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "a.nii.gz")
    assert "a.nii.gz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_is_no_label(tmp_path, reader, ending, value):
    """ITK makes it 0."""
    labels = np.where(LABELS == 1, value, LABELS).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / f"a{ending}")
    with pytest.raises(InputError, match=r"a\.nii.*: (values that are NaN|label values .*(nan|inf))"):
        read_labels(tmp_path / f"a{ending}", reader, (0, 1, 2))


def test_complex_numbers_are_no_labels(tmp_path):
    nibabel.save(nibabel.Nifti1Image(LABELS.astype(np.complex64), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="complex numbers"):
        read(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_a_flipped_byte_is_noticed(tmp_path, dtype):
    """Bytes that are stored, not packed: the voxel alone changes, to a label the data set has."""
    path = tmp_path / "a.nii.gz"
    content = bytearray(nibabel.Nifti1Image(np.full((9, 8, 7), 2, dtype=dtype), np.eye(4)).to_bytes())
    path.write_bytes(gzip.compress(bytes(content), compresslevel=0))
    assert (read(path).labels == 2).all()
    packed = bytearray(path.read_bytes())
    voxel = np.array(2, dtype=dtype).tobytes()
    position = packed.index(voxel * 10) + 4 * len(voxel)
    packed[position : position + len(voxel)] = np.array(1, dtype=dtype).tobytes()
    path.write_bytes(packed)
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


def test_a_4d_image_is_refused(tmp_path):
    volume = sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), dtype=np.uint8), isVector=False)
    sitk.WriteImage(volume, str(tmp_path / "a.nii.gz"))
    with pytest.raises(InputError, match="one 2D or 3D label map"):
        read(tmp_path / "a.nii.gz")


def test_the_same_geometry_is_needed_beyond_rounding(tmp_path):
    write_labels(tmp_path / "reference.nii.gz", LABELS)
    reference = read(tmp_path / "reference.nii.gz")
    others = {
        "shape": {"labels": LABELS[:, :2]},
        "spacing": {"spacing": (1.0, 1.0, 1.01)},
        "origin": {"origin": (0.0, 0.0, 0.5)},
    }
    for what, change in others.items():
        write_labels(tmp_path / "other.nii.gz", **{"labels": LABELS} | change)
        with pytest.raises(InputError, match=rf"other\.nii\.gz: {what} .*reference\.nii\.gz"):
            check_same_geometry(reference, read(tmp_path / "other.nii.gz"))
    write_labels(tmp_path / "other.nii.gz", LABELS, spacing=(1.0, 1.0, 1.00001), origin=(0.0, 0.0, 0.0001))
    check_same_geometry(reference, read(tmp_path / "other.nii.gz"))


def test_another_direction_is_refused(tmp_path):
    for name, sign in (("reference", 1), ("other", -1)):
        image = sitk.GetImageFromArray(LABELS)
        image.SetDirection([sign, 0, 0, 0, 1, 0, 0, 0, 1])
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    with pytest.raises(InputError, match="direction"):
        check_same_geometry(read(tmp_path / "reference.nii.gz"), read(tmp_path / "other.nii.gz"))


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
def test_the_direction_has_the_same_tolerance_with_every_reader(tmp_path, reader):
    """A turn about x, by 1/2000 or by 1/200, of voxels of (0.5, 0.5, 5) mm."""
    for name, angle in (("straight", 0.0), ("rounded", 5e-4), ("turned", 5e-3)):
        turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        affine = np.eye(4)
        affine[:3, :3] = turn * (0.5, 0.5, 5.0)
        nibabel.save(nibabel.Nifti1Image(LABELS.T, affine), tmp_path / f"{name}.nii.gz")
    straight, rounded, turned = (
        read_labels(tmp_path / f"{name}.nii.gz", reader, (0, 1, 2)) for name in ("straight", "rounded", "turned")
    )
    check_same_geometry(straight, rounded)
    with pytest.raises(InputError, match=r"turned\.nii\.gz: direction"):
        check_same_geometry(straight, turned)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_the_origin_has_the_same_tolerance_with_every_reader(tmp_path, reader):
    for name, shift in (("reference", 0.0), ("other", 0.02)):
        affine = np.eye(4)
        affine[0, 3] = shift
        nibabel.save(nibabel.Nifti1Image(LABELS.T, affine), tmp_path / f"{name}.nii.gz")
    reference, other = (read_labels(tmp_path / f"{n}.nii.gz", reader, (0, 1, 2)) for n in ("reference", "other"))
    with pytest.raises(InputError, match="origin"):
        check_same_geometry(reference, other)


def test_the_reader_is_nnunets_choice_and_a_broken_example_does_not_matter(tmp_path, capfd):
    path = tmp_path / "dataset.json"

    def dataset(**content):
        path.write_text(json.dumps({"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"} | content))
        return read_dataset(path)

    broken, whole = tmp_path / "broken.nii.gz", tmp_path / "whole.nii.gz"
    broken.write_bytes(b"")
    write_labels(whole, LABELS)
    capfd.readouterr()
    assert choose_reader(dataset()) is SimpleITKIO
    chosen = choose_reader(dataset(overwrite_image_reader_writer="NibabelIOWithReorient"))
    assert chosen.__name__ == NibabelIOWithReorient.__name__
    assert choose_reader(dataset(file_ending=".tiff")) is Tiff3DIO
    with pytest.raises(InputError, match="no reader for '.jpg'"):
        choose_reader(dataset(file_ending=".jpg"))
    assert "Traceback" not in capfd.readouterr().err
