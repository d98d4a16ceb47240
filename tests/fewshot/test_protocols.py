"""Which volumes support which query."""

import numpy as np
import pytest

from nnunet_calib.data.errors import UsageError
from nnunet_calib.fewshot.protocols import Episode, paper_episodes, real_episodes, scored_slices, worst_tenth


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


def test_p1_scores_the_slices_between_the_first_and_the_last_of_the_structure():
    reference = np.zeros((6, 2, 2), dtype=bool)
    reference[1, 0, 0] = reference[4, 1, 1] = True
    assert scored_slices(reference, 0)[:, 1, 0].tolist() == [False, True, True, True, True, False]
    assert not scored_slices(np.zeros_like(reference), 0).any()


@pytest.mark.parametrize(("values", "expected"), [(range(20), 0.5), ([0.3, 0.9], 0.3), ([np.nan, 0.5], 0.5)])
def test_the_worst_tenth_is_a_mean_of_one_pair_at_least(values, expected):
    assert worst_tenth(list(values)) == expected


def test_the_worst_tenth_of_nothing_is_unknown():
    assert np.isnan(worst_tenth([]))
