"""Settings of a training: the key ``nnunet_calib`` of a plans configuration, checked and completed."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from nnunet_calib import losses
from nnunet_calib.data.errors import did_you_mean, nearest
from nnunet_calib.data.plans import first_kernel
from nnunet_calib.losses.values import choice, count, number
from nnunet_calib.training import catalogue

RESOLVED_KEY = "nnunet_calib_resolved"
"""Key at the top of the plans under which a training records what it really used."""

CHECKPOINT_ENDING = ".pth"
"""What tells a checkpoint's file from a trainer's name in ``finetune_from``."""

# Dice of MEEP and NACL, and balanced means: chosen on validation cases (docs/results/trainers.md); the rest in older
# runs, on test cases. Less Dice calibrates more, and costs Dice.
DICE_WEIGHT = 1.0
DICE_WEIGHT_OF = {"focal": 0.6}
CALIBRATE_FROM = 0.75
RAMP = 0.5
ARGUMENTS_OF = {"mbls": {"weight": 0.03}, "nacl": {"weight": 0.03, "balanced": True}}
"""Loss arguments whose default is another in a trainer, beside nnU-Net's Dice, than in the paper."""


SCHEDULE = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "save_every")
"""Settings that are attributes of nnU-Net's trainer; another class may set them too."""


class EndedTraining(SystemExit):
    """A training that cannot go on. The stock commands show it as one line, exit code 1."""

    def __init__(self, message: str):
        super().__init__(f"nnunet-calib: {message}")


class RefusedSettings(SystemExit, ValueError):
    """A training that must not start. The stock commands show it as one line (it is a `SystemExit`), no traceback."""

    def __init__(self, message: str):
        super().__init__(f"nnunet-calib: {message}")


def resolve_settings(
    given: Mapping[str, Any], loss: str | None, fixed: Mapping[str, Any], kernel_size: int | list[int]
) -> dict[str, Any]:
    """Complete and check the settings of one training.

    Args:
        given: what the plans configuration says.
        loss: key of `nnunet_calib.losses.LOSSES`; None for nnU-Net's own loss, which knows only the schedule.
        fixed: loss arguments that the trainer fixes.
        kernel_size: default for losses with a neighbourhood; one value per axis where the number of axes is known.

    Returns:
        Every setting with its value, the loss arguments under their own names; JSON types only.

    Raises:
        RefusedSettings: an unknown key, a wrong type or value, or a combination without meaning.
    """
    settings = check_settings(given, loss, fixed, kernel_size)
    if loss is not None:
        try:
            losses.LOSSES[loss](**loss_arguments(settings, loss, fixed))
        except ValueError as error:
            raise RefusedSettings(str(error)) from error
    return settings


def check_settings(
    given: Mapping[str, Any], loss: str | None, fixed: Mapping[str, Any], kernel_size: int | list[int] = 3
) -> dict[str, Any]:
    """``resolve_settings`` without torch: all but what only the constructor of the loss can say of its arguments."""
    defaults = default_settings(loss, fixed, kernel_size, finetune=given.get("finetune_from") is not None)
    if unknown := sorted(set(given) - set(defaults)):
        raise RefusedSettings(_of_unknown(unknown[0], defaults))
    settings = defaults | dict(given)
    if loss is not None and settings["calibrate_from"] == 0:
        settings["ramp"] = given.get("ramp", 0.0)  # the objective is there from the first step
    try:
        for name, check in _CHECKS.items():
            if name in settings:
                settings[name] = check(name, settings[name])
        if loss in losses.KEYS:
            for check_arguments in catalogue.loss_arguments(loss).checks:
                check_arguments(loss_arguments(settings, loss, fixed))
    except ValueError as error:
        raise RefusedSettings(str(error)) from error
    size = settings.get("kernel_size")
    if isinstance(kernel_size, list) and isinstance(size, (list, tuple)) and len(size) != len(kernel_size):
        raise RefusedSettings(f"kernel_size {size!r} does not fit images of {len(kernel_size)} axes")
    _refuse_meaningless(settings)
    return settings


def default_settings(
    loss: str | None, fixed: Mapping[str, Any], kernel_size: int | list[int] = 3, *, finetune: bool = False
) -> dict[str, Any]:
    """Every setting of a trainer and its default; arguments as ``resolve_settings``."""
    defaults = _schedule(finetune)
    if loss is not None:
        defaults |= {
            "dice_weight": DICE_WEIGHT_OF.get(loss, DICE_WEIGHT),
            "calibrate_from": 0.0 if finetune else CALIBRATE_FROM,
            "ramp": RAMP,
            "deep_supervision": "all",
            **loss_defaults(loss, fixed, kernel_size),
            **{name: value for name, value in ARGUMENTS_OF.get(loss, {}).items() if name not in fixed},
        }
    return defaults


def default_kernel_size(plans: Mapping[str, Any], configuration: str) -> list[int]:
    """3 voxels along every axis, 1 where nnU-Net's first convolution has 1 because the slices are far apart."""
    return [1 if size == 1 else 3 for size in first_kernel(plans, configuration)]


