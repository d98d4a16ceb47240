"""Refinement on a query: the papers' objectives, and what it does to a head."""

import numpy as np
import pytest
import torch

from nnunet_calib.fewshot.structure.heads import LinearHead
from nnunet_calib.fewshot.structure.objective import PUBLISHED, Objective, Query, assigned, refine


def case(seed=0, n=400, m=300):
    g = torch.Generator().manual_seed(seed)
    s, q = torch.randn(n, generator=g).double() * 2, torch.randn(m, generator=g).double() * 2
    y = torch.rand(n, generator=g) < 0.4
    w, v = torch.rand(n, generator=g).double(), torch.rand(m, generator=g).double()
    return s, y, w / w.sum(), q, v / v.sum(), torch.rand(m, generator=g) < 0.7


def naive(s, y, w, q, v, within, pi, objective, which):
    """Loops over voxels, in the papers' symbols."""
    ce = mean = entropy = counted = 0.0
    for i in range(len(s)):
        p = 1 / (1 + np.exp(-s[i]))
        ce -= w[i] * np.log(p if y[i] else 1 - p)
    for j in range(len(q)):
        p = 1 / (1 + np.exp(-q[j]))
        mean += v[j] * p
        if within[j]:
            entropy -= v[j] * (p * np.log(p) + (1 - p) * np.log(1 - p))
            counted += v[j]
    if which == "kl":
        d = mean * np.log(mean / pi) + (1 - mean) * np.log((1 - mean) / (1 - pi))
    elif which == "marginal entropy":
        d = mean * np.log(mean) + (1 - mean) * np.log(1 - mean)
    else:
        e = (pi - mean) / max(pi, mean)
        d = max(abs(e) - objective.margin, 0)
    return objective.support * ce + objective.prior * d + objective.entropy * entropy / counted


OBJECTIVES = [
    (PUBLISHED["repri"](2), "kl"),
    (PUBLISHED["tim_volume"](1), "kl"),
    (PUBLISHED["tim"](1), "marginal entropy"),
    (Objective(), "hinge"),
]


@pytest.mark.parametrize(("objective", "which"), OBJECTIVES)
@pytest.mark.parametrize("pi", [0.05, 0.45])
def test_the_objective_is_the_papers(objective, which, pi):
    parts = case()
    expected = naive(*(part.numpy() for part in parts), pi, objective, which)
    assert float(objective(*parts, pi)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("objective", "which"), OBJECTIVES)
def test_the_gradient_is_that_of_finite_differences(objective, which):
    s, y, w, q, v, within = case(n=20, m=15)
    s.requires_grad_()
    q.requires_grad_()
    objective(s, y, w, q, v, within, 0.1).backward()
    step = 1e-6
    for x in (s, q):
        for i in range(len(x)):
            values = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in (s, q)]
                moved[0 if x is s else 1][i] += sign * step
                values.append(float(objective(moved[0], y, w, moved[1], v, within, 0.1)))
            assert float(x.grad[i]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)


def test_the_gradient_in_closed_form():
    """RePRI: dCE/ds = w (p - y); dKL/dq = v p (1 - p) log(m (1 - pi) / (pi (1 - m))); dH/dq = -v q p (1 - p) / v."""
    s, y, w, q, v, within = case()
    s.requires_grad_()
    q.requires_grad_()
    PUBLISHED["repri"](2)(s, y, w, q, v, within, 0.1).backward()
    torch.testing.assert_close(s.grad, w * (s.sigmoid() - y.double()).detach())
    p = q.detach().sigmoid()
    m, slope = v @ p, p * (1 - p)
    counted = v * within
    expected = v * slope * torch.log(m * 0.9 / (0.1 * (1 - m))) / 2 - counted * q.detach() * slope / counted.sum() / 2
    torch.testing.assert_close(q.grad, expected)


@pytest.mark.parametrize(("share", "moves"), [(0.25, False), (0.4, False), (0.1, True), (0.7, True)])
def test_the_hinge_pulls_only_outside_the_margin(share, moves):
    q = torch.full((50,), float(torch.logit(torch.tensor(0.3))), requires_grad=True)
    parts = torch.zeros(2), torch.tensor([True, False]), torch.zeros(2), q, torch.full((50,), 0.02), torch.ones(50) > 0
    Objective(support=0, entropy=0, margin=0.3)(*parts, share).backward()
    assert bool((q.grad != 0).all()) == moves
    if moves:
        assert bool((q.grad < 0).all()) == (share > 0.3)


