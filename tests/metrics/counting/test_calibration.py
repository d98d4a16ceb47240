"""Calibration statistics and scores: literal values, the peers' vectors, netcal, and what peers get wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netcal.metrics import ECE

from nnunet_calib.metrics import (
    SCORES,
    bin_index,
    calibration_scores,
    calibration_statistics,
    expected_calibration_error,
    scores,
    smallest_probability,
)

from ...folders import assert_same

FILE = Path(__file__).parents[3].parent / "shared" / "vectors" / "metrics.json"
VECTORS = json.loads(FILE.read_text())["calibration"] if FILE.is_file() else {}


def everywhere(labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"volume": np.ones(labels.shape, dtype=bool)}


def statistics_of(probabilities, labels, **options):
    classes = options.pop("classes", range(len(probabilities)))
    return calibration_statistics(probabilities, labels, classes, everywhere(labels), **options)[0]["volume"]


def scores_of(probabilities, labels, **options):
    return scores(statistics_of(probabilities, labels, **options), [str(c) for c in range(len(probabilities))])


def softmax_noise(seed: int, classes: int, shape: tuple[int, ...], dtype=np.float32):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (classes, *shape))
    p = np.exp(logits - logits.max(axis=0))
    p = (p / p.sum(axis=0)).astype(dtype)
    flip = rng.random(shape) < 0.3
    return p, np.where(flip, rng.integers(0, classes, shape), p.argmax(axis=0)).astype(np.uint8)


@pytest.mark.skipif(not VECTORS, reason=f"the peers' vectors are not there: {FILE}")
def test_agrees_with_the_vectors():
    p = np.array(VECTORS["prob"], dtype=np.float32).reshape(VECTORS["shape"])
    ours = scores_of(p, np.array(VECTORS["label"]).reshape(VECTORS["shape"][1:]))
    netcal, monai, naive = (VECTORS["peers"][peer] for peer in ("netcal", "monai", "proto_numpy"))
    assert ours["ECE"] == pytest.approx(naive["ece"], abs=1e-12)
    assert ours["ECE"] == pytest.approx(netcal["ece"], abs=1e-9)
    assert ours["MCE"] == pytest.approx(netcal["MCE"], abs=1e-9)
    assert ours["ACE"] == pytest.approx(netcal["ACE_equal_mass"], abs=1e-9)  # misnamed: netcal's default is equal width
    assert ours["CECE"] == pytest.approx(np.mean(netcal["cwece"]), abs=1e-9)
    assert [ours["classes"][c]["ECE"] for c in "012"] == pytest.approx(netcal["cwece"], abs=1e-9)
    assert [ours["classes"][c]["ACE"] for c in "012"] == pytest.approx(monai["ace"], abs=1e-6)
    # float32 sums of the prototype that wrote the file
    assert ours["Brier"] == pytest.approx(VECTORS["peers"]["proto_numba"]["brier"], rel=1e-7)
    assert ours["NLL"] == pytest.approx(VECTORS["peers"]["proto_numba"]["nll"], rel=1e-7)


def test_four_voxels_by_hand():
    """Top label: .9 right, .6 wrong, .8 right, .5 right (first of equals); with 10 bins each in a bin of its own."""
    p = np.array([[0.9, 0.6, 0.2, 0.5], [0.1, 0.4, 0.8, 0.5]])
    ours = scores_of(p, np.array([0, 1, 1, 0]), bins=10)
    assert ours["ECE"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.5) / 4)
    assert ours["ACE"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.5) / 4)
    assert ours["MCE"] == pytest.approx(0.6)
    assert ours["CECE"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.5) / 4)
    assert ours["Brier"] == pytest.approx(2 * (0.01 + 0.36 + 0.04 + 0.25) / 4)
    assert ours["NLL"] == pytest.approx(-math.log(0.9 * 0.4 * 0.8 * 0.5) / 4)
    assert ours["n"] == 4
    assert ours["classes"]["0"]["NLL"] == pytest.approx(-math.log(0.9 * 0.5) / 2)
    assert ours["classes"]["0"]["n"] == 2


def test_regions_are_binary_problems():
    """Two overlapping regions over labels 1 and 2; by hand, each voxel in a bin of its own."""
    p = np.array([[0.9, 0.6, 0.2], [0.3, 0.7, 0.1]])
    ours = scores_of(p, np.array([1, 2, 0]), classes=[(1, 2), (2,)], multilabel=True, bins=10)
    first, second = (0.1 + 0.4 + 0.2) / 3, (0.3 + 0.3 + 0.1) / 3
    assert [ours["classes"][r]["ECE"] for r in "01"] == pytest.approx([first, second])
    assert ours["ECE"] == ours["CECE"] == pytest.approx((first + second) / 2)
    assert ours["Brier"] == pytest.approx((0.01 + 0.16 + 0.04 + 0.09 + 0.09 + 0.01) / 6)
    assert ours["NLL"] == pytest.approx(-math.log(0.9 * 0.6 * 0.8 * 0.7 * 0.7 * 0.9) / 6)


def test_agrees_with_netcal_on_half_a_million_voxels():
    p, labels = softmax_noise(1, 4, (500_000,))
    ours = scores_of(p, labels)
    per_class = [ECE(15).measure(channel.astype(np.float64), (labels == c).astype(int)) for c, channel in enumerate(p)]
    top = ECE(15).measure(p.max(axis=0).astype(np.float64), (p.argmax(axis=0) == labels).astype(int))
    assert ours["ECE"] == pytest.approx(top, abs=1e-9)
    assert [ours["classes"][str(c)]["ECE"] for c in range(4)] == pytest.approx(per_class, abs=1e-9)
    assert ours["CECE"] == pytest.approx(np.mean(per_class), abs=1e-9)


def test_counts_do_not_stop_at_2_to_the_24():
    """2e7 voxels, confidence .98, accuracy .99: ECE .01. MONAI and torchmetrics, counting in float32, say 0."""
    slab = 1_000_000
    labels = np.zeros(slab, dtype=np.uint8)
    labels[: slab // 100] = 1
    p = np.stack([np.full(slab, 0.98), np.full(slab, 0.02)])
    one = statistics_of(p, labels)
    whole = one
    for _ in range(19):
        whole = whole + one
    assert whole.voxels == 20_000_000
    assert scores(whole, "01")["ECE"] == pytest.approx(0.01, abs=1e-9)
    assert scores(whole, "01")["CECE"] == pytest.approx(0.01, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 499), multilabel=st.booleans())
def test_statistics_of_parts_add_up_to_those_of_the_whole(seed, cut, multilabel):
    p, labels = softmax_noise(seed, 3, (500,))
    parts = [
        statistics_of(p[:, part], labels[part], multilabel=multilabel) for part in (slice(None, cut), slice(cut, None))
    ]
    whole = scores(statistics_of(p, labels, multilabel=multilabel), "012")
    assert_same(scores(parts[0] + parts[1], "012"), whole)
    assert_same(scores(parts[1] + parts[0], "012"), whole)


def test_several_sets_of_voxels_at_once_equal_one_after_the_other():
    p, labels = softmax_noise(5, 3, (6, 7, 8))
    rng = np.random.default_rng(0)
    masks = {name: rng.random(labels.shape) < share for name, share in (("a", 0.9), ("b", 0.5), ("c", 0.1))}
    together, _ = calibration_statistics(p, labels, range(3), masks)
    for name, mask in masks.items():
        assert_same(scores(together[name], "012"), scores_of(p[:, mask], labels[mask]))


def test_a_generator_of_channels_is_read_one_by_one():
    p, labels = softmax_noise(6, 3, (4, 5, 6))
    assert_same(scores_of(p, labels), scores(_streamed(p, labels), "012"))


def _streamed(p, labels):
    return calibration_statistics((c for c in p), labels, range(3), everywhere(labels))[0]["volume"]


def test_the_top_label_is_the_first_of_equals():
    p = np.array([[0.4, 0.2], [0.4, 0.4], [0.2, 0.4]], dtype=np.float16)
    _, top = calibration_statistics(p, np.zeros(2, dtype=int), range(3), everywhere(np.zeros(2)))
    assert top.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bins_are_closed_below_and_one_is_in_the_last(dtype):
    """[k/4, (k+1)/4): quarters are exact in every float type."""
    edges = np.array([0, 0.25, 0.5, 0.75, 1], dtype=dtype)
    assert bin_index(edges, 4).tolist() == [0, 1, 2, 3, 3]
    assert bin_index(np.nextafter(edges[1:], dtype(0)), 4).tolist() == [0, 1, 2, 3]


def test_saturated_probabilities_are_kept():
    """p = 0 and p = 1 are voxels like others (MetricsReloaded drops the first, torchmetrics has a 16th bin)."""
    p = np.array([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=np.float32)
    ours = scores_of(p, np.array([0, 1, 1, 0]))
    assert ours["ECE"] == ours["CECE"] == 0.25
    assert ours["n"] == 4
    # one voxel of four is certain of the wrong label: -log of the smallest normal float32, 126 log 2
    assert ours["NLL"] == pytest.approx(126 * math.log(2) / 4)


def test_nll_is_clipped_where_the_stored_type_ends():
    assert smallest_probability(np.dtype(np.float16)) == 2.0**-24
    assert smallest_probability(np.dtype(np.float32)) == 2.0**-126
    p = np.array([[1.0], [0.0]], dtype=np.float16)
    assert scores_of(p, np.array([1]))["NLL"] == pytest.approx(24 * math.log(2))
    # a region's 1 - p ends at the spacing below 1: 2^-11 in float16
    assert scores_of(p[:1], np.array([0]), classes=[1], multilabel=True)["NLL"] == pytest.approx(11 * math.log(2))


def test_voxels_in_no_set_are_never_looked_at():
    p, labels = softmax_noise(7, 3, (50,))
    mask = {"volume": np.arange(50) < 30}
    clean = calibration_statistics(p, labels, range(3), mask)[0]["volume"]
    p[:, 30:] = np.nan
    dirty = calibration_statistics(p, labels, range(3), mask)[0]["volume"]
    assert_same(scores(dirty, "012"), scores(clean, "012"))


@pytest.mark.parametrize("multilabel", [False, True])
def test_no_voxels_have_no_scores(multilabel):
    p, labels = softmax_noise(8, 3, (5,))
    nothing = {"empty": np.zeros(5, dtype=bool)}
    empty = calibration_statistics(p, labels, range(3), nothing, multilabel=multilabel)[0]["empty"]
    result = scores(empty, "012")
    assert result["n"] == 0
    assert all(math.isnan(result[name]) for name in SCORES)


def test_absent_classes_still_count_in_cece():
    """A class no voxel has and no voxel is given is perfectly calibrated: CECE is the mean over three, not two."""
    two, labels = softmax_noise(9, 2, (200,))
    three = np.concatenate([two, np.zeros((1, 200), dtype=np.float32)])
    assert scores_of(three, labels)["CECE"] == pytest.approx(scores_of(two, labels)["CECE"] * 2 / 3)


def test_what_does_not_fit_is_refused():
    p, labels = softmax_noise(10, 3, (5,))
    with pytest.raises(ValueError, match="3 channels for 4 classes"):
        calibration_statistics(p, labels, range(4), everywhere(labels))
    with pytest.raises(ValueError, match="does not fit"):
        calibration_statistics(p, labels, range(2), everywhere(labels))
    with pytest.raises(ValueError, match="masks"):
        calibration_statistics(p, labels, range(3), {})
    with pytest.raises(ValueError, match="do not add up"):
        statistics_of(p, labels) + statistics_of(p, labels, multilabel=True)


def test_perfectly_calibrated_bins_have_no_error():
    statistics = statistics_of(np.array([[0.75] * 4, [0.25] * 4]), np.array([0, 0, 0, 1]))
    assert expected_calibration_error(statistics.top) == 0
    assert expected_calibration_error(statistics.classes).tolist() == [0, 0]


def test_over_and_underconfidence_are_the_parts_of_ece():
    """.9 wrong and .6 right, each in a bin of its own: .9 too confident, .4 not confident enough."""
    ours = scores_of(np.array([[0.9, 0.6], [0.1, 0.4]]), np.array([1, 0]), bins=10)
    assert ours["overconfidence"] == pytest.approx(0.9 / 2)
    assert ours["underconfidence"] == pytest.approx(0.4 / 2)
    assert ours["ECE"] == pytest.approx(ours["overconfidence"] + ours["underconfidence"])


def test_negligible_probabilities_are_left_out_of_tcece():
    """Class 0 keeps both voxels, class 1 one of two; of class 2 nothing is left, it adds 0 to the mean."""
    p = np.array([[0.9995, 0.6], [0.0005, 0.3995], [0.0, 0.0005]])
    ours = scores_of(p, np.array([0, 1]), bins=10)
    assert ours["classes"]["0"]["TECE"] == pytest.approx((0.0005 + 0.6) / 2)
    assert ours["classes"]["1"]["TECE"] == pytest.approx(1 - 0.3995)
    assert math.isnan(ours["classes"]["2"]["TECE"])
    assert ours["TCECE"] == pytest.approx((0.60050 / 2 + 0.6005) / 3)
    assert scores_of(p, np.array([0, 1]), bins=10, threshold=0.7)["classes"]["1"]["n"] == 1


def test_a_region_is_confident_in_its_decision():
    """p = .9 and .2 decide in and out with confidence .9 and .8; the second is wrong: risk 0, then 1/2."""
    ours = scores_of(np.array([[0.9, 0.2]]), np.array([1, 1]), classes=[1], multilabel=True)
    assert ours["AURC"] == pytest.approx(0.25, abs=1e-12)


def test_scores_of_an_array_in_one_call():
    p, labels = softmax_noise(11, 3, (400,))
    mask = np.arange(400) % 2 == 0
    inside = scores_of(p[:, mask], labels[mask])
    assert_same(calibration_scores(p, labels, mask=mask), inside)
    assert list(inside) == [*SCORES, "n", "classes"]


def test_needs_no_torch():
    code = "import sys, nnunet_calib.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
