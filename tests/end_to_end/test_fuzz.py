"""300 damaged and hostile inputs: each ends in one line or in a result, in bounded memory, and runs nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_calib.data.probabilities import write_compact

from ..folders import Folders
from . import fuzz_inputs


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name and error of every input; in a process of its own, whose memory is bounded and which may crash."""
    if sys.platform != "linux":
        pytest.skip("the address space is bounded by means of Linux")
    root = tmp_path_factory.mktemp("fuzz")
    folders = Folders(root)
    folders.add_ambiguous("case")
    p = np.load(folders.prediction / "case.npz")["probabilities"]
    write_compact(folders.prediction / "case.nncp", p, p.shape, p.dtype)
    image = nibabel.Nifti1Image(p.transpose(3, 2, 1, 0), np.diag([-1, -1, 1, 1]))
    nibabel.save(image, folders.prediction / "case_probabilities.nii.gz")
    (folders.prediction / "plans.json").write_text('{"label_manager": "LabelManager"}')
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    ended = subprocess.run(
        [sys.executable, fuzz_inputs.__file__, str(root)],
        capture_output=True,
        text=True,
        env=os.environ | threads | {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"},
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not (root / "trap").exists(), "code of a file was executed"
    return dict(json.loads(line) for line in ended.stdout.splitlines() if line.startswith("["))


def test_every_input_ends_in_one_line_or_in_a_result(outcomes):
    assert len(outcomes) == fuzz_inputs.COUNT
    errors = [error for error in outcomes.values() if error is not None]
    assert len(errors) > 200
    assert not [error for error in errors if "\n" in error or "Error:" in error]


def test_the_line_names_the_file(outcomes):
    for name, error in outcomes.items():
        file = Path(name.partition(":")[0]).name
        assert error is None or "case" in error or file in error


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("predicted/case.npz: int32", "a float array"),
        ("predicted/case.npz: zero bomb", "differs from (6, 14, 12) of the segmentation"),
        ("predicted/case.nii.gz: 4D", "one 2D or 3D label map"),
        ("predicted/case.nncp: plugin", "that this package did not write"),
    ],
)
def test_what_some_of_the_lines_say(outcomes, name, error):
    assert error in outcomes[name]
