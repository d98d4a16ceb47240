"""Adapters beside a frozen decoder, on a network of a few thousand weights."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.apply.folder import apply_folder
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.branch import AdapterBranch, ParallelAdapter, against_base
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.task.adapter_training import AdapterSettings, AnnotatedImage, fit_adapters, stage_inputs
from nnunet_calib.fewshot.task.adapters import adapt
from nnunet_calib.fewshot.task.file import read_tasks

from ..conftest import write_case

PATCH = (8, 8, 8)


def network(kind=PlainConvUNet, dimensions=3, seed=0):
    torch.manual_seed(seed)
    conv = torch.nn.Conv3d if dimensions == 3 else torch.nn.Conv2d
    norm = torch.nn.InstanceNorm3d if dimensions == 3 else torch.nn.InstanceNorm2d
    return kind(
        1,
        3,
        [4, 8, 8],
        conv,
        3,
        [1, 2, 2],
        [1, 1, 1],
        3,
        [2, 2],
        True,
        norm,
        {"eps": 1e-5, "affine": True},
        None,
        None,
        torch.nn.LeakyReLU,
        {"inplace": True},
        deep_supervision=False,
    ).eval()


def annotated_cubes(k, size=12):
    """Bright cubes in noise, at places of their own."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(k):
        image = 0.1 * torch.randn((1, size, size, size), generator=generator)
        target = torch.zeros((size, size, size), dtype=torch.bool)
        target[2 + i : 6 + i, 3:7, 4:8] = True
        image[0, target] += 2
        made.append(AnnotatedImage(image, target, torch.ones_like(target)))
    return made


def probability(base, branch, image):
    with torch.no_grad(), stage_inputs(base.decoder) as inputs:
        base(image)
        return torch.sigmoid(branch.logit(*inputs))


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_before_training_the_branch_gives_the_base_logits(kind, dimensions):
    base = network(kind, dimensions)
    branch = AdapterBranch(base.decoder).eval()
    image = torch.randn(2, 1, *[8] * dimensions)
    with torch.no_grad(), stage_inputs(base.decoder) as inputs:
        expected = base(image)
        logits, novel = branch(*inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert not novel.any()


def test_only_adapters_norms_and_the_novel_row_are_trained():
    base = network()
    trained = AdapterBranch(base.decoder).trained()
    # per convolution C_in x C_out; per norm 2 C; the row C + 1. Stages 16 -> 8 -> 8 and 8 -> 4 -> 4 of this decoder.
    expected = (16 * 8 + 8 * 8 + 2 * 2 * 8) + (8 * 4 + 4 * 4 + 2 * 2 * 4) + (4 + 1)
    assert sum(parameter.numel() for parameter in trained.values()) == expected


def test_a_parallel_adapter_equals_the_kernel_with_its_centre_changed():
    conv = torch.nn.Conv3d(2, 3, 3, padding=1)
    adapter = ParallelAdapter(conv)
    torch.nn.init.normal_(adapter.weight)
    merged = copy.deepcopy(conv)
    with torch.no_grad():
        merged.weight[:, :, 1, 1, 1] += adapter.weight[:, :, 0, 0, 0]
    x = torch.randn(1, 2, 5, 5, 5)
    torch.testing.assert_close(adapter(x), merged(x), rtol=1e-5, atol=1e-5)


def test_the_novel_logit_is_the_log_odds_in_the_joint_softmax():
    base, novel = torch.randn(1, 3, 4), torch.randn(1, 1, 4)
    joint = torch.cat([base, novel], dim=1).softmax(dim=1)[:, -1:]
    torch.testing.assert_close(torch.sigmoid(against_base(base, novel)), joint)


def test_training_finds_the_structure_and_leaves_the_base_as_it_was():
    base = network()
    before = copy.deepcopy(base.state_dict())
    branch = fit_adapters(base, annotated_cubes(3), PATCH, settings=AdapterSettings(steps=150, learning_rate=1e-2))
    image, target = annotated_cubes(4)[3].image[None, :, 2:10, :8, 2:10], annotated_cubes(4)[3].target[2:10, :8, 2:10]
    predicted = probability(base, branch, image)[0, 0] > 0.5
    assert 2 * (predicted & target).sum() / (predicted.sum() + target.sum()) > 0.8
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_saved_branch_predicts_the_same():
    base = network()
    branch = fit_adapters(base, annotated_cubes(3), PATCH, settings=AdapterSettings(steps=3))
    state = {name: parameter.detach().clone() for name, parameter in branch.trained().items()}
    again = AdapterBranch(base.decoder).eval()
    again.load_trained(state)
    image = torch.randn(1, 1, *PATCH)
    torch.testing.assert_close(probability(base, again, image), probability(base, branch, image), rtol=0, atol=0)


def test_the_same_seed_gives_the_same_branch():
    first, second = (
        fit_adapters(network(), annotated_cubes(3), PATCH, settings=AdapterSettings(steps=3, seed=5)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("expected_volume", "grows"), [(1600.0, True), (0.0, False)])
def test_the_volume_expected_of_an_image_without_annotation_pulls_the_prediction(expected_volume, grows):
    base = network()
    image = torch.randn((1, 12, 12, 12), generator=torch.Generator().manual_seed(3))
    settings = AdapterSettings(steps=20, size_weight=5.0, size_from=0.0)
    free = fit_adapters(base, annotated_cubes(3), PATCH, settings=settings)
    pulled = fit_adapters(base, annotated_cubes(3), PATCH, [(image, expected_volume)], settings)
    tile = image[None, :, :8, :8, :8]
    difference = probability(base, pulled, tile).sum() - probability(base, free, tile).sum()
    assert (difference > 0) == grows


def test_a_volume_within_the_margin_pulls_nothing():
    base = network()
    image = torch.randn((1, 12, 12, 12), generator=torch.Generator().manual_seed(3))
    settings = AdapterSettings(steps=4, size_from=0.0, size_margin=1.0)
    free = fit_adapters(base, annotated_cubes(3), PATCH, settings=settings)
    pulled = fit_adapters(base, annotated_cubes(3), PATCH, [(image, 100.0)], settings)
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), pulled.parameters(), strict=True))


