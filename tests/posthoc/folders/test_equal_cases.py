"""Every case counts the same in a fit, whatever its size: what is minimised is the mean over cases that is reported."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from nnunet_calib.posthoc import DirichletCalibration, LocalTemperature
from nnunet_calib.posthoc.folders.crossfit import fit_samples
from nnunet_calib.posthoc.folders.fit import fit_folder

from ...folders import Folders
from ..predictions import LABELS, too_sure

CASES = {"case_00": (6, 12, 14, 3.0), "case_01": (12, 40, 30, 1.2), "case_02": (5, 16, 12, 2.0)}


@pytest.fixture
def unequal(tmp_path):
    """A folder of cases of unequal size and overconfidence, and their references and log probabilities."""
    made, known = Folders(tmp_path / "made", labels=LABELS), {}
    for seed, (name, (*shape, temperature)) in enumerate(CASES.items()):
        reference, p = too_sure(seed, temperature, tuple(shape))
        made.add(name, reference, p.argmax(axis=0), p)
        known[name] = reference.ravel().astype(int), np.log(p.reshape(3, -1).astype(float))
    return made, known


def mean_of_cases(z_of, known, inside):
    """The mean over cases of a case's mean NLL, by its definition."""
    means = []
    for y, log_p in known.values():
        z = z_of(log_p)
        nll = np.log(np.exp(z).sum(axis=0)) - z[y, np.arange(y.size)]
        means.append(nll[inside(y, log_p)].mean())
    return np.mean(means)


@pytest.mark.parametrize("region", ["volume", "foreground"])
def test_one_temperature_is_the_best_for_the_mean_over_cases(unequal, tmp_path, region):
    made, known = unequal
    inside = {"volume": lambda y, z: y >= 0, "foreground": lambda y, z: (y != 0) | (z.argmax(axis=0) != 0)}[region]
    outside = minimize_scalar(
        lambda t: mean_of_cases(lambda z: z / t, known, inside),
        bounds=(0.5, 5),
        method="bounded",
        options={"xatol": 1e-8},
    )
    how = {"methods": ["temperature"], "region": region, "voxels": 10**6}
    found = fit_folder(made.prediction, tmp_path / "out", made.reference, **how)["temperature"]
    assert found == pytest.approx(outside.x, rel=1e-5)
    pooled = [np.concatenate(parts, axis=-1) for parts in zip(*known.values(), strict=True)]
    together = {"all": (pooled[0], pooled[1])}
    by_voxel = minimize_scalar(
        lambda t: mean_of_cases(lambda z: z / t, together, inside), bounds=(0.5, 5), method="bounded"
    )
    assert abs(found - by_voxel.x) > 0.1  # the two are told apart


def test_the_penalty_of_dirichlet_stands_beside_the_mean_over_cases(unequal, tmp_path):
    made, known = unequal
    off = ~np.eye(3, dtype=bool)

    def objective(theta):
        matrix, offset = theta[:9].reshape(3, 3), theta[9:, None]
        nll = mean_of_cases(lambda z: matrix @ z + offset, known, lambda y, z: y >= 0)
        penalty = 1e-3 * (matrix[off] ** 2).sum() / 6 + 1e-3 * (offset**2).sum() / 3
        return nll + penalty + 1e-6 * ((np.diag(matrix) - 1) ** 2).sum()

    outside = minimize(objective, np.append(np.eye(3).ravel(), np.zeros(3)), method="BFGS", options={"gtol": 1e-7})
    found = fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["dirichlet"], voxels=10**6)
    assert np.allclose(found["matrix"], outside.x[:9].reshape(3, 3), atol=1e-3)
    assert np.allclose(found["offset"], outside.x[9:], atol=1e-3)


@pytest.mark.parametrize("method", [LocalTemperature, DirichletCalibration])
def test_every_case_has_the_same_weight_and_one_without_the_region_none(method):
    """What ``fit`` is given, for voxels and for patches."""
    rng, given = np.random.default_rng(0), {}

    class Spy(method):
        def fit(self, log_probabilities, target, valid=None, *, weights=None):
            given["weights"] = weights
            return self

    samples = []
    for n, share in ((50, 0.5), (200, 0.9), (80, 0.0), (10, 1.0)):
        p = rng.dirichlet(np.ones(3), n).T
        regions = {"boundary": np.arange(n) < share * n}
        target, weights = rng.integers(0, 3, n), rng.uniform(1, 100, n)
        patches = SimpleNamespace(probabilities=p[:, :, None], target=target[:, None], regions=regions)
        patches.regions = {"boundary": regions["boundary"][:, None]}
        samples.append(
            SimpleNamespace(probabilities=p, target=target, weights=weights, regions=regions, patches=patches)
        )
    fit_samples(Spy(), samples, "boundary")
    ends = np.cumsum([50, 200, 80, 10]) if method.margin else np.cumsum([25, 180, 0, 10])
    sums = [part.sum() for part in np.split(given["weights"], ends[:-1])]
    assert sums == pytest.approx([1, 1, 0, 1])
