"""What trainers there are and what can be set of them, read from their source without importing it.

The classes and constructors say it, and they alone. Importing them takes torch and nnU-Net's trainer along, which is
seconds; a mistyped setting is told before. So their source is parsed instead.
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from nnunet_calib import losses, training
from nnunet_calib._autoload import trainers_folder
from nnunet_calib.data.errors import UsageError, nearest
from nnunet_calib.data.host import modules_with_trainers, own_trainer_folders, trainer_folders
from nnunet_calib.losses import values

Check = Callable[[Mapping[str, Any]], object]
"""Given values of all arguments; raises ValueError for a wrong one."""


@dataclass(frozen=True)
class Listed:
    """What the class of a trainer says.

    Attributes:
        loss: its ``LOSS``.
        fixed: its ``FIXED``.
        summary: the first line of its docstring.
    """

    loss: str | None
    fixed: dict[str, Any]
    summary: str


@dataclass(frozen=True)
class Arguments:
    """What the constructor of a loss says.

    Attributes:
        defaults: of the arguments, by name.
        checks: those of the constructor's checks (of `nnunet_calib.losses.values`) that need nothing but arguments.
    """

    defaults: dict[str, Any]
    checks: tuple[Check, ...]


@cache
def listed_trainers() -> dict[str, Listed]:
    """The trainers of `nnunet_calib.training.trainers`, by name."""
    return {node.name: _listed(node) for node in _classes(Path(__file__).with_name("trainers.py")).values()}


def no_trainer(name: str) -> str:
    """What to say of a name that no trainer has."""
    stems = {_stem(trainer): trainer for trainer in listed_trainers()}
    near = nearest(_stem(name), stems)
    meant = f"did you mean {stems[near]}? There" if near else "there"
    return f"no trainer {name!r}; {meant} are {', '.join(listed_trainers())}"


def _stem(name: str) -> str:
    """A name without what all have at the end, which makes any two look alike."""
    return re.sub(r"tr[a-z]*$", "", name.lower())


def other_folders() -> list[Path]:
    """Where nnU-Net finds trainers that are not ours: its own folder, then those of ``nnUNet_extTrainer``."""
    ours = Path(trainers_folder())
    return own_trainer_folders() + [folder for folder in trainer_folders() if folder.absolute() != ours]


def check_may_be_ours(name: str) -> None:
    """Refuse the name of a trainer that is neither ours nor can have been made from one of ours by a user.

    Raises:
        UsageError: no module that nnU-Net searches holds the name, or none of them knows this package.
    """
    if name in listed_trainers() or name in training.YARDSTICKS:
        return
    folders = other_folders()
    if not modules_with_trainers([name], folders):
        raise UsageError(no_trainer(name))
    if not modules_with_trainers(["nnunet_calib"], folders):
        raise UsageError(f"{name} is no trainer of nnunet-calib and takes no settings; derive it from one of ours")


@cache
def loss_arguments(key: str) -> Arguments:
    """Arguments of a loss of `nnunet_calib.losses.KEYS`, but for ``multilabel``."""
    return _arguments(losses.KEYS[key])


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _listed(node: ast.ClassDef) -> Listed:
    constants = {
        target.id: ast.literal_eval(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    return Listed(constants.get("LOSS"), constants.get("FIXED", {}), summary)


def _arguments(name: str) -> Arguments:
    node = _classes(Path(losses.__file__).with_name(f"{losses.FILES[name]}.py"))[name]
    constructor = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if constructor is None:
        return _arguments(next(base.id for base in node.bases if isinstance(base, ast.Name)))
    names = [argument.arg for argument in constructor.args.args if argument.arg != "self"]
    defaults = dict(zip(names, map(ast.literal_eval, constructor.args.defaults), strict=True))
    calls = [call for call in ast.walk(constructor) if isinstance(call, ast.Call) and _is_check(call, names)]
    return Arguments(defaults, tuple(partial(_run, compile(ast.Expression(call), name, "eval")) for call in calls))


def _is_check(call: ast.Call, arguments: list[str]) -> bool:
    known = {node.id in arguments or hasattr(values, node.id) for node in ast.walk(call) if isinstance(node, ast.Name)}
    return isinstance(call.func, ast.Name) and hasattr(values, call.func.id) and all(known)


def _run(check: Any, given: Mapping[str, Any]) -> object:
    return eval(check, vars(values) | dict(given))  # of our own source, with the given values as arguments
