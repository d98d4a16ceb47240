"""Damaged files of every format that nnU-Net's readers take: refused in one line, whole ones taken."""

import contextlib
import gzip
import random

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_calib.data import whole
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import read_image, read_labels
from nnunet_calib.data.whole import check_whole

LABELS = (np.random.default_rng(0).random((9, 11, 13)) < 0.4).astype(np.uint8)
IMAGE = np.random.default_rng(1).integers(-1000, 1000, (9, 11, 13)).astype(np.int16)


def itk(path, array, compress):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 2.0))
    sitk.WriteImage(image, str(path), compress)


def packed(path, array):
    itk(path, array, True)


def plain(path, array):
    itk(path, array, False)


def slices(path, array):
    tifffile.imwrite(path, array, compression="zlib")


def flat(path, array):
    io.imsave(path, array[4].astype(np.uint8), check_contrast=False)


CHECKSUMS = [("a.nii.gz", packed, SimpleITKIO), ("a.mha", packed, SimpleITKIO), ("a.nrrd", packed, SimpleITKIO),
             ("a.gipl.gz", packed, SimpleITKIO), ("a.png", flat, NaturalImage2DIO),
             ("a.nii.gz", packed, NibabelIO)]  # fmt: skip
SIZES = [("a.nii", plain, SimpleITKIO), ("a.mha", plain, SimpleITKIO), ("a.nrrd", plain, SimpleITKIO),
         ("a.gipl", plain, SimpleITKIO), ("a.nii", plain, NibabelIO), ("a.bmp", flat, NaturalImage2DIO),
         ("a.tif", flat, NaturalImage2DIO)]  # fmt: skip
OTHERS = [("a.tif", slices, Tiff3DIO), ("a.tiff", slices, Tiff3DIO)]


def images_and_labels(formats):
    return pytest.mark.parametrize(
        ("name", "write", "reader", "array"),
        [(*entry, array) for entry in formats for array in (LABELS, IMAGE) if entry[1] is not flat or array is LABELS],
    )


def read(path, reader, array):
    """As label map or image."""
    return read_labels(path, reader, (0, 1)).labels if array is LABELS else read_image([path], reader)[0]


@images_and_labels(CHECKSUMS + SIZES + OTHERS)
def test_whole_files_are_read(tmp_path, name, write, reader, array):
    write(tmp_path / name, array)
    check_whole(tmp_path / name)
    assert np.array_equal(
        read(tmp_path / name, reader, array).reshape(-1, 11, 13)[-1], array[4 if write is flat else -1]
    )


@images_and_labels(CHECKSUMS + SIZES + OTHERS)
@pytest.mark.parametrize("keep", [0, 0.02, 0.3, 0.6, 0.9, -1])
def test_cut_files_are_refused(tmp_path, name, write, reader, array, keep):
    path = tmp_path / name
    write(path, array)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)] if keep >= 0 else content[:keep])
    with pytest.raises(InputError, match=rf"{name}: .*(truncated|damaged|cannot be read)") as caught:
        read(path, reader, array)
    assert "\n" not in str(caught.value)
    assert "No such file" not in str(caught.value)
    if reader is not Tiff3DIO:
        with pytest.raises(InputError, match="truncated or damaged"):
            check_whole(path)


@images_and_labels(CHECKSUMS + OTHERS)
def test_changed_bytes_are_refused_where_there_is_a_checksum(tmp_path, name, write, reader, array):
    path = tmp_path / name
    write(path, array)
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content) // 2, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):  # bytes that decide no voxel may change
            assert np.array_equal(read(path, reader, array).reshape(-1, 11, 13)[-1], array[4 if write is flat else -1])


@pytest.mark.parametrize(("name", "write", "reader"), CHECKSUMS)
def test_what_is_in_memory_is_not_decompressed_again(tmp_path, monkeypatch, name, write, reader):
    write(tmp_path / name, IMAGE)
    monkeypatch.setattr(whole.Stored, "check", lambda *_: pytest.fail("decompressed again"))
    read_image([tmp_path / name], reader)


def test_scaled_voxels_are_not_decompressed_again(tmp_path, monkeypatch):
    image = nibabel.Nifti1Image(IMAGE.T, np.eye(4))
    image.header.set_slope_inter(0.25, -1024)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([0.25, -1024], "<f4").tobytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(content)))
    monkeypatch.setattr(whole.Stored, "check", lambda *_: pytest.fail("decompressed again"))
    for reader in (SimpleITKIO, NibabelIO):
        read, _ = read_image([tmp_path / "a.nii.gz"], reader)
        assert np.array_equal(read[0], IMAGE * 0.25 - 1024)


def test_each_channel_is_checked(tmp_path):
    paths = [tmp_path / f"a_000{c}.mha" for c in range(3)]
    for path in paths:
        packed(path, IMAGE)
    assert read_image(paths, SimpleITKIO)[0].shape == (3, 9, 11, 13)
    content = bytearray(paths[1].read_bytes())
    content[-1000] ^= 1
    paths[1].write_bytes(content)
    with pytest.raises(InputError, match=r"a_0001\.mha: truncated or damaged"):
        read_image(paths, SimpleITKIO)


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_in_a_file_of_their_own(tmp_path, ending):
    packed(tmp_path / f"a{ending}", IMAGE)
    check_whole(tmp_path / f"a{ending}")
    (data,) = (path for path in tmp_path.iterdir() if path.suffix != ending)
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or damaged"):
        check_whole(tmp_path / f"a{ending}")
    data.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        check_whole(tmp_path / f"a{ending}")


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
)
@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.nii.gz"])
@pytest.mark.parametrize("compress", [False, True])
def test_every_type(tmp_path, dtype, name, compress):
    itk(tmp_path / name, IMAGE.astype(dtype), compress)
    check_whole(tmp_path / name)


def test_a_plain_nifti_called_gz_is_read(tmp_path):
    plain(tmp_path / "a.nii", LABELS)
    (tmp_path / "a.nii").rename(tmp_path / "a.nii.gz")
    assert np.array_equal(read(tmp_path / "a.nii.gz", SimpleITKIO, LABELS), LABELS)


def test_a_dead_link_says_so(tmp_path):
    for name in ("a.nii.gz", "a.mha", "a.png"):
        (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(InputError, match=rf"{name}: a link to nowhere, which is not there"):
            check_whole(tmp_path / name)
