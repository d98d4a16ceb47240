"""Distances of all structures of two label maps: by hand, by brute force, against the peers, and between backends."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary
from scipy import ndimage

from nnunet_calib.metrics import (
    SurfaceDistances,
    average_surface_distance,
    hausdorff,
    hausdorff_95,
    mean_average_surface_distance,
    structure_distances,
    surface,
    surface_dice,
    surface_distances,
)
from nnunet_calib.metrics.surface.surfels import corner_offsets, surfel_areas

FILE = Path(__file__).parents[3].parent / "shared" / "vectors" / "metrics.json"
VECTORS = json.loads(FILE.read_text())["cases"] if FILE.is_file() else {}
SHAPE = (12, 14, 16)

with_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
every_backend = pytest.mark.parametrize("backend", ["numpy", pytest.param("numba", marks=with_numba), "torch"])
every_surface = pytest.mark.parametrize("definition", ["voxel", "area"])


def box(*sides: slice) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[sides] = 1
    return mask


BOX = box(slice(3, 8), slice(3, 9), slice(3, 10))
# The recipes of the vectors' descriptions.
MASKS = {
    "1_shifted_box_iso": (BOX, box(slice(3, 8), slice(3, 9), slice(5, 12))),
    "4_single_voxels": (box(5, 6, 7), box(5, 6, 10)),
    "6_one_false_positive_voxel": (BOX, BOX | box(11, 13, 15)),
}


def label_maps(seed: int, shape: tuple[int, ...], labels: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two alike label maps of smooth, touching structures that reach the image edge."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(labels + 1)])
    other = fields + noise * np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1.0) for _ in fields])
    return fields.argmax(axis=0).astype(np.uint8), other.argmax(axis=0).astype(np.uint8)


def voxels_by_hand(mask: np.ndarray, spacing) -> tuple[np.ndarray, None]:
    return np.argwhere(surface(mask)) * spacing, None


def cells_by_hand(mask: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Every 2 x 2 (x 2) window of the mask in zeros."""
    inside = np.pad(mask, 1)
    code = np.zeros([length - 1 for length in inside.shape], dtype=int)
    for k, corner in enumerate(corner_offsets(mask.ndim)):
        code |= inside[tuple(slice(c, c + n) for c, n in zip(corner, code.shape, strict=True))].astype(int) << k
    mixed = (code > 0) & (code < (1 << (1 << mask.ndim)) - 1)
    return np.argwhere(mixed) * spacing, surfel_areas(spacing)[code[mixed]]


def by_brute_force(reference, prediction, structure, spacing, definition) -> SurfaceDistances:
    labels = structure if isinstance(structure, tuple) else (structure,)
    find = {"voxel": voxels_by_hand, "area": cells_by_hand}[definition]
    (ours, our_area), (theirs, their_area) = (
        find(np.isin(map_, labels), np.array(spacing)) for map_ in (reference, prediction)
    )
    apart = np.sqrt(((ours[:, None] - theirs[None]) ** 2).sum(axis=-1))
    return SurfaceDistances(
        apart.min(axis=1, initial=np.inf), apart.min(axis=0, initial=np.inf), our_area, their_area
    )  # fmt: skip


def assert_same(ours: SurfaceDistances, expected: SurfaceDistances, tolerance: float = 1e-9) -> None:
    for name in ("from_reference", "from_prediction", "reference_area", "prediction_area"):
        a, b = getattr(ours, name), getattr(expected, name)
        if b is None:
            assert a is None
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)


@every_surface
@every_backend
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(9, 8), (1, 9, 8), (7, 1, 8), (6, 7, 8), (2, 9, 9), (3, 1, 1), (5,) * 3]),
    step=st.tuples(*[st.sampled_from([0.4, 1.0, 2.3, 5.0])] * 3),
    noise=st.sampled_from([0.3, 5.0]),
    structures=st.sampled_from([[1, 2, 3], [3, 1], [(1, 2, 3), (2, 3), 3], [(1, 3), 2, 9], [0, 1]]),
)
def test_every_backend_agrees_with_all_pairs(definition, backend, seed, shape, step, noise, structures):
    reference, prediction = label_maps(seed, shape, 3, noise)
    spacing = step[: len(shape)]
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    flat = [labels.reshape([shape[axis] for axis in axes]) for labels in (reference, prediction)]
    found = structure_distances(reference, prediction, structures, spacing, surface=definition, backend=backend)
    for structure, ours in zip(structures, found, strict=True):
        assert_same(ours, by_brute_force(*flat, structure, [spacing[axis] for axis in axes], definition))


