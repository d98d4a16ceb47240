"""What every verb refuses before it imports what takes seconds."""

from pathlib import Path

from nnunet_calib.data.errors import UsageError


def folders(*paths: Path | None) -> None:
    """Refuse a folder that is not there; None is one that was not named.

    Raises:
        UsageError: as said.
    """
    for path in paths:
        if path is not None and not path.is_dir():
            what = "is not a folder" if path.exists() else "is not a folder: there is nothing of that name"
            raise UsageError(f"{path} {what}")


def at_least(least: int, **values: int | None) -> None:
    """Refuse whole numbers below the least that makes sense; their names are those of the options.

    Raises:
        UsageError: as said.
    """
    for name, value in values.items():
        if value is not None and value < least:
            dashes = "-" if name in ("np", "npp", "nps", "k") else "--"
            raise UsageError(f"{dashes}{name} {value}: it must be {least} or more")


def step_size(value: float) -> None:
    """Refuse a step of the sliding window that is none.

    Raises:
        UsageError: as said.
    """
    if not 0 < value <= 1:
        raise UsageError(f"-step_size {value:g}: it must be above 0 and at most 1")
