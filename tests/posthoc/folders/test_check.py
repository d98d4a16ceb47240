"""``calibrate check``: at most 5 % of the cases and folders that are like those of the fit are called unlike them."""

import numpy as np
import pytest

from nnunet_calib.posthoc.folders.check import FEWEST, case_p_value, cases_p_value, check_shift


def cases(n, rng, temperature=1.0):
    """Shares by confidence of cases whose networks are too sure by a temperature of their own."""
    own = temperature * np.exp(rng.normal(0, 0.4, n))
    p = 1 / (1 + np.exp(-np.abs(rng.normal(0, 4, (n, 500))) / own[:, None]))
    return np.stack([np.bincount((case * 20).astype(int).clip(max=19), minlength=20) / 500 for case in p])


def test_of_cases_like_those_of_the_fit_five_percent_are_called_unlike():
    """With 39 cases of the fit the level is 2 / 40 exactly; 800 binomial trials of 5 % give 5 % +- 1.5 %."""
    rng = np.random.default_rng(3)
    p = np.array([case_p_value(cases(39, rng), case) for _ in range(80) for case in cases(10, rng)])
    assert 0.035 <= (p <= 0.05).mean() <= 0.065
    assert p.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("fitted", "new"), [(8, 3), (30, 8)], ids=["all divisions", "drawn divisions"])
def test_of_folders_like_the_fit_five_percent_are_called_unlike(fitted, new):
    """200 binomial trials of 5 % give 5 % +- 3 %."""
    rng = np.random.default_rng(4)
    p = np.array([cases_p_value(cases(fitted, rng), cases(new, rng)) for _ in range(200)])
    assert 0.02 <= (p <= 0.05).mean() <= 0.08


def test_a_shift_of_all_and_one_to_both_sides_are_seen():
    rng = np.random.default_rng(5)
    fitted = cases(40, rng)
    assert cases_p_value(fitted, cases(20, rng, 2.0)) <= 0.05
    to_both_sides = np.concatenate([cases(10, rng, 3.0), cases(10, rng, 0.3)])
    assert cases_p_value(fitted, to_both_sides) <= 0.05


def test_one_case_has_one_verdict():
    """All together, a single case is judged as that case."""
    rng = np.random.default_rng(6)
    fitted = {str(i): shares for i, shares in enumerate(cases(25, rng))}
    for temperature in (1.0, 1.0, 1.0, 3.0, 8.0):
        found = check_shift(fitted, {"new": cases(1, rng, temperature)[0]})
        assert found["p"] == found["cases"]["new"]["p"]
        assert found["shifted"] == found["cases"]["new"]["unlike"]
    assert found["shifted"]


def test_with_few_cases_of_the_fit_no_single_one_can_be_told():
    rng = np.random.default_rng(7)
    few = {str(i): shares for i, shares in enumerate(cases(FEWEST - 1, rng))}
    assert not check_shift(few, {"new": cases(1, rng, 20.0)[0]})["cases"]["new"]["unlike"]
    enough = few | {"more": cases(1, rng)[0]}
    assert check_shift(enough, {"new": cases(1, rng, 20.0)[0]})["cases"]["new"]["unlike"]


def test_equal_cases_are_like_each_other():
    same = np.full((20, 20), 1 / 20)
    assert case_p_value(same, same[0]) == 1
    assert cases_p_value(same, same[:5]) == 1
