"""What an experiment is: a JSON file that names the data, the network, the schedule and every training.

    {"name": ..., "dataset": "Dataset027_ACDC", "group": "patient[0-9]+", "configuration": "2d",
     "validation": {"share": 0.3, "seed": 12345},
     "network": {...}, "schedule": {...}, "methods": [...], "test_is_open": false,
     "queue": [{"label": ..., "trainer": ..., "start": ..., "settings": {...}, "runs": [1, 2]}, ...]}

``network`` overrides the planned configuration. ``group`` is found in a case's name; cases with the same match lie on
the same side of every split, and are resampled together. ``queue`` is the order of work. ``start`` is one of

- nothing: from scratch;
- the label of another training: its finished network (``settings`` holds ``finetune_from``);
- ``"shared <label>"``: its checkpoint at ``calibrate_from`` of the epochs. Until then nnU-Net's own loss is all there
  is, so the two differ in the last part only: they are a pair.

A training's ``run`` number is that of its start.

``shift``, where it is there, names a data set of another origin that the networks are tried on: ``name``, ``dataset``,
``group``, and ``labels``, its label values to those of the networks.

``sparse``, where it is there, names label maps to train on that leave most voxels unlabelled: their ``folder`` in the
data set, and the value ``ignore`` of such voxels. Scores, and fits of calibrators, are those on whole references.

``nacl``, where it is true, adds the numbers of the NACL code (``evaluate --protocol nacl``) to the rows.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

SHARED = "shared "
NEW = "@new"
"""After a calibrator's name: fitted to other patients of the data set it is tried on, not to that of the networks."""
_KEYS = {"name", "about", "dataset", "group", "configuration", "validation", "network", "schedule", "methods"}
_KEYS |= {"test_is_open", "queue", "shift", "sparse", "nacl"}
_TRAINING_KEYS = {"label", "trainer", "start", "settings", "runs"}


@dataclass(frozen=True)
class Training:
    """One training: a row of the tables for every method after it."""

    label: str
    trainer: str
    run: int
    start: str | None = None
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.label}_{self.run}"

    @property
    def shares(self) -> bool:
        """It goes on from the first part of another."""
        return self.start is not None and self.start.startswith(SHARED)

    @property
    def start_name(self) -> str | None:
        """Name of the training that it starts from."""
        return None if self.start is None else f"{self.start.removeprefix(SHARED)}_{self.run}"


@dataclass(frozen=True)
class Protocol:
    """An experiment; see the module."""

    file: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Protocol":
        """Raises ValueError for what makes no experiment."""
        content = json.loads(file.read_text())
        if unknown := set(content) - _KEYS:
            raise ValueError(f"{file}: unknown keys {sorted(unknown)}")
        protocol = cls(file, content)
        known: set[str] = set()
        for training in protocol.trainings:
            if training.name in known:
                raise ValueError(f"{file}: {training.name} is there twice")
            if training.start_name and training.start_name not in known:
                raise ValueError(f"{file}: {training.name} starts from {training.start_name}, which is not before it")
            known.add(training.name)
        return protocol

    @property
    def name(self) -> str:
        return self.content["name"]

    @cached_property
    def trainings(self) -> list[Training]:
        """In the order of work."""
        found = []
        for entry in self.content["queue"]:
            if unknown := set(entry) - _TRAINING_KEYS:
                raise ValueError(f"{self.file}: unknown keys {sorted(unknown)} of {entry.get('label')}")
            for run in entry.get("runs", [1]):
                start, settings = entry.get("start"), entry.get("settings", {})
                found.append(Training(entry["label"], entry["trainer"], run, start, settings))
        return found

    def training(self, name: str) -> Training:
        return next(training for training in self.trainings if training.name == name)

    def shifted(self) -> "Protocol":
        """The same trainings on the data set of ``shift``, with calibrators from here and (``@new``) from there."""
        shift = self.content["shift"]
        methods = [*self.content["methods"], *(f"{method}{NEW}" for method in self.content["methods"])]
        return Protocol(self.file, self.content | {key: shift[key] for key in ("name", "group")} | {"methods": methods})

    def tested(self) -> "Protocol":
        """The same trainings on the test cases, with calibrators of the validation cases."""
        return Protocol(self.file, self.content | {"name": f"{self.name}_test"})

    def of_part(self, part: str) -> "Protocol":
        """Whose rows are those of ``validation``, ``test`` or ``shift``."""
        return {"validation": lambda: self, "test": self.tested, "shift": self.shifted}[part]()

    def group(self, case: str) -> str:
        """What the cases of one patient have in common."""
        found = re.search(self.content["group"], case)
        if not found:
            raise ValueError(f"{case} does not match {self.content['group']!r}")
        return found.group()

    def split(self, cases: list[str]) -> tuple[list[str], list[str]]:
        """Cases to train on and to validate on; those of a patient stay together."""
        groups = sorted({self.group(case) for case in cases})
        random.Random(self.content["validation"]["seed"]).shuffle(groups)
        held = set(groups[: round(len(groups) * self.content["validation"]["share"])])
        return [c for c in cases if self.group(c) not in held], [c for c in cases if self.group(c) in held]

    def folds(self, cases: list[str], number: int = 5) -> list[list[str]]:
        """Cases in folds, those of a patient together: for calibrators, which are fitted on the other folds."""
        groups = sorted({self.group(case) for case in cases})
        random.Random(0).shuffle(groups)
        return [[case for case in cases if self.group(case) in groups[k::number]] for k in range(number)]


def checksum(*files: Path) -> str:
    """The first 16 digits of SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
