"""Label maps and probabilities are those of nnU-Net's export, voxel by voxel."""

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from nnunet_calib.data.errors import InputError
from nnunet_calib.prediction import Grid, PredictedCase, case, interpolation

DEFAULT = ("resample_data_or_seg_to_shape", {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None})
TORCH = ("resample_torch_fornnunet", {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False})


def smooth_logits(classes, shape, seed=0, dtype=np.float16):
    """Logits with regions as large as organs, and ties: many values are equal in float16."""
    rng = np.random.default_rng(seed)
    field = np.stack([gaussian_filter(rng.normal(size=shape), 2) for _ in range(classes)])
    return torch.from_numpy((field * 20).astype(dtype))


def host(spacing=(2.0, 1.0, 1.0), transpose=(0, 1, 2), resampling=DEFAULT, labels=4, regions=None, ignore=False):
    plans = {
        "transpose_forward": list(transpose),
        "transpose_backward": list(np.argsort(transpose)),
        "configurations": {
            "3d_fullres": {
                "architecture": {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []},
                "spacing": list(spacing),
                "resampling_fn_probabilities": resampling[0],
                "resampling_fn_probabilities_kwargs": resampling[1],
            }
        },
        "label_manager": "LabelManager",
    }
    names = {"background": 0} | {f"s{c}": c for c in range(1, labels)}
    dataset = {"labels": regions or names}
    if regions:
        dataset["regions_class_order"] = list(range(1, len(regions)))
    if ignore:
        dataset["labels"] = {**dataset["labels"], "ignore": labels}
    manager = PlansManager(plans)
    return manager, manager.get_configuration("3d_fullres"), manager.get_label_manager(dataset)


def properties(box_shape, spacing, margins=((0, 0),) * 3):
    """As the preprocessor says: ``spacing`` in the order of the file, shapes in that of the plans."""
    return {
        "spacing": list(spacing),
        "shape_after_cropping_and_before_resampling": tuple(box_shape),
        "shape_before_cropping": tuple(low + n + high for n, (low, high) in zip(box_shape, margins, strict=True)),
        "bbox_used_for_cropping": [[low, low + n] for n, (low, _) in zip(box_shape, margins, strict=True)],
    }


CASES = {
    "finer": dict(source=(12, 15, 17), target=(15, 24, 22), file_spacing=(1.6, 0.64, 0.77)),
    "coarser": dict(source=(15, 24, 22), target=(12, 15, 17), file_spacing=(2.5, 1.6, 1.3)),
    "fifths": dict(source=(8, 16, 16), target=(10, 20, 20), file_spacing=(1.6, 0.8, 0.8)),
    "as it is": dict(source=(9, 11, 13), target=(9, 11, 13), file_spacing=(2.0, 1.0, 1.0)),
    "anisotropic": dict(source=(6, 20, 18), target=(6, 25, 27), file_spacing=(8.0, 0.8, 0.67)),
    "anisotropic, other slices": dict(source=(6, 20, 18), target=(9, 25, 27), file_spacing=(6.0, 0.8, 0.67)),
    "one coarse axis, not the first": dict(source=(20, 6, 18), target=(25, 7, 27), file_spacing=(0.8, 8.0, 0.67)),
    "one slice": dict(source=(1, 20, 18), target=(1, 25, 27), file_spacing=(999.0, 0.8, 0.67)),
    "cropped": dict(
        source=(8, 12, 14), target=(10, 17, 16), file_spacing=(1.6, 0.7, 0.9), margins=((2, 1), (0, 3), (4, 0))
    ),
    "transposed": dict(source=(12, 15, 17), target=(15, 24, 22), file_spacing=(0.77, 1.6, 0.64), transpose=(1, 2, 0)),
}


def both(name, classes=4, resampling=DEFAULT, dtype=np.float16, seed=0, **labels):
    given = CASES[name]
    transpose = given.get("transpose", (0, 1, 2))
    plans, configuration, manager = host(transpose=transpose, resampling=resampling, labels=classes, **labels)
    logits = smooth_logits(manager.num_segmentation_heads, given["source"], seed, dtype)
    about = properties(given["target"], given["file_spacing"], given.get("margins", ((0, 0),) * 3))
    stock = [
        convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.clone(), plans, configuration, manager, about, return_probabilities=wanted, num_threads_torch=1
        )
        for wanted in (False, True)
    ]
    grid = Grid.of(tuple(logits.shape), about, plans, configuration)
    ours = PredictedCase(logits, grid, manager, configuration)
    return ours, stock[0], stock[1][1]


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(interpolation, "compiled_loops", lambda: None)
        monkeypatch.setattr(case, "compiled_loops", lambda: None)
    elif interpolation.compiled_loops() is None:
        pytest.skip("numba is not installed")