@every_surface
@every_backend
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9)])
def test_a_prediction_far_off_is_measured_exactly(definition, backend, spacing):
    """Beyond every probe; single voxels in two corners make the box large for so few points."""
    reference, prediction = (np.zeros((14, 40, 50), dtype=np.uint8) for _ in range(2))
    reference[2:6, 3:12, 3:12] = 1
    prediction[7:12, 28:36, 38:47] = 1
    reference[0, 39, 0] = prediction[13, 0, 49] = 1
    (found,) = structure_distances(reference, prediction, [1], spacing, surface=definition, backend=backend)
    assert_same(found, by_brute_force(reference, prediction, 1, spacing, definition))


@every_backend
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (9.0, 0.7, 0.9), (0.6, 5.0, 1.0), (2.0, 3.0, 0.3)])
@pytest.mark.parametrize("voxels", [12, 400])
def test_scattered_voxels_near_and_far_are_measured_exactly(backend, spacing, voxels):
    """Every distance from none to most of the image, along every axis, in one structure."""
    rng = np.random.default_rng(voxels)
    reference, prediction = (np.zeros((9, 30, 210), dtype=np.uint8) for _ in range(2))
    for labels in (reference, prediction):
        labels[tuple(rng.integers(0, labels.shape, (voxels, 3)).T)] = 1
    prediction[:, :, 60:] &= reference[:, :, 60:]
    (found,) = structure_distances(reference, prediction, [1], spacing, backend=backend)
    assert_same(found, by_brute_force(reference, prediction, 1, spacing, "voxel"))


@every_surface
@every_backend
def test_many_labels_in_uint16_and_wide_integers(definition, backend):
    reference, prediction = label_maps(1, (8, 20, 20), 40, 0.5)
    structures = list(range(1, 41))
    options = {"spacing": (2.0, 1.0, 1.0), "surface": definition, "backend": backend}
    expected = structure_distances(reference, prediction, structures, **options)
    new = np.concatenate([[0], np.random.default_rng(0).permutation(np.arange(200, 60_000, 1000))[:40]])
    for kind in (np.uint16, np.int64):
        maps = (new[labels].astype(kind) for labels in (reference, prediction))
        for a, b in zip(structure_distances(*maps, new[1:].tolist(), **options), expected, strict=True):
            assert_same(a, b, tolerance=0)


def test_one_pass_gives_what_a_mask_each_gives():
    reference, prediction = label_maps(2, (6, 15, 16), 3, 0.5)
    found = structure_distances(reference, prediction, [1, (2, 3), 2], (3.0, 1.0, 1.0))
    for ours, members in zip(found, [(1,), (2, 3), (2,)], strict=True):
        masks = (np.isin(labels, members) for labels in (reference, prediction))
        assert_same(ours, surface_distances(*masks, (3.0, 1.0, 1.0)), tolerance=0)


@every_surface
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.1, 3.0]), shift=st.integers(1, 4))
def test_symmetric_translation_invariant_and_proportional_to_spacing(definition, seed, factor, shift):
    reference, prediction = (np.pad(labels, 5) for labels in label_maps(seed, (4, 6, 7), 2, 1.0))

    def readings(a, b, step=1.0):
        measured = structure_distances(a, b, [1, 2], (step,) * 3, surface=definition)
        return [
            (hausdorff(d), average_surface_distance(d), mean_average_surface_distance(d), surface_dice(d, 1.5 * step))
            for d in measured
        ]

    expected = np.array(readings(reference, prediction))
    moved = (np.roll(labels, shift, axis=(0, 1, 2)) for labels in (reference, prediction))
    np.testing.assert_allclose(readings(prediction, reference), expected, rtol=1e-12)
    np.testing.assert_allclose(readings(*moved), expected, rtol=1e-12)
    scaled = expected * [factor, factor, factor, 1]
    np.testing.assert_allclose(readings(reference, prediction, factor), scaled, rtol=1e-9)


