"""Surface distances: literal values, the peers' vectors, MONAI, and the cases in which peers go wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from nnunet_calib.metrics import (
    average_surface_distance,
    hausdorff,
    hausdorff_95,
    near_surface,
    surface,
    surface_dice,
    surface_distances,
)
from nnunet_calib.metrics.surface.boundary import surface_of_any

FILE = Path(__file__).parents[3].parent / "shared" / "vectors" / "metrics.json"
VECTORS = json.loads(FILE.read_text())["cases"] if FILE.is_file() else {}
SHAPE = (12, 14, 16)


def box(*sides: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[sides] = True
    return mask


def numbers(reference, prediction, spacing=(1.0, 1.0, 1.0), tolerance=1.0) -> dict[str, float]:
    distances = surface_distances(reference, prediction, spacing)
    return {
        "hd": hausdorff(distances),
        "hd95": hausdorff_95(distances),
        "assd": average_surface_distance(distances),
        "nsd": surface_dice(distances, tolerance),
    }


def of_monai(reference, prediction, spacing, tolerance=1.0) -> dict[str, float]:
    y, y_pred = (torch.from_numpy(mask[None, None].copy()) for mask in (reference, prediction))
    options = {"y_pred": y_pred, "y": y, "include_background": True, "spacing": list(spacing)}
    return {
        "hd": float(compute_hausdorff_distance(**options)),
        "hd95": float(compute_hausdorff_distance(**options, percentile=95)),
        "assd": float(compute_average_surface_distance(**options, symmetric=True)),
        "nsd": float(compute_surface_dice(**options, class_thresholds=[tolerance])),
    }


BOX = box(slice(3, 8), slice(3, 9), slice(3, 10))
# The recipes of the vectors' descriptions.
MASKS = {
    "1_shifted_box_iso": (BOX, box(slice(3, 8), slice(3, 9), slice(5, 12))),
    "4_single_voxels": (box(5, 6, 7), box(5, 6, 10)),
    "6_one_false_positive_voxel": (BOX, BOX | box(11, 13, 15)),
}


@pytest.mark.skipif(not VECTORS, reason=f"the peers' vectors are not there: {FILE}")
@pytest.mark.parametrize("name", MASKS)
def test_agrees_with_the_vectors_of_monai(name):
    expected = {number: VECTORS[name]["peers"]["monai"][number] for number in ("hd", "hd95", "assd", "nsd")}
    assert numbers(*MASKS[name]) == pytest.approx(expected, abs=1e-5)


def test_a_shifted_box():
    """MetricsReloaded and medpy say the same (vectors: 1_shifted_box_iso)."""
    expected = {"hd": 2.0, "hd95": 2.0, "assd": 0.6133333333333333, "nsd": 0.7866666666666666}
    assert numbers(*MASKS["1_shifted_box_iso"]) == pytest.approx(expected, abs=1e-12)


def test_two_voxels_apart_by_an_anisotropic_diagonal():
    """sqrt((2*3)^2 + (1*4)^2 + 0) = sqrt(52)."""
    result = numbers(box(2, 5, 5), box(4, 6, 5), spacing=(3.0, 4.0, 0.5), tolerance=7.2)
    assert result == pytest.approx({"hd": math.sqrt(52), "hd95": math.sqrt(52), "assd": math.sqrt(52), "nsd": 0.0})


def test_a_missed_structure_is_infinitely_far():
    nothing = np.zeros(SHAPE, dtype=bool)
    worst = {"hd": math.inf, "hd95": math.inf, "assd": math.inf, "nsd": 0.0}
    assert numbers(BOX, nothing) == worst
    assert numbers(nothing, BOX) == worst


def test_nothing_in_either_is_nothing_to_score():
    nothing = np.zeros(SHAPE, dtype=bool)
    assert all(math.isnan(value) for value in numbers(nothing, nothing).values())


def test_identical_structures_are_perfect():
    assert numbers(BOX, BOX) == {"hd": 0.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0}


def test_beyond_the_image_edge_is_outside():
    whole = np.ones((4, 5, 6), dtype=bool)
    assert np.count_nonzero(surface(whole)) == 4 * 5 * 6 - 2 * 3 * 4


def test_a_single_slice_is_a_2d_image():
    rng = np.random.default_rng(3)
    flat = [ndimage.gaussian_filter(rng.normal(size=(20, 25)), 2) > 0 for _ in range(2)]
    expected = of_monai(*flat, spacing=(1.5, 0.7))
    assert numbers(*flat, spacing=(1.5, 0.7)) == pytest.approx(expected, abs=1e-5)
    assert numbers(*(mask[None] for mask in flat), spacing=(999.0, 1.5, 0.7)) == pytest.approx(expected, abs=1e-5)


def test_one_voxel_images():
    voxel = np.ones((1, 1, 1), dtype=bool)
    assert numbers(voxel, voxel) == {"hd": 0.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0}
    assert numbers(voxel, ~voxel)["hd"] == math.inf


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spacing=st.tuples(*[st.sampled_from([0.4, 1.0, 2.3, 5.0])] * 3),
    noise=st.sampled_from([0.05, 0.3, 2.0]),
)
def test_agrees_with_monai(seed, spacing, noise):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(9, 15, 13)), 2) * 8
    reference = field > 0.5
    prediction = field + ndimage.gaussian_filter(rng.normal(size=field.shape), 1) * noise > 0.6
    if reference.any() and prediction.any():
        expected = of_monai(reference, prediction, spacing)
        assert numbers(reference, prediction, spacing) == pytest.approx(expected, rel=1e-6, abs=1e-5)  # float32


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.1, 3.0]), shift=st.integers(1, 4))
def test_symmetric_translation_invariant_and_proportional_to_spacing(seed, factor, shift):
    rng = np.random.default_rng(seed)
    reference, prediction = (np.pad(rng.random((4, 5, 6)) < 0.3, 5) for _ in range(2))
    expected = numbers(reference, prediction)
    moved = (np.roll(mask, shift, axis=(0, 1, 2)) for mask in (reference, prediction))
    scaled = numbers(reference, prediction, (factor,) * 3, tolerance=factor)
    assert numbers(prediction, reference) == pytest.approx(expected)
    assert numbers(*moved) == pytest.approx(expected)
    assert scaled == pytest.approx({k: v if k == "nsd" else v * factor for k, v in expected.items()})


def test_rounding_of_the_spacing_does_not_decide_who_is_within_the_tolerance():
    """Ten voxels of 0.1 mm are 1 mm, also where the header says float32(0.1) = 0.100000001."""
    reference, prediction = box(5, 5, 3), box(5, 5, 13)
    for step in (0.1, float(np.float32(0.1))):
        assert numbers(reference, prediction, (step,) * 3, tolerance=1.0)["nsd"] == 1.0


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        surface_distances(BOX, BOX[1:], (1, 1, 1))
    with pytest.raises(ValueError, match="spacing"):
        surface_distances(BOX, BOX, (1, 0, 1))
    with pytest.raises(ValueError, match="tolerance"):
        surface_dice(surface_distances(BOX, BOX, (1, 1, 1)), -1.0)


def test_near_surface_is_the_ball_around_it():
    """3 mm around one voxel, spacing (2, 1, 1): 29 offsets in the plane, 2 x 21 one slice away (4 + y^2 + x^2 <= 9)."""
    labels = np.zeros((7, 11, 11), dtype=np.uint8)
    labels[3, 5, 5] = 1
    near = near_surface(labels, (2.0, 1.0, 1.0), 3.0)
    assert [int(near[z].sum()) for z in range(7)] == [0, 0, 21, 29, 21, 0, 0]


@pytest.mark.parametrize("spacing", [(2.0, 0.8, 0.8), (0.5, 0.5, 0.5), (0.06, 0.06, 0.06), (7.0, 1.2, 1.2)])
def test_near_surface_is_what_distances_say(spacing):
    """By scipy's exact distances; the third spacing is as fine as makes distances the faster way."""
    labels = (ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(18, 60, 22)), 3) > 0.03).astype(np.uint8)
    labels[:, 20:] = 0
    labels[9:] *= 2
    distance = ndimage.distance_transform_edt(~surface_of_any(labels), sampling=spacing)
    near = near_surface(labels, spacing, 1.5)
    assert 0 < near.mean() < 1
    assert np.array_equal(near, distance <= 1.5)
    for planes in (slice(3, 7), slice(0, 1), slice(17, None)):
        assert np.array_equal(near_surface(labels, spacing, 1.5, planes), near[planes])


def test_near_surface_of_a_structure_in_one_slice_is_all_of_it():
    labels = np.zeros((3, 5, 5), dtype=np.uint8)
    labels[1, 1:4, 1:4] = 1
    assert np.array_equal(near_surface(labels, (1.0, 1.0, 1.0), 0.0), labels == 1)


def test_near_surface_knows_borders_between_structures_and_empty_references():
    labels = np.repeat([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]], 10, axis=0)
    assert near_surface(labels, (1.0, 1.0), 0.0)[5].tolist() == [True, *[False] * 3, True, True, *[False] * 3, True]
    assert not near_surface(np.zeros((3, 4, 5), dtype=np.uint8), (1.0, 1.0, 1.0), 3.0).any()
