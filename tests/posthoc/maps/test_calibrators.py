"""Calibrators on arrays: the papers' values, known truths recovered, and what happens at the edges."""

import json
from pathlib import Path

import numpy as np
import pytest

from nnunet_calib.data.errors import InputError
from nnunet_calib.posthoc import (
    CALIBRATORS,
    ClasswiseTemperature,
    DirichletCalibration,
    IsotonicCalibration,
    TemperatureScaling,
    VectorScaling,
    load_calibrator,
    log_probabilities,
)
from nnunet_calib.posthoc.maps.calibrator import log_softmax, softmax

from ..simulated import drawn, ece, floor_of_ece, logits

VOXELWISE = [key for key in CALIBRATORS if key != "local"]
VECTORS = Path(__file__).parents[3].parent / "shared/vectors/losses.json"


@pytest.fixture(scope="module")
def vectors():
    """The authors' inputs as (C, N) logits and (N,) classes."""
    if not VECTORS.is_file():
        pytest.skip(f"no {VECTORS.name} beside the repository (shared/vectors)")
    inputs = json.loads(VECTORS.read_text())["inputs"]
    made = {}
    for name in ("A2", "B3"):
        z, y = np.array(inputs[name]["logits"]), np.array(inputs[name]["target"])
        made[name] = np.moveaxis(z, 1, 0).reshape(z.shape[1], -1), y.reshape(-1)
    return made


def nll(p, y) -> float:
    return -np.log(p[y, np.arange(y.size)]).mean()


@pytest.mark.parametrize(("name", "best"), [("A2", 1.119787), ("B3", 1.117590)])
def test_temperature_as_the_grid_search_of_the_papers(vectors, name, best):
    """torrvision/focal_calibration: T = 10, the end of the grid, for both."""
    z, y = vectors[name]
    fitted = TemperatureScaling(bounds=(0.1, 10)).fit(z, y)
    assert fitted.temperature == 10
    assert nll(fitted.apply(z), y) == pytest.approx(best, rel=1e-5)
    assert "bound 10" in fitted.notes[0]


@pytest.mark.parametrize(("name", "temperature", "best"), [("A2", 8.4, 0.138999), ("B3", 10.0, 0.121113)])
def test_temperature_by_ece(vectors, name, temperature, best):
    """torrvision/focal_calibration."""
    z, y = vectors[name]
    fitted = TemperatureScaling(criterion="ece").fit(z, y)
    assert fitted.temperature == temperature
    assert ece(fitted.apply(z), y) == pytest.approx(best, rel=1e-5)


def test_temperature_is_recovered():
    z = logits(60_000)
    y = drawn(softmax(z / 1.7), np.random.default_rng(1))
    fitted = TemperatureScaling().fit(z, y)
    assert fitted.temperature == pytest.approx(1.7, rel=0.01)
    slightly = [nll(softmax(z / (fitted.temperature * by)), y) for by in (0.999, 1.001)]
    assert nll(fitted.apply(z), y) < min(slightly)


def test_class_and_region_temperatures_are_recovered():
    z = logits(90_000, classes=3)
    truth = np.array([1.2, 2.0, 0.7])
    y = drawn(softmax(z / truth[z.argmax(axis=0)]), np.random.default_rng(1))
    assert ClasswiseTemperature().fit(z, y).parameters[0]["temperature"] == pytest.approx(truth, rel=0.03)
    odds = np.random.default_rng(2).normal(0, 3, (2, 90_000))
    inside = np.random.default_rng(3).uniform(size=odds.shape) < 1 / (1 + np.exp(-odds / [[1.5], [0.8]]))
    fitted = ClasswiseTemperature(multilabel=True).fit(odds, inside)
    assert [own["temperature"] for own in fitted.parameters] == pytest.approx([1.5, 0.8], rel=0.03)


def test_dirichlet_parameters_are_recovered():
    """The softmax leaves a common row and offset open, so those of the last class are taken off."""
    z = logits(200_000, classes=3, spread=1.5)
    matrix, offset = np.array([[0.6, 0.2, -0.1], [-0.2, 0.9, 0.3], [0.1, -0.2, 0.5]]), np.array([0.4, -0.3, 0.2])
    y = drawn(softmax(matrix @ z + offset[:, None]), np.random.default_rng(1))
    (found,) = DirichletCalibration().fit(z, y).parameters
    ours, theirs = (np.hstack([np.array(m), np.array(b)[:, None]]) for m, b in
                    ((found["matrix"], found["offset"]), (matrix, offset)))  # fmt: skip
    ours, theirs = ours - ours[-1], theirs - theirs[-1]
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_vector_parameters_are_recovered():
    z = logits(200_000, classes=3)
    slope, offset = np.array([0.5, 0.8, 1.1]), np.array([0.5, -0.4, -0.1])
    y = drawn(softmax(slope[:, None] * z + offset[:, None]), np.random.default_rng(1))
    (found,) = VectorScaling().fit(z, y).parameters
    assert found["slope"] == pytest.approx(slope, rel=0.05)
    assert found["offset"] == pytest.approx(offset, abs=0.03)


