"""``convert``: between the formats, exactly, again only what is new, and one bad file does not stop the rest."""

import os

import nibabel
import numpy as np
import pytest

from nnunet_calib.cli.main import main
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.data.probabilities.convert import convert_all, plan_conversions

P = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 5, 6)).transpose(3, 0, 1, 2).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Two cases as nnU-Net leaves them."""
    (tmp_path / "in").mkdir()
    for name in ("case_1", "case_2"):
        np.savez_compressed(tmp_path / "in" / f"{name}.npz", probabilities=P)
        (tmp_path / "in" / f"{name}.nii.gz").touch()
    return tmp_path


def convert(folder, *words, source="in", to="compact", output="out"):
    return main(["convert", str(folder / source), "-o", str(folder / output), "--to", to, "-np", "1", *words])


def test_there_and_back_again_is_exact_and_nnunet_can_read_it(folder, capsys):
    assert convert(folder) == 0
    assert convert(folder, source="out", to="npz", output="back") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["case_1.nncp", "case_2.nncp"]
    assert np.array_equal(np.load(folder / "back" / "case_1.npz")["probabilities"], P)  # as nnUNetv2_ensemble does
    assert capsys.readouterr().out == "2 converted\n2 converted\n"


def test_float16(folder):
    assert convert(folder, "--float16") == 0
    assert ProbabilityFile(folder / "out" / "case_1.nncp").dtype == np.float16
    assert convert(folder, source="out", to="npz", output="back") == 0
    assert np.array_equal(np.load(folder / "back" / "case_1.npz")["probabilities"], P.astype(np.float16))


def test_nifti(folder):
    image = nibabel.Nifti1Image(P.transpose(3, 2, 1, 0), np.eye(4))
    nibabel.save(image, folder / "case_probabilities.nii.gz")
    assert convert(folder, source="case_probabilities.nii.gz", to="npz") == 0
    assert np.array_equal(np.load(folder / "out" / "case.npz")["probabilities"], P)


def test_again_only_what_is_new(folder, capsys):
    convert(folder)
    capsys.readouterr()
    source = folder / "in" / "case_1.npz"
    later = source.stat().st_mtime + 100
    os.utime(source, (later, later))
    assert convert(folder) == 0
    assert capsys.readouterr().out == "1 converted, 1 up to date\n"
    os.utime(folder / "out" / "case_1.nncp", (later, later))
    assert convert(folder) == 0
    assert capsys.readouterr().out == "0 converted, 2 up to date\n"
    assert convert(folder, "--float16") == 0  # another result is asked for
    assert capsys.readouterr().out == "2 converted\n"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_damaged_file_is_reported_and_the_rest_goes_on(folder, capsys, processes):
    source = folder / "in" / "case_1.npz"
    source.write_bytes(source.read_bytes()[:-200])
    assert convert(folder, "-np", processes) == 1
    captured = capsys.readouterr()
    assert captured.out == "1 converted, 1 failed\n"
    reported = [line for line in captured.err.splitlines() if line.startswith("nnunet-calib convert: ")]
    assert len(reported) == 1
    assert "case_1.npz: truncated or damaged" in reported[0]
    assert [path.name for path in (folder / "out").iterdir()] == ["case_2.nncp"]


def test_stopped_it_leaves_what_is_not_begun(folder):
    """Ctrl-C closes the generator; hundreds of files must not be converted after it."""
    for number in range(300):
        os.link(folder / "in" / "case_1.npz", folder / "in" / f"again_{number}.npz")
    (folder / "out").mkdir()
    ended = convert_all(plan_conversions([folder / "in"], folder / "out", "compact"), 2, pytest.fail)
    next(ended)
    ended.close()
    assert 0 < len(list((folder / "out").glob("*.nncp"))) < 300


def test_a_source_that_is_found_damaged_late_leaves_what_was_there(folder):
    convert(folder)
    before = (folder / "out" / "case_1.nncp").read_bytes()
    bad = P.copy()
    bad[-1, -1, -1, -1] = 7
    np.savez_compressed(folder / "in" / "case_1.npz", probabilities=bad)
    later = (folder / "out" / "case_1.nncp").stat().st_mtime + 100
    os.utime(folder / "in" / "case_1.npz", (later, later))
    assert convert(folder) == 1
    assert (folder / "out" / "case_1.nncp").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("nowhere", "out", "does not exist"),
        ("empty", "out", "no file ends with"),
        ("in/case_1.nii.gz", "out", "not a probability file"),
        ("in/case_1.npz", "in", "would be overwritten"),
    ],
)
def test_bad_usage(folder, capsys, source, output, message):
    (folder / "empty").mkdir()
    assert convert(folder, source=source, output=output, to="npz") == 2
    assert message in capsys.readouterr().err


def test_two_sources_of_one_name(folder, capsys):
    (folder / "more").mkdir()
    (folder / "more" / "case_1.npz").write_bytes(b"")
    words = ["convert", str(folder / "in"), str(folder / "more"), "-o", str(folder / "out"), "--to", "compact"]
    assert main(words) == 2
    assert "would both become" in capsys.readouterr().err


def test_no_processes(folder, capsys):
    assert convert(folder, "-np", "0") == 2
    assert "must be 1 or more" in capsys.readouterr().err


def test_a_file_of_the_same_name_from_elsewhere_is_not_up_to_date(folder, capsys):
    convert(folder)
    (folder / "elsewhere").mkdir()
    np.savez_compressed(folder / "elsewhere" / "case_1.npz", probabilities=P[::-1])
    os.utime(folder / "elsewhere" / "case_1.npz", (1e9, 1e9))  # older than the file it was not made into
    capsys.readouterr()
    assert convert(folder, source="elsewhere") == 0
    assert capsys.readouterr().out == "1 converted\n"
    assert np.array_equal(ProbabilityFile(folder / "out" / "case_1.nncp").whole(), P[::-1])
