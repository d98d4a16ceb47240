"""Heads: the papers' formulas, and structures they can and cannot tell apart."""

import numpy as np
import pytest
import torch

from nnunet_calib.fewshot.structure.heads import HEADS, LinearHead, LocalPrototypeHead, PrototypeHead
from nnunet_calib.fewshot.structure.heads.base import balanced
from nnunet_calib.fewshot.structure.heads.prototype import masked_averages
from nnunet_calib.fewshot.structure.logistic import fit_logistic
from nnunet_calib.fewshot.volume.frame import Chunks

# adapters take the log odds of a trained branch in the place of features: tests/fewshot/test_adapter.py
every_head = pytest.mark.parametrize("key", [key for key in HEADS if key != "adapter"])


def sample(n=4000, features=12, chunks=4, supports=2, share=0.1, seed=0, turning=0.0, noise=0.5):
    """Unit features; the structure's direction turns along the first axis by ``turning`` (1: half a circle)."""
    g = torch.Generator().manual_seed(seed)
    position = torch.rand(n, 3, generator=g)
    target = torch.rand(n, generator=g) < share
    angle = torch.pi * turning * position[:, 0]
    f = noise * torch.randn(n, features, generator=g)
    sign = torch.where(target, 1.0, -1.0)
    f[:, 0] += sign * angle.cos()
    f[:, 1] += sign * angle.sin()
    chunk = Chunks(chunks, "hard").weights(position[:, 0])
    support = torch.arange(n) % supports
    weight = torch.where(target, 1.0, 5.0)
    return torch.nn.functional.normalize(f, dim=1), target, weight, position, chunk, support


def accuracy(head, seed=99, chunks=None, **how):
    f, target, _, position, chunk, _ = sample(seed=seed, share=0.5, **how)
    chunk = chunk if chunks is None else chunks.weights(position[:, 0])
    s = head(f, position, chunk)
    return float(((s > s.median()) == target).float().mean())


@every_head
def test_a_state_gives_back_the_head(key):
    parts = sample()
    head = HEADS[key].fit(*parts)
    state = head.state()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    again = HEADS[key].from_state(state)
    f, _, _, position, chunk, _ = parts
    assert torch.equal(again(f, position, chunk), head(f, position, chunk))
    assert head.logit(f @ head.projections.T, position, chunk).shape == (len(f),)
    assert head.projections.dtype == torch.float32


@every_head
def test_a_head_tells_what_can_be_told_apart(key):
    assert accuracy(HEADS[key].fit(*sample(noise=0.2)), noise=0.2) > 0.95


@every_head
def test_chunks_follow_features_that_change_along_the_axis(key):
    """The direction of the structure turns by a whole circle along the axis: no single head can follow."""
    fitted = {n: HEADS[key].fit(*sample(n=12_000, turning=2, chunks=n)) for n in (1, 8)}
    assert accuracy(fitted[1], turning=2, chunks=Chunks(1)) < 0.75
    assert accuracy(fitted[8], turning=2, chunks=Chunks(8, "hard")) > 0.85
    assert accuracy(fitted[8], turning=2, chunks=Chunks(8)) > accuracy(fitted[1], turning=2, chunks=Chunks(1)) + 0.15


@every_head
def test_a_chunk_without_the_structure_borrows_and_is_only_softly_absent(key):
    parts = list(sample(chunks=4, supports=3))
    parts[1] = parts[1] & (parts[4].argmax(dim=1) != 2)
    settings = {"cells": 2, "most": 1000} if key == "local_prototypes" else {}
    head = HEADS[key].fit(*parts, **settings)
    shared = HEADS[key].fit(*parts[:4], torch.ones(len(parts[0]), 1), parts[5], **settings)
    f, _, _, position, _, _ = parts
    here = torch.zeros(len(f), 4)
    here[:, 2] = 1
    expected = shared(f, position, torch.ones(len(f), 1)) + np.log(1 / 4)  # Beta(1, 1 + 3)
    torch.testing.assert_close(head(f, position, here), expected.float(), atol=2e-3, rtol=1e-3)


