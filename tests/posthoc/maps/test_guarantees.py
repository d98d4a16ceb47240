"""The table method x guarantee of docs/calibrate.md, each cell a property of random voxels."""

import numpy as np
import pytest

from nnunet_calib.posthoc import CALIBRATORS, ArgmaxPreservingScaling, OrderPreservingScaling
from nnunet_calib.posthoc.folders.crossfit import fit_cases
from nnunet_calib.posthoc.maps.calibrator import log_softmax, softmax

from ..simulated import drawn, logits

VOXELWISE = [key for key in CALIBRATORS if key != "local"]
LABELS = {"temperature", "classwise", "cmsop", "cmsap"}
ORDER = {"temperature", "classwise", "cmsop"}
REGIONS = {"temperature", "classwise", "cmsop", "cmsap"}


def trial(seed: int = 0):
    """A network that is too sure, in a way of its own for every class; new voxels, some with ties nearly."""
    z = logits(8000, classes=5, seed=seed, spread=3)
    shift = np.random.default_rng(7).normal(0, 2.0, (5, 5))
    y = drawn(softmax(z / 2.5 + shift[:, z.argmax(axis=0)]), np.random.default_rng(seed + 1))
    new = np.concatenate([logits(4000, classes=5, seed=50 + seed, spread=6), logits(4000, 5, 60 + seed, 0.05)], axis=1)
    return z, y, new


@pytest.fixture(scope="module")
def calibrated():
    z, y, new = trial()
    return new, {key: CALIBRATORS[key]().fit(z, y).apply(new) for key in VOXELWISE}


@pytest.mark.parametrize("key", VOXELWISE)
def test_the_predicted_class_stays_where_promised_and_only_there(calibrated, key):
    new, found = calibrated
    stays = bool((np.take_along_axis(found[key], new.argmax(axis=0)[None], 0)[0] >= found[key].max(axis=0)).all())
    assert stays == CALIBRATORS[key].keeps_labels == (key in LABELS)


@pytest.mark.parametrize("key", VOXELWISE)
def test_the_order_of_all_classes_stays_where_promised_and_only_there(calibrated, key):
    new, found = calibrated
    ranked = np.take_along_axis(found[key], np.argsort(-new, axis=0), axis=0)
    stays = bool((np.diff(ranked, axis=0) <= 1e-15).all())
    assert stays == CALIBRATORS[key].keeps_order == (key in ORDER)


@pytest.mark.parametrize("key", VOXELWISE)
def test_a_number_added_to_all_logits_of_a_voxel_changes_nothing(calibrated, key):
    z, y, new = trial()
    moved = new + np.random.default_rng(3).normal(0, 10, new.shape[1])
    assert np.abs(CALIBRATORS[key]().fit(z, y).apply(moved) - calibrated[1][key]).max() < 1e-8


@pytest.mark.parametrize("key", VOXELWISE)
def test_regions_stay_on_their_side_of_one_half_where_promised(key):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 4, (2, 6000))
    y = rng.uniform(size=z.shape) < 1 / (1 + np.exp(-(z / 3 + 1)))
    p = CALIBRATORS[key](multilabel=True).fit(z, y).apply(z)
    assert not ((p > 0.5) & (z < 0)).any() or key not in REGIONS
    assert not ((p < 0.5) & (z > 0)).any() or key not in REGIONS


@pytest.mark.parametrize("make", [ArgmaxPreservingScaling, OrderPreservingScaling])
def test_the_fit_is_the_smallest_in_its_box(make):
    """No single parameter can be moved within the bounds for a smaller objective (convex: so it is the minimum)."""
    z, y, _ = trial()
    fitted = make(off_diagonal=0, intercept=0).fit(z, y)
    log_p = log_softmax(z)

    def nll(parameters):
        p = fitted._calibrate(log_p, parameters)
        return -np.log(p[y, np.arange(y.size)]).mean()

    best = nll(fitted.parameters[0])
    for name in ("matrix", "offset"):
        for index in np.ndindex(np.shape(fitted.parameters[0][name])):
            for step in (-0.02, 0.02):
                moved = {key: np.array(value) for key, value in fitted.parameters[0].items()}
                moved[name][index] = max(0.001 if name == "matrix" else 0, moved[name][index] + step)
                assert nll(moved) > best - 2e-6


