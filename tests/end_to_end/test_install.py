"""What pip puts into an environment, and that nnU-Net finds the trainers there."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from .host import ROOT, Installed, call, last_words

pytestmark = pytest.mark.slow

LOOK = """
import json, multiprocessing, os, sys
from contextlib import redirect_stdout

def variable(queue):
    queue.put(os.environ.get("nnUNet_extTrainer"))

if __name__ == "__main__":
    import nnunet_calib
    from nnunet_calib._autoload import register
    loaded = [name for name in ("torch", "numpy") if name in sys.modules]
    at_start = os.environ.get("nnUNet_extTrainer")
    register()
    register()
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    child = spawn.Process(target=variable, args=(queue,))
    child.start()
    in_child = queue.get(timeout=120)
    child.join()
    found = []
    if "find" in sys.argv:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
        with redirect_stdout(sys.stderr):
            found = [recursive_find_trainer_class_by_name("NACLTrainer").__module__ for _ in range(2)]
    print(json.dumps({
        "file": nnunet_calib.__file__,
        "loaded": loaded,
        "at_start": at_start,
        "registered_twice": os.environ.get("nnUNet_extTrainer"),
        "in_child": in_child,
        "found": found,
    }))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("look") / "look.py"
    file.write_text(LOOK)
    return str(file)


def look(installed: Installed, *words: str, **environment: str) -> dict:
    done = installed.run(*words, **environment)
    assert done.returncode == 0, last_words(done)
    return json.loads(done.stdout)


def package_and_folder(installed: Installed, how: str) -> tuple[Path, Path]:
    if how == "editable":
        return ROOT / "nnunet_calib", ROOT / "trainers"
    return installed.site / "nnunet_calib", installed.site / "nnunet_calib" / "_trainers"


@pytest.fixture(params=["from_wheel", "editable"])
def how(request) -> str:
    return request.param


@pytest.fixture
def installed(request, how) -> Installed:
    return request.getfixturevalue(how)


def test_the_wheel_holds_the_package_the_trainers_and_two_start_up_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"nnunet_calib", "nnunet_calib.pth", "nnunet_calib.start"}
    assert "nnunet_calib/_trainers/nnunet_calib_trainers.py" in names
    assert [name for name in names if name.startswith("nnunet_calib/_trainers/")] == [
        "nnunet_calib/_trainers/nnunet_calib_trainers.py"
    ]


def test_nnunet_finds_the_trainers_without_a_word(installed, how, script):
    package, folder = package_and_folder(installed, how)
    seen = look(installed, script, "find")
    assert Path(seen["file"]).parent == package
    assert seen["loaded"] == []
    assert seen["at_start"] == seen["registered_twice"] == seen["in_child"] == str(folder)
    assert seen["found"] == ["nnunet_calib.training.trainers"] * 2


def test_switched_off_nothing_is_registered_and_the_explicit_way_works(installed, how, script):
    _, folder = package_and_folder(installed, how)
    off = {"NNUNET_CALIB_AUTOLOAD": "0"}
    seen = look(installed, script, **off)
    assert (seen["at_start"], seen["registered_twice"], seen["in_child"]) == (None, None, None)
    path = installed.run("-m", "nnunet_calib.cli.main", "trainers-path", **off)
    assert path.stdout == f"{folder}\n"
    seen = look(installed, script, "find", **off, nnUNet_extTrainer=path.stdout.strip())
    assert seen["found"] == ["nnunet_calib.training.trainers"] * 2


def test_uninstalling_leaves_nothing(wheel, tmp_path):
    installed = Installed(tmp_path / "gone", [str(wheel)])
    assert list(installed.site.glob("*nnunet_calib*"))
    done = call(
        [sys.executable, "-m", "pip", "--python", str(installed.python), "uninstall", "-y", "nnunet-calib"],
        installed.environment,
    )
    assert done.returncode == 0, last_words(done)
    assert not list(installed.site.glob("*nnunet_calib*"))
