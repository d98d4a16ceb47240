"""Damaged and hostile inputs, 300 of them by default and 1,000 with ``-m slow``: each ends in one line or in a result.

In bounded memory; nothing is run, nothing is written beside the results, no damaged voxel is taken for a whole one. A
failure names the input, with the seed that makes it again: ``fuzz_inputs.py``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_calib.data.probabilities import write_compact
from nnunet_calib.posthoc import CALIBRATORS

from ..fewshot.conftest import Supports
from ..folders import Folders
from ..posthoc.simulated import drawn, logits
from . import fuzz_inputs


@pytest.fixture(scope="module", params=[300, pytest.param(1000, marks=pytest.mark.slow)])
def outcomes(tmp_path_factory, request):
    """Name and error of every input; in a process of its own, whose memory is bounded and which may crash."""
    if sys.platform != "linux":
        pytest.skip("the address space is bounded by means of Linux")
    root = tmp_path_factory.mktemp("fuzz")
    folders = Folders(root / "nifti")
    folders.add_ambiguous("case")
    p = np.load(folders.prediction / "case.npz")["probabilities"]
    write_compact(folders.prediction / "case.nncp", p, p.shape, p.dtype)
    image = nibabel.Nifti1Image(p.transpose(3, 2, 1, 0), np.diag([-1, -1, 1, 1]))
    nibabel.save(image, folders.prediction / "case_probabilities.nii.gz")
    (folders.prediction / "plans.json").write_text('{"label_manager": "LabelManager"}')
    z = logits(400, 3)
    calibrator = CALIBRATORS["vector"]().fit(z, drawn(np.exp(z), np.random.default_rng(0)))
    (root / "calibrator.json").write_text(json.dumps(calibrator.state()))
    shutil.copy(Supports(tmp_path_factory.mktemp("task")).task, root / "ball.fewshot")
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    ended = subprocess.run(
        [sys.executable, fuzz_inputs.__file__, str(root), str(request.param)],
        capture_output=True,
        text=True,
        env=os.environ | threads | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"},
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not (root / "trap").exists(), "code of a file was executed"
    found = dict(json.loads(line) for line in ended.stdout.splitlines() if line.startswith("["))
    assert len(found) == request.param
    return found


def test_every_input_ends_in_one_line_or_in_a_result(outcomes):
    """Unexpected errors come with their type; so does what was trusted or written though it must not be."""
    errors = {name: error for name, error in outcomes.items() if error is not None}
    assert len(errors) > len(outcomes) // 2
    assert not {name: error for name, error in errors.items() if "\n" in error or "Error:" in error}


def test_every_kind_of_file_is_among_them(outcomes):
    endings = (".npz", ".nncp", ".nii.gz", ".mha", ".nrrd", ".gipl", ".tif", ".json", ".fewshot")
    of_ending = {ending: [name for name in outcomes if name.partition(":")[0].endswith(ending)] for ending in endings}
    assert min(map(len, of_ending.values())) >= 3
    assert all(any(outcomes[name] is not None for name in names) for names in of_ending.values())


def test_the_line_names_the_file(outcomes):
    for name, error in outcomes.items():
        file = Path(name.partition(":")[0]).name
        assert error is None or "case" in error or file in error


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nifti/predicted/case.npz: int32", "a float array"),
        ("nifti/predicted/case.npz: zero bomb", "differs from (6, 14, 12) of the segmentation"),
        ("nifti/predicted/case.nii.gz: 4D", "one 2D or 3D label map"),
        ("nifti/predicted/case.nncp: plugin", "that this package did not write"),
    ],
)
def test_what_some_of_the_lines_say(outcomes, name, error):
    assert error in outcomes[name]
