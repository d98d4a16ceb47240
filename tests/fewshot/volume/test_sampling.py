"""Voxels of an annotated volume: their weights give back the volume, and the same seed the same voxels."""

import numpy as np
import pytest
from scipy import ndimage

from nnunet_calib.fewshot.volume.sampling import BANDS_MM, distance_band, sample_support

SPACING = (3.0, 1.0, 1.5)


def volume(seed: int = 0):
    """A structure of 2 % and three base classes."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(24, 60, 50)), 3)
    base = np.digitize(smooth, np.quantile(smooth, [0.5, 0.8]))
    structure = np.zeros(smooth.shape, dtype=bool)
    structure[8:14, 20:35, 10:24] = True
    return structure, base


def test_a_small_structure_is_taken_whole():
    structure, base = volume()
    index, weight = sample_support(structure, base, SPACING, voxels=4000)
    inside = structure.ravel()[index]
    assert inside.sum() == structure.sum()
    assert (weight[inside] == 1).all()
    assert index.size == 4000
    assert (np.diff(index) > 0).all()


def test_a_large_structure_is_half_of_the_sample():
    structure, base = volume()
    index, weight = sample_support(structure, base, SPACING, voxels=1000)
    inside = structure.ravel()[index]
    assert inside.sum() == 500
    assert weight[inside].sum() == pytest.approx(structure.sum())


def test_weights_add_up_to_the_volume_of_every_class_at_every_distance():
    structure, base = volume()
    index, weight = sample_support(structure, base, SPACING, voxels=2000)
    distance = ndimage.distance_transform_edt(~structure, sampling=SPACING)
    band = np.digitize(distance, BANDS_MM)
    assert weight.sum() == pytest.approx(structure.size)
    for c in range(3):
        for b in range(4):
            here = ~structure & (base == c) & (band == b)
            assert weight[here.ravel()[index]].sum() == pytest.approx(here.sum())


def test_sums_over_the_volume_are_estimated_without_bias():
    structure, base = volume()
    values = np.random.default_rng(1).normal(base, 1).ravel()
    estimates = []
    for seed in range(60):
        index, weight = sample_support(structure, base, SPACING, voxels=600, seed=seed)
        estimates.append(weight @ values[index])
    standard_error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - values.sum()) < 3 * standard_error


def test_the_same_seed_draws_the_same():
    structure, base = volume()
    first, second, other = (sample_support(structure, base, SPACING, voxels=900, seed=s)[0] for s in (4, 4, 5))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_voxels_that_do_not_count_are_not_drawn():
    structure, base = volume()
    valid = np.zeros(structure.shape, dtype=bool)
    valid[:, :25] = True
    index, weight = sample_support(structure, base, SPACING, valid, voxels=1500)
    assert valid.ravel()[index].all()
    assert weight.sum() == pytest.approx(valid.sum())


def test_bands_are_those_of_the_whole_volume_although_only_a_part_is_looked_at():
    structure = np.zeros((40, 90, 100), dtype=bool)
    structure[2:5, 60:70, 5:9] = True
    distance = ndimage.distance_transform_edt(~structure, sampling=SPACING)
    assert np.array_equal(distance_band(structure, SPACING), np.digitize(distance, BANDS_MM))


def test_an_empty_structure_is_refused():
    structure, base = volume()
    with pytest.raises(ValueError, match="no voxel of the structure"):
        sample_support(structure, base, SPACING, ~structure)
