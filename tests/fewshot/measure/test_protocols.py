"""Which volumes support which query."""

import numpy as np
import pytest

from nnunet_calib.data.errors import UsageError
from nnunet_calib.fewshot.measure.protocols import (
    Episode,
    alpnet_parts,
    alpnet_support_slices,
    paper_episodes,
    real_episodes,
    worst_tenth,
)


def test_folds_and_supports_are_alpnets():
    # SSL-ALPNet, CHAOS: 20 scans cut at 0, 4, 8, 12, 16, 20; the support of a fold is the scan that follows it
    episodes = paper_episodes([f"chaos_{i}" for i in range(20)])
    supports = {int(e.query[6:]): int(e.supports[0][6:]) for e in episodes}
    assert supports == {i: (i // 4 + 1) * 4 % 20 for i in range(20)}


def test_scans_are_sorted_by_their_numbers():
    assert paper_episodes(["case_10", "case_9"], folds=5) == [
        Episode(("case_10",), "case_9"),
        Episode(("case_9",), "case_10"),
    ]


def test_no_case_supports_itself():
    for n in range(2, 12):
        assert all(episode.query not in episode.supports for episode in paper_episodes([str(i) for i in range(n)]))


def test_one_case_is_too_few_for_the_papers_protocol():
    with pytest.raises(UsageError, match="needs two cases, not 1"):
        paper_episodes(["a"])


def test_one_volume_meets_every_other():
    names = ["a1", "a2", "a3"]
    expected = {(s, q) for s in names for q in names if s != q}
    assert {(e.supports[0], e.query) for e in real_episodes(names, names, 1)} == expected


@pytest.mark.parametrize("k", [1, 3, 5])
def test_every_support_serves_equally_often(k):
    names = [f"a{i}" for i in range(10)]
    episodes = real_episodes(names, ["q1", "q2"], k)
    assert len(episodes) == 20
    assert {sum(name in e.supports for e in episodes) for name in names} == {2 * k}
    assert all(len(set(e.supports)) == k for e in episodes)


def test_all_supports_together_are_one_set():
    assert len(real_episodes(["a", "b", "c"], ["q"], 3)) == 1


def test_fewer_sets_are_spread_over_the_list():
    sets = {e.supports for e in real_episodes([str(i) for i in range(10)], ["q"], 1, most_sets=5)}
    assert sets == {("0",), ("2",), ("4",), ("6",), ("8",)}


def test_more_volumes_than_there_are_is_refused():
    with pytest.raises(UsageError, match="between 1 and 2"):
        real_episodes(["a", "b"], ["q"], 3)


@pytest.mark.parametrize(("values", "expected"), [(range(20), 0.5), ([0.3, 0.9], 0.3), ([np.nan, 0.5], 0.5)])
def test_the_worst_tenth_is_a_mean_of_one_pair_at_least(values, expected):
    assert worst_tenth(list(values)) == expected


def test_the_worst_tenth_of_nothing_is_unknown():
    assert np.isnan(worst_tenth([]))


def test_alpnet_pairing_by_hand():
    """M = 9, n = 3: q M = 1.5, 4.5, 7.5; the interval is 8 / 3, so the last slice falls out and is clipped."""
    assert alpnet_support_slices(range(20, 29), 3) == [21, 24, 27]
    assert alpnet_parts(np.arange(20, 29), 20, 28, 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert alpnet_parts(np.arange(0, 7), 0, 6, 3).tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("n", [1, 3, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_alpnet_pairing_as_the_formula(n, size):
    """Spec 1.3: Z[int(q_i M)], q_i = 1/(2n) + i/n; part floor((z - z_min) / ((z_max - z_min) / n)) clipped."""
    z_min, z_max = 11, 11 + size - 1
    slices = list(range(z_min, z_max + 1))
    assert alpnet_support_slices(slices, n) == [slices[int((1 / (2 * n) + i / n) * size)] for i in range(n)]
    for z in slices:
        part = 0 if z_max == z_min else min(max(int((z - z_min) // ((z_max - z_min) / n)), 0), n - 1)
        assert alpnet_parts(np.array([z]), z_min, z_max, n) == part
