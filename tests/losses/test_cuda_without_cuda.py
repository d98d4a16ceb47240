"""What runs on a GPU, run on tensors that say they are on one and hold no values: devices agree, nothing is read."""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_calib.losses import base, voxelwise

from .cases import DEFAULTS, FORMS, name, problem

EXTRA = [("meep", {"variant": "kl"}), ("ace", {"soft": True}), ("nacl", {"prior": "gaussian"})]
SCALES = [(8, 4, 8), (4, 4, 4), (4, 2, 4), (2, 2, 2), (1, 1, 1)]
CUDA = torch.device("cuda:0")


@contextlib.contextmanager
def fake_cuda():
    """Tensors without values on a GPU that need not be there; reading one raises, and so does mixing devices."""
    # The first batch's look at the values is the only one, and on purpose.
    with (
        patch.object(base, "check_labels"),
        patch.object(base, "check_logits"),
        FakeTensorMode(allow_non_fake_inputs=False) as mode,
    ):
        yield mode


def on_cuda(form, shape, masked, dtype=torch.float16):
    """Made on the processor, where the random numbers are, before there are fake tensors."""
    return problem(form, shape, masked=masked, classes=3, dtype=dtype)


def step(loss, given):
    """Value and gradient as autograd would get them; its engine itself starts no backward pass without a driver."""
    context = SimpleNamespace(save_for_backward=lambda *tensors: setattr(context, "saved_tensors", tensors))
    batch = loss._batch(given.logits, given.target, given.valid)
    means = base._WeightedMeans.forward(
        context, given.logits, given.target, given.valid, loss, batch, (loss._weights(),), True
    )
    (gradient, *_) = base._WeightedMeans.backward(context, torch.ones_like(means))
    return means[0], gradient


@pytest.mark.parametrize("case", [*DEFAULTS, *EXTRA], ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_every_loss_at_five_scales(case, form, monkeypatch):
    monkeypatch.setattr(voxelwise, "_SLAB_ON_GPU", 1000)  # the largest scale in several slabs, the others in one
    scales = [on_cuda(form, shape, masked=number % 2 == 0) for number, shape in enumerate(SCALES)]
    loss = scales[0].loss(case)
    with fake_cuda() as mode:
        for given in scales:
            made = given.map(lambda tensor: mode.from_tensor(tensor).to(CUDA))
            value, gradient = step(loss, made)
            assert (value.device, value.dtype, value.shape) == (CUDA, torch.float32, ())
            assert (gradient.device, gradient.dtype, gradient.shape) == (CUDA, torch.float16, made.logits.shape)
            loss.observe(made.logits, made.target, made.valid)
        loss.update()


def test_a_value_that_is_read_or_a_tensor_on_the_processor_would_show():
    with fake_cuda():
        z = torch.zeros(3, device=CUDA)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            z.sum().item()
        with pytest.raises(RuntimeError, match="same device"):
            z + torch.zeros(3)
