"""The evidence harness: patients stay together, trainings come after what they start from, pages say what rows give."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

EVIDENCE = Path(__file__).resolve().parents[2] / "scripts" / "evidence"
CASES = [f"patient{p:03d}_frame{f:02d}" for p in range(20) for f in (1, 12)]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    loaded = []

    def load(name: str):
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture
def acdc(module):
    return module("protocol").Protocol.read(EVIDENCE / "protocols" / "acdc2d.json")


def test_the_volumes_of_a_patient_stay_together_in_split_and_folds(acdc):
    train, validation = acdc.split(CASES)
    assert sorted(train + validation) == CASES
    assert len(validation) == 12
    assert not {acdc.group(case) for case in train} & {acdc.group(case) for case in validation}
    folds = acdc.folds(validation)
    assert sorted(sum(folds, [])) == validation
    groups = [{acdc.group(case) for case in fold} for fold in folds]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6


def test_pairs_start_from_stock_of_the_same_run(acdc):
    nacl = acdc.training("nacl_2")
    assert (nacl.shares, nacl.start_name) == (True, "stock_2")


def test_the_test_cases_are_closed(acdc):
    assert acdc.content["test_is_open"] is False


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        ([{"label": "meep", "trainer": "MEEPTrainer", "start": "shared stock"}], "not before it"),
        ([{"label": "a", "trainer": "T"}, {"label": "a", "trainer": "T"}], "twice"),
        ([{"label": "a", "trainer": "T", "seed": 1}], "unknown keys"),
    ],
)
def test_protocols_without_meaning_are_refused(module, tmp_path, queue, message):
    file = tmp_path / "protocol.json"
    file.write_text(json.dumps({"name": "x", "queue": queue}))
    with pytest.raises(ValueError, match=message):
        module("protocol").Protocol.read(file)


def test_the_page_says_what_the_rows_give_and_a_changed_number_is_found(module):
    pages = module("pages")
    text = pages.PAGE.read_text()
    assert list(pages.differences(text)) == []
    assert text == pages.written(text)
    changed = text.replace("| stock | isotonic | 9423 | 0.844 | 0.0378 ", "| stock | isotonic | 9423 | 0.844 | 0.0377 ")
    assert len(list(pages.differences(changed))) == 1


def test_the_balanced_penalty_is_the_sum_of_its_groups_means_and_so_is_its_slope(monkeypatch):
    """Against the definition, with torch's own cross-entropy and autograd."""
    monkeypatch.syspath_prepend(str(EVIDENCE / "trainers"))
    losses = importlib.import_module("evidence_losses")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 12, 12, generator=generator).requires_grad_()
    y = torch.zeros(2, 1, 12, 12, dtype=torch.long)
    y[:, :, 3:8, 2:9], y[0, :, 4:6] = 1, 2
    windows = torch.nn.functional.pad(y.float(), (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    q = torch.stack([(windows == c).float().mean(dim=(-1, -2))[:, 0] for c in range(4)], dim=1)
    wrong = z.argmax(dim=1, keepdim=True) != y
    mixed = (q.amax(dim=1, keepdim=True) < 1) & ~wrong
    settled = ~wrong & ~mixed
    for with_settled in (False, True):
        d = (z - q).abs().mean(dim=1, keepdim=True)
        means = d[wrong].mean() + d[mixed].mean() + (d[settled].mean() if with_settled else 0)
        expected = torch.nn.functional.cross_entropy(z, y[:, 0]) + 0.03 * means
        found = losses.BalancedNACLLoss(weight=0.03, settled=with_settled)(z, y)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (found, expected)))
    sys.modules.pop("evidence_losses")
