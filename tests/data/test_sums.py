"""Probabilities of classes that exclude each other add up to 1; others are refused by whatever reads them."""

import numpy as np
import pytest

from nnunet_calib import metrics
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact, write_npz

P = np.random.default_rng(0).dirichlet(np.ones(4), size=(5, 6, 7)).transpose(3, 0, 1, 2)
WRITERS = {".npz": write_npz, ".nncp": write_compact}
READ = {
    "channels": lambda file: list(file.channels()),
    "whole": lambda file: file.whole(),
    "slabs": lambda file: [slab.copy() for slab in file.slabs()],
}


def written(folder, p, ending, dtype):
    path = folder / f"case{ending}"
    WRITERS[ending](path, p.astype(dtype), p.shape, dtype)
    return path


@pytest.mark.parametrize("how", READ)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("ending", WRITERS)
def test_sums_of_one_pass_and_one_voxel_of_another_is_refused(tmp_path, ending, dtype, how):
    READ[how](ProbabilityFile(written(tmp_path, P, ending, dtype), exclusive=True))
    wrong = P.copy()
    wrong[:, 2, 3, 4] = 0
    path = written(tmp_path, wrong, ending, dtype)
    with pytest.raises(InputError, match=r"case\.\w+: the probabilities of a voxel add up to 0 to 1"):
        READ[how](ProbabilityFile(path, exclusive=True))
    READ[how](ProbabilityFile(path))  # sigmoid regions need not


def test_what_rounding_to_16_bits_does_to_many_classes_is_no_error(tmp_path):
    many = np.random.default_rng(1).dirichlet(np.full(118, 0.3), size=(4, 4, 4)).transpose(3, 0, 1, 2)
    whole = ProbabilityFile(written(tmp_path, many, ".npz", "float16"), exclusive=True).whole()
    assert np.array_equal(whole, many.astype(np.float16))


def test_who_stops_at_the_last_channel_is_told_too(tmp_path):
    channels = ProbabilityFile(written(tmp_path, P * 0.9, ".npz", "float32"), exclusive=True).channels()
    for _ in range(3):
        next(channels)
    with pytest.raises(InputError, match=r"add up to 0\.9"):
        next(channels)


def test_arrays_are_held_against_1_too():
    reference = P.argmax(axis=0)
    assert metrics.calibration_scores(P, reference)["n"] == reference.size
    with pytest.raises(ValueError, match=r"add up to 0\.9 to 0\.9"):
        metrics.calibration_scores(P * 0.9, reference)
    assert metrics.calibration_scores(P * 0.9, reference, multilabel=True)["n"] == reference.size
