"""A formula is enough: autograd differentiates it; slopes in closed form are tested against that."""

from types import MethodType

import pytest
import torch

from nnunet_calib.losses import CalibrationLoss, NACLLoss
from nnunet_calib.losses.voxelwise import Voxels

from .cases import FORMS, OPTIONS, Problem, name, problem

forms = pytest.mark.parametrize("form", FORMS)


class PlainECP(CalibrationLoss):
    """L = CE - 0.1 H, as somebody would write it who knows the formula only."""

    def _weights(self):
        return {"cross_entropy": 1.0, "entropy": -0.1}

    def _formula(self, v: Voxels, shared):
        entropy = -(v.p * v.log_p).sum(dim=1, keepdim=True)
        return {"cross_entropy": -v.log_p_y, "entropy": entropy}


def by_autograd(given: Problem, case):
    """Value, terms and gradient of a loss without its slopes."""
    loss = given.loss(case)
    loss._terms = MethodType(CalibrationLoss._terms, loss)
    logits = given.logits.clone().requires_grad_()
    value = loss(logits, given.target, given.valid)
    value.backward()
    return value.detach(), loss.parts(given.logits, given.target, given.valid), logits.grad


@pytest.mark.parametrize("case", OPTIONS, ids=name)
@forms
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_slopes_in_closed_form_are_those_of_the_formula(case, form, masked):
    given = problem(form, (4, 3, 4), masked=masked, classes=4)
    value, gradient = given.gradient(case)
    parts = given.loss(case).parts(given.logits, given.target, given.valid)
    plain_value, plain_parts, plain_gradient = by_autograd(given, case)
    torch.testing.assert_close(value, plain_value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts, plain_parts, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-10, atol=1e-12)


def test_a_loss_of_its_formula_alone_is_the_loss():
    given = problem("labels", (4, 3, 4), masked=True)
    logits = given.logits.clone().requires_grad_()
    PlainECP()(logits, given.target, given.valid).backward()
    torch.testing.assert_close(logits.grad, given.gradient(("ecp", {}))[1], rtol=1e-10, atol=1e-12)


@forms
def test_a_term_that_does_not_depend_on_the_logits_has_no_slope(form):
    class Constant(PlainECP):
        def _formula(self, v, shared):
            return {"cross_entropy": -v.log_p_y, "entropy": torch.ones_like(v.log_p_y.detach())}

    given = problem(form, (4, 3))
    logits = given.logits.clone().requires_grad_()
    Constant(multilabel=form == "regions")(logits, given.target).backward()
    torch.testing.assert_close(logits.grad, given.gradient(("ce", {}))[1], rtol=1e-10, atol=1e-12)


def test_the_slope_of_a_region_at_zero_is_that_of_the_sigmoid():
    given = Problem("regions", torch.zeros(1, 1, 2, 1).double(), torch.tensor([[[[True], [False]]]]), None)
    assert by_autograd(given, ("ce", {}))[2].flatten().tolist() == [-0.25, 0.25]


def test_balanced_means_are_the_sum_over_their_groups_and_so_is_their_slope():
    """Against the definition, with torch's own cross-entropy and autograd."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 12, 12, generator=generator).requires_grad_()
    y = torch.zeros(2, 1, 12, 12, dtype=torch.long)
    y[:, :, 3:8, 2:9], y[0, :, 4:6] = 1, 2
    windows = torch.nn.functional.pad(y.float(), (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    q = torch.stack([(windows == c).float().mean(dim=(-1, -2))[:, 0] for c in range(4)], dim=1)
    wrong = z.argmax(dim=1, keepdim=True) != y
    mixed = (q.amax(dim=1, keepdim=True) < 1) & ~wrong
    d = (z - q).abs().mean(dim=1, keepdim=True)
    expected = torch.nn.functional.cross_entropy(z, y[:, 0]) + 0.03 * (d[wrong].mean() + d[mixed].mean())
    found = NACLLoss(weight=0.03, balanced=True)(z, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (found, expected)))
