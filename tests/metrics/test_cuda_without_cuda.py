"""The torch backends on a GPU that is not there: devices agree up to the numbers that come back."""

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from nnunet_calib.metrics.counting import gather_torch
from nnunet_calib.metrics.counting.gather import Volume
from nnunet_calib.metrics.surface import distances_torch

DEVICE = "cuda:0"


class Unknown:
    """An array that came back from the GPU; it has no values."""

    def __init__(self, tensor: torch.Tensor):
        self.came_from = tensor

    def reshape(self, shape):
        return np.zeros(shape, bool)

    def astype(self, dtype):
        return np.zeros(tuple(self.came_from.shape), dtype)

    def __array__(self, dtype=None, copy=None):
        return np.zeros((), dtype or bool)


@pytest.fixture
def came_back(monkeypatch):
    """What was asked of the GPU; and its shapes may depend on values."""
    found = []

    def numpy(tensor):
        assert tensor.device.type == "cpu"
        found.append(tensor)
        return Unknown(tensor)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    monkeypatch.setattr(gather_torch, "_numpy_type", lambda p: np.dtype(str(p.dtype).removeprefix("torch.")))
    monkeypatch.setattr(gather_torch, "check_probabilities", lambda p: None)  # the one look at values
    with fake_cuda(ShapeEnv()):
        yield found


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_calibration_is_counted_on_one_device(multilabel, dtype, came_back):
    reference = np.arange(24).reshape(2, 3, 4) % 3
    masks = {"all": np.ones(reference.shape, bool), "foreground": reference > 0}
    classes = [(1, 2), 2] if multilabel else [0, 1, 2]
    volume = Volume(reference, classes, masks, multilabel)
    channels = [torch.zeros(reference.shape, dtype=dtype, device=DEVICE) for _ in classes]
    gather_torch.gather_on(DEVICE, channels, volume, 15, 1e-3)
    assert len(came_back) > 10


def test_surfaces_are_searched_on_one_device(came_back):
    points = np.arange(12).reshape(3, 4)
    flat, offsets = np.arange(60) % 4, np.array([0, 1, 4])
    distances_torch.surface_voxels(flat, np.array([1, 4]), DEVICE)
    distances_torch.mixed_cells(flat, offsets, DEVICE)
    squares = np.array([0.0, 1.0, 4.0])
    distances_torch.probe(np.array([3, 5]), np.array([4]), 60, offsets, squares, DEVICE)
    distances_torch.search(points, points[:, :2], np.array([1.0, 1.0, 3.0]), DEVICE)
    assert [tensor.dtype for tensor in came_back] == [torch.int64, torch.int64, torch.float64, torch.float64]
