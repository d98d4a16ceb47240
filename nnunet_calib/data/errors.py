"""The two ways a user's request can fail, each told in one line; and which name was meant."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(Exception):
    """A file cannot be used; the message says which file, what is wrong and what to do. Exit code 1."""


class UsageError(Exception):
    """The request itself makes no sense; the message says what is allowed. Exit code 2."""


def nearest(name: str, known: Iterable[Any]) -> str | None:
    """The known name that an unknown one looks like; None if there is none."""
    of_lower = {str(entry).lower(): str(entry) for entry in known}
    lower = name.lower()
    near = difflib.get_close_matches(lower, of_lower, n=1)
    near = near or [entry for entry in of_lower if len(lower) > 2 and (entry.startswith(lower) or lower in entry)]
    return of_lower[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[Any]) -> str:
    """``; did you mean margin?`` for the end of a message; empty if no known name is near."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[Any]) -> str:
    """``no metric 'Dise'; did you mean Dice? There are Dice, IoU``."""
    names = [str(entry) for entry in known]
    near = nearest(name, names)
    return f"no {kind} {name!r}; {f'did you mean {near}? There' if near else 'there'} are {', '.join(names)}"
