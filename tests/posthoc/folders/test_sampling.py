"""Samples of voxels: unbiased, the same for the same seed, at borders, and small in memory."""

import numpy as np
import pytest

from nnunet_calib.data.cases import pair_cases
from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import choose_reader
from nnunet_calib.data.strata import draw
from nnunet_calib.metrics import BOUNDARY_MM, near_surface
from nnunet_calib.posthoc.folders.sampling import sample_case

from ...folders import Folders, write_labels
from ..predictions import SHAPE, predictions, region_predictions, too_sure


def sampled(made: Folders, **how):
    dataset = read_dataset(made.dataset_json)
    case = pair_cases(made.reference, made.prediction, dataset.file_ending)[0]
    return sample_case(case, dataset, choose_reader(dataset), **how)


def test_weights_add_up_to_the_voxels_of_each_stratum():
    strata = np.repeat([0, 1, 2, 4], [5, 100, 10_000, 300])
    index, weights = draw(strata, None, 405, np.random.default_rng(0))
    assert index.size == 405
    assert np.unique(index).size == 405
    assert [np.count_nonzero(strata[index] == s) for s in (0, 1, 2, 4)] == [5, 100, 150, 150]
    assert [weights[strata[index] == s].sum() for s in (0, 1, 2, 4)] == pytest.approx([5, 100, 10_000, 300])


def test_every_stratum_has_a_voxel_however_few_are_asked_for():
    strata = np.repeat(np.arange(20), [1_000, *range(1, 20)])
    index, weights = draw(strata, None, 12, np.random.default_rng(0))
    assert set(strata[index]) == set(range(20))
    assert weights.sum() == pytest.approx(strata.size)


def test_sums_over_the_volume_are_estimated_without_bias():
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 3, 20_000) ** 2
    values = rng.normal(strata, 1)
    estimates = []
    for seed in range(200):
        index, weights = draw(strata, None, 300, np.random.default_rng(seed))
        estimates.append(weights @ values[index])
    standard_error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - values.sum()) < 3 * standard_error


def test_the_whole_of_a_small_volume(tmp_path):
    made = predictions(tmp_path, 1)
    sample = sampled(made, voxels=10**6)
    reference, p = too_sure(0)
    assert np.array_equal(sample.index, np.arange(reference.size))
    assert (sample.weights == 1).all()
    assert np.array_equal(sample.target, reference.reshape(-1))
    assert np.array_equal(sample.probabilities, p.reshape(3, -1))
    assert np.array_equal(sample.regions["foreground"], ((reference != 0) | (p.argmax(axis=0) != 0)).reshape(-1))


@pytest.mark.parametrize("spacing", [(2.5, 1.0, 0.8), (9.0, 3.0, 4.0), (0.5, 0.05, 0.05)])
def test_the_boundary_is_that_of_the_evaluation(tmp_path, spacing):
    made = Folders(tmp_path)
    reference, p = too_sure(3)
    reference[:6] = 0
    made.add("case_00", reference, p.argmax(axis=0), p, spacing)
    sample = sampled(made, voxels=10**6)
    assert np.array_equal(sample.regions["boundary"], near_surface(reference, spacing, BOUNDARY_MM).reshape(-1))


def test_the_same_seed_draws_the_same_voxels(tmp_path):
    made = predictions(tmp_path, 1)
    one, same, other = (sampled(made, voxels=500, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.index, same.index)
    assert not np.array_equal(one.index, other.index)
    assert one.weights.sum() == pytest.approx(np.prod(SHAPE))


def test_regions_are_targets_of_their_own(tmp_path):
    sample = sampled(region_predictions(tmp_path, 1), voxels=10**6)
    labels = np.unique(sample.target, axis=1).T.tolist()
    assert sorted(labels) == [[False, False], [True, False], [True, True]]


def test_ignored_voxels_are_never_drawn(tmp_path):
    made = Folders(tmp_path, labels={"background": 0, "a": 1, "b": 2, "ignore": 3})
    reference, p = too_sure(0)
    ignored = np.random.default_rng(0).uniform(size=SHAPE) < 0.4
    made.add("case_00", np.where(ignored, 3, reference), p.argmax(axis=0), p)
    sample = sampled(made, voxels=2_000, patches=3)
    assert not ignored.reshape(-1)[sample.index].any()
    assert sample.weights.sum() == pytest.approx(np.count_nonzero(~ignored))
    assert sample.patches.regions["volume"].sum() < 0.7 * 3 * np.prod(SHAPE)
    write_labels(made.reference / "case_00.nii.gz", np.full(SHAPE, 3))
    with pytest.raises(InputError, match="every voxel has the ignore label"):
        sampled(made)


def test_patches_are_filled_up_beyond_the_edge(tmp_path):
    patches = sampled(predictions(tmp_path, 1), patches=2).patches
    assert patches.probabilities.shape == (3, 2, 24, 24, 24)
    assert not patches.regions["volume"][:, 12:].any()
    assert patches.regions["volume"][:, :12].all()


def test_flipped_probabilities_are_refused(tmp_path):
    made = Folders(tmp_path)
    reference, p = too_sure(0)
    made.add("case_00", reference, p.argmax(axis=0), p[:, :, ::-1])
    with pytest.raises(InputError, match="flipped or reordered"):
        sampled(made)