@pytest.mark.parametrize("key", VOXELWISE)
def test_ece_comes_down_to_the_noise(key):
    classes = 2 if key == "isotonic" else 4  # making several curves sum to one is a second error of its own
    z, other = logits(40_000, classes), logits(40_000, classes, seed=5)
    y = drawn(softmax(z / 2), np.random.default_rng(1))
    truth = drawn(softmax(other / 2), np.random.default_rng(6))
    p = CALIBRATORS[key]().fit(z, y).apply(other)
    assert np.allclose(p.sum(axis=0), 1)
    assert ece(p, truth) < 1.5 * floor_of_ece(p)
    assert ece(p, truth) < 0.1 * ece(softmax(other), truth)


@pytest.mark.parametrize("key", VOXELWISE)
def test_weights_are_repetitions_and_validity_is_absence(key):
    z, rng = logits(400, seed=3), np.random.default_rng(4)
    y = drawn(softmax(z / 2), rng)
    times = rng.integers(0, 4, y.size)
    repeated = CALIBRATORS[key]().fit(np.repeat(z, times, axis=1), np.repeat(y, times))
    weighted = CALIBRATORS[key]().fit(z, y, weights=times)
    left_out = CALIBRATORS[key]().fit(z, np.where(times > 0, y, 0), times > 0, weights=np.maximum(times, 1))
    assert np.allclose(repeated.apply(z), weighted.apply(z), atol=3e-3)
    assert np.allclose(left_out.apply(z), weighted.apply(z), atol=1e-12)


@pytest.mark.parametrize("key", VOXELWISE)
@pytest.mark.parametrize("multilabel", [False, True])
def test_saved_and_loaded(key, multilabel, tmp_path):
    z = logits(500, classes=3)
    y = drawn(softmax(z), np.random.default_rng(0))
    target = np.arange(3)[:, None] == y if multilabel else y
    fitted = CALIBRATORS[key](multilabel=multilabel).fit(z, target)
    file = fitted.save(tmp_path, {"region": "volume"})
    assert file.name == "calibrator.json"
    loaded = load_calibrator(file)
    assert type(loaded) is type(fitted)
    assert np.array_equal(loaded.apply(z), fitted.apply(z))
    assert json.loads(file.read_text())["region"] == "volume"


