"""Probability files: read channel by channel, never unpickled, refused in one line when damaged."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.probabilities import ProbabilityFile

P = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5, 6)).transpose(3, 0, 1, 2).astype(np.float32)


def npz(path, content, member="probabilities.npy"):
    """A zip with one member of any content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_channels_come_one_by_one_as_stored(tmp_path, dtype, save):
    save(tmp_path / "a.npz", probabilities=P.astype(dtype))
    stored = ProbabilityFile(tmp_path / "a.npz")
    assert (stored.shape, stored.dtype) == (P.shape, np.dtype(dtype))
    stored.check_fits(3, (4, 5, 6))
    for ours, theirs in zip(stored.channels(), P.astype(dtype), strict=True):
        assert ours.dtype == dtype
        assert np.array_equal(ours, theirs)


def test_fortran_order(tmp_path):
    """A one-region model whose axes nnU-Net turned round is stored in Fortran order."""
    path = npz(tmp_path / "a.npz", npy(np.asfortranarray(P)))
    assert np.array_equal(np.stack(list(ProbabilityFile(path).channels())), P)


def test_rounding_beyond_one_is_clipped(tmp_path):
    np.savez(tmp_path / "a.npz", probabilities=np.where(P.max() == P, np.float32(1.000001), P))
    assert max(channel.max() for channel in ProbabilityFile(tmp_path / "a.npz").channels()) == 1


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_the_ends_of_the_range_are_probabilities(tmp_path, dtype):
    values = np.array([0, 1, -0.0, 0.5], dtype=dtype).reshape(1, 1, 2, 2)
    np.savez(tmp_path / "a.npz", probabilities=values)
    assert np.array_equal(next(ProbabilityFile(tmp_path / "a.npz").channels()), values[0])


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, probabilities=P)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=r"a\.npz: truncated or damaged") as caught:
        list(ProbabilityFile(path).channels())
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, probabilities=P)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # the last bit of a mantissa: still a probability
    path.write_bytes(content)
    with pytest.raises(InputError, match="truncated or damaged"):
        list(ProbabilityFile(path).channels())


class _Dangerous:
    """Would write a file if it were ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "unpickled"
    path = npz(tmp_path / "a.npz", _object_npy(trap))
    with pytest.raises(InputError):
        list(ProbabilityFile(path).channels())
    assert not trap.exists()


def _object_npy(trap) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1, 1), }"
    padded = header + b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + pickle.dumps(_Dangerous(trap))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(P[0]), "a float array"),
        (npy((P * 255).astype(np.uint8)), "a float array"),
        (npy(P)[:-8], "does not fit its shape"),
        (npy(P) + b"more", "does not fit its shape"),
        (npy(P).replace(b"(3, 4, 5, 6)", b"(9, 9, 9, 9)"), "does not fit its shape"),
        (b"not an array", "truncated or damaged"),
        (b"", "truncated or damaged"),
        (npy(P).replace(b"'shape'", b"'shap!'"), "truncated or damaged"),
    ],
)
def test_what_is_no_array_of_probabilities(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        list(ProbabilityFile(npz(tmp_path / "a.npz", content)).channels())


def test_a_small_file_cannot_claim_much_memory(tmp_path):
    """Format 2 allows a header of 4 GB, all of which numpy reads before it finds it too long; spaces pack well."""
    size = 1 << 25
    path = npz(tmp_path / "a.npz", b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little") + b" " * size)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"npy format \(2, 0\)"):
        ProbabilityFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 8


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, -0.1, 1.1])
def test_values_that_are_no_probabilities(tmp_path, value, dtype):
    bad = P.astype(dtype)
    bad[1, 2, 3, 4] = value
    np.savez(tmp_path / "a.npz", probabilities=bad)
    with pytest.raises(InputError, match="probabilities are in"):
        list(ProbabilityFile(tmp_path / "a.npz").channels())


def test_what_does_not_fit_the_labels(tmp_path):
    np.savez(tmp_path / "a.npz", probabilities=P)
    stored = ProbabilityFile(tmp_path / "a.npz")
    with pytest.raises(InputError, match="3 channels, but dataset.json has 4"):
        stored.check_fits(4, (4, 5, 6))
    with pytest.raises(InputError, match="differs from"):
        stored.check_fits(3, (4, 5, 7))
    with pytest.raises(InputError, match="axes are in another order"):
        stored.check_fits(3, (6, 5, 4))


def test_another_npz(tmp_path):
    np.savez(tmp_path / "a.npz", softmax=P)
    with pytest.raises(InputError, match="no array 'probabilities'"):
        ProbabilityFile(tmp_path / "a.npz")


def test_the_other_byte_order(tmp_path):
    """Scored like any other: every backend takes the processor's own order."""
    np.savez_compressed(tmp_path / "case.npz", probabilities=P.astype(">f4"))
    stored = ProbabilityFile(tmp_path / "case.npz")
    assert stored.dtype == np.dtype("float32")
    channels = list(stored.channels())
    assert all(channel.dtype.isnative for channel in channels)
    assert np.array_equal(np.stack(channels), P)
