"""CRaC's multipliers: what they follow, how they grow, and that they can be saved."""

import copy

import numpy as np
import pytest
import torch

from nnunet_calib.losses import CRaCLoss

from . import naive
from .cases import FORMS, SHAPES, Problem, problem

forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def observe(loss: CRaCLoss, *problems: Problem) -> CRaCLoss:
    for given in problems:
        loss.observe(given.logits, given.target, given.valid)
    return loss


def epoch(loss: CRaCLoss, *problems: Problem) -> CRaCLoss:
    observe(loss, *problems).update()
    return loss


def violations(given: Problem, margin: float = 5.0) -> np.ndarray:
    """Mean over the voxels that count of h at the boundary and inside, (2, C), by loops."""
    logits, labels = given.logits.numpy(), given.target[:, 0].numpy()
    valid = None if given.valid is None else given.valid[:, 0].numpy()
    q, mixed = naive.neighbourhood(labels, logits.shape[1], valid), naive.boundary(labels, valid)
    sums, voxels = np.zeros((2, logits.shape[1])), 0
    for index, z, _ in naive.voxels(logits, labels, valid):
        image, *position = index
        voxels += 1
        for c, z_c in enumerate(z):
            target = q[(image, c, *position)] * (1 if mixed[index] else margin)
            sums[0 if mixed[index] else 1, c] += abs(target - z_c)
    return sums / voxels


def inside(logits: float) -> Problem:
    """One voxel of class 0 with the logits (5, ``logits``): all h are 0 but that of class 1 inside."""
    z = torch.tensor([5.0, logits], dtype=torch.float64).reshape(1, 2, 1, 1)
    return Problem("labels", z, torch.zeros(1, 1, 1, 1).long(), None)


@masks
@shapes
def test_after_an_epoch_the_multipliers_have_grown_by_rho_times_the_mean_violation(shape, masked):
    given = problem("labels", shape, masked=masked)
    loss = epoch(CRaCLoss(rho=0.3), given)
    expected = torch.from_numpy(1e-6 + 0.3 * violations(given)).float()
    torch.testing.assert_close(loss.multipliers, expected)
    epoch(loss, given)
    torch.testing.assert_close(loss.multipliers, 2 * expected - 1e-6)


@forms
def test_the_mean_is_over_the_voxels_of_all_batches(form):
    given = problem(form, SHAPES["3d"], masked=True, batch=3)
    batches = [given.map(lambda tensor, part=part: tensor[part]) for part in (slice(0, 1), slice(1, 3))]
    by_batch, at_once = (epoch(CRaCLoss(multilabel=form == "regions"), *seen) for seen in (batches, [given]))
    torch.testing.assert_close(by_batch.multipliers, at_once.multipliers)


def test_regions_share_the_multipliers_of_the_two_class_problems():
    given = problem("regions", SHAPES["2d"], masked=True)
    shared, stacked = epoch(CRaCLoss(multilabel=True), given), epoch(CRaCLoss(), given.stacked())
    assert shared.multipliers.shape == (2, 2)
    torch.testing.assert_close(shared.multipliers, stacked.multipliers)


@masks
@shapes
def test_the_penalty_grows_by_the_multipliers_times_the_violations(shape, masked):
    given = problem("labels", shape, masked=masked)
    first, then = (
        loss.parts(given.logits, given.target, given.valid)["penalty"].item()
        for loss in (CRaCLoss(rho=0.3), epoch(CRaCLoss(rho=0.3), given))
    )
    # The multipliers grew by 0.3 times the mean violations; the mean is over 2 C constraints.
    assert then - first == pytest.approx((0.3 * violations(given) ** 2).sum() / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("second", "rho"),
    [
        (2.0, 0.12),  # nothing gained
        (1.81, 0.12),
        (1.79, 0.1),  # a tenth gained
        (0.0, 0.1),
        (3.0, 0.12),
    ],
)
def test_rho_grows_where_the_violation_did_not_fall_by_a_tenth(second, rho):
    loss = epoch(epoch(CRaCLoss(rho_every=2), inside(2.0)), inside(second))
    assert loss.rho[1, 1].item() == pytest.approx(rho)
    assert loss.rho[0].tolist() == pytest.approx([0.1, 0.1]), "no voxel at a boundary, no violation there"


def test_rho_grows_every_few_epochs_up_to_its_largest_value():
    loss = CRaCLoss(rho=1.0, rho_growth=2.0, rho_every=3, rho_max=5.0)
    seen = [epoch(loss, inside(2.0)).rho[1, 1].item() for _ in range(12)]
    assert seen == [1, 1, 2, 2, 2, 4, 4, 4, 5, 5, 5, 5]


@forms
def test_forward_leaves_the_state_alone(form):
    given = problem(form, SHAPES["2d"])
    loss = epoch(CRaCLoss(multilabel=form == "regions"), given)
    before = copy.deepcopy(loss.state_dict())
    for mode in (True, False):
        loss.train(mode)(given.logits, given.target, given.valid)
    loss.update()
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_an_epoch_without_valid_voxels_changes_nothing():
    given = problem("labels", SHAPES["2d"], masked=True)
    loss = epoch(CRaCLoss(), given)
    before = copy.deepcopy(loss.state_dict())
    given.valid = torch.zeros_like(given.valid)
    given.logits = torch.full_like(given.logits, float("nan"))
    epoch(loss, given)
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_observing_keeps_no_graph_and_counts_in_half_precision():
    given = problem("labels", SHAPES["3d"], dtype=torch.float16)
    given.logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = epoch(CRaCLoss(), given)
    given.logits = given.logits.detach().double()
    torch.testing.assert_close(loss.multipliers, epoch(CRaCLoss(), given).multipliers)
    assert not loss.multipliers.requires_grad


def test_a_fresh_loss_takes_over_the_state_and_goes_on_exactly():
    given, other = problem("labels", SHAPES["2d"]), problem("labels", SHAPES["2d"], seed=1)
    first = epoch(CRaCLoss(rho_every=2), given)
    second = CRaCLoss(rho_every=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for loss in (first, second):
        epoch(loss, other)
    assert first.rho.max() > 0.1
    assert all(torch.equal(first.state_dict()[key], value) for key, value in second.state_dict().items())
    assert first(given.logits, given.target) == second(given.logits, given.target)


def test_without_logits_there_is_no_state():
    loss = CRaCLoss()
    loss.update()
    assert loss.state_dict() == {}


def test_multipliers_of_other_classes_are_refused():
    loss = epoch(CRaCLoss(), problem("labels", SHAPES["2d"]))
    given = problem("labels", SHAPES["2d"], classes=4)
    with pytest.raises(ValueError, match="the multipliers are those of 3 classes, not of 4"):
        loss(given.logits, given.target)


def test_wrong_shapes_are_refused_when_observing_too():
    given = problem("labels", SHAPES["2d"])
    with pytest.raises(ValueError, match="target"):
        CRaCLoss().observe(given.logits, given.target[:, 0])
