"""Against scipy, published values and simulated truth."""

import numpy as np
import pytest
from scipy import stats

from nnunet_calib.report.statistics import (
    Paired,
    cases_needed,
    false_claim,
    holm,
    paired,
    ranks,
    sign_flip_p,
    smallest_p,
    spreads,
    t_interval,
    wilcoxon_p,
)

# Darwin's maize plants, differences in eighths of an inch: Fisher, The design of experiments, 1935, sections 17 and 21
DARWIN = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48.0])


def one(differences, higher=True) -> Paired:
    return paired(np.asarray(differences, dtype=float)[:, None], [higher])[0]


def test_fishers_permutation_test_of_darwins_plants():
    # Fisher: 863 of the 2^15 sign patterns have a sum as large, so two-sided 1726 / 32768
    assert sign_flip_p(DARWIN[:, None], flips=2**15)[0] == pytest.approx(1726 / 32768, abs=1e-12)


def test_drawn_signs_come_near_all_signs():
    assert sign_flip_p(DARWIN[:, None], flips=9999)[0] == pytest.approx(1726 / 32768, abs=0.008)


def test_students_t_of_darwins_plants():
    # Fisher, section 17: t = 2.148 with 14 degrees of freedom
    found = one(DARWIN)
    assert found.d_z * np.sqrt(15) == pytest.approx(2.148, abs=5e-4)
    assert found.t_p == pytest.approx(stats.ttest_1samp(DARWIN, 0).pvalue, rel=1e-9)
    assert found.false_claim == pytest.approx(stats.ttest_1samp(DARWIN, 0, alternative="greater").pvalue, rel=1e-9)


def test_wilcoxon_of_darwins_plants():
    # Hollander and Wolfe; R: wilcox.test(d)$p.value
    assert wilcoxon_p(DARWIN) == pytest.approx(stats.wilcoxon(DARWIN).pvalue, rel=1e-12)
    assert wilcoxon_p(DARWIN) == pytest.approx(0.04126, abs=5e-5)


@pytest.mark.parametrize("n", [3, 12, 40, 200])
def test_intervals_and_tests_are_scipys(n):
    values = np.random.default_rng(n).gamma(2, 1, n) - 1.5
    found = one(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.t_interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-9)
    bca = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20000, rng=1).confidence_interval
    width = expected.high - expected.low
    assert found.bca_interval == pytest.approx((bca.low, bca.high), abs=0.06 * width)


@pytest.mark.parametrize(
    ("d_z", "power", "expected"),
    # G*Power 3.1, means, two dependent groups, two-sided alpha 0.05
    [(0.2, 0.8, 199), (0.5, 0.8, 34), (0.8, 0.8, 15), (0.5, 0.95, 54)],
)
def test_cases_needed_are_those_of_g_power(d_z, power, expected):
    assert cases_needed(d_z, power) == expected
    assert cases_needed(-d_z, power) == expected


def test_no_difference_needs_more_cases_than_there_are():
    assert cases_needed(0.0) == np.inf
    assert cases_needed(1e-4) == np.inf
    assert np.isnan(cases_needed(np.nan))


def test_holm_is_rs_p_adjust():
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and of an unsorted family
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.001, 0.6]) == pytest.approx([0.08, 0.003, 0.6])


def test_a_test_that_could_not_be_done_does_not_count_in_the_family():
    found = holm([0.02, np.nan, 0.03])
    assert found[0] == pytest.approx(0.04)
    assert np.isnan(found[1])


def test_an_infinite_difference_ranks_highest_and_is_not_dropped():
    differences = np.array([0.5, -0.2, 1.0, -0.3, 0.7, np.inf, np.inf])
    large = np.where(np.isinf(differences), 99, differences)
    found = one(differences, higher=False)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(large).pvalue)
    assert (found.n, found.infinite) == (5, 2)
    assert found.mean == pytest.approx(0.34)
    assert found.better == pytest.approx(2 / 7)  # lower is better: the two negative ones


def test_the_spread_keeps_infinite_values_in_mean_and_quartiles():
    (found,) = spreads(np.array([[1.0], [2.0], [3.0], [np.inf], [np.nan]]))
    assert (found.n, found.infinite, found.mean, found.finite_mean) == (4, 1, np.inf, 2.0)
    assert found.quartiles == (1.0, 2.0, 3.0)
    assert found.t_interval == pytest.approx(t_interval(np.array([1.0, 2.0, 3.0])))


