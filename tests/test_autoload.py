"""The few lines that run at every interpreter start: they add one folder to one variable and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_calib import _autoload
from nnunet_calib._autoload import OPT_OUT, VARIABLE, register, trainers_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(OPT_OUT, raising=False)


def in_a_new_interpreter(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run without site-packages, where neither torch nor the ``.pth`` file can help."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    words = [sys.executable, "-S", "-c", start + code]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_the_folder_is_the_one_with_our_trainers():
    assert Path(trainers_folder()) == ROOT / "trainers"
    assert (Path(trainers_folder()) / "nnunet_calib_trainers.py").is_file()


def test_registers_the_folder():
    register()
    assert os.environ[VARIABLE] == trainers_folder()


def test_the_users_value_comes_first(monkeypatch):
    monkeypatch.setenv(VARIABLE, os.pathsep.join(["/home/me/trainers", "/home/lab/trainers"]))
    register()
    assert os.environ[VARIABLE].split(os.pathsep) == ["/home/me/trainers", "/home/lab/trainers", trainers_folder()]


@pytest.mark.parametrize("before", ["", "/home/me/trainers"])
def test_twice_is_once(monkeypatch, before):
    monkeypatch.setenv(VARIABLE, before)
    register()
    once = os.environ[VARIABLE]
    register()
    assert os.environ[VARIABLE] == once
    assert once.count(trainers_folder()) == 1


def test_a_folder_that_the_user_listed_stays_where_it_is(monkeypatch):
    listed = os.pathsep.join([trainers_folder(), "/home/me/trainers"])
    monkeypatch.setenv(VARIABLE, listed)
    register()
    assert os.environ[VARIABLE] == listed


@pytest.mark.parametrize("off", ["0", "false", "No", " OFF "])
def test_can_be_switched_off(monkeypatch, off):
    monkeypatch.setenv(OPT_OUT, off)
    register()
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("on", ["", "1", "yes"])
def test_other_values_leave_it_on(monkeypatch, on):
    monkeypatch.setenv(OPT_OUT, on)
    register()
    assert os.environ[VARIABLE] == trainers_folder()


def test_never_raises(monkeypatch, capfd):
    def broken() -> str:
        raise OSError("the disk is gone")

    monkeypatch.setattr(_autoload, "trainers_folder", broken)
    register()
    assert VARIABLE not in os.environ
    assert capfd.readouterr() == ("", "")


def test_without_the_trainers_nothing_is_added(monkeypatch):
    monkeypatch.setattr(_autoload, "trainers_folder", lambda: "")
    register()
    assert VARIABLE not in os.environ


def test_is_silent_and_imports_the_standard_library_only():
    done = in_a_new_interpreter(
        "before = set(sys.modules)\n"
        "import nnunet_calib._autoload; nnunet_calib._autoload.register()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert new - set(sys.stdlib_module_names) == {'nnunet_calib'}, new\n"
        "assert not {'torch', 'numpy', 'nnunetv2'} & set(sys.modules)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_imports_nothing_else():
    done = in_a_new_interpreter(
        "before = set(sys.modules)\nimport nnunet_calib\nprint(*sorted(set(sys.modules) - before))\n"
    )
    assert (done.stdout, done.stderr) == ("nnunet_calib\n", "")


def test_the_start_up_files_name_the_function():
    """``.pth`` for Python up to 3.14 and ``.start`` (PEP 829) call the same; one short line each."""
    line = (ROOT / "nnunet_calib.pth").read_text()
    assert line == "import nnunet_calib._autoload; nnunet_calib._autoload.register()\n"
    assert (ROOT / "nnunet_calib.start").read_text() == "nnunet_calib._autoload:register\n"
    done = in_a_new_interpreter(f"import os\nexec({line!r})\nprint(os.environ[{VARIABLE!r}])")
    assert done.stdout == trainers_folder() + "\n"