def test_the_file_says_the_temperature(tmp_path):
    z = logits(500)
    fitted = TemperatureScaling().fit(z, drawn(softmax(z), np.random.default_rng(0)))
    content = json.loads(fitted.save(tmp_path / "t.json").read_text())
    assert (content["method"], content["temperature"]) == ("temperature", fitted.temperature)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"method": "none"}',
        '{"method": "temperature", "format": 1, "multilabel": false, "channels": 3}',
        '{"method": "temperature", "format": 1, "multilabel": false, "channels": 3, "temperature": 0}',
        '{"method": "temperature", "format": 1, "multilabel": false, "channels": 3, "temperature": -1}',
        '{"method": "temperature", "format": 1, "multilabel": false, "channels": 3, "temperature": "hot"}',
        '{"method": "vector", "format": 1, "multilabel": false, "channels": 3, "slope": [1, 1], "offset": [0, 0]}',
        '{"method": "isotonic", "format": 1, "multilabel": false, "channels": 2, "curves": 3}',
        '{"method": "local", "format": 1, "multilabel": false, "channels": 2, "network": {}, "image_channels": 0}',
        '{"method": "temperature", "format": 9, "multilabel": false, "channels": 3, "temperature": 1}',
    ],
)
def test_a_file_that_is_no_calibrator(content, tmp_path):
    (tmp_path / "calibrator.json").write_text(content)
    with pytest.raises(InputError, match=r"calibrator\.json") as caught:
        load_calibrator(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", VOXELWISE)
def test_a_class_absent_from_the_fit_set(key):
    z = logits(5_000)
    y = drawn(softmax(z[:3] / 2), np.random.default_rng(1))
    fitted = CALIBRATORS[key]().fit(z, y)
    p = fitted.apply(z)
    assert np.isfinite(p).all()
    assert nll(p, y) < nll(softmax(z), y)
    if key in ("vector", "dirichlet", "isotonic"):
        assert any("class 3" in note for note in fitted.notes)
    (own,) = fitted.parameters
    if key == "vector":
        assert (own["slope"][3], own["offset"][3]) == (1, 0)
    if key == "dirichlet":
        assert own["matrix"][3] == [0, 0, 0, 1]
        assert [row[3] for row in own["matrix"]] == [0, 0, 0, 1]
    if key == "isotonic":
        assert own["curves"][3] == {"p": [0, 1], "q": [0, 1]}


@pytest.mark.parametrize("key", VOXELWISE)
def test_only_right_predictions(key):
    z = logits(3_000)
    fitted = CALIBRATORS[key]().fit(z, z.argmax(axis=0))
    p = fitted.apply(z)
    assert np.isfinite(p).all()
    assert np.allclose(p.sum(axis=0), 1)
    assert p.max(axis=0).mean() > 0.9
    if key == "temperature":
        assert fitted.temperature == 0.05
        assert fitted.notes == ["the temperature ended at the bound 0.05: every prediction is right"]


@pytest.mark.parametrize("key", VOXELWISE)
@pytest.mark.parametrize("right", [True, False])
def test_one_voxel(key, right):
    z = log_softmax(np.array([[2.0], [1.0], [-1.0]]))
    p = CALIBRATORS[key]().fit(z, np.array([0 if right else 2])).apply(z)
    assert np.isfinite(p).all()
    assert p.sum() == pytest.approx(1)


@pytest.mark.parametrize("key", VOXELWISE)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_of_exactly_0_and_1(key, dtype, multilabel):
    p = np.array([[1, 0, 0.5, 1, 0], [0, 1, 0.5, 0, 1]], dtype=dtype)
    z = log_probabilities(p, multilabel=multilabel)
    assert np.isfinite(z).all()
    y = np.array([0, 1, 1, 1, 1])
    target = np.stack([y == 0, y == 1]) if multilabel else y
    assert np.isfinite(CALIBRATORS[key](multilabel=multilabel).fit(z, target).apply(z)).all()


def test_where_log_p_is_clipped():
    ends = np.array([[0.0, 1.0]])
    assert log_probabilities(ends.astype(np.float16))[0] == pytest.approx([-24 * np.log(2), 0])
    assert log_probabilities(ends.astype(np.float32))[0] == pytest.approx([-126 * np.log(2), 0])
    odds = log_probabilities(ends.astype(np.float16), multilabel=True)[0]
    assert odds == pytest.approx([-24 * np.log(2), 11 * np.log(2)])


@pytest.mark.parametrize("key", [key for key in VOXELWISE if CALIBRATORS[key].keeps_labels])
@pytest.mark.parametrize("multilabel", [False, True])
def test_temperatures_keep_labels(key, multilabel):
    z = logits(5_000, classes=3)
    y = np.random.default_rng(0).integers(0, 3, 5_000)
    fitted = CALIBRATORS[key](multilabel=multilabel).fit(z, np.arange(3)[:, None] == y if multilabel else y)
    p = fitted.apply(z)
    assert np.array_equal(p > 0.5, z > 0) if multilabel else np.array_equal(p.argmax(axis=0), z.argmax(axis=0))


@pytest.mark.parametrize("key", VOXELWISE)
def test_a_region_is_a_two_class_problem(key):
    odds = np.random.default_rng(0).normal(0, 3, (1, 2_000))
    inside = np.random.default_rng(1).uniform(size=odds.shape) < 1 / (1 + np.exp(-odds / 2))
    region = CALIBRATORS[key](multilabel=True).fit(odds, inside).apply(odds)
    z = np.concatenate([np.zeros_like(odds), odds])
    if key == "classwise":  # of regions: one temperature each
        key = "temperature"
    assert np.allclose(region[0], CALIBRATORS[key]().fit(z, inside[0].astype(int)).apply(z)[1])


def test_isotonic_is_ascending_and_never_certain():
    z = logits(3_000, classes=2)
    y = drawn(softmax(z / 3), np.random.default_rng(0))
    fitted = IsotonicCalibration().fit(z, y)
    p = fitted.apply(z)
    assert (np.diff(p[0][np.argsort(z[0])]) >= -1e-12).all()
    assert 0 < p.min() < p.max() < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 4)), np.zeros(5, dtype=int)), "does not fit"),
        ((np.zeros((3, 4)), np.full(4, 3)), "outside 0 to 2"),
        ((np.zeros((3, 4)), np.full(4, -1)), "outside 0 to 2"),
        ((np.zeros((3, 4)), np.zeros(4, dtype=int), np.zeros(4, dtype=bool)), "no voxel"),
        ((np.full((3, 4), -np.inf), np.zeros(4, dtype=int)), "finite"),
        ((np.zeros((3, 4)), np.zeros(4, dtype=int), np.ones(3, dtype=bool)), "valid and weights"),
    ],
)
def test_what_cannot_be_fitted(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemperatureScaling().fit(*arguments)
    with pytest.raises(ValueError, match="not negative"):
        TemperatureScaling().fit(np.zeros((3, 4)), np.zeros(4, dtype=int), weights=-np.ones(4))
    with pytest.raises(ValueError, match="not fitted"):
        TemperatureScaling().apply(np.zeros((3, 4)))