def check_of_any(given: Mapping[str, Any], kernel_size: int | list[int] = 3) -> list[str]:
    """Our trainers that take these settings.

    Args:
        given: settings by name.
        kernel_size: as for ``resolve_settings``.

    Raises:
        RefusedSettings: none takes them; the message says what is wrong, and which trainers have what is right.
    """
    trainers = catalogue.listed_trainers()
    having = {name: default_settings(trainer.loss, trainer.fixed).keys() for name, trainer in trainers.items()}
    every = {setting for settings in having.values() for setting in settings}
    if unknown := [setting for setting in given if setting not in every]:
        near = nearest(unknown[0], sorted(every))
        hint = f"did you mean {near} (of {_named(near)})?" if near else f"there are {', '.join(sorted(every))}"
        raise RefusedSettings(f"unknown setting {unknown[0]!r}; {hint}")
    candidates = [name for name in trainers if given.keys() <= having[name]]
    if not candidates:
        some = [setting for setting in given if len(trainers_with(setting)) < len(trainers)]
        raise RefusedSettings(
            "no trainer has all of these settings: " + "; ".join(f"{name} is of {_named(name)}" for name in some)
        )
    return accepting(
        candidates, lambda name: check_settings(given, trainers[name].loss, trainers[name].fixed, kernel_size)
    )


def accepting(names: Iterable[str], check: Callable[[str], object]) -> list[str]:
    """The trainers whose settings ``check`` does not refuse.

    Raises:
        RefusedSettings: it refuses those of every trainer; what it says of the first.
    """
    found, refusals = [], []
    for name in names:
        try:
            check(name)
            found.append(name)
        except RefusedSettings as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    return found


def trainers_with(setting: str) -> list[str]:
    """Our trainers that have a setting."""
    trainers = catalogue.listed_trainers().items()
    return [name for name, trainer in trainers if setting in default_settings(trainer.loss, trainer.fixed)]


def _of_unknown(setting: str, own: Collection[str]) -> str:
    """What to say of a setting that is none of ``own``."""
    known = f", which is of {_named(setting)}" if trainers_with(setting) else did_you_mean(setting, own)
    allowed = f"allowed: {', '.join(sorted(own))}"
    return f"unknown setting {setting!r}{known}{' ' if known.endswith('?') else '; '}{allowed}"


def _named(setting: str) -> str:
    """The trainers that have a setting, in words."""
    having, every = trainers_with(setting), [*catalogue.listed_trainers()]
    missing = [name for name in every if name not in having]
    if len(missing) < 3:
        return "every trainer" + (f" but {' and '.join(missing)}" if missing else "")
    return ", ".join(having)


def asked_schedule(given: Mapping[str, Any]) -> list[str]:
    """The part of the schedule that was given, or that follows from ``finetune_from``."""
    follows = ("num_epochs", "initial_lr") if given.get("finetune_from") is not None else ()
    return [name for name in SCHEDULE if name in given or name in follows]


def loss_defaults(loss: str, fixed: Mapping[str, Any], kernel_size: int | list[int]) -> dict[str, Any]:
    """Arguments of a loss that a setting can change, with their defaults."""
    if loss in losses.KEYS:
        defaults = catalogue.loss_arguments(loss).defaults
    else:  # a user's own, put into LOSSES
        parameters = inspect.signature(losses.LOSSES[loss]).parameters.items()
        defaults = {name: parameter.default for name, parameter in parameters if name != "multilabel"}
    defaults = {name: value for name, value in defaults.items() if name not in fixed}
    return defaults | ({"kernel_size": kernel_size} if "kernel_size" in defaults else {})


def loss_arguments(settings: Mapping[str, Any], loss: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the constructor of a loss, out of all settings."""
    return {name: settings[name] for name in loss_defaults(loss, fixed, 3)} | dict(fixed)


def _schedule(finetune: bool) -> dict[str, Any]:
    """nnU-Net's own schedule; a shorter one with a smaller step where a trained network is the start."""
    return {
        "num_epochs": 250 if finetune else 1000,
        "num_iterations_per_epoch": 250,
        "num_val_iterations_per_epoch": 50,
        "initial_lr": 1e-3 if finetune else 1e-2,
        "save_every": 50,
        "finetune_from": None,
    }


def _refuse_meaningless(settings: Mapping[str, Any]) -> None:
    if settings.get("calibrate_from", 0.0) > 0 and settings["finetune_from"] is not None:
        raise RefusedSettings(
            "calibrate_from and finetune_from are two ways to put nnU-Net's own loss first; set one of them "
            "(0 or null undoes an inherited one)"
        )
    if settings.get("calibrate_from") == 1:
        raise RefusedSettings(
            "calibrate_from 1 leaves no epoch to the objective; set less than 1 or use -tr nnUNetTrainer"
        )


def _learning_rate(name: str, value: Any) -> float:
    if number(name, value) == 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return float(value)


def _start(name: str, value: Any) -> str | None:
    named = isinstance(value, str) and (value.isidentifier() or value.endswith(CHECKPOINT_ENDING))
    if value is not None and not named:
        raise ValueError(
            f"{name} must be the name of a trainer, such as nnUNetTrainer, or null, or the path of a checkpoint "
            f"({CHECKPOINT_ENDING}), got {value!r}"
        )
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_epochs": count,
    "num_iterations_per_epoch": count,
    "num_val_iterations_per_epoch": count,
    "save_every": count,
    "initial_lr": _learning_rate,
    "finetune_from": _start,
    "dice_weight": number,
    "calibrate_from": lambda name, value: number(name, value, maximum=1.0),
    "ramp": lambda name, value: number(name, value, maximum=1.0),
    "deep_supervision": lambda name, value: choice(name, value, ("all", "full_resolution")),
}
