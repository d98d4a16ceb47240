"""Reading cases: patient axes, labels on the network's grid, and the way back."""

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_calib.data.cases import find_images
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.images import Place, place_as_read
from nnunet_calib.fewshot.volume.files import (
    IGNORED,
    STRUCTURE,
    UNKNOWN,
    find_supports,
    read_volume,
    to_image_grid,
    unit_of,
    voxel_size,
    write_segmentation,
)
from nnunet_calib.fewshot.volume.scan import Scan

from ..hosts import model, phantom, write_image

ORIENTATIONS = ("LPS", "RAS", "PIR", "SAL")


def case(of, root, stored="LPS", spacing=(1.0, 1.0, 1.0), seed=0, **options):
    image, structure = phantom(seed)
    write_image(root / "imagesTr" / "a_0000.nii.gz", image, stored, spacing)
    write_image(root / "labelsTr" / "a.nii.gz", structure.astype(np.uint8) * 5, stored, spacing)
    options = {"label": root / "labelsTr" / "a.nii.gz", "value": 5} | options
    return read_volume(of, "a", [root / "imagesTr" / "a_0000.nii.gz"], **options), image, structure


def centre_of_mass(mask) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_patient_axes_are_the_same_however_a_case_is_stored(tmp_path, orientation, reader, transpose):
    of = model(tmp_path / "model", transpose=transpose, reader=reader)
    found, _, structure = case(of, tmp_path, orientation)
    assert found.orientation == ("RAS" if "WithReorient" in reader else orientation)
    # the phantom is LPS: z grows to superior, y to posterior, x to left
    expected = structure[:, ::-1, ::-1]
    scan = Scan(found.spacing, found.axes, found.label)
    mean = scan.mm(np.flatnonzero(found.label == STRUCTURE)).mean(axis=0)
    assert mean == pytest.approx(np.array(centre_of_mass(expected))[::-1] + 0.5)


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_a_case_is_turned_into_the_tasks_orientation_and_back(tmp_path, stored):
    of = model(tmp_path / "model")
    straight, image, structure = case(of, tmp_path / "one", "LPS", spacing=(1.0, 1.0, 1.0))
    turned, _, _ = case(of, tmp_path / "two", stored, orientation="LPS")
    assert turned.turned == (stored != "LPS")
    assert np.array_equal(turned.image, straight.image)
    assert np.array_equal(turned.label, straight.label)
    back = to_image_grid(of, turned, (turned.label == STRUCTURE)[None].astype(np.float32), 0.0)[0] > 0.5
    write_segmentation(of, turned, back.astype(np.uint8), tmp_path / "back.nii.gz")
    written = sitk.ReadImage(str(tmp_path / "back.nii.gz"))
    source = sitk.ReadImage(str(tmp_path / "two" / "labelsTr" / "a.nii.gz"))
    assert written.GetDirection() == pytest.approx(source.GetDirection())
    assert written.GetOrigin() == pytest.approx(source.GetOrigin())
    assert np.array_equal(sitk.GetArrayFromImage(written) > 0, sitk.GetArrayFromImage(source) > 0)


def test_spacing_follows_when_a_case_is_turned(tmp_path):
    of = model(tmp_path / "model", spacing=1.0)
    straight, _, _ = case(of, tmp_path / "one", "LPS", spacing=(2.0, 1.0, 0.5))
    turned, _, _ = case(of, tmp_path / "two", "PIR", spacing=(2.0, 1.0, 0.5), orientation="LPS")
    assert turned.shape == straight.shape
    assert turned.spacing == pytest.approx(straight.spacing)
    np.testing.assert_allclose(turned.image, straight.image, atol=1e-5)


def test_labels_come_to_the_networks_spacing(tmp_path):
    of = model(tmp_path / "model", spacing=2.0)
    found, _, structure = case(of, tmp_path, spacing=(1.0, 1.0, 1.0))
    assert found.shape == (10, 13, 12)
    assert found.spacing == pytest.approx((2.0, 2.0, 2.0))
    assert found.structure_mm3 == structure.sum()
    assert 8 * np.count_nonzero(found.label == STRUCTURE) == pytest.approx(found.structure_mm3, rel=0.1)
    assert not found.cut
    assert not found.staircase


