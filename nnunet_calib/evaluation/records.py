"""A record per case on disk, and whether it still holds.

``OUT/cases/<case>.json`` is written by whoever scored the case, whole or not at all, in four lines of one JSON object:

    sha256      of the lines that follow: a damaged record is no record
    made_from   all that its numbers depend on: the files (path, size, time), the protocol, dataset.json, the software
    record      the case's entry in ``metric_per_case``
    statistics  its entry in ``reliability.json``

A record is used again if the same case would be made from the same today.
"""

import functools
import hashlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nnunet_calib
from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import unreadable, write_whole
from nnunet_calib.data.software import installed_versions
from nnunet_calib.evaluation.case import CaseResult
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.evaluation.write import numbers_as_json, numbers_from_json, statistics_as_json, statistics_from_json

_NUMBERS = ("metrics", "calibration", "nacl")  # entries of a record that hold numbers, not names
_PACKAGES = ("nnunet-calib", "nnunetv2", "numpy", "scipy", "SimpleITK", "nibabel", "numba")


@dataclass(frozen=True)
class Records:
    """The records of a folder, and how a case becomes one.

    Attributes:
        folder: of the records; it exists.
        score: makes a case's result from its files; picklable.
        setting: what all cases are scored with, as ``setting`` describes it.
    """

    folder: Path
    score: Callable[[CaseFiles], CaseResult]
    setting: dict[str, Any]

    def __call__(self, files: CaseFiles) -> None:
        """Score a case and write its record; for an engine's workers.

        Raises:
            InputError: a file that cannot be used, found or written; a worker whose software is not the setting's.
        """
        _check_same_software(self.setting["software"])
        made_from = self._made_from(files)  # before the files are read: a change meanwhile is a change since
        result = self.score(files)
        lines = [
            f'"made_from": {json.dumps(made_from)},',
            f'"record": {json.dumps(numbers_as_json(result.record), allow_nan=False)},',
            f'"statistics": {statistics_as_json(result.statistics)}}}',
        ]
        rest = "\n".join(lines) + "\n"
        path = self._path(files)
        try:
            write_whole(path, f'{{"sha256": "{_digest(rest.encode())}",\n{rest}')
        except OSError as error:
            raise InputError(f"{path}: cannot be written on {socket.gethostname()} ({error.strerror})") from error

    def hold(self, files: CaseFiles) -> bool:
        """Whether there is a whole record of the case, made from what is there now."""
        try:
            return json.loads(self._lines(files)[0].removesuffix(",").join("{}"))["made_from"] == self._made_from(files)
        except (InputError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def read(self, files: CaseFiles) -> CaseResult:
        """The result of a case that was scored; paths in it are those of ``files``.

        Raises:
            InputError: there is no whole record.
        """
        _, record_line, statistics_line = self._lines(files)
        try:
            record = json.loads(record_line.removesuffix(",").join("{}"))["record"]
            result = CaseResult(
                record
                | {name: numbers_from_json(record[name]) for name in _NUMBERS if name in record}
                | {"reference_file": str(files.reference), "prediction_file": str(files.prediction)}
                | {"probabilities_file": None if files.probabilities is None else str(files.probabilities)},
                statistics_from_json(json.loads("{" + statistics_line)["statistics"]),
            )
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise InputError(f"{self._path(files)}: damaged; delete it and run again") from error
        return result

    def statistics_text(self, files: CaseFiles) -> str:
        """A case's entry in ``reliability.json``, as its record has it.

        Raises:
            InputError: there is no whole record.
        """
        return self._lines(files)[2].removeprefix('"statistics": ').removesuffix("}")

    def refuse_others(self, cases: set[str], reference: Path, *, fresh: bool) -> None:
        """Refuse a folder with records of another data set; with ``fresh`` remove them.

        Records of cases that are no more stay: they are not used.

        Raises:
            UsageError: a record of another case has its reference in another folder.
        """
        others: dict[Path, Path] = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name.removesuffix(".json") in cases:
                continue
            try:
                with path.open("rb") as stream:
                    stream.readline()
                    line = stream.readline().decode().strip().removesuffix(",")
                there = Path(json.loads(line.join("{}"))["made_from"]["files"]["reference"][0]).parent
            except (OSError, ValueError, LookupError, TypeError, RecursionError):
                continue  # no record of ours
            if there != Path(os.path.abspath(reference)):
                others[path] = there
        if others and not fresh:
            raise UsageError(
                f"{self.folder.parent} holds the results of {len(others)} other case{'s' * (len(others) > 1)}, with "
                f"references in {next(iter(others.values()))}; name another folder with -o, or drop them with --fresh"
            )
        for path in others:
            path.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what a killed run did not finish writing."""
        for path in self.folder.glob(".*.json.*"):
            path.unlink(missing_ok=True)

    def _path(self, files: CaseFiles) -> Path:
        return self.folder / f"{files.name}.json"

    def _lines(self, files: CaseFiles) -> tuple[str, str, str]:
        """A record's last three lines."""
        path = self._path(files)
        try:
            first, _, rest = path.read_bytes().partition(b"\n")
        except FileNotFoundError as error:
            raise InputError(f"{path}: not there; the workers must write to the folder this process reads") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if first != f'{{"sha256": "{_digest(rest)}",'.encode():
            raise InputError(f"{path}: damaged; delete it and run again")
        made_from, record, statistics = rest.decode().splitlines()
        return made_from, record, statistics

    def _made_from(self, files: CaseFiles) -> dict[str, Any]:
        paths = {"reference": files.reference, "prediction": files.prediction, "probabilities": files.probabilities}
        return self.setting | {"files": {name: path and _identity(path) for name, path in paths.items()}}


def setting(
    protocol: Protocol,
    dataset_json: Path,
    plans: Path | None,
    reader: str,
    calibration: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What every case's numbers depend on besides its own files."""
    return {
        "software": software(),
        "protocol": json.loads(json.dumps(asdict(protocol))),  # as it is read back
        "dataset_json": _digest(dataset_json.read_bytes()),
        "plans": plans and _digest(plans.read_bytes()),
        "reader": reader,
        "calibrator": calibration,
    }


@functools.cache
def software() -> dict[str, str]:
    """Versions of all that takes part in the numbers; of this package also its very code, for development."""
    root = Path(nnunet_calib.__file__).parent
    sources = sorted(
        file
        for room in ("metrics", "data", "prediction", "evaluation", "posthoc")
        for file in (root / room).rglob("*.py")
    )
    return installed_versions(_PACKAGES) | {"code": _digest(b"".join(file.read_bytes() for file in sources))[:12]}


def _check_same_software(expected: dict[str, str]) -> None:
    for name, here in software().items():
        if here != expected[name]:
            raise InputError(
                f"{socket.gethostname()} has another {name} ({here}) than the process that collects the results "
                f"({expected[name]}); numbers would not be comparable"
            )


def _identity(path: Path) -> list[str | int]:
    try:
        state = path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise unreadable(path, error) from error
        raise InputError(
            f"{path}: not there on {socket.gethostname()}; workers must see the folders under the same path"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    return [os.path.abspath(path), state.st_size, state.st_mtime_ns]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