def fitted(seed=0, n=3000, shift=0.0):
    """A head on one volume, and a query of which the features are off by ``shift``."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for off in (0.0, shift):
        y = torch.rand(n, generator=g) < 0.2
        f = 0.6 * torch.randn(n, 8, generator=g)
        f[:, 0] += torch.where(y, 1.0, -1.0) + off
        parts.append((f, y, torch.ones(n), torch.rand(n, 3, generator=g), torch.ones(n, 1), torch.zeros(n).long()))
    supports, (f, y, w, position, chunk, _) = parts
    query = Query(f, position, chunk, w, torch.ones(n, dtype=torch.bool))
    return LinearHead.fit(*supports), supports, query, y


def predicted(head, query):
    return head(query.features, query.position, query.chunk)


def test_a_query_of_other_contrast_is_brought_to_the_expected_share():
    head, supports, query, y = fitted(shift=-1.2)
    before = predicted(head, query)
    after = predicted(refine(head, supports, query, share=0.2, objective=Objective(prior=10.0)), query)
    assert before.sigmoid().mean() < 0.1
    assert after.sigmoid().mean() > 0.7 * 0.2 - 0.01
    assert ((after > 0) == y).float().mean() > ((before > 0) == y).float().mean() + 0.03


def test_a_query_like_the_support_changes_little():
    head, supports, query, y = fitted()
    after = predicted(refine(head, supports, query, share=0.2, objective=Objective(entropy=0.0)), query)
    before = predicted(head, query)
    assert ((after > 0) == (before > 0)).float().mean() > 0.98


def test_entropy_makes_the_head_surer():
    head, supports, query, _ = fitted()
    mean = {
        weight: predicted(refine(head, supports, query, 0.2, Objective(entropy=weight)), query).abs().mean()
        for weight in (0.0, 1.0)
    }
    assert mean[1.0] > mean[0.0] * 1.2


def test_without_a_prior_the_own_prediction_is_the_anchor():
    head, supports, query, _ = fitted(shift=-0.3)
    share = predicted(head, query).sigmoid().mean()
    after = predicted(refine(head, supports, query, None, PUBLISHED["repri"](1)), query)
    assert after.sigmoid().mean() == pytest.approx(float(share), abs=0.03)


def test_tim_as_published_wants_classes_of_one_size():
    head, supports, query, _ = fitted()
    objectives = [PUBLISHED[name](1) for name in ("tim", "tim_volume")]
    shares = [float(predicted(refine(head, supports, query, 0.2, o), query).sigmoid().mean()) for o in objectives]
    assert shares[0] > 0.3
    assert shares[1] == pytest.approx(0.2, abs=0.05)


def test_tim_by_turns_lowers_tims_objective_and_wants_classes_of_one_size_too():
    head, supports, query, _ = fitted()
    turned = refine(head, supports, query, 0.5, PUBLISHED["tim_adm"](1))
    features, target, weight, position, chunk, _ = supports

    def value(one):
        logits = (one(features, position, chunk), target, weight / weight.sum(), predicted(one, query))
        return float(PUBLISHED["tim"](1)(*logits, query.weight / query.weight.sum(), query.within, 0.5))

    assert value(turned) < value(head) - 0.01
    assert float(predicted(turned, query).sigmoid().mean()) > 0.3


def test_the_assignment_of_adm_is_the_papers():
    z, v = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.2, 0.5, 0.3])
    p = np.array([[1 / (1 + np.exp(x)), 1 / (1 + np.exp(-x))] for x in z.tolist()])
    power = p**1.1
    q = power / np.sqrt((v.numpy()[:, None] * power).sum(axis=0))
    assert assigned(z, v, 0.1).numpy() == pytest.approx(q[:, 1] / q.sum(axis=1), rel=1e-5)


def test_the_head_that_is_given_stays_as_it_is():
    head, supports, query, _ = fitted()
    state = {name: tensor.clone() for name, tensor in head.state().items()}
    refine(head, supports, query, 0.2, steps=3)
    assert all(torch.equal(head.state()[name], tensor) for name, tensor in state.items())