def check(ours, labels, probabilities):
    to_image = ours.grid.to_image
    made = ours.label_map().transpose(to_image)
    assert made.dtype == labels.dtype
    assert np.array_equal(made, labels)
    whole = np.empty((ours.grid.channels, *ours.grid.shape), dtype=np.float32)
    whole.fill(np.nan)
    for part in ours.parts():
        whole[:, part.planes] = part.probabilities
    whole = whole.transpose(0, *(axis + 1 for axis in to_image))
    assert whole.shape == probabilities.shape
    np.testing.assert_allclose(whole, probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_geometry(name, backend):
    check(*both(name))


@pytest.mark.parametrize("values", [1, 2500, 6000])
def test_parts_of_a_few_planes(values, backend, monkeypatch):
    """Of planes of 20 x 20 voxels, the box's 17 x 16, and four classes."""
    monkeypatch.setattr(case, "_VALUES", values)
    check(*both("cropped"))


@pytest.mark.parametrize("seed", range(5))
def test_many_classes_and_ties(seed, backend):
    check(*both("fifths", classes=30, seed=seed))


def test_ignore_label(backend):
    check(*both("finer", ignore=True))


def test_regions(backend):
    check(*both("cropped", regions={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}))


def test_logits_that_are_a_part_of_a_larger_array(backend):
    """As nnU-Net hands them on where it had padded an image smaller than the patch."""
    ours, labels, probabilities = both("fifths", classes=5)
    padded = torch.nn.functional.pad(ours._logits, (2, 1, 0, 3, 1, 1), value=9)
    ours._logits = padded[:, 1:-1, :-3, 2:-1]
    assert not ours._logits.is_contiguous()
    check(ours, labels, probabilities)


def test_single_precision_logits(backend):
    check(*both("finer", dtype=np.float32))


def test_plans_that_resample_in_another_way(backend):
    ours, labels, probabilities = both("cropped", resampling=TORCH)
    assert not ours.streamed
    check(ours, labels, probabilities)


@pytest.mark.parametrize("name", ["fifths", "cropped", "transposed", "anisotropic, other slices"])
@pytest.mark.parametrize("enough", [True, False])
def test_a_device_makes_the_same_probabilities_until_its_memory_ends(name, enough, monkeypatch, capsys):
    """Without CUDA: what would go to the device stays, and the second slab is one too many."""
    ours, labels, probabilities = both(name)
    ours._device = torch.device("cuda")
    monkeypatch.setattr(case, "_VALUES", 2500)
    slabs = []

    def copied(tensor, device):
        slabs.append(device.type)
        if not enough and len(slabs) == 2:
            raise torch.OutOfMemoryError
        return tensor.clone()

    monkeypatch.setattr(interpolation, "copied", copied)
    check(ours, labels, probabilities)
    assert len(slabs) > 2 if enough else slabs == ["cuda"] * 2
    assert ("out of memory on cuda; the rest" in capsys.readouterr().err) != enough


def test_what_a_device_makes_stays_there():
    plans, configuration, _ = host()
    about = properties((10, 17, 16), (1.6, 0.7, 0.9))
    axes = Grid.of((4, 8, 12, 14), about, plans, configuration).axes
    with fake_cuda(ShapeEnv()):
        logits = torch.zeros((4, 8, 12, 14), dtype=torch.float16)
        made = interpolation.interpolate_on("cuda:0", logits, axes, 2, 7)
    assert (made.device.type, made.dtype, tuple(made.shape)) == ("cuda", torch.float32, (4, 5, 17, 16))


def test_ties_of_equal_logits_go_to_the_first_class(backend):
    plans, configuration, manager = host(labels=3)
    logits = torch.zeros((3, 4, 5, 6), dtype=torch.float16)
    logits[1:] = 1
    about = properties((5, 9, 8), (1.6, 0.6, 0.8))
    grid = Grid.of(tuple(logits.shape), about, plans, configuration)
    assert (PredictedCase(logits, grid, manager, configuration).label_map() == 1).all()


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value, backend):
    plans, configuration, manager = host(labels=3)
    logits = smooth_logits(3, (4, 5, 6))
    logits[1, 2, 3, 4] = value
    about = properties((5, 9, 8), (1.6, 0.6, 0.8))
    ours = PredictedCase(logits, Grid.of(tuple(logits.shape), about, plans, configuration), manager, configuration)
    with pytest.raises(InputError, match="not finite"):
        ours.label_map()