@pytest.mark.parametrize("differences", [[], [0.3], [0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [np.nan, np.nan], [np.inf, 0.1]])
def test_small_and_constant_samples_give_no_error(differences):
    found = paired(np.asarray(differences, dtype=float).reshape(-1, 1), [True]) if differences else []
    for statistics in found:
        assert np.isnan(statistics.t_p) or 0 <= statistics.t_p <= 1


def test_smallest_p():
    assert smallest_p(5) == 1 / 16
    assert smallest_p(100, flips=999) == 1 / 1000
    assert sign_flip_p(np.ones((5, 1)))[0] == pytest.approx(1 / 16)
    assert wilcoxon_p(np.arange(1.0, 6)) == pytest.approx(1 / 16)


def test_ranks_by_mean_and_by_case_can_differ():
    # A wins two of three cases narrowly and loses one by far
    found = ranks([np.array([[0.9, 0.8], [0.9, 0.8], [0.1, 0.8]])], [True])[0]
    assert found.of_means == [2, 1]
    assert found.of_ranks == [1, 2]
    assert found.mean_rank == pytest.approx([4 / 3, 5 / 3])


def test_the_rank_distribution_of_a_sure_thing_and_of_twins():
    sure, twins, short = ranks(
        [
            np.stack([np.linspace(0.5, 0.6, 30), np.linspace(0.8, 0.9, 30)], axis=1),
            np.stack([np.linspace(0.5, 0.6, 30)] * 2, axis=1),
            np.array([[0.1, np.nan], [0.2, 0.3]]),
        ],
        [True, True, True],
    )
    assert sure.distribution == [[0, 1], [1, 0]]
    assert (short.n, short.of_means) == (1, [2, 1])
    assert np.asarray(twins.distribution) == pytest.approx(0.5)


def test_a_missed_structure_ranks_last():
    assert ranks([np.array([[1.0, 5.0], [np.inf, 5.0]])], [False])[0].of_means == [2, 1]


def _samples(kind: str, n: int, many: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    if kind == "dice":
        return rng.beta(8, 1.2, (n, many)), 8 / 9.2
    if kind == "ece":
        return rng.gamma(2, 0.05, (n, many)), 0.1
    hard = rng.gamma(2, 0.05, (n, many))  # differences of two skewed numbers that share the case's difficulty
    return 0.2 * hard + rng.gamma(2, 0.02, (n, many)) - rng.gamma(2, 0.02, (n, many)), 0.02


@pytest.mark.parametrize("n", [20, 60, 200])
@pytest.mark.parametrize("kind", ["dice", "ece", "difference"])
def test_intervals_cover_the_true_mean(kind, n):
    values, truth = _samples(kind, n, 1500, np.random.default_rng(n))
    found = spreads(values)
    by_t = np.mean([of.t_interval[0] <= truth <= of.t_interval[1] for of in found])
    by_bca = np.mean([of.bca_interval[0] <= truth <= of.bca_interval[1] for of in found])
    assert by_t == pytest.approx(0.95, abs=0.02 if n >= 60 or kind == "difference" else 0.035)
    # BCa is too short with few cases: hence the warning, and the t interval in the first table
    assert by_bca == pytest.approx(0.95, abs={20: 0.045, 60: 0.03, 200: 0.02}[n])


@pytest.mark.parametrize("n", [20, 60, 200])
def test_a_family_of_true_null_hypotheses_is_rejected_in_five_percent(n):
    rng = np.random.default_rng(n)
    rejected = {"wilcoxon": 0, "flips": 0}
    trials, family = 400, 6
    # skewed numbers of two equally good methods, exchangeable within a case; the family's metrics are correlated
    hard = rng.gamma(2, 0.05, (n, trials, 1))
    difference = hard * (rng.gamma(2, 0.1, (n, trials, family)) - rng.gamma(2, 0.1, (n, trials, family)))
    difference += 0.01 * rng.normal(size=(n, trials, 1))
    flips = sign_flip_p(difference.reshape(n, -1), flips=999).reshape(trials, family)
    for trial in range(trials):
        rejected["wilcoxon"] += min(holm([wilcoxon_p(d) for d in difference[:, trial].T])) <= 0.05
        rejected["flips"] += min(holm(flips[trial])) <= 0.05
    for times in rejected.values():
        assert times / trials <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("n", [20, 60, 200])
def test_the_probability_of_a_false_claim_is_the_share_of_false_claims(n):
    # true differences of any size, as the definition supposes; the claim is that the better-looking one is better
    rng = np.random.default_rng(n)
    truth = rng.normal(0, 20 / np.sqrt(n), 40000)
    seen = rng.normal(truth, 1, (n, len(truth)))
    claimed = np.array([false_claim(column) for column in seen.T[:8000]])
    wrong = np.sign(seen.mean(axis=0)[:8000]) != np.sign(truth[:8000])
    unsure = claimed > 0.02
    assert wrong[unsure].mean() == pytest.approx(claimed[unsure].mean(), abs=0.06)
    assert wrong.mean() == pytest.approx(claimed.mean(), abs=0.006)
