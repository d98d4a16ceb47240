"""Episodic trainers: what an episode costs, worked out by hand, and that nnU-Net trains with them."""

import math

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunet_calib.training
from nnunet_calib._autoload import trainers_folder
from nnunet_calib.training import YARDSTICKS
from nnunet_calib.training.episodic import MAMLTrainer, PANetTrainer
from nnunet_calib.training.settings import RefusedSettings

from .toy import IGNORE, batch, build, construct, prepare_folders

every = pytest.mark.parametrize("trainer", [PANetTrainer, MAMLTrainer])
dimensions = pytest.mark.parametrize("axes", [2, 3])
ALL = torch.ones(2, 4, 6, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)


def halves() -> torch.Tensor:
    """The structure: the left half of a patch of 4 x 6."""
    return torch.arange(6).expand(4, 6) < 3


def stage(inside: torch.Tensor) -> torch.Tensor:
    """One feature is 1 inside, the other outside."""
    return torch.stack([inside, ~inside]).float()


def test_panet_costs_nothing_where_features_agree_and_alpha_where_they_are_swapped():
    inside = halves()
    alike = PANetTrainer.episode([stage(inside)], inside, [stage(inside)], inside, ALL)
    assert float(alike) == pytest.approx(2 * math.log1p(math.exp(-20)), abs=1e-6)
    # every voxel of the query on the wrong side: CE is 20; what is predicted there still tells the support apart
    swapped = PANetTrainer.episode([stage(inside)], inside, [stage(~inside)], inside, ALL)
    assert float(swapped) == pytest.approx(20, abs=1e-6)


def test_maml_holds_the_fitted_head_and_learns_on_the_query_alone():
    inside = halves()
    torch.manual_seed(0)
    support, query = (torch.nn.functional.normalize(stage(inside) + 0.3 * torch.rand(2, 4, 6), dim=0) for _ in range(2))
    support.requires_grad_()
    query.requires_grad_()
    loss = MAMLTrainer.episode([support], inside, [query], inside, ALL)
    loss.backward()
    assert support.grad is None
    assert query.grad is not None
    assert query.grad.abs().sum() > 0
    swapped = MAMLTrainer.episode([support], inside, [query], ~inside, ALL)
    assert float(loss.detach()) < 0.3
    assert float(swapped.detach()) > 2


@every
def test_what_is_ignored_costs_nothing(trainer):
    inside, wrong = halves(), halves()
    wrong[:, 0] = False
    known = ALL.clone()
    known[1, :, 0] = False
    torch.manual_seed(0)
    right = trainer.episode([stage(inside)], inside, [stage(inside)], inside, known)
    torch.manual_seed(0)
    assert trainer.episode([stage(inside)], inside, [stage(inside)], wrong, known) == pytest.approx(float(right))


@every
@dimensions
@pytest.mark.parametrize("kind", ["labels", "labels_ignore"])
def test_a_step_adds_the_episode_to_nnunets_loss(trainer, axes, kind):
    mine, stock = (build(name, {}, kind=kind, axes=axes) for name in (trainer.__name__, "StockTrainer"))
    given = batch(mine, kind)
    torch.manual_seed(0)
    both, own = (float(one.train_step(given)["loss"]) for one in (mine, stock))
    assert math.isfinite(both)
    assert both > own
    assert all(weights.grad.isfinite().all() for weights in mine.network.parameters() if weights.grad is not None)


@every
def test_a_batch_whose_patches_share_no_class_costs_what_it_costs_nnunet(trainer):
    mine, stock = (build(name, {}, kind="labels_ignore", axes=2) for name in (trainer.__name__, "StockTrainer"))
    given = batch(mine, "labels_ignore")
    for scale in given["target"]:
        scale[0], scale[1] = 1, IGNORE
    assert float(mine.train_step(given)["loss"]) == pytest.approx(float(stock.train_step(given)["loss"]))


@every
def test_regions_are_refused(trainer):
    with pytest.raises(RefusedSettings, match="episodes are made of labels; this data set has regions"):
        build(trainer.__name__, {}, kind="regions", axes=2)


@pytest.mark.parametrize("name", YARDSTICKS)
def test_nnunet_finds_them(name, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())
    assert recursive_find_trainer_class_by_name(name) is getattr(nnunet_calib.training, name)
    assert construct(name, {"num_epochs": 3}, axes=2).num_epochs == 3
