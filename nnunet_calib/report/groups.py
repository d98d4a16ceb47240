"""Which scans belong together: patients as the units of all statistics, and subgroups."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_calib.data.errors import InputError

UNIT_COLUMNS = ("patient", "group")


@dataclass(frozen=True)
class Groups:
    """What a ``--group`` file says of the cases.

    Attributes:
        unit: of every case, what is resampled and tested: its patient, or the case itself.
        unit_name: ``patient`` or ``case``.
        subgroups: by column (site, scanner ...), the value of every case.
    """

    unit: Mapping[str, str]
    unit_name: str
    subgroups: Mapping[str, Mapping[str, str]]


def no_groups(cases: Sequence[str]) -> Groups:
    """Every case for itself."""
    return Groups({case: case for case in cases}, "case", {})


def read_groups(path: Path, cases: Sequence[str]) -> Groups:
    """Read a CSV file with the columns ``case``, ``patient`` (or ``group``; optional), and any others as subgroups.

    Raises:
        InputError: the file cannot be read, lacks a column, or lacks one of the cases.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    columns = [column for column in (rows[0] if rows else {}) if column]
    if "case" not in columns:
        raise InputError(f"{path}: the first line must name a column 'case', and 'patient' or subgroups such as 'site'")
    by_case = {row["case"]: row for row in rows}
    if len(by_case) != len(rows):
        raise InputError(f"{path}: a case is listed twice")
    if lacking := [case for case in cases if case not in by_case]:
        raise InputError(f"{path}: has no line for {len(lacking)} of the cases, first {lacking[0]}")
    unit = next((column for column in UNIT_COLUMNS if column in columns), None)
    for column in columns:
        if empty := [case for case in cases if not by_case[case][column]]:
            raise InputError(f"{path}: column {column} is empty for case {empty[0]}")
    return Groups(
        {case: by_case[case][unit] if unit else case for case in cases},
        "patient" if unit else "case",
        {c: {case: by_case[case][c] for case in cases} for c in columns if c not in ("case", unit)},
    )


def by_unit(values: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Mean over the cases of every unit, in the order of their first case.

    Args:
        values: float (cases, ...). NaN: the case has no value, and is left out; inf is kept.
        units: of the cases.

    Returns:
        float64 (units, ...); NaN where no case of the unit has a value.
    """
    order = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    if len(order) == len(units):
        return np.asarray(values, dtype=np.float64)
    index = np.array([order[unit] for unit in units])
    known = ~np.isnan(values)
    total, count = np.zeros((len(order), *values.shape[1:])), np.zeros((len(order), *values.shape[1:]))
    np.add.at(total, index, np.where(known, values, 0.0))
    np.add.at(count, index, known)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
