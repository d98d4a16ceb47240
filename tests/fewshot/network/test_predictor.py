"""One pass over a volume: nnU-Net's logits to the bit, and features averaged over its windows."""

import errno
import io
import os

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_calib.data.errors import UsageError
from nnunet_calib.fewshot.network import windows as module
from nnunet_calib.fewshot.network.predictor import FeaturePredictor

from ..hosts import KINDS, PATCH, model

SHAPE = (12, 22, 30)  # smaller than a patch along the first axis: nnU-Net pads it


def volume(shape=SHAPE) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def stock(of, data: torch.Tensor, mirroring: bool = True) -> torch.Tensor:
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(of.folder), tuple(int(fold) for fold in of.folds))
    return predictor.predict_logits_from_preprocessed_data(data.clone())


def weights(predictor: FeaturePredictor, rows: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [10 * torch.randn(rows, predictor.features.size, generator=generator) for _ in range(predictor.folds)]


def averaged(predictor: FeaturePredictor, data: torch.Tensor) -> torch.Tensor:
    """Features (F, *S) of the first fold, from the definition: forward, unmirrored, Gaussian mean over windows."""
    patch = predictor.configuration_manager.patch_size
    padded = torch.zeros(1, *[max(a, b) for a, b in zip(data.shape[1:], [1, *patch][-3:], strict=True)])
    start = [(p - s) // 2 for p, s in zip(padded.shape[1:], data.shape[1:], strict=True)]
    here = (slice(None), *[slice(a, a + s) for a, s in zip(start, data.shape[1:], strict=True)])
    padded[here] = data
    gaussian = compute_gaussian(tuple(patch), 1 / 8, 10, device=torch.device("cpu")).float()
    total, count = torch.zeros(predictor.features.size, *padded.shape[1:]), torch.zeros(padded.shape[1:])
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    everywhere = torch.cartesian_prod(*[torch.arange(side) for side in patch])
    for place in predictor._internal_get_sliding_window_slicers(padded.shape[1:]):
        with torch.no_grad(), predictor.features.first_forward() as stages:
            predictor.network(padded[place][None])
        features = predictor.features.at(stages, everywhere, patch).T.reshape(-1, *patch)
        total[place] += features * gaussian
        count[place[1:]] += gaussian
    return (total / count)[here]


@pytest.mark.parametrize("mirroring", [True, False])
@pytest.mark.parametrize("folds", [("0",), ("0", "1")])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_base_logits_are_nnunets_to_the_bit(tmp_path, kind, axes, folds, mirroring):
    of, data = model(tmp_path, kind=kind, axes=axes, folds=folds), volume()
    predictor = FeaturePredictor(of, mirroring=mirroring)
    found = predictor.predict(data, weights(predictor), torch.tensor([[0, 0, 0], [11, 21, 29]]))
    expected = stock(of, data, mirroring)
    assert found.base.dtype == expected.dtype
    assert torch.equal(found.base, expected)
    assert torch.equal(predictor.predict(data).base, expected), "without features"


@pytest.mark.parametrize("labels", ["labels", "regions"])
@pytest.mark.parametrize("axes", [2, 3])
def test_features_are_the_mean_over_windows(tmp_path, axes, labels):
    predictor = FeaturePredictor(model(tmp_path, axes=axes, labels=labels, folds=("0", "1")))
    data = volume()
    voxels = torch.from_numpy(np.random.default_rng(0).integers(0, SHAPE, (50, 3)))
    projections = weights(predictor)
    found = predictor.predict(data, projections, voxels)
    expected = averaged(predictor, data)
    sampled = expected[(slice(None), *voxels.unbind(1))].T
    torch.testing.assert_close(found.sampled[0], sampled, rtol=1e-4, atol=1e-5)
    projected = torch.einsum("rf,f...->r...", projections[0], expected)
    torch.testing.assert_close(found.projected[0], projected, rtol=1e-3, atol=1e-3)
    # the folds' features are their own, and the two ways agree in each
    assert not torch.allclose(found.sampled[0], found.sampled[1], atol=1e-2)
    for fold in (0, 1):
        ours = found.sampled[fold] @ projections[fold].T
        theirs = found.projected[fold][(slice(None), *voxels.unbind(1))].T
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_mirroring_changes_the_logits_and_not_the_features(tmp_path):
    of, data, voxels = model(tmp_path), volume(), torch.tensor([[3, 4, 5], [8, 20, 2]])
    plain = FeaturePredictor(of, mirroring=False)
    mirrored = FeaturePredictor(of, mirroring=True)
    first, second = (p.predict(data, weights(p), voxels) for p in (plain, mirrored))
    assert not torch.equal(first.base, second.base)
    assert torch.equal(first.sampled[0], second.sampled[0])
    assert torch.equal(first.projected[0], second.projected[0])


def test_many_projections_are_accumulated_in_half_precision_and_stay_close(tmp_path, monkeypatch):
    predictor, data = FeaturePredictor(model(tmp_path)), volume()
    exact = predictor.predict(data, weights(predictor)).projected[0]
    monkeypatch.setattr(module, "HALF_ABOVE", 0)
    half = predictor.predict(data, weights(predictor)).projected[0]
    assert half.dtype == torch.float16
    # the corners, where the Gaussian is below the smallest half-precision number, too
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=float(exact.abs().max()) * 3e-3)


@pytest.mark.parametrize("axes", [2, 3])
def test_projections_of_large_volumes_lie_on_disk_and_are_the_same(tmp_path, monkeypatch, axes):
    predictor, data = FeaturePredictor(model(tmp_path, axes=axes, folds=("0", "1"))), volume((40, 12, 30))
    expected = predictor.predict(data, weights(predictor)).projected
    monkeypatch.setattr(module, "ON_DISK_ABOVE", 0)
    monkeypatch.setattr(module._Memory, "write", None)
    found = predictor.predict(data, weights(predictor)).projected
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (3, 40, 12, 30)
        assert torch.equal(ours, theirs)


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "ON_DISK_ABOVE", 0)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", Full)
    predictor = FeaturePredictor(model(tmp_path))
    with pytest.raises(UsageError, match="No space left on device; a volume of this size takes .* GB there"):
        predictor.predict(volume(), weights(predictor))


