"""Labels that no class has, and logits that are none, say so in every loss; on a GPU in the first batch."""

from unittest.mock import patch

import pytest
import torch

from nnunet_calib.losses import base

from .cases import DEFAULTS, FORMS, name, problem

every_loss = pytest.mark.parametrize("case", DEFAULTS, ids=name)
SHAPE = (12, 16)


@every_loss
@pytest.mark.parametrize("label", [3, 255, -1])
def test_a_label_that_no_class_has_is_named(case, label):
    given = problem("labels", SHAPE)
    given.target[1, 0, 2, 3] = label
    with pytest.raises(ValueError, match=f"label {label}, but logits of 3 classes know 0 to 2; .*valid="):
        given.value(case)


@every_loss
def test_a_label_that_no_class_has_is_named_in_a_later_batch_too(case):
    given = problem("labels", SHAPE)
    loss = given.loss(case)
    loss(given.logits, given.target)
    given.target[0, 0, 0, 0] = 7
    with pytest.raises(ValueError, match="label 7"):
        loss(given.logits, given.target)


@every_loss
def test_an_ignored_voxel_may_hold_any_label(case):
    given = problem("labels", SHAPE, masked=True)
    given.target = torch.where(given.valid, given.target, 255)
    assert given.value(case).isfinite()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_softmax_is_no_logit(case, dtype):
    given = problem("labels", SHAPE)
    given.logits = given.logits.softmax(dim=1).to(dtype)
    with pytest.raises(ValueError, match="after a softmax; pass the network's output"):
        given.value(case)


@every_loss
def test_a_sigmoid_is_no_logit(case):
    given = problem("regions", SHAPE)
    given.logits = given.logits.sigmoid()
    with pytest.raises(ValueError, match="after a sigmoid; pass the network's output"):
        given.value(case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", [0.0, 1 / 3, 1.0])
def test_a_network_that_starts_with_one_value_everywhere_is_taken(form, fill):
    given = problem(form, SHAPE)
    given.logits = torch.full_like(given.logits, fill)
    assert given.value(("ce", {})).isfinite()


def test_logits_between_0_and_1_that_do_not_sum_to_1_are_taken():
    given = problem("labels", SHAPE)
    given.logits = given.logits.sigmoid()
    assert given.value(("ce", {})).isfinite()


def test_on_a_device_only_the_first_batch_is_looked_at():
    """`meta` stands for a GPU: it is not the CPU."""
    loss = problem("labels", SHAPE).loss(("ce", {}))
    given = problem("labels", SHAPE).map(lambda tensor: tensor.to("meta"))
    with patch.object(base, "check_labels") as labels, patch.object(base, "check_logits") as logits:
        for _ in range(3):
            loss._batch(given.logits, given.target, None)
    assert (labels.call_count, logits.call_count) == (1, 1)