def test_a_known_map_is_found():
    """Voxels of one predicted class drawn from a map of the family give its parameters back."""
    truth = ArgmaxPreservingScaling()
    truth.channels = 3
    matrix = np.array([[[0.5, 0.1], [0.0, 0.3]], [[0.4, 0.0], [0.1, 0.6]], [[0.7, 0.0], [0.0, 0.7]]])
    offset = np.array([[0.2, 0.0], [0.0, 0.5], [0.1, 0.1]])
    truth.parameters = [{"matrix": matrix.tolist(), "offset": offset.tolist()}]
    z = logits(200_000, classes=3, seed=1, spread=3)
    fitted = ArgmaxPreservingScaling().fit(z, drawn(truth.apply(z), np.random.default_rng(2)))
    assert np.abs(np.array(fitted.parameters[0]["matrix"]) - matrix).max() < 0.06
    assert np.abs(np.array(fitted.parameters[0]["offset"]) - offset).max() < 0.15


@pytest.mark.parametrize("key", ["cmsop", "cmsap"])
def test_with_one_case_it_is_the_classwise_temperature(key):
    z, y, new = trial()
    (simplest,) = CALIBRATORS[key]().choices(cases=1, channels=len(z))
    found, expected = simplest.fit(z, y).apply(new), CALIBRATORS["classwise"]().fit(z, y).apply(new)
    assert np.abs(found - expected).max() < 0.01


def test_classes_that_are_tied_everywhere_do_not_stop_the_search():
    """Where classes are clipped to one probability the gaps between them are 0."""
    z, y, new = trial()
    tied, also = (np.concatenate([part, np.full((4, part.shape[1]), -60.0)]) for part in (z, new))
    (simplest,) = CALIBRATORS["cmsop"]().choices(cases=1, channels=len(tied))
    found, expected = simplest.fit(tied, y).apply(also), CALIBRATORS["classwise"]().fit(tied, y).apply(also)
    assert np.abs(found - expected).max() < 0.01


def test_a_case_without_weight_has_no_part_in_the_choice():
    cases = [(z, y, np.ones(z.shape[1])) for z, y, _ in map(trial, range(3))]
    empty = (cases[0][0], cases[1][1], np.zeros(cases[0][2].size))
    found, expected = (fit_cases(CALIBRATORS["cmsap"](), part) for part in ([*cases, empty], cases))
    assert found.parameters == expected.parameters


def test_penalties_that_are_given_stay():
    cases = [(z, y, np.ones(z.shape[1])) for z, y, _ in map(trial, range(2))]
    fitted = fit_cases(ArgmaxPreservingScaling(off_diagonal=7, intercept=3, spread=2), cases)
    assert (fitted.off_diagonal, fitted.intercept, fitted.spread) == (7, 3, 2)


@pytest.mark.parametrize("key", ["cmsop", "cmsap"])
def test_few_cases_with_many_classes_are_not_learned_by_heart(key):
    """Every case errs in its own way, so a whole matrix fitted to three of them is worse on others, and not chosen."""
    rng = np.random.default_rng(5)

    def case():
        z = rng.normal(0, 3, (8, 1500))
        own = z * rng.uniform(0.2, 0.7, (8, 1)) + rng.normal(0, 1.5, (8, 1))
        return z, drawn(np.exp(log_softmax(own)), rng), np.ones(z.shape[1])

    seen, others = [case() for _ in range(3)], [case() for _ in range(20)]

    def nll(fitted):
        return np.mean([-np.log(fitted.apply(z)[y, np.arange(y.size)]).mean() for z, y, _ in others])

    chosen = fit_cases(CALIBRATORS[key](), seen)
    whole = CALIBRATORS[key]().fit(*(np.concatenate(part, axis=-1) for part in list(zip(*seen, strict=True))[:2]))
    classwise = fit_cases(CALIBRATORS["classwise"](), seen)
    assert nll(chosen) < nll(whole) - 0.01
    assert nll(chosen) < nll(classwise) + 0.005
    assert np.count_nonzero(np.array(chosen.parameters[0]["matrix"])[:, ~np.eye(7, dtype=bool)]) == 0


def test_from_many_cases_all_of_a_map_is_found():
    truth = ArgmaxPreservingScaling()
    truth.channels = 3
    matrix = [[[0.5, 0.3], [0.0, 0.3]], [[0.4, 0.0], [0.4, 0.6]], [[0.7, 0.3], [0.0, 0.7]]]
    truth.parameters = [{"matrix": matrix, "offset": [[0.2, 0.0], [0.0, 0.5], [0.1, 0.1]]}]
    rng, cases = np.random.default_rng(2), []
    for seed in range(10):
        z = logits(10_000, classes=3, seed=seed, spread=3)
        cases.append((z, drawn(truth.apply(z), rng), np.ones(z.shape[1])))
    fitted = fit_cases(ArgmaxPreservingScaling(), cases)
    assert np.abs(np.array(fitted.parameters[0]["matrix"]) - matrix).max() < 0.1