@pytest.mark.skipif(not VECTORS, reason=f"the peers' vectors are not there: {FILE}")
@pytest.mark.parametrize("name", MASKS)
def test_areas_agree_with_the_vectors_of_deepmind(name):
    expected = VECTORS[name]["peers"]["deepmind"]
    (distances,) = structure_distances(*MASKS[name], [1], (1.0, 1.0, 1.0), surface="area")
    assert hausdorff(distances) == pytest.approx(expected["hd"], abs=1e-5)
    assert hausdorff_95(distances) == pytest.approx(expected["hd95"], abs=1e-5)
    assert average_surface_distance(distances) == pytest.approx(expected["assd"], abs=1e-5)
    assert surface_dice(distances, 1.0) == pytest.approx(expected["nsd"], abs=1e-5)


def test_area_of_a_cube_and_length_of_a_square():
    """4 voxels a side: a cube with its edges and corners cut off. Per corner a triangle of sqrt(3)/8 and per edge
    3 pieces of sqrt(2)/2 x 1; faces 3 x 3 whole cells. In 2D: 4 sides of 3 and 4 corners of sqrt(2)/2.
    """
    cube = np.zeros((8, 8, 8), dtype=bool)
    cube[2:6, 2:6, 2:6] = True
    area = surface_distances(cube, cube, (1, 1, 1), surface="area").reference_area
    assert area.sum() == pytest.approx(6 * 9 + 12 * 3 * math.sqrt(2) / 2 + 8 * math.sqrt(3) / 8)
    length = surface_distances(cube[3], cube[3], (1, 1), surface="area").reference_area
    assert length.sum() == pytest.approx(4 * 3 + 4 * math.sqrt(2) / 2)


def test_areas_of_a_corner_of_three_voxels():
    """The triangle over the three and the trapezoid beside it, from DeepMind's table: 1/2 + sqrt(3)/4 + sqrt(3)/8."""
    corners = [(1, 1, 1), (1, 1, 0), (1, 0, 1)]
    code = sum(1 << corner_offsets(3).index(corner) for corner in corners)
    assert surfel_areas((1, 1, 1))[code] == pytest.approx(0.5 + math.sqrt(3) / 4 + math.sqrt(3) / 8)
    assert surfel_areas((1, 1, 1))[255 - code] == pytest.approx(surfel_areas((1, 1, 1))[code])
    assert surfel_areas((1, 1, 1))[[0, 255]].tolist() == [0, 0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.tuples(*[st.sampled_from([0.4, 1.0, 2.3])] * 3))
def test_pooled_percentile_and_averages_agree_with_medpy(seed, spacing):
    reference, prediction = label_maps(seed, (7, 11, 12), 1, 0.6)
    distances = surface_distances(reference == 1, prediction == 1, spacing)
    masks = prediction == 1, reference == 1
    assert hausdorff_95(distances, "pooled") == pytest.approx(binary.hd95(*masks, spacing), abs=1e-9)
    assert hausdorff(distances) == pytest.approx(binary.hd(*masks, spacing), abs=1e-9)
    assert average_surface_distance(distances) == pytest.approx(binary.assd(*masks, spacing), abs=1e-9)
    directed = binary.asd(*masks, spacing), binary.asd(*masks[::-1], spacing)
    assert mean_average_surface_distance(distances) == pytest.approx(sum(directed) / 2, abs=1e-9)


@pytest.mark.parametrize("percentile", [0, 5, 50, 95, 99.9])
@pytest.mark.parametrize("values", [np.zeros(40), np.repeat([0.0, 1.0, 7.5], [90, 9, 2]), np.linspace(0, 5, 57) ** 2])
def test_percentiles_are_those_of_numpy(values, percentile):
    distances = SurfaceDistances(values, values[::-1])
    expected = np.percentile(values, percentile)
    assert hausdorff(distances, percentile) == pytest.approx(expected, abs=1e-12)


