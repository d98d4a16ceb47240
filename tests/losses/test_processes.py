"""What MEEP and DCA pool over the processes of multi-GPU training: the batch cut in two is the batch as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from .cases import name, problem

CASES = [("meep", {}), ("meep", {"variant": "kl"}), ("dca", {}), ("nacl", {"balanced": True})]
FORM = "labels"
ROOT = Path(__file__).parents[2]


def whole():
    """Two images with the same number of valid voxels and very different numbers of wrong ones."""
    given = problem(FORM, (6, 6, 6), masked=False)
    given.logits[0].scatter_add_(0, given.target[0], torch.full_like(given.logits[0, :1], 12.0))
    return given


def step(cases, images):
    """Values and gradients of the images, one a case."""
    return [whole().map(lambda tensor: tensor[images]).gradient(case) for case in cases]


def process(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(step(CASES, slice(rank, rank + 1)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    # Processes that start anew: forked ones inherit the locks of torch's threads, and can wait for ever.
    code = "import sys; from tests.losses.test_processes import process; process(int(sys.argv[1]), sys.argv[2])"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], cwd=ROOT) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("number", range(len(CASES)), ids=[name(case) for case in CASES])
def test_two_processes_with_an_image_each_are_one_with_both(halves, number):
    ((value, gradient),) = step([CASES[number]], slice(None))
    (value_0, gradient_0), (value_1, gradient_1) = (half[number] for half in halves)
    torch.testing.assert_close((value_0 + value_1) / 2, value, rtol=1e-10, atol=1e-12)
    # DistributedDataParallel averages over the processes.
    torch.testing.assert_close(torch.cat([gradient_0, gradient_1]) / 2, gradient, rtol=1e-10, atol=1e-12)
