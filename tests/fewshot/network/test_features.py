"""Features and projections of a patch, against a plain computation of their definition."""

import pytest
import torch
from torch.nn import functional

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.network.features import DecoderFeatures

from ..hosts import KINDS, model

PATCH = 16


def forward(of, seed: int = 0):
    axes = len(of.configuration_manager.patch_size)
    features = DecoderFeatures(of.network)
    image = torch.randn(1, 1, *[PATCH] * axes, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), features.first_forward() as stages:
        of.network(image)
        of.network(image.flip(-1))
    return features, stages, (PATCH,) * axes


def defined(stages, size) -> torch.Tensor:
    """F of every voxel, (F, *size), as the formula says."""
    mode = "trilinear" if len(size) == 3 else "bilinear"
    parts = [functional.interpolate(s / s.norm(dim=1, keepdim=True), size, mode=mode)[0] for s in stages]
    return torch.cat(parts)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_projections_and_single_features_are_those_of_the_definition(tmp_path, kind, axes):
    features, stages, size = forward(model(tmp_path, kind=kind, axes=axes))
    assert features.channels == (16, 8, 8)
    assert [tuple(stage.shape[2:]) for stage in stages] == [(4,) * axes, (8,) * axes, (16,) * axes]
    whole = defined(stages, size)
    weight = torch.randn(5, features.size, generator=torch.Generator().manual_seed(1))
    projected = features.project(stages, weight, size)[0]
    torch.testing.assert_close(projected, torch.einsum("rf,f...->r...", weight, whole), rtol=1e-4, atol=1e-5)
    everywhere = torch.cartesian_prod(*[torch.arange(side) for side in size])
    at = features.at(stages, everywhere, size)
    torch.testing.assert_close(at, whole.flatten(1).T, rtol=1e-4, atol=1e-5)


def test_only_the_first_forward_pass_is_read(tmp_path):
    of = model(tmp_path)
    features, stages, _ = forward(of)
    with torch.no_grad(), features.first_forward() as again:
        of.network(torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert len(stages) == 3
    for first, second in zip(stages, again, strict=True):
        torch.testing.assert_close(first, second)


def test_a_voxel_without_any_activation_has_no_direction(tmp_path):
    features, stages, size = forward(model(tmp_path))
    stages[-1][:] = 0
    assert features.at(stages, torch.tensor([[3, 4, 5]]), size)[0, -8:].eq(0).all()
    assert features.project(stages, torch.eye(features.size), size).isfinite().all()


def test_half_precision_activations_give_float32_features(tmp_path):
    features, stages, size = forward(model(tmp_path))
    half = [stage.half() * 100 for stage in stages]  # whose squares overflow half precision
    at = features.at(half, torch.tensor([[3, 4, 5]]), size)
    assert at.dtype == torch.float32
    torch.testing.assert_close(at, features.at(stages, torch.tensor([[3, 4, 5]]), size), rtol=0, atol=2e-3)


def test_a_network_without_decoder_stages_is_refused():
    with pytest.raises(InputError, match=r"no decoder\.stages and decoder\.seg_layers"):
        DecoderFeatures(torch.nn.Linear(1, 1))
