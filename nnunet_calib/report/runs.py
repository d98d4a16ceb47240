"""What is compared: the evaluations of one or several trainings of each method, read from their ``summary.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json

_PLACES = ("", "scores", "evaluation", "validation")  # of summary.json, in the folder that the user names
# In the protocol, and not the yardstick. ``probabilities`` says that they were scored in memory, without a file.
_OF_THE_METHOD = ("dataset_json", "plans", "calibrator", "calibrated_from", "device", "reader", "probabilities")


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        name: of the method; several trainings of a method share it.
        folder: with ``summary.json`` in it.
        records: of its cases, by name.
        structures: name of every structure, by key.
        protocol: what changes a number; empty for a summary of nnU-Net's own.
        software: versions; empty likewise.
        failed: cases that could not be scored, with the reason.
        checksum: SHA-256 of ``summary.json``.
    """

    name: str
    folder: Path
    records: Mapping[str, Mapping[str, Any]]
    structures: Mapping[str, str]
    protocol: Mapping[str, Any]
    software: Mapping[str, Any]
    failed: Mapping[str, str]
    checksum: str

    def value(self, case: str, metric: str, place: str, calibration: bool) -> float:
        """A number of a case: of a structure, or of a region's calibration; NaN if it has none."""
        record = self.records.get(case)
        if record is None:
            return float("nan")
        scores = record.get("calibration" if calibration else "metrics", {}).get(place, {})
        return float(scores.get(metric, "nan"))

    @property
    def regions(self) -> list[str]:
        """Regions in which calibration was measured."""
        return list(dict.fromkeys(region for record in self.records.values() for region in record["calibration"]))


def parse_runs(words: Sequence[str]) -> list[Run]:
    """Read ``FOLDER`` or ``NAME=FOLDER`` words; the same name several times are trainings of one method.

    Raises:
        UsageError: a folder without an evaluation, or the same folder twice.
        InputError: a summary that cannot be used.
    """
    pairs = [_name_and_folder(word) for word in words]
    plain = _distinct([folder for name, folder in pairs if name is None])
    found = [_find(folder) for _, folder in pairs]
    for i, path in enumerate(found):
        if path in found[:i]:
            raise UsageError(f"{path.parent} is given twice")
    return [
        _read(name if name is not None else plain[folder], path)
        for (name, folder), path in zip(pairs, found, strict=True)
    ]


