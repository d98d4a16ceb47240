"""One reading of where a NIfTI file lies, in mm, for label maps, images and probabilities; readers, file by file."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy import ndimage

from nnunet_calib.cli.main import main
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import (
    Place,
    check_same_geometry,
    place_as_read,
    predicted_at,
    read_image,
    read_labels,
)
from nnunet_calib.data.nifti import affine_in_mm
from nnunet_calib.data.probabilities import ProbabilityFile

from ..folders import Folders

LABELS = np.arange(120, dtype=np.uint8).reshape(4, 5, 6) % 3  # (z, y, x)
P = np.stack([c == LABELS for c in range(3)]).astype(np.float32)
READERS = (SimpleITKIO, NibabelIO)
FACTOR = {"micron": 1000, "mm": 1, "meter": 1e-3}


def save(path, array, affine, unit="mm", kind=nibabel.Nifti1Image):
    """(z, y, x) or (C, z, y, x) as (x, y, z) or (x, y, z, C)."""
    image = kind(array.T, affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def with_two_places(path, array):
    """What public cardiac data have: the sform says 1 mm, the qform and pixdim the true spacing."""
    image = nibabel.Nifti1Image(array.T, None)
    image.header.set_zooms((1.4, 1.4, 10, 1)[: array.ndim])
    image.header.set_qform(np.diag([-1.4, -1.4, 10, 1]), 1)
    image.header.set_sform(np.diag([-1.0, -1, 1, 1]), 1)
    nibabel.save(image, path)
    return path


def sheared(by):
    affine = np.diag([1.0, 1.5, 2.0, 1])
    affine[0, 2] = by
    return affine


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("unit", FACTOR)
def test_units_are_converted(tmp_path, reader, unit):
    affine = np.diag([*np.multiply((-0.5, 0.6, 3.0), FACTOR[unit]), 1])
    affine[:3, 3] = np.multiply((7, 8, 9), FACTOR[unit])
    labels = read_labels(save(tmp_path / "a.nii.gz", LABELS, affine, unit), reader, (0, 1, 2))
    assert labels.spacing == pytest.approx((3.0, 0.6, 0.5))
    in_mm = np.array([[-0.5, 0, 0, 7], [0, 0.6, 0, 8], [0, 0, 3, 9], [0, 0, 0, 1]])
    assert labels.place.affine == pytest.approx(in_mm, abs=1e-5)
    stored = ProbabilityFile(save(tmp_path / "a_probabilities.nii.gz", P, affine, unit))
    assert stored.affine == pytest.approx(in_mm, abs=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_label_maps_and_probabilities_of_two_places_lie_where_itk_says(tmp_path, reader):
    path = with_two_places(tmp_path / "a.nii.gz", LABELS)
    labels = read_labels(path, reader, (0, 1, 2))
    assert labels.spacing == pytest.approx(sitk.ReadImage(str(path)).GetSpacing()[::-1])
    stored = ProbabilityFile(with_two_places(tmp_path / "a_probabilities.nii.gz", P))
    stored.check_fits(3, LABELS.shape, labels.place.affine)
    assert stored.affine == pytest.approx(labels.place.affine)


@pytest.mark.parametrize("affine", [sheared(0.9), np.diag([1.0, 1.5, 2.0, 1])])
@pytest.mark.parametrize("reader", READERS)
def test_of_what_itk_does_not_read_the_place_is_nibabels_in_mm(tmp_path, reader, affine):
    """Axes that are not at right angles; NIfTI-2."""
    kind = nibabel.Nifti2Image if affine[0, 2] == 0 else nibabel.Nifti1Image
    stored = affine.copy()
    stored[:3] *= 1000
    labels = read_labels(save(tmp_path / "a.nii.gz", LABELS, stored, "micron", kind), reader, (0, 1, 2))
    assert np.array_equal(labels.labels, LABELS)
    assert labels.place.affine == pytest.approx(affine)
    p = ProbabilityFile(save(tmp_path / "a_probabilities.nii.gz", P, stored, "micron", kind))
    p.check_fits(3, LABELS.shape, labels.place.affine)


def test_an_array_that_its_reader_turns_lies_where_its_file_lies(tmp_path):
    """NibabelIOWithReorient turns to right, anterior, superior by the sform; the place is that of the qform."""
    path = with_two_places(tmp_path / "a.nii.gz", LABELS)
    labels = read_labels(path, NibabelIOWithReorient, (0, 1, 2))
    assert np.array_equal(labels.labels, LABELS[:, ::-1, ::-1])
    corner = affine_in_mm(path) @ [5, 4, 0, 1]
    assert labels.place.affine @ [0, 0, 0, 1] == pytest.approx(corner)
    assert labels.spacing == pytest.approx((10, 1.4, 1.4))


def test_a_prediction_whose_unit_nnunets_writer_left_out_lies_where_its_reference_lies(tmp_path):
    affine = np.diag([500.0, 600, 3000, 1])
    reference = read_labels(save(tmp_path / "a.nii.gz", LABELS, affine, "micron"), NibabelIO, (0, 1, 2))
    NibabelIO().write_seg(LABELS, str(tmp_path / "b.nii.gz"), reference.properties)
    check_same_geometry(reference, read_labels(tmp_path / "b.nii.gz", NibabelIO, (0, 1, 2)))
    in_mm = read_labels(save(tmp_path / "c.nii.gz", LABELS, affine, "mm"), NibabelIO, (0, 1, 2))
    with pytest.raises(InputError, match=r"c\.nii\.gz: spacing \(3000, 600, 500\) differs from \(3, 0\.6, 0\.5\)"):
        check_same_geometry(reference, in_mm)


@pytest.mark.parametrize(
    "make", [with_two_places, lambda path, a: save(path, a, np.diag([5e2, 6e2, 3e3, 1]), "micron")]
)
def test_what_is_predicted_in_memory_lies_where_nnunets_reader_saw_its_image(tmp_path, make):
    """Its properties tell neither the unit nor the other form."""
    image = make(tmp_path / "a_0000.nii.gz", LABELS.astype(np.float32))
    properties = NibabelIO().read_images([str(image)])[1]
    reference = read_labels(make(tmp_path / "a.nii.gz", LABELS), NibabelIO, (0, 1, 2))
    assert predicted_at(reference, tmp_path / "p.nii.gz", LABELS, properties).spacing == reference.spacing
    elsewhere = properties["nibabel_stuff"]["original_affine"] + np.outer([1, 0, 0, 0], [0, 0, 0, 50])
    moved = {"nibabel_stuff": {"original_affine": elsewhere}}
    with pytest.raises(InputError, match=r"p\.nii\.gz: "):
        predicted_at(reference, tmp_path / "p.nii.gz", LABELS, properties | moved)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_distances_and_volumes_of_microns_are_in_mm(tmp_path, reader):
    """Two slices shifted by one voxel of 0.5 mm."""
    folders = Folders(tmp_path, {"background": 0, "a": 1}, overwrite_image_reader_writer=reader)
    reference = np.zeros((3, 8, 8), np.uint8)
    reference[1, 2:5, 2:5] = 1
    affine = np.diag([500.0, 500, 2000, 1])
    save(folders.reference / "x.nii.gz", reference, affine, "micron")
    prediction = np.roll(reference, 1, 2)
    save(folders.prediction / "x.nii.gz", prediction, affine, "micron")
    p = np.stack([prediction == c for c in range(2)]).astype(np.float32)
    save(folders.prediction / "x_probabilities.nii.gz", p, affine, "micron")
    assert main(folders.words) == 0
    (case,) = folders.summary()["metric_per_case"]
    assert case["metrics"]["1"]["HD"] == pytest.approx(0.5)
    assert case["metrics"]["1"]["volume_ref_mm3"] == pytest.approx(9 * 0.5)
    assert case["calibration"]["volume"]["ECE"] > 0


def test_calibrate_fit_checks_the_place_of_the_probabilities_too(tmp_path, capsys):
    folders = Folders(tmp_path)
    for name in "abc":
        save(folders.reference / f"{name}.nii.gz", LABELS, np.eye(4))
        save(folders.prediction / f"{name}.nii.gz", LABELS, np.eye(4))
        save(folders.prediction / f"{name}_probabilities.nii.gz", P * 0.9 + 0.1 / 3, np.diag([-1, 1, 1, 1]))
    words = ["calibrate", "fit", str(folders.prediction), "--reference", str(folders.reference)]
    assert main([*words, "-o", str(tmp_path / "fitted"), "--method", "temperature"]) == 1
    assert "origin, spacing or direction" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "fitted").rglob("*") if path.is_file()]


@pytest.mark.parametrize("first", ["straight", "sheared", "second"])
def test_a_case_is_scored_the_same_whatever_file_sorts_first(tmp_path, first):
    folders = Folders(tmp_path, {"background": 0, "a": 1, "b": 2})
    kinds = {"straight": (np.eye(4), nibabel.Nifti1Image), "sheared": (sheared(0.9), nibabel.Nifti1Image)}
    kinds["second"] = (np.eye(4), nibabel.Nifti2Image)
    for name, (affine, kind) in kinds.items():
        case = f"{name != first:d}_{name}.nii.gz"
        save(folders.reference / case, LABELS, affine, kind=kind)
        save(folders.prediction / case, np.roll(LABELS, 1, 2), affine, kind=kind)
    assert main(folders.words) == 0
    scored = {case["case"][2:]: case["metrics"]["1"]["Dice"] for case in folders.summary()["metric_per_case"]}
    assert set(scored) == set(kinds)
    assert len(set(scored.values())) == 1


def test_two_files_that_two_readers_read_lie_in_the_same_place(tmp_path):
    """A reference as NIfTI-2, its prediction as NIfTI-1: axes turned, voxels of three lengths."""
    affine = np.array([[-1.0, 0, 0, 5], [0, 2, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1]])
    read = {}
    for name, kind in (("reference", nibabel.Nifti2Image), ("prediction", nibabel.Nifti1Image)):
        read[name] = read_labels(save(tmp_path / f"{name}.nii.gz", LABELS, affine, kind=kind), SimpleITKIO, (0, 1, 2))
    check_same_geometry(read["reference"], read["prediction"])
    affine[0, 3] += 1
    moved = read_labels(save(tmp_path / "moved.nii.gz", LABELS, affine), SimpleITKIO, (0, 1, 2))
    with pytest.raises(InputError, match="differs from"):
        check_same_geometry(read["reference"], moved)


@pytest.mark.parametrize(
    ("kind", "affine", "said"),
    [
        (nibabel.Nifti1Image, sheared(0.9), "axes are not at right angles: resample it"),
        (nibabel.Nifti2Image, np.eye(4), "save it as NIfTI-1"),
    ],
)
def test_an_image_that_the_models_reader_cannot_read_has_a_remedy(tmp_path, kind, affine, said):
    """Another reader's properties are not what this one writes a segmentation with."""
    path = save(tmp_path / "a_0000.nii.gz", LABELS.astype(np.float32), affine, kind=kind)
    with pytest.raises(InputError, match=f"a_0000.nii.gz: cannot be read as an image .*{said}") as caught:
        read_image([path], SimpleITKIO)
    assert "\n" not in str(caught.value)
    assert np.array_equal(read_image([path], SimpleITKIO, any_reader=True)[0][0], LABELS)


