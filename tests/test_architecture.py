"""Imports run one way, floor by floor; LEVELS lists the floors from the ground up."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nnunet_calib"
LEVELS = [
    {"metrics", "data", "losses"},
    {"prediction"},
    {"evaluation", "posthoc", "fewshot"},
    {"pipeline"},
    {"report", "training"},
    {"demo"},
    {"cli"},
]
INSIDE = {"fewshot": ("network", "volume", "structure", "task", "apply", "measure")}
"""Rooms of the larger rooms, in the order in which data flow: each imports from itself and from those before it."""

LEVEL = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """``nnunet_calib.losses.base`` to ``losses``; the package's own name for what lies at its top."""
    return module.split(".")[1] if "." in module else module


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported(file: Path) -> set[str]:
    """Dotted names of all that a module imports anywhere in it, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            # `from nnunet_calib import losses` imports a room by its name.
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def own(file: Path) -> set[str]:
    return {room(name) for name in imported(file) if name.startswith("nnunet_calib.")} & LEVEL.keys()


def foreign(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)} - set(sys.stdlib_module_names) - {"nnunet_calib"}


def files(of: str) -> list[Path]:
    return [file for file in MODULES if room(name_of(file)) == of]


every_module = pytest.mark.parametrize("file", MODULES, ids=name_of)


@pytest.mark.parametrize("house", INSIDE)
def test_imports_go_one_way_inside_a_large_room(house):
    order = INSIDE[house]
    assert {path.name for path in (PACKAGE / house).iterdir() if any(path.glob("*.py"))} == set(order)
    for file in files(house):
        here = name_of(file).split(".")[2]
        for name in imported(file):
            there = name.split(".")[2] if name.startswith(f"nnunet_calib.{house}.") else None
            if here in order and there in order:
                assert order.index(there) <= order.index(here), f"{name_of(file)} imports {name}"


@every_module
def test_imports_go_down_or_stay_in_the_room(file):
    here = room(name_of(file))
    if here in LEVEL:
        assert not {there for there in own(file) if there != here and LEVEL[there] >= LEVEL[here]}
    else:
        assert not own(file), "what every interpreter start runs imports no room"


def test_every_room_has_a_level():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms - {"_trainers"} <= LEVEL.keys()


@pytest.mark.parametrize(
    ("of", "allowed"),
    [("losses", {"torch"}), ("metrics", {"numpy", "scipy", "torch", "numba"}), ("nnunet_calib", set())],
)
def test_the_ground_floor_needs_little(of, allowed):
    needs = {name for file in files(of) for name in foreign(file)}
    assert needs <= allowed


def test_what_starts_with_the_interpreter_needs_the_standard_library():
    assert not foreign(PACKAGE / "_autoload.py")
    assert not imported(PACKAGE / "__init__.py")


def test_one_module_of_training_knows_the_host():
    assert [file.name for file in files("training") if "nnunetv2" in foreign(file)] == ["base.py"]


def test_the_folder_that_nnunet_searches_re_exports_only():
    (file,) = (PACKAGE.parent / "trainers").glob("*.py")
    kinds = {type(node) for node in ast.parse(file.read_text(encoding="utf-8")).body}
    assert kinds == {ast.Expr, ast.ImportFrom}
    assert foreign(file) == set()


ONE_WAY = {  # room: its parts, each with those of the room that it may import
    "posthoc": {"maps": set(), "folders": {"maps"}},
    "metrics": {"counting": set(), "surface": set()},
}


def part(module: str, room_of_it: str) -> str | None:
    """``nnunet_calib.posthoc.maps.local`` to ``maps``; None for what lies at the top of the room."""
    names = module.split(".")
    return names[2] if len(names) > 2 and names[1] == room_of_it and names[2] in ONE_WAY[room_of_it] else None


@pytest.mark.parametrize(("of", "here"), [(of, here) for of, parts in ONE_WAY.items() for here in parts])
def test_imports_run_one_way_inside_a_room(of, here):
    for file in files(of):
        if part(name_of(file), of) == here:
            names = imported(file)
            assert {part(name, of) for name in names} - {here, None} <= ONE_WAY[of][here], file
            # the room's own list of names would bring in every part
            assert f"nnunet_calib.{of}" not in {name for name in names if part(name, of) is None}, file
