"""Temperatures in float32: the numbers of float64, from what is stored in 16 or 32 bits."""

import numpy as np
import pytest

from nnunet_calib.posthoc import (
    ClasswiseTemperature,
    TemperatureScaling,
    calibrate_case,
    log_probabilities,
)
from nnunet_calib.posthoc.folders import apply
from nnunet_calib.posthoc.folders.apply import _kept
from nnunet_calib.posthoc.maps import tempered


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def loops(request, monkeypatch):
    """With and without numba."""
    if request.param == "numpy":
        for module in (tempered, apply):
            monkeypatch.setattr(module, "compiled_loops", lambda: None)
    else:
        assert tempered.compiled_loops() is not None


def with_parameters(calibrator, channels: int, parameters: list[dict]):
    calibrator.channels, calibrator.parameters = channels, parameters
    return calibrator


def every(channels: int, temperature: float, multilabel: bool):
    """Calibrators of both methods with about that temperature."""
    own = (temperature * np.linspace(1, 1.5, channels)).tolist()
    yield with_parameters(TemperatureScaling(multilabel=multilabel), channels, [{"temperature": temperature}])
    classwise = [{"temperature": t} for t in own] if multilabel else [{"temperature": own}]
    yield with_parameters(ClasswiseTemperature(multilabel=multilabel), channels, classwise)


def probabilities(channels: int, sure: float, multilabel: bool, kind: type) -> np.ndarray:
    """Of 2000 voxels (C, n); the first ones exactly 0 and 1, and in regions 0 and 1 everywhere."""
    rng = np.random.default_rng(channels)
    if multilabel:
        p = 1 / (1 + np.exp(-rng.normal(0, sure, (channels, 2000))))
        p[:, :4], p[:, 4:8] = 0, 1
    else:
        p = rng.dirichlet(np.full(channels, 1 / sure), size=2000).T
        p[:, :4], p[0, :4] = 0, 1
    return p.astype(kind)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize(("channels", "sure"), [(2, 60), (14, 3), (300, 0.01)])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_float32_is_as_good_as_float64(kind, multilabel, channels, sure, temperature):
    p = probabilities(channels, sure, multilabel, kind)
    for calibrator in every(channels, temperature, multilabel):
        exact = calibrator.apply(log_probabilities(p, multilabel=multilabel))
        assert np.abs(calibrator.calibrate(p) - exact).max() < 1e-6


def test_what_is_stored_in_float64_stays_exact():
    p = probabilities(3, 1, False, np.float64)
    for calibrator in every(3, 1.67, False):
        assert np.array_equal(calibrator.calibrate(p), calibrator.apply(log_probabilities(p)))


def test_a_saturated_voxel_has_the_floor_of_its_type():
    """sqrt(2^-126) = 2^-63 and sqrt(2^-24) = 2^-12, each beside 1."""
    calibrator = with_parameters(TemperatureScaling(), 2, [{"temperature": 2.0}])
    for kind, root in ((np.float32, 2.0**-63), (np.float16, 2.0**-12)):
        calibrated = calibrator.calibrate(np.array([[1.0], [0.0]], dtype=kind))
        assert calibrated[1, 0] == pytest.approx(root / (1 + root), rel=1e-4)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("writeable", [True, False])
def test_slabs_of_a_case_change_no_number(kind, writeable):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=(9, 90, 110)).transpose(3, 0, 1, 2).astype(kind)
    p.flags.writeable = writeable
    for calibrator in every(5, 1.67, False):
        whole = calibrator.calibrate(p)
        assert np.array_equal(calibrate_case(calibrator, p), whole.astype(kind))
        assert calibrate_case(calibrator, p).dtype == kind


@pytest.mark.parametrize("multilabel", [False, True])
def test_probabilities_that_are_given_are_not_touched(multilabel):
    p = probabilities(3, 1, multilabel, np.float32)
    before = p.copy()
    for temperature in (0.5, 2.0):
        for calibrator in every(3, temperature, multilabel):
            calibrator.calibrate(p)
            assert np.array_equal(p, before)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_what_counts_as_the_same_label(kind):
    """The first class of the largest probability must still have it, but for rounding."""
    before = np.array([[0.5, 0.2, 0.4], [0.3, 0.5, 0.4], [0.2, 0.3, 0.2]], dtype=kind)
    assert _kept(before, before**2, regions=False)
    assert not _kept(before, before[[1, 0, 2]], regions=False)
    for much, kept in ((1e-7, True), (1e-5, False)):
        after = np.full((3, 3), 1 / 3, dtype=kind)
        after[2, 1] += much
        assert _kept(before, after, regions=False) == kept
