import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion

from nnunet_calib.demo import phantom


@pytest.fixture(scope="module")
def case():
    return phantom.make_case(reader=2, rng=np.random.default_rng(7))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    written = []
    phantom.write_dataset(folder / "raw", folder / "readers", seed=3, tick=written.append)
    assert written == list(range(1, 29))
    return folder


def test_the_same_seed_gives_the_same_voxels(case):
    again = phantom.make_case(reader=2, rng=np.random.default_rng(7))
    for name in ("image", "label", "fractions"):
        np.testing.assert_array_equal(getattr(case, name), getattr(again, name))


def test_another_seed_gives_another_case(case):
    other = phantom.make_case(reader=2, rng=np.random.default_rng(8))
    assert not np.array_equal(case.label, other.label)


def test_shapes_and_types(case):
    assert (case.image.shape, case.image.dtype) == ((32, 40, 40), np.float32)
    assert (case.label.shape, case.label.dtype) == ((32, 40, 40), np.uint8)
    assert (case.fractions.shape, case.fractions.dtype) == ((3, 32, 40, 40), np.float32)


def test_fractions_are_a_distribution_over_classes_in_eighths(case):
    np.testing.assert_array_equal(case.fractions.sum(axis=0), 1)
    np.testing.assert_array_equal(case.fractions * 8, np.round(case.fractions * 8))


def test_borders_are_ambiguous_and_only_borders(case):
    ambiguous = case.fractions.max(axis=0) < 1
    majority = case.fractions.argmax(axis=0)
    assert 0.05 < ambiguous.mean() < 0.2
    for label in (1, 2):
        inside = majority == label
        border = inside & ~binary_erosion(inside)
        core = binary_erosion(inside, iterations=5)
        assert ambiguous[border].mean() > 0.8
        assert core.any()
        assert ambiguous[core].mean() < 0.05


def test_the_label_is_possible_and_follows_the_readers_fraction():
    """Over all readers, a class is drawn exactly as often as its fraction says: the fractions are the truth."""
    cases = [phantom.make_case(reader, np.random.default_rng(5)) for reader in range(phantom.READERS)]
    for label in phantom.LABELS.values():
        drawn = np.mean([case.label == label for case in cases], axis=0)
        np.testing.assert_allclose(drawn, cases[0].fractions[label])


def test_a_generous_reader_draws_larger_structures():
    strict, generous = (phantom.make_case(reader, np.random.default_rng(5)).label for reader in (0, 7))
    assert (generous > 0).sum() > 1.1 * (strict > 0).sum()


def test_the_image_is_blurred_where_readers_differ(case):
    """The intensity of the organ's border lies between those of background (0) and organ (1)."""
    half = (case.fractions[1] > 0.3) & (case.fractions[1] < 0.7) & (case.fractions[2] == 0)
    assert case.image[half].mean() == pytest.approx(0.5, abs=0.15)


def test_the_dataset_is_a_raw_dataset_of_nnunet(dataset):
    description = json.loads((dataset / "raw" / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "organ": 1, "node": 2}
    assert description["numTraining"] == 16
    assert description["channel_names"] == {"0": "MRI"}
    for part, cases in (("Tr", 16), ("Ts", 12)):
        images = sorted(file.name for file in (dataset / "raw" / f"images{part}").iterdir())
        labels = sorted(file.name for file in (dataset / "raw" / f"labels{part}").iterdir())
        assert images == [label.replace(".nii.gz", "_0000.nii.gz") for label in labels]
        assert len(labels) == cases


def test_every_label_map_has_all_labels_and_the_images_geometry(dataset):
    for part in ("Tr", "Ts"):
        for file in (dataset / "raw" / f"labels{part}").iterdir():
            label = sitk.ReadImage(str(file))
            name = file.name.replace(".nii.gz", "_0000.nii.gz")
            image = sitk.ReadImage(str(dataset / "raw" / f"images{part}" / name))
            assert label.GetSpacing() == image.GetSpacing() == pytest.approx((0.9, 0.9, 1.2))
            assert label.GetSize() == image.GetSize() == (40, 40, 32)
            assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, 1, 2}


def test_readers_stand_beside_as_predictions_do(dataset):
    for part in ("Tr", "Ts"):
        for file in (dataset / "raw" / f"labels{part}").iterdir():
            beside = dataset / "readers" / f"labels{part}" / file.name
            with np.load(beside.with_name(file.name.replace(".nii.gz", ".npz")), allow_pickle=False) as stored:
                fractions = stored["probabilities"]
            majority = sitk.GetArrayFromImage(sitk.ReadImage(str(beside)))
            label = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            np.testing.assert_array_equal(majority, fractions.argmax(axis=0))
            assert np.take_along_axis(fractions, label[None].astype(int), axis=0).min() > 0


def test_the_whole_dataset_repeats_with_its_seed(dataset, tmp_path):
    phantom.write_dataset(tmp_path / "raw", tmp_path / "readers", seed=3)
    for name in ("imagesTr/demo_001_0000.nii.gz", "labelsTs/demo_028.nii.gz"):
        one, two = (sitk.GetArrayFromImage(sitk.ReadImage(str(root / "raw" / name))) for root in (dataset, tmp_path))
        np.testing.assert_array_equal(one, two)
