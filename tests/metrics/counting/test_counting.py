"""Counting in numpy, numba and torch: the same statistics, whatever the type, the order, the split or the sets."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_calib import metrics
from nnunet_calib.metrics import calibration_statistics, scores
from nnunet_calib.metrics.counting.rules import CELLS

from ...folders import assert_same

BACKENDS = ("numpy", "numba", "torch")
NAMES = ["0", "1", "2"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    pytest.importorskip(request.param)
    return request.param


def volume(seed: int, dtype=np.float32, multilabel: bool = False, size: int = 3000):
    """Probabilities with many zeros and ones, runs of equal labels, three overlapping sets and ignored NaN voxels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 3, size // 60), 60).astype(np.uint8)
    logits = rng.normal(0, 3, (3, size)) + 5 * (np.arange(3)[:, None] == labels) * (rng.random(size) < 0.9)
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    p = (np.round(p, 3) if seed % 2 else p).astype(dtype)
    if multilabel:
        p = p[::-1].copy()
    masks = {"most": np.ones(size, dtype=bool), "foreground": labels != 0, "some": rng.random(size) < 0.5}
    ignored = np.arange(size) // 100 % 7 == 3
    p[:, ignored] = np.nan
    return p, labels, {name: mask & ~ignored for name, mask in masks.items()}


def statistics(p, labels, masks, **options):
    classes = [(1, 2), (2,), (0, 1)] if options.get("multilabel") else range(3)
    return calibration_statistics(p, labels, classes, masks, **options)


