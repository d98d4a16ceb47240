"""Every trainer in two processes (gloo), built and stepped under DistributedDataParallel."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_calib.training.trainers import TRAINERS

KINDS = ("labels_ignore", "regions_ignore")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ddp")
    program = Path(__file__).with_name("ddp_processes.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_both_processes_step_and_stay_the_same(ranks, name, kind):
    first, second = (rank[f"{name}-{kind}"] for rank in ranks)
    assert first["wrapped"]
    assert all(math.isfinite(loss) for loss in first["losses"] + second["losses"])
    assert first["losses"] != second["losses"], "each process has its own patches"
    assert first["weights"] == second["weights"]
    assert first["trace"] == pytest.approx(1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_follow_the_voxels_of_all_processes(ranks, kind):
    first, second = (rank[f"multipliers-{kind}"] for rank in ranks)
    assert first["gathered"] == second["gathered"]
    for gathered, expected in zip(first["gathered"], first["expected"], strict=True):
        assert gathered == pytest.approx(expected, rel=1e-5)
    assert max(max(row) for row in first["gathered"]) > 1e-3


def test_new_classes_begin_alike_in_both_processes(ranks):
    first, second = (rank["begun"] for rank in ranks)
    assert first == second
    assert len(first["class_weights"]) == 3
