"""Names and labels that a task may ask for; without torch, so that a wrong one is told at once."""

from collections.abc import Sequence

from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import UsageError

_LONGEST_NAME = 100
_FORBIDDEN = set('/\\:*?"<>|')
_ENDINGS = (".json", ".npz", ".pkl", ".fewshot")
_RESERVED = ("background", "ignore")


def valid_name(name: object) -> bool:
    """Whether it can name a structure, and a folder or file inside the one that a user has named, on any system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= _LONGEST_NAME
        and name.isprintable()
        and not set(name) & _FORBIDDEN
        and name == name.strip()
        and name[0] not in ".-"
        and not name.endswith((".", *_ENDINGS))
        and name not in _RESERVED
    )


def check_asked(name: str, inside: Sequence[int] | None, base: Dataset) -> None:
    """Refuse a structure that has no name, or one of the base model, or that lies in labels which this does not have.

    Args:
        name: of the structure.
        inside: labels that it may override; None: not said.
        base: labels of the base model.

    Raises:
        UsageError: as said.
    """
    if not valid_name(name):
        raise UsageError(f"{name!r} cannot name a structure")
    if name in base.content["labels"]:
        raise UsageError(f"the model has a class {name!r} already; choose another --name")
    known = [label for label in base.labels if label]
    if unknown := sorted(set(inside or ()) - set(known)):
        named = ", ".join(f"{label} ({base.names[str(label)]})" for label in known)
        raise UsageError(f"--inside {unknown[0]}: the model's labels are {named}")