def assert_same_statistics(ours, theirs, rel=1e-12):
    assert ours.voxels == theirs.voxels
    for name in ("classes", "negligible", "ranked") + (() if ours.top is None else ("top",)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(mine.n, other.n, err_msg=name)
        np.testing.assert_array_equal(mine.correct, other.correct, err_msg=name)
        np.testing.assert_allclose(mine.confidence, other.confidence, rtol=rel, err_msg=name)
    np.testing.assert_allclose(ours.squared_error, theirs.squared_error, rtol=rel)
    np.testing.assert_allclose(ours.log_loss, theirs.log_loss, rtol=rel, atol=1e-12)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_backends_count_the_same(backend, dtype, multilabel):
    for seed in range(4):
        p, labels, masks = volume(seed, dtype, multilabel)
        expected, top = statistics(p, labels, masks, multilabel=multilabel, backend="numpy")
        for channels in (p, (channel for channel in p)):
            ours, ours_top = statistics(channels, labels, masks, multilabel=multilabel, backend=backend)
            for name in masks:
                assert_same_statistics(ours[name], expected[name])
            if not multilabel:
                inside = masks["most"]
                assert np.array_equal(ours_top[inside], top[inside])


def smooth_volume(seed: int, dtype=np.float32, size: int = 20_000):
    """As a network's: long runs of labels and sets; p close to 0 or 1, or just that; here and there others.

    The more ``seed``, the more p differ from voxel to voxel.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(0, 3, size), rng.integers(1, 2000, size))[:size].astype(np.uint8)
    logits = 6 * (np.arange(3)[:, None] == labels) + rng.normal(0, 0.3 + seed / 2, (3, size)) + rng.normal(0, 1, (3, 1))
    unusual = rng.integers(0, size, size // 500)
    logits[:, unusual] = rng.normal(0, 9, (3, unusual.size))
    logits *= np.where(np.arange(size) // 700 % 3 == 0, 40, 1)
    p = np.exp(logits - logits.max(axis=0))
    masks = {name: np.arange(size) // run % 4 != 2 for name, run in (("some", 901), ("others", 477))}
    return (p / p.sum(axis=0)).astype(dtype), labels, masks


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("bins", "threshold"), [(3, 0.001), (15, 0.001), (40, 0.2)])
def test_voxels_that_are_alike_are_counted_together_and_the_same(backend, dtype, multilabel, bins, threshold):
    """Against the plain sums of every voxel on its own."""
    for seed in range(4):
        p, labels, masks = smooth_volume(seed, dtype)
        options = {"multilabel": multilabel, "bins": bins, "threshold": threshold}
        ours, top = statistics(p, labels, masks, backend=backend, **options)
        classes = [(1, 2), (2,), (0, 1)] if multilabel else [(0,), (1,), (2,)]
        for name, mask in masks.items():
            q, inside = p[:, mask].astype(np.float64), labels[mask]
            for c, of_class in enumerate(classes):
                y, counted = np.isin(inside, of_class), ours[name].classes[c]
                index = np.minimum((q[c] * bins).astype(int), bins - 1)
                assert counted.n.tolist() == np.bincount(index, minlength=bins).tolist()
                assert counted.correct.tolist() == np.bincount(index, y, bins).tolist()
                np.testing.assert_allclose(counted.confidence, np.bincount(index, q[c], bins), rtol=1e-12, atol=1e-11)
                few, small = ours[name].negligible[c], q[c] <= dtype(threshold)
                cells, index = few.n.size, index[small]
                assert few.n.tolist() == np.bincount(index, minlength=cells).tolist()
                assert few.correct.tolist() == np.bincount(index, y[small], cells).tolist()
                sums = np.bincount(index, q[c][small], cells)
                np.testing.assert_allclose(few.confidence, sums, rtol=1e-12, atol=1e-11)
                np.testing.assert_allclose(ours[name].squared_error[c], np.square(q[c] - y).sum(), rtol=1e-12)
                least = metrics.smallest_probability(np.dtype(dtype))
                log = np.log(np.maximum(q[c][y], least)).sum()
                if multilabel:
                    log += np.log(np.maximum(1 - q[c][~y], np.finfo(dtype).epsneg)).sum()
                np.testing.assert_allclose(ours[name].log_loss[c], -log, rtol=1e-11, atol=1e-11)
            if not multilabel:
                assert np.array_equal(top[mask], q.argmax(axis=0))
                index = np.minimum((q.max(axis=0) * bins).astype(int), bins - 1)
                hit = inside == q.argmax(axis=0)
                assert ours[name].top.n.tolist() == np.bincount(index, minlength=bins).tolist()
                assert ours[name].top.correct.tolist() == np.bincount(index, hit, bins).tolist()
                np.testing.assert_allclose(ours[name].top.confidence, np.bincount(index, q.max(axis=0), bins))
                cells = metrics.confidence_cell(1 - q.max(axis=0))
                assert ours[name].ranked.n.tolist() == np.bincount(cells, minlength=CELLS).tolist()
                assert ours[name].ranked.correct.tolist() == np.bincount(cells, hit, CELLS).tolist()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 900), max_size=4), multilabel=st.booleans())
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_any_split_in_any_order_adds_up_to_the_whole(name, seed, cuts, multilabel):
    pytest.importorskip(name)
    p, labels, masks = volume(seed, multilabel=multilabel, size=900)
    options = {"multilabel": multilabel, "backend": name}
    borders = [0, *sorted(cuts), 900]
    parts = [slice(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True) if b > a]
    np.random.default_rng(seed).shuffle(parts)
    pieces = [
        statistics(p[:, part], labels[part], {k: m[part] for k, m in masks.items()}, **options)[0] for part in parts
    ]
    whole, _ = statistics(p, labels, masks, **options)
    for mask in masks:
        merged = pieces[0][mask]
        for piece in pieces[1:]:
            merged = merged + piece[mask]
        assert_same_statistics(merged, whole[mask])
        assert_same(scores(merged, NAMES), scores(whole[mask], NAMES), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)), moved=st.permutations(range(300)))
def test_neither_the_names_of_classes_nor_the_order_of_voxels_matter(seed, order, moved):
    p, labels, masks = volume(seed, np.float64, size=300)
    p += np.random.default_rng(seed).random(p.shape) * 1e-9  # no ties between classes: the first would win
    whole = scores(statistics(p, labels, masks)[0]["most"], NAMES)
    renamed = np.array(order, dtype=np.uint8)[labels]
    permuted = statistics(p[np.argsort(order)], renamed, masks)[0]["most"]
    ours = scores(permuted, NAMES)
    for c in range(3):
        assert_same(ours["classes"][str(order[c])], whole["classes"][str(c)], rel=1e-9)
    shuffled = statistics(p[:, moved], labels[moved], {k: m[moved] for k, m in masks.items()})[0]["most"]
    whole.pop("classes")
    for result in (ours, scores(shuffled, NAMES)):
        result.pop("classes")
        assert_same(result, whole, rel=1e-9)


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_threads_share_the_voxels(name):
    pytest.importorskip(name)
    p, labels, masks = volume(1, size=300_000)
    alone, top = statistics(p, labels, masks, backend=name)
    together, together_top = statistics(p, labels, masks, backend=name, threads=3)
    streamed, _ = statistics((c for c in p), labels, masks, backend=name, threads=3)
    for mask in masks:
        assert_same_statistics(together[mask], alone[mask])
        assert_same_statistics(streamed[mask], alone[mask])
    assert np.array_equal(together_top, top)


def test_float32_probe(backend):
    """2e7 voxels, confidence .98, accuracy .99: ECE .01. Float32 counters say 0 (MONAI, torchmetrics)."""
    labels = np.zeros(20_000_000, dtype=np.uint8)
    labels[:200_000] = 1
    channels = (np.full(labels.shape, value, dtype=np.float32) for value in (0.98, 0.02))
    masks = {"it": np.ones(labels.shape, dtype=bool)}
    counted, _ = calibration_statistics(channels, labels, range(2), masks, backend=backend)
    exact = abs(0.99 - float(np.float32(0.98)))  # 1.4e-8 from .01: float32 has no .98
    assert scores(counted["it"], "01")["ECE"] == pytest.approx(exact, abs=1e-12)
    assert scores(counted["it"], "01")["AdaptiveECE"] == pytest.approx(exact, abs=1e-9)
    assert scores(counted["it"], "01")["ECE"] == pytest.approx(0.01, abs=2e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bins", [1, 2, 10, 15, 37, 1000])
def test_edges_of_bins_are_where_bin_index_has_them(bins, dtype, backend):
    """One voxel on each multiple of 1/B and its two neighbours in the float type."""
    edges = (np.arange(bins + 1) / bins).astype(dtype)
    p = np.concatenate([edges, np.nextafter(edges, dtype(0)), np.nextafter(edges[:-1], dtype(1))])
    labels, mask = np.ones(p.size, dtype=np.uint8), {"it": np.ones(p.size, dtype=bool)}
    counted, _ = calibration_statistics(p[None], labels, [0], mask, bins=bins, backend=backend)
    index = np.minimum((p.astype(np.float64) * bins).astype(int), bins - 1)
    assert counted["it"].classes.n[0].tolist() == np.bincount(index, minlength=bins).tolist()


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 1.01, -1e9])
def test_what_is_no_probability_is_refused_where_it_counts(backend, bad, multilabel):
    """Such as logits: their bin would be somewhere else in memory."""
    options = {"multilabel": multilabel, "backend": backend}
    p, labels, _ = volume(2, multilabel=multilabel)
    every = np.ones(labels.size, dtype=bool)
    p[np.isnan(p)] = 0.5
    for voxel in (0, 70, labels.size - 1):
        wrong, others = p.copy(), every.copy()
        wrong[1, voxel], others[voxel] = bad, False
        for channels in (wrong, iter(wrong)):
            with pytest.raises(ValueError, match=r"probabilities are in \[0, 1\]"):
                statistics(channels, labels, {"it": every}, **options)
        left, _ = statistics(wrong, labels, {"it": others}, **options)
        clean, _ = statistics(p, labels, {"it": others}, **options)
        assert_same_statistics(left["it"], clean["it"])


def test_a_probability_beyond_1_by_rounding_is_1(backend):
    """As the float32 mean of an ensemble's may be; it is in the last bin."""
    p = np.array([[1 + 2**-23, -(2**-23)], [-(2**-23), 1 + 2**-23]], dtype=np.float32)
    counted, _ = calibration_statistics(p, np.array([0, 1]), range(2), {"it": np.ones(2, bool)}, backend=backend)
    assert counted["it"].top.n.tolist() == [0] * 14 + [2]
    assert counted["it"].classes.n[:, 0].tolist() == [1, 1]
    assert scores(counted["it"], "01")["ECE"] < 1e-6
    many = {"it": np.ones(2000, bool)}
    for bins in (1, 3, 15):
        q = np.repeat(p, 1000, axis=1)
        counted, _ = calibration_statistics(q, np.repeat([0, 1], 1000), range(2), many, bins=bins, backend=backend)
        assert counted["it"].top.n.tolist() == [0] * (bins - 1) + [2000]
        assert counted["it"].classes.n[0].tolist() == ([1000] + [0] * (bins - 2) + [1000] if bins > 1 else [2000])


def test_a_threshold_that_the_type_rounds_up_across_an_edge(backend):
    """.24999 is .25 in float16: p = .25 is left out, though it lies in the next of 4 bins."""
    p = np.array([[0.25, 0.5], [0.75, 0.5]], dtype=np.float16)
    sets = {"one": np.array([True, False]), "both": np.array([True, True])}
    options = {"bins": 4, "threshold": 0.24999, "backend": backend}
    counted, _ = calibration_statistics(p, np.array([1, 0]), range(2), sets, **options)
    assert counted["both"].above_threshold().n.tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert counted["one"].above_threshold().n.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("multilabel", [False, True])
def test_bool_references_are_label_1_and_masks_of_any_number_are_masks(backend, multilabel):
    p, labels, masks = volume(4, multilabel=multilabel)
    truth = labels == 1
    options = {"classes": [0, 1], "multilabel": multilabel, "backend": backend}
    expected, _ = calibration_statistics(p[:2], truth.astype(int), masks=masks, **options)
    grey = {name: mask.astype(np.uint8) * 255 for name, mask in masks.items()}
    ours, _ = calibration_statistics(p[:2], truth, masks=grey, **options)
    for name in masks:
        assert_same_statistics(ours[name], expected[name])


def test_options_and_types_that_make_no_sense_are_refused():
    p, labels, masks = volume(0)
    for options in ({"bins": 0}, {"bins": 1001}, {"threshold": 1}, {"threshold": -0.1}):
        with pytest.raises(ValueError, match="between 1 and 1000 bins and a threshold in"):
            statistics(p, labels, masks, **options)
    with pytest.raises(ValueError, match="not uint8"):
        statistics((p > 0.5).astype(np.uint8), labels, masks)
    with pytest.raises(ValueError, match="hold integers, not float64"):
        statistics(p, labels.astype(float), masks)
    with pytest.raises(ValueError, match="negative"):
        statistics(p, labels.astype(int) - 1, masks)


def test_unknown_backends_are_refused():
    p, labels, masks = volume(0)
    with pytest.raises(ValueError, match="backend 'cupy'"):
        statistics(p, labels, masks, backend="cupy")


def test_numba_is_optional_and_a_read_only_package_no_obstacle(tmp_path):
    """Without numba "auto" counts in numpy; importing needs neither numba nor torch."""
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'numba' else find(name, *a)\n"
        "import numpy as np, nnunet_calib.metrics as m\n"
        "r = m.calibration_scores(np.array([[.9, .2], [.1, .8]], np.float32), np.array([0, 1]))\n"
        "assert abs(r['ECE'] - .15) < 1e-7, r\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_place_for_compiled_code_it_compiles_all_the_same(monkeypatch):
    numba = pytest.importorskip("numba")
    from nnunet_calib.metrics.counting import gather_numba

    real = numba.njit

    def nowhere(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert gather_numba._compiled(lambda x: x + 1)(1) == 2
