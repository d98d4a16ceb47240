"""Run the stock commands of this Python environment, each with a log, and never leave one behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nnunet_calib.data.errors import InputError

POLL_SECONDS = 0.5
GRACE_SECONDS = 10
_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b|nnunet-calib: ")


def find_command(name: str) -> str:
    """Path of a console script beside the running interpreter.

    Raises:
        InputError: it is not there.
    """
    scripts = Path(sys.executable).parent
    found = shutil.which(name, path=str(scripts))
    if found is None:
        raise InputError(
            f"there is no {name} in {scripts}; install nnU-Net there: {sys.executable} -m pip install nnunetv2"
        )
    return found


def run_command(command: Sequence[str], environment: Mapping[str, str], log: Path, tick: Callable[[], None]) -> None:
    """Run a command to its end; an interruption ends it and all its children.

    Args:
        command: name of a console script beside the interpreter, and its arguments.
        environment: all its variables.
        log: gets what the command prints.
        tick: called every `POLL_SECONDS` while it runs.

    Raises:
        InputError: the command is missing or failed; the message has the last error it printed.
    """
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [find_command(command[0]), *command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that its workers can be ended with it
        )
        try:
            while process.poll() is None:
                tick()
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
            tick()
        finally:
            if process.poll() is None:
                _end(process)
    if process.returncode != 0:
        raise InputError(f"{command[0]} failed ({_gist(log, process.returncode)}); see {log}")


def _end(process: subprocess.Popen) -> None:
    """Ask the whole group to end, then force it."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        try:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _gist(log: Path, code: int) -> str:
    """The line of a log that says what went wrong."""
    if code < 0:
        return f"ended by signal {-code}" + (", often for want of memory" if code == -9 else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines or [f"exit code {code}, nothing printed"])[-1]
