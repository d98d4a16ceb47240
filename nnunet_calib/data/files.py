"""Files read and written with care."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nnunet_calib.data.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected, the file holds a {type(content).__name__}")
    return content


def is_named(path: Path) -> bool:
    """Whether a folder has a file of this name. A link to nothing is one: whatever opens it says where it leads."""
    return path.is_file() or path.is_symlink()


def is_hidden(path: Path) -> bool:
    """Whether it is a hidden file, such as macOS' ``._x.nii.gz``: those are no cases."""
    return path.name.startswith(".")


def unreadable(path: Path, error: OSError) -> InputError:
    """What to say of a file that cannot be opened or read."""
    if path.is_symlink() and not path.exists():
        return InputError(f"{path}: a link to {os.readlink(path)}, which is not there")
    return InputError(f"{path}: cannot be read ({error.strerror or error})")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a reader sees the old content or the new, never a part."""
    with whole_file(path) as stream:
        stream.write(text.encode("utf-8"))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when all of it is written; an error leaves what was there before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's are private; results are for colleagues too
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