def methods_of(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The trainings of every method, in the order given."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.name, []).append(run)
    return methods


def common_cases(methods: Mapping[str, Sequence[Run]], common: bool) -> tuple[list[str], list[str]]:
    """The cases to compare, and those left out because a method has not scored them.

    A method has a case if one of its trainings has: folds of a cross-validation share the cases between them.

    Raises:
        UsageError: the methods have different cases and ``common`` is false, or no case in common.
    """
    by_method = {
        name: dict.fromkeys(case for run in trainings for case in run.records) for name, trainings in methods.items()
    }
    every = dict.fromkeys(case for cases in by_method.values() for case in cases)
    shared = sorted(case for case in every if all(case in cases for cases in by_method.values()))
    left_out = sorted(every.keys() - set(shared))
    if not shared:
        raise UsageError("the runs have no case in common; are they of the same test set?")
    if left_out and not common:
        lacking = next(name for name, cases in by_method.items() if left_out[0] not in cases)
        why = next((run.failed[left_out[0]] for run in methods[lacking] if left_out[0] in run.failed), "not scored")
        raise UsageError(
            f"{len(left_out)} of {len(every)} cases are not in every run, first {left_out[0]} in {lacking} ({why}); "
            "score them, or compare what all have with --common"
        )
    return shared, left_out


def check_comparable(runs: Sequence[Run], cases: Sequence[str]) -> list[str]:
    """Refuse runs that were measured with different yardsticks.

    Returns:
        Differences that may be meant, a sentence each: versions of software, summaries of nnU-Net's own.

    Raises:
        UsageError: labels, protocol or reference files differ; one line says where.
    """
    first = runs[0]
    notes: list[str] = []
    for run in runs[1:]:
        if run.structures.keys() != first.structures.keys():
            raise UsageError(
                f"labels differ: {_list(first.structures)} in {first.folder}, {_list(run.structures)} in {run.folder}"
            )
        if run.protocol and first.protocol:
            for key in dict.fromkeys([*first.protocol, *run.protocol]):
                ours, theirs = (of.protocol.get(key, "nothing") for of in (run, first))
                if key not in _OF_THE_METHOD and ours != theirs:
                    raise UsageError(
                        f"the protocol differs: {key} is {theirs} in {first.folder} and {ours} in {run.folder}; "
                        "evaluate both alike"
                    )
        for key in dict.fromkeys([*first.software, *run.software]):
            ours, theirs = (of.software.get(key, "unknown") for of in (run, first))
            if run.software and first.software and ours != theirs:
                note = f"{run.folder} was scored with {key} {ours}, {first.folder} with {theirs}."
                notes.append(note)
    for run in runs:
        if not run.protocol:
            notes.append(f"{run.folder} is a summary of nnU-Net's own: it has Dice and IoU, and no protocol to check.")
    holders: dict[str, Run] = {}
    for run in runs:
        for case in cases:
            if case in run.records:
                _check_same_reference(case, run, holders.setdefault(case, run))
    return notes


def _check_same_reference(case: str, run: Run, other: Run) -> None:
    if run is other:
        return
    ours, theirs = run.records[case], other.records[case]
    for structure, name in run.structures.items():
        here, there = (record["metrics"][structure]["n_ref"] for record in (ours, theirs))
        if here != there:
            raise UsageError(
                f"case {case} has other references: {here} voxels of {name} in {run.folder}, {there} in {other.folder}"
            )
    here, there = (Path(record["reference_file"]) for record in (ours, theirs))
    if here == there or not (here.is_file() and there.is_file()) or here.samefile(there):
        return
    if hashlib.sha256(here.read_bytes()).digest() != hashlib.sha256(there.read_bytes()).digest():
        raise UsageError(f"case {case} has other references: {here} and {there} are not the same")


def _name_and_folder(word: str) -> tuple[str | None, Path]:
    name, equals, folder = word.partition("=")
    if not equals or Path(word).exists():
        return None, Path(word)
    if not name.strip() or not folder:
        raise UsageError(f"{word!r} is neither FOLDER nor NAME=FOLDER")
    return name.strip(), Path(folder)


def _distinct(folders: Sequence[Path]) -> dict[Path, str]:
    """The shortest endings of the paths that tell them apart; a fold's ``validation`` has no name by itself."""
    whole = {folder: folder.resolve().parts for folder in folders}
    names: dict[Path, str] = {}
    for folder, parts in whole.items():
        others = [other for path, other in whole.items() if path != folder]
        length = 1
        while length < len(parts) - 1 and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        kept = parts[-length:]
        generic = [part for part in kept if part in _PLACES or part.startswith("fold_")]
        if len(generic) == len(kept) and length < len(parts) - 1:
            kept = parts[-length - len(_trailing_generic(parts)) :]
        names[folder] = "/".join(part for part in kept if part not in _PLACES) or kept[-1]
    return names


def _trailing_generic(parts: Sequence[str]) -> list[str]:
    found: list[str] = []
    for part in reversed(parts):
        if part not in _PLACES and not part.startswith("fold_"):
            break
        found.append(part)
    return found


def _find(folder: Path) -> Path:
    if folder.is_file() and folder.name == "summary.json":
        return folder.resolve()
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    for place in _PLACES:
        if (path := folder / place / "summary.json").is_file():
            return path.resolve()
    raise UsageError(f"no summary.json in {folder}; make one with nnunet-calib evaluate REF {folder} -o SCORES")


def _read(name: str, path: Path) -> Run:
    summary = read_json(path)
    try:
        listed = summary["metric_per_case"]
        records = {record.get("case") or _case_of(record): {"calibration": {}, **record} for record in listed}
        keys = list(dict.fromkeys(key for record in records.values() for key in record["metrics"]))
        described = summary.get("structures", {})
        structures = {key: str(described.get(key, {}).get("name", key)) for key in keys}
        for record in records.values():
            if record["metrics"].keys() != structures.keys() or not isinstance(record["reference_file"], str):
                raise ValueError
            for scores in (*record["metrics"].values(), *record["calibration"].values()):
                for metric, value in scores.items():
                    if metric != "classes":
                        float(value)
        failed = {entry["case"]: entry["error"] for entry in summary.get("failed", [])}
        protocol, software = dict(summary.get("protocol", {})), dict(summary.get("software", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a summary.json of nnunet-calib evaluate or nnU-Net; evaluate again") from error
    if not records:
        raise InputError(f"{path}: holds no case")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return Run(name, path.parent, records, structures, protocol, software, failed, checksum)


def _case_of(record: Mapping[str, Any]) -> str:
    """nnU-Net's records have no name, but files."""
    name = Path(record["prediction_file"]).name
    return name.removesuffix(".nii.gz") if name.endswith(".nii.gz") else Path(name).stem


def _list(structures: Mapping[str, str]) -> str:
    return ", ".join(structures)