def test_adapters_of_another_network_are_refused():
    state = {name: parameter.detach() for name, parameter in AdapterBranch(network().decoder).trained().items()}
    state["novel.weight"] = torch.zeros(1, 9, 1, 1, 1)
    with pytest.raises(InputError, match="network of another build"):
        AdapterBranch(network().decoder).load_trained(state)


def test_a_task_with_adapters_is_fitted_and_applied(supports, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nnunet_calib.fewshot.task.adapter_training.AdapterSettings", partial(AdapterSettings, steps=10)
    )
    task = supports.fit(tmp_path / "ball.fewshot", settings=Settings(head="adapter", chunks=1), voxels=2000)
    again = read_tasks(tmp_path / "ball.fewshot")[0]
    assert again.structure.settings.head == "adapter"
    assert len(task.structure.left_out) == 3
    (tmp_path / "images").mkdir()
    write_case(tmp_path, "query", 7)
    (report,) = apply_folder(
        supports.model, [tmp_path / "ball.fewshot"], tmp_path / "images", tmp_path / "out", merge=False, progress=False
    )
    assert np.isfinite(report["structures"]["ball"]["presence_score"])


def test_images_without_annotation_are_held_to_the_volume_that_the_others_lead_to_expect(
    supports, tmp_path, monkeypatch
):
    given = []

    def watched(*arguments, **options):
        given.append(arguments[3])
        return fit_adapters(*arguments, **options | {"settings": AdapterSettings(steps=2, size_from=0.0)})

    monkeypatch.setattr("nnunet_calib.fewshot.task.adapters.fit_adapters", watched)
    write_case(tmp_path, "query", 7)
    settings = Settings(head="adapter", chunks=1)
    supports.fit(tmp_path / "ball.fewshot", settings=settings, voxels=2000, unlabelled=tmp_path / "images")
    volumes = [row["volume_mm3"] for row in supports.fitted.report["supports"]]
    groups = [volumes[1:], [volumes[0], volumes[2]], volumes[:2], volumes]
    bodies = [expected / np.exp(np.log(group).mean()) for ((_, expected),), group in zip(given, groups, strict=True)]
    assert all(0.6 < ratio < 1.5 for ratio in bodies)  # the size of the body
    ((image, _),) = given[-1]
    assert image.shape == (1, 24, 26, 24)  # a phantom, and what a patch reaches beyond
    # of the folder of the supports, what has no label map: nothing here
    given.clear()
    supports.fit(tmp_path / "ball.fewshot", settings=settings, voxels=2000, unlabelled=supports.root / "images")
    assert given == [[]] * 4


def test_what_the_predictor_gathers_is_the_branchs_log_odds(supports):
    model = BaseModel(supports.model)
    predictor = FeaturePredictor(model)
    branch = AdapterBranch(predictor.network.decoder).eval()
    torch.nn.init.normal_(branch.novel.weight)
    trained = {name: parameter.detach().clone() for name, parameter in branch.trained().items()}
    image = torch.randn(1, *model.configuration_manager.patch_size)
    (gathered,) = predictor.project_adapted(image, [trained])
    torch.testing.assert_close(
        gathered, probability(predictor.network, branch, image[None])[0].logit(), rtol=0, atol=1e-3
    )


def test_adapters_need_three_volumes(supports):
    model = BaseModel(supports.model)
    with pytest.raises(InputError, match="3 supports or more, there are 2"):
        adapt(model, FeaturePredictor(model), [None] * 2, [None] * 2)