def test_a_coarse_support_is_told(tmp_path):
    found, _, _ = case(model(tmp_path / "model"), tmp_path, spacing=(4.0, 1.0, 1.0))
    assert found.coarsest == pytest.approx(4.0)
    assert found.staircase


def test_a_structure_at_the_border_is_told(tmp_path):
    of, (image, structure) = model(tmp_path / "model"), phantom(0)
    structure[:, :2, :] = True
    write_image(tmp_path / "a_0000.nii.gz", image)
    write_image(tmp_path / "a.nii.gz", structure.astype(np.uint8))
    assert read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], label=tmp_path / "a.nii.gz").cut


def test_ignored_voxels_are_marked(tmp_path):
    of, (image, structure) = model(tmp_path / "model"), phantom(0)
    labels = structure.astype(np.uint8)
    labels[10:] = 9
    write_image(tmp_path / "a_0000.nii.gz", image)
    write_image(tmp_path / "a.nii.gz", labels)
    found = read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], label=tmp_path / "a.nii.gz", ignore=9)
    assert np.array_equal(found.label == IGNORED, labels == 9)
    assert np.array_equal(found.label == STRUCTURE, labels == 1)


def test_a_structure_beside_ignored_voxels_may_go_on_in_them(tmp_path):
    of, (image, structure) = model(tmp_path / "model"), phantom(0)
    write_image(tmp_path / "a_0000.nii.gz", image)
    inside = np.argwhere(structure)
    for beside, cut in ((inside[:, 0].max(), True), (inside[:, 0].max() + 2, False)):
        labels = structure.astype(np.uint8)
        labels[beside:] = 9
        write_image(tmp_path / "a.nii.gz", labels)
        found = read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], label=tmp_path / "a.nii.gz", ignore=9)
        assert found.cut == cut


def test_what_nnunet_crops_away_comes_back(tmp_path):
    of, (image, structure) = model(tmp_path / "model"), phantom(0)
    image[:, :3], image[17:] = 0, 0
    write_image(tmp_path / "a_0000.nii.gz", image)
    write_image(tmp_path / "a.nii.gz", structure.astype(np.uint8))
    found = read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], label=tmp_path / "a.nii.gz")
    assert found.shape == (17, 23, 24)
    back = to_image_grid(of, found, found.label[None].astype(np.float32), -7.0)[0]
    assert (back[:, :3] == -7).all()
    assert (back[17:] == -7).all()
    assert np.array_equal(back[:17, 3:] > 0.5, structure[:17, 3:])


def test_two_dimensional_models_keep_the_slices(tmp_path):
    of = model(tmp_path / "model", axes=2, spacing=2.0)
    found, _, _ = case(of, tmp_path, spacing=(3.0, 1.0, 1.0))
    assert found.shape == (20, 13, 12)
    assert found.spacing == pytest.approx((3.0, 2.0, 2.0))


def test_without_an_affine_an_orientation_cannot_be_compared(tmp_path):
    of, (image, _) = model(tmp_path / "model", axes=2), phantom(0)
    flat = sitk.GetImageFromArray(image[8])
    sitk.WriteImage(flat, str(tmp_path / "a_0000.nii.gz"))
    files = [tmp_path / "a_0000.nii.gz"]
    assert read_volume(of, "a", files).orientation == UNKNOWN
    assert read_volume(of, "a", files, orientation=UNKNOWN).shape == (1, 26, 24)
    with pytest.raises(InputError, match=r"a_0000\.nii\.gz: its orientation cannot be compared"):
        read_volume(of, "a", files, orientation="LPS")


