"""What runs on a GPU, run on tensors that say they are on one and hold no values: devices agree, nothing is read."""

from types import MethodType

import pytest
import torch
from fake_cuda import CUDA, Cost, fake_cuda, gradients
from torch.nn.functional import cross_entropy

from nnunet_calib.losses import CalibrationLoss, voxelwise

from .cases import DEFAULTS, FORMS, Problem, name, problem

EXTRA = [
    ("meep", {"variant": "kl"}),
    ("meep", {"binary": True}),
    ("ace", {"soft": True}),
    ("nacl", {"prior": "gaussian"}),
]
SCALES = [(8, 4, 8), (4, 4, 4), (4, 2, 4), (2, 2, 2), (1, 1, 1)]


def on_cuda(mode, given: Problem) -> Problem:
    """Made on the processor, where the random numbers are, before there are fake tensors."""
    made = given.map(lambda tensor: mode.from_tensor(tensor).to(CUDA))
    made.logits.requires_grad_()
    return made


@pytest.mark.parametrize("slopes", ["closed form", "autograd"])
@pytest.mark.parametrize("case", [*DEFAULTS, *EXTRA], ids=name)
@pytest.mark.parametrize("form", FORMS)
def test_every_loss_at_five_scales(case, form, slopes, monkeypatch):
    monkeypatch.setattr(voxelwise, "_SLAB_ON_GPU", 1000)  # the largest scale in several slabs, the others in one
    scales = [problem(form, shape, masked=number % 2 == 0, dtype=torch.float16) for number, shape in enumerate(SCALES)]
    loss = scales[0].loss(case)
    if slopes == "autograd":
        loss._terms = MethodType(CalibrationLoss._terms, loss)
    with fake_cuda() as mode, torch.autocast("cuda"):
        for given in scales:
            made = on_cuda(mode, given)
            value = loss(made.logits, made.target, made.valid)
            (gradient,) = gradients(value * 2.0**12, made.logits)
            assert (value.device, value.dtype, value.shape) == (CUDA, torch.float32, ())
            assert (gradient.device, gradient.dtype, gradient.shape) == (CUDA, torch.float16, made.logits.shape)
            loss.observe(made.logits, made.target, made.valid)
        loss.update()


@pytest.mark.parametrize("case", [*DEFAULTS, ("ace", {"soft": True})], ids=name)
def test_a_step_on_a_gpu_needs_no_more_memory_than_torchs_cross_entropy(case):
    """With the slabs of a GPU, at nnU-Net's largest usual patch: beyond logits and target, the gradient included."""
    peaks = []
    for loss in (problem("labels", (1, 1)).loss(case), lambda z, y: cross_entropy(z.float(), y[:, 0].long())):
        with fake_cuda():
            z = torch.empty(2, 14, 128, 128, 128, dtype=torch.float16, device=CUDA).requires_grad_()
            y = torch.empty(2, 1, 128, 128, 128, dtype=torch.int16, device=CUDA)
            with Cost() as cost:
                cost.known(z, y)
                gradients(loss(z, y) * 2.0**12, z)
            peaks.append(cost.peak)
    assert z.numel() * 6 <= peaks[0] <= 0.55 * peaks[1]  # the gradient in float32, and in float16 for autograd


def test_a_value_that_is_read_or_a_tensor_on_the_processor_would_show():
    with fake_cuda():
        z = torch.zeros(3, device=CUDA)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            z.sum().item()
        with pytest.raises(RuntimeError, match="same device"):
            z + torch.zeros(3)


def test_the_backward_pass_of_the_fake_gpu_is_that_of_autograd():
    x, w = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    first, second = (x * w).softmax(dim=1).unbind(dim=1)[:2]
    value = (first * second + x.exp().sum(dim=1)).sum() + w.square().mean()
    ours = gradients(value, (x, w), retain_graph=True)
    for mine, theirs in zip(ours, torch.autograd.grad(value, (x, w)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_cost_of_a_step_counts_kernels_bytes_and_the_peak_of_memory():
    with fake_cuda():
        z = torch.empty(4, 256, device=CUDA)
        with Cost() as cost:
            cost.known(z)
            doubled = z.view(256, 4) * 2  # 4 KiB are read, 4 are written
            doubled.add_(z.view(256, 4)[:1].expand(256, 4))  # 4 + 4, and 16 bytes of the row
            total = doubled.sum()  # 4 KiB, and 4 bytes of the sum
            del doubled
            torch.empty(100, device=CUDA)
        assert (cost.kernels, cost.bytes, cost.peak) == (3, 5 * 4096 + 16 + 4, 4096 + 4)
        assert total.device == CUDA