def test_stacks_of_tiff_are_read_wherever_flat_ones_are(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", LABELS[0])
    tifffile.imwrite(tmp_path / "b.tif", LABELS)
    assert np.array_equal(read_labels(tmp_path / "a.tif", NaturalImage2DIO, (0, 1, 2)).labels, LABELS[:1])
    assert np.array_equal(read_labels(tmp_path / "b.tif", NaturalImage2DIO, (0, 1, 2)).labels, LABELS)


def test_another_reader_reads_no_damaged_file(tmp_path):
    path = save(tmp_path / "a.nii.gz", LABELS, sheared(0.9))
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_labels(path, SimpleITKIO, (0, 1, 2))


def test_what_a_reader_says_of_formats_without_place():
    assert place_as_read({"spacing": (999, 1, 1)}).affine is None


def test_distances_and_volumes_where_axes_are_not_at_right_angles_are_those_of_the_voxels_as_they_lie(tmp_path, capsys):
    """Against all pairs of surface voxels, at the places that the affine gives them."""
    folders = Folders(tmp_path, {"background": 0, "a": 1})
    reference = np.zeros((7, 8, 9), np.uint8)
    reference[1:5, 2:6, 2:5] = 1
    prediction = np.zeros_like(reference)
    prediction[2:6, 2:6, 4:7] = 1
    for folder, labels in ((folders.reference, reference), (folders.prediction, prediction)):
        save(folder / "x.nii.gz", labels, sheared(0.9))
    assert main(folders.words) == 0
    (case,) = folders.summary()["metric_per_case"]

    def places(labels):
        inner = ndimage.binary_erosion(labels, ndimage.generate_binary_structure(3, 1))
        return np.argwhere((labels > 0) & ~inner)[:, ::-1] @ sheared(0.9)[:3, :3].T

    apart = np.linalg.norm(places(reference)[:, None] - places(prediction)[None], axis=2)
    both = np.concatenate([apart.min(axis=0), apart.min(axis=1)])
    assert case["metrics"]["1"]["HD"] == pytest.approx(both.max())
    assert case["metrics"]["1"]["ASSD"] == pytest.approx(both.mean())
    assert case["metrics"]["1"]["volume_ref_mm3"] == pytest.approx(48 * 1.0 * 1.5 * 2.0)  # shearing keeps volumes
    assert main([*folders.words, "--boundary"]) == 1
    assert "x.nii.gz: its axes are not at right angles" in capsys.readouterr().err


def test_a_place_whose_axes_are_reordered_lies_where_it_lay():
    affine = sheared(0.9)
    place = Place((float(np.linalg.norm(affine[:3, 2])), 1.5, 1.0), {}, affine)
    turned = place.with_axes((2, 0, 1))
    assert turned.spacing == (1.0, place.spacing[0], 1.5)
    voxel = np.array([1, 2, 3])  # of (z, y, x)
    there, here = affine @ [3, 2, 1, 1], turned.affine @ [*voxel[[2, 0, 1]][::-1], 1]
    assert here == pytest.approx(there)
    assert turned.oblique == pytest.approx(place.oblique[:, [2, 0, 1]])


def test_a_type_that_there_is_not_is_refused_where_the_file_is_read(tmp_path, capsys):
    """nibabel raises a KeyError."""
    folders = Folders(tmp_path)
    folders.add_ambiguous("x")
    (folders.prediction / "x.npz").unlink()
    path = folders.prediction / "x_probabilities.nii"
    nibabel.save(nibabel.Nifti1Image(np.full((12, 14, 6, 3), 1 / 3, np.float32), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[70:72] = (4096).to_bytes(2, "little")
    path.write_bytes(content)
    assert main(folders.words) == 1
    (failed,) = folders.summary()["failed"]
    assert "x_probabilities.nii: " in failed["error"]
    assert "Error:" not in capsys.readouterr().err
    assert main(["convert", str(folders.prediction), "-o", str(tmp_path / "c"), "--to", "compact"]) == 1