def test_percentiles_by_hand():
    plain = SurfaceDistances(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.0, 10.0]))
    assert hausdorff(plain) == hausdorff(plain, rule="pooled") == 10
    assert hausdorff(plain, 50) == 5  # the larger of 2 and 5
    assert hausdorff(plain, 50, "pooled") == 2  # 0 0 1 2 3 4 10
    assert average_surface_distance(plain) == 20 / 7
    assert mean_average_surface_distance(plain) == (2 + 5) / 2
    weighted = SurfaceDistances(np.array([3.0, 1.0]), np.array([2.0]), np.array([1.0, 9.0]), np.array([5.0]))
    assert hausdorff(weighted, 90) == 2  # 90 % of the reference's area lies within 1
    assert hausdorff(weighted, 91) == 3
    assert hausdorff(weighted, 90, "pooled") == 2  # 9 of 15 within 1, 14 within 2
    assert average_surface_distance(weighted) == (3 + 9 + 10) / 15
    assert mean_average_surface_distance(weighted) == (1.2 + 2) / 2
    assert surface_dice(weighted, 2) == 14 / 15


@every_surface
@every_backend
def test_empty_structures_are_never_good(definition, backend):
    nothing, absent = np.zeros_like(BOX), 7
    options = {"spacing": (1, 1, 1), "surface": definition, "backend": backend}
    for maps in ((BOX, nothing), (nothing, BOX)):
        missed, both_empty = structure_distances(*maps, [1, absent], **options)
        for read in (average_surface_distance, mean_average_surface_distance, hausdorff, hausdorff_95):
            assert read(missed) == math.inf
            assert math.isnan(read(both_empty))
        assert hausdorff(missed, 50, "pooled") == math.inf
        assert surface_dice(missed, 1.0) == 0
        assert math.isnan(surface_dice(both_empty, 1.0))
        (flat,) = structure_distances(nothing[0], nothing[0], [1], (1, 1), surface=definition, backend=backend)
        assert flat.both_empty
    assert structure_distances(BOX, BOX, [], (1, 1, 1)) == []


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        structure_distances(BOX, BOX[1:], [1], (1, 1, 1))
    with pytest.raises(ValueError, match="integers"):
        structure_distances(BOX.astype(float), BOX, [1], (1, 1, 1))
    with pytest.raises(ValueError, match="negative"):
        structure_distances(BOX.astype(int) - 1, BOX, [1], (1, 1, 1))
    with pytest.raises(ValueError, match="surface 'mesh' is not one of voxel, area"):
        structure_distances(BOX, BOX, [1], (1, 1, 1), surface="mesh")
    with pytest.raises(ValueError, match="backend"):
        structure_distances(BOX, BOX, [1], (1, 1, 1), backend="fortran")
    (distances,) = structure_distances(BOX, BOX, [1], (1, 1, 1))
    with pytest.raises(ValueError, match="percentile"):
        hausdorff(distances, 101)
    with pytest.raises(ValueError, match="rule"):
        hausdorff_95(distances, "mean")


def test_without_numba_auto_is_numpy_and_numba_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_same(*structure_distances(BOX, BOX, [1], (1, 1, 1)), surface_distances(BOX, BOX, (1, 1, 1)))
    with pytest.raises(ImportError, match=r"nnunet-calib\[fast\]"):
        structure_distances(BOX, BOX, [1], (1, 1, 1), backend="numba")


def test_importing_and_measuring_masks_in_numpy_needs_neither_numba_nor_torch():
    code = (
        "import sys, numpy as np; from nnunet_calib import metrics; m = np.ones((3, 4, 5), np.uint8);"
        "metrics.structure_distances(m, m, [1], (1, 1, 1), backend='numpy');"
        "sys.exit(bool({'numba', 'torch'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@with_numba
def test_numba_works_where_nothing_can_be_cached(tmp_path):
    """Neither beside the source, read as from an archive, nor in a home folder."""
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = [];"
        "import numpy as np; from nnunet_calib.metrics import structure_distances, hausdorff;"
        "a = np.zeros((9, 9), int); b = a.copy(); a[1, 1] = b[8, 8] = 1;"
        "print(hausdorff(*structure_distances(a, b, [1], (3., 4.), backend='numba')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=240, capture_output=True, text=True)
    assert float(done.stdout) == 35.0
