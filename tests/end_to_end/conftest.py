import subprocess
import sys

import pytest

from .host import ROOT, Installed, backend


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Our wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", *backend("hatchling"), "-w", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("nnunet_calib-*.whl")
    return file


@pytest.fixture(scope="session")
def from_wheel(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("from_wheel"), [str(wheel)])


@pytest.fixture(scope="session")
def editable(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("editable"), [*backend("hatchling", "editables"), "-e", str(ROOT)])