@every_head
def test_samples_that_cannot_be_fitted_are_refused(key):
    f, target, weight, position, chunk, support = sample(n=100)
    with pytest.raises(ValueError, match="structure and background"):
        HEADS[key].fit(f, torch.zeros_like(target), weight, position, chunk, support)
    with pytest.raises(ValueError, match="do not fit"):
        HEADS[key].fit(f, target[1:], weight, position, chunk, support)
    with pytest.raises(ValueError, match="bool"):
        HEADS[key].fit(f, target.long(), weight, position, chunk, support)


def test_the_prototype_score_is_panets():
    """20 cos(f, p): masked averages of each support, their plain mean, the softmax's log odds."""
    f, target, weight, position, _, support = sample(chunks=1)
    head = PrototypeHead.fit(f, target, weight, position, torch.ones(len(f), 1), support)
    prototypes = []
    for y in (~target, target):
        means = []
        for s in (0, 1):
            m = (y & (support == s)).float() * weight
            means.append((f * m[:, None]).sum(0) / m.sum())
        prototypes.append(sum(means) / 2)
    scores = torch.stack([20 * torch.cosine_similarity(f, p[None], dim=1) for p in prototypes], dim=1)
    probability = scores.softmax(dim=1)[:, 1]
    s = head(f, position, torch.ones(len(f), 1))
    torch.testing.assert_close(s.sigmoid(), probability, atol=1e-5, rtol=1e-4)


def test_prototypes_of_a_chunk_are_of_its_voxels_alone():
    f, target, weight, position, chunk, support = sample(chunks=3, turning=1)
    head = PrototypeHead.fit(f, target, weight, position, chunk, support)
    here = chunk.argmax(dim=1) == 1
    alone = PrototypeHead.fit(
        f[here], target[here], weight[here], position[here], torch.ones(int(here.sum()), 1), support[here]
    )
    torch.testing.assert_close(head.projections[1:2], alone.projections, atol=1e-5, rtol=1e-4)