def test_labels_elsewhere_than_their_image_are_refused(tmp_path):
    of, (image, structure) = model(tmp_path / "model"), phantom(0)
    write_image(tmp_path / "a_0000.nii.gz", image)
    write_image(tmp_path / "a.nii.gz", structure.astype(np.uint8), "RAS")
    with pytest.raises(InputError, match=r"a\.nii\.gz: (direction|origin) .* differs from .* of its image .*a_0000"):
        read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], label=tmp_path / "a.nii.gz")
    write_image(tmp_path / "a.nii.gz", structure[:-1].astype(np.uint8))
    with pytest.raises(InputError, match=r"a\.nii\.gz: shape \(19, 26, 24\) differs"):
        read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], label=tmp_path / "a.nii.gz")


def test_images_that_cannot_be_used_are_refused_by_name(tmp_path):
    of, (image, _) = model(tmp_path / "model"), phantom(0)
    write_image(tmp_path / "a_0000.nii.gz", image)
    write_image(tmp_path / "a_0001.nii.gz", image)
    with pytest.raises(InputError, match="a_0000.nii.gz: 2 image channels, the model takes 1"):
        read_volume(of, "a", [tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"])
    (tmp_path / "b_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match="b_0000.nii.gz: truncated or damaged"):
        read_volume(of, "b", [tmp_path / "b_0000.nii.gz"])
    of = model(tmp_path / "other", reader="NibabelIO")  # ITK reads 0
    image[3, 4, 5] = np.nan
    write_image(tmp_path / "c_0000.nii.gz", image)
    with pytest.raises(InputError, match="c_0000.nii.gz: values that are NaN or infinite"):
        read_volume(of, "c", [tmp_path / "c_0000.nii.gz"])


def test_supports_are_the_cases_with_a_label_map(tmp_path):
    image, structure = phantom(0)
    for name in ("case_1", "case_2", "case_10"):
        write_image(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", image)
    write_image(tmp_path / "labelsTr" / "case_2.nii.gz", structure.astype(np.uint8))
    (tmp_path / "labelsTr" / "notes.txt").touch()
    found = find_supports(tmp_path / "imagesTr", tmp_path / "labelsTr", ".nii.gz")
    assert found == {
        "case_2": ([tmp_path / "imagesTr" / "case_2_0000.nii.gz"], tmp_path / "labelsTr" / "case_2.nii.gz")
    }
    write_image(tmp_path / "labelsTr" / "case_3.nii.gz", structure.astype(np.uint8))
    with pytest.raises(InputError, match=r"case_3\.nii\.gz: no image case_3_0000\.nii\.gz"):
        find_supports(tmp_path / "imagesTr", tmp_path / "labelsTr", ".nii.gz")
    with pytest.raises(InputError, match="no images; nnU-Net names them CASE_0000.nii.gz"):
        find_images(tmp_path / "labelsTr", ".nii.gz")
    with pytest.raises(UsageError, match="is not a folder"):
        find_images(tmp_path / "nowhere", ".nii.gz")


def test_a_model_that_is_no_cascade_takes_no_previous_stage(tmp_path):
    of, (image, structure) = model(tmp_path / "model"), phantom(0)
    write_image(tmp_path / "a_0000.nii.gz", image)
    write_image(tmp_path / "a.nii.gz", structure.astype(np.uint8))
    with pytest.raises(UsageError, match="is not a cascade"):
        read_volume(of, "a", [tmp_path / "a_0000.nii.gz"], previous=tmp_path / "a.nii.gz")


def test_the_placeholder_of_a_2d_image_is_no_millimetre():
    """nnU-Net's third spacing of a 2D image is 999 times the largest other one."""
    image = np.zeros((1, 1, 8, 8), dtype=np.float32)
    flat = {"sitk_stuff": {"origin": (0.0, 0.0), "direction": (1.0, 0.0, 0.0, 1.0)}, "spacing": (499.5, 0.5, 0.5)}
    assert unit_of(image, place_as_read(flat)) == "mm2"
    assert voxel_size(place_as_read(flat), "mm2") == 0.25
    assert unit_of(image, place_as_read({"spacing": (999, 1, 1)})) == "pixels"
    solid = {"sitk_stuff": {"origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}, "spacing": (1.0,) * 3}
    assert unit_of(image, place_as_read(solid)) == "mm3"
    assert voxel_size(Place((2.0, 0.5, 0.5), {}), "mm3") == 0.5