def test_projections_are_reduced_fold_by_fold(tmp_path):
    predictor, data, seen = FeaturePredictor(model(tmp_path, folds=("0", "1"))), volume(), []

    def reduce(fold, base, projected):
        seen.append((fold, tuple(base.shape), tuple(projected.shape)))
        return projected.sum(dim=0)

    found = predictor.predict(data, weights(predictor), reduce=reduce)
    assert seen == [(0, (3, *SHAPE), (3, *SHAPE)), (1, (3, *SHAPE), (3, *SHAPE))]
    assert [tuple(part.shape) for part in found.projected] == [SHAPE, SHAPE]


def test_sampled_features_can_be_part_of_a_gradient(tmp_path):
    predictor = FeaturePredictor(model(tmp_path))
    sampled = predictor.predict(volume(), None, torch.tensor([[1, 2, 3]])).sampled[0]
    weight = torch.zeros(predictor.features.size, requires_grad=True)
    (sampled @ weight).sum().backward()
    assert weight.grad is not None


def test_a_device_without_memory_falls_back_as_nnunet_does(tmp_path, monkeypatch):
    predictor, data = FeaturePredictor(model(tmp_path)), volume()
    expected = predictor.predict(data, weights(predictor), torch.tensor([[1, 2, 3]]))
    predictor.perform_everything_on_device = True  # what a CUDA device has
    calls = []
    stock_add = module.Windows.add

    def fails_once(window, stages):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        stock_add(window, stages)

    monkeypatch.setattr(module.Windows, "add", fails_once)
    found = predictor.predict(data, weights(predictor), torch.tensor([[1, 2, 3]]))
    assert torch.equal(found.base, expected.base)
    assert torch.equal(found.projected[0], expected.projected[0])
    assert torch.equal(found.sampled[0], expected.sampled[0])


def test_windows_are_those_of_the_step_size(tmp_path):
    of = model(tmp_path)
    coarse, fine = FeaturePredictor(of, step_size=1.0), FeaturePredictor(of)
    data = volume((PATCH, PATCH, 2 * PATCH))
    a, b = (p.predict(data, weights(p)).projected[0] for p in (coarse, fine))
    assert not torch.allclose(a, b)