def test_the_logistic_fit_is_where_the_gradient_ends():
    """Against scipy's minimum of the formula, in float64."""
    from scipy.optimize import minimize

    g = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(600, 5, generator=g), torch.ones(600, 1)], dim=1).double()
    y = torch.rand(600, generator=g) < torch.sigmoid(x @ torch.tensor([1.0, -2, 0.5, 0, 0, -1]).double())
    w = torch.rand(600, generator=g).double()
    w /= w.sum()
    ridge, centre = torch.full((6,), 0.01).double(), torch.linspace(-1, 1, 6).double()

    def objective(theta):
        s = np.where(y.numpy(), 1, -1)
        nll = w.numpy() @ np.log1p(np.exp(-s * (x.numpy() @ theta)))
        return nll + 0.5 * (ridge.numpy() * (theta - centre.numpy()) ** 2).sum()

    expected = minimize(objective, np.zeros(6), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(fit_logistic(x, y, w, ridge, centre).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(fit_logistic(x.float(), y, w, ridge, centre).numpy(), expected, atol=1e-4)


def test_separable_samples_end():
    x = torch.tensor([[-1.0, 1], [1, 1]])
    theta = fit_logistic(x, x[:, 0] > 0, torch.tensor([0.5, 0.5]).double(), torch.tensor([1e-6, 1e-8]).double())
    assert torch.isfinite(theta).all()
    assert theta[0] > 5


def test_every_support_counts_the_same_and_the_structure_has_its_share():
    target = torch.tensor([True, False, False, True, False, False])
    support = torch.tensor([0, 0, 0, 1, 1, 1])
    weight = torch.tensor([1.0, 50, 50, 3, 300, 300])
    w = balanced(target, weight, support, 0.2)
    assert w.sum().item() == pytest.approx(1)
    assert w[target].tolist() == pytest.approx([0.1, 0.1])
    assert w[~target].tolist() == pytest.approx([0.2] * 4)


def test_the_linear_head_gives_log_odds_in_natural_shares():
    """Drawn from a logistic model: the odds are found whatever share the structure has in the fit."""
    g = torch.Generator().manual_seed(0)
    n = 60_000
    f = torch.randn(n, 3, generator=g)
    truth = f @ torch.tensor([1.5, -1, 0.0]) - 4
    target = torch.rand(n, generator=g) < truth.sigmoid()
    ones = torch.ones(n, 1)
    head = LinearHead.fit(
        f, target, torch.ones(n), torch.rand(n, 3, generator=g), ones, torch.zeros(n, dtype=torch.long), ridge=1e-6
    )
    s = head(f, torch.full((n, 3), 0.5), ones)
    assert (s - truth).abs().mean() < 0.15


def test_positions_tell_apart_what_features_cannot():
    f, _, weight, position, chunk, support = sample()
    target = (position[:, 2] - 0.4).abs() < 0.15
    fitted = {
        on: LinearHead.fit(f, target, weight, position, chunk, support, with_position=on)(f, position, chunk)
        for on in (True, False)
    }
    score = {on: float(s[target].median() - s[~target].median()) for on, s in fitted.items()}
    assert score[True] > score[False] + 2


def test_positions_beyond_the_extent_are_those_of_its_end():
    head = LinearHead.fit(*sample())
    f, _, _, position, chunk, _ = sample()
    beyond = position.clone()
    beyond[:, 1] = 3.0
    at_end = position.clone()
    at_end[:, 1] = 1.0
    assert torch.equal(head(f, beyond, chunk), head(f, at_end, chunk))


def test_much_shrinkage_makes_all_chunks_alike():
    parts = sample(turning=1)
    head = LinearHead.fit(*parts, chunk_ridge=1e6)
    alone = LinearHead.fit(*parts[:4], torch.ones(len(parts[0]), 1), parts[5])
    for row in head.projections:
        torch.testing.assert_close(row, alone.projections[0], atol=1e-2, rtol=1e-2)


def test_local_prototypes_are_alpnets():
    """On a grid: cells filled by more than 0.95 of a class, the masked average beside those of the structure, and
    the class score sum_i softmax_i(20 cos) 20 cos, loops over the pooled cells as in the paper."""
    g = torch.Generator().manual_seed(5)
    side, window = 8, 2
    grid = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    position = (grid + 0.5) / side
    target = ((grid >= 2) & (grid < 7)).all(dim=1)
    f = torch.nn.functional.normalize(torch.randn(side**3, 6, generator=g) + target[:, None], dim=1)
    ones, support = torch.ones(side**3), torch.zeros(side**3, dtype=torch.long)
    parts = f, target, ones, position, torch.ones(side**3, 1), support
    head = LocalPrototypeHead.fit(*parts, cells=side // window, most=1000)

    volume, mask = f.view(side, side, side, 6), target.view(side, side, side).float()
    local = {True: [(f * target[:, None]).sum(0) / target.sum()], False: []}
    for z in range(0, side, window):
        for y in range(0, side, window):
            for x in range(0, side, window):
                box = (slice(z, z + window), slice(y, y + window), slice(x, x + window))
                mean, share = volume[box].reshape(-1, 6).mean(0), mask[box].mean()
                if share > 0.95:
                    local[True].append(mean)
                if 1 - share > 0.95:
                    local[False].append(mean)
    assert len(local[True]) == 9
    score = {}
    for c, prototypes in local.items():
        s = torch.stack([20 * torch.cosine_similarity(f, p[None], dim=1) for p in prototypes], dim=1)
        score[c] = (s.softmax(dim=1) * s).sum(dim=1)
    torch.testing.assert_close(head(f, position, parts[4]), score[True] - score[False], atol=1e-3, rtol=1e-4)


def test_a_structure_that_fills_no_cell_has_its_masked_average_alone():
    parts = sample(chunks=1)
    head = LocalPrototypeHead.fit(*parts, cells=2)
    assert head.novel.sum() == 1
    pair = PrototypeHead.fit(*parts)
    f, target, weight, _, _, support = parts
    average = masked_averages(f, target, weight.double(), support, torch.zeros_like(support), 1)[0, 1]
    cosine = torch.cosine_similarity(f, average[None], dim=1)
    torch.testing.assert_close(f @ head.projections[head.novel][0], 20 * cosine, atol=1e-3, rtol=1e-3)
    assert pair.projections.shape == (1, f.shape[1])


@pytest.mark.parametrize("most", [4, 32])
def test_prototypes_are_no_more_than_asked_for(most):
    head = LocalPrototypeHead.fit(*sample(chunks=2, noise=0.1, share=0.5), most=most)
    assert len(head.projections) <= most
    assert accuracy(head, noise=0.1, chunks=Chunks(2, "hard")) > 0.95
