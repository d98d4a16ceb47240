import os
import stat
import sys
import time

import pytest

from nnunet_calib.data.errors import InputError
from nnunet_calib.demo import commands


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Make a console script beside a pretended interpreter."""
    monkeypatch.setattr(commands.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(commands, "POLL_SECONDS", 0.05)

    def make(body):
        file = tmp_path / "nnUNetv2_pretend"
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return ["nnUNetv2_pretend"]

    return make


@pytest.mark.usefixtures("script")
def test_a_missing_command_is_named_with_the_remedy():
    with pytest.raises(InputError, match=r"no nnUNetv2_train in .*pip install nnunetv2"):
        commands.find_command("nnUNetv2_train")


def test_output_and_errors_go_to_the_log(script, tmp_path):
    ticks = []
    commands.run_command(script("echo out; echo err >&2"), os.environ, tmp_path / "log", lambda: ticks.append(1))
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    assert ticks


def test_a_failure_tells_the_error_and_the_log_in_one_line(script, tmp_path):
    body = "echo 'Traceback (most recent call last):'; echo 'ValueError: no such plans'; exit 3"
    with pytest.raises(InputError) as failure:
        commands.run_command(script(body), os.environ, tmp_path / "log", lambda: None)
    assert str(failure.value) == f"nnUNetv2_pretend failed (ValueError: no such plans); see {tmp_path / 'log'}"


def test_a_silent_failure_tells_its_code(script, tmp_path):
    with pytest.raises(InputError, match="exit code 3, nothing printed"):
        commands.run_command(script("exit 3"), os.environ, tmp_path / "log", lambda: None)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
def test_an_interruption_ends_the_command_and_its_children(script, tmp_path):
    def interrupt():
        if (tmp_path / "child").is_file() and (tmp_path / "child").read_text().strip():
            raise KeyboardInterrupt

    command = script(f"sleep 60 & echo $! > {tmp_path / 'child'}; wait")
    with pytest.raises(KeyboardInterrupt):
        commands.run_command(command, os.environ, tmp_path / "log", interrupt)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not _runs(child):
            return
        time.sleep(0.05)
    pytest.fail("the command's child is still running")


def _runs(process):
    try:
        with open(f"/proc/{process}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
