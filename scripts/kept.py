"""Finished rows of the experiments, kept in committed JSON files; the folders they were made in get lost.

A file holds ``rows``, a line each, in the order in which they came. CSV tables are written from it.
"""

import csv
import io
import json
import math
import re
from pathlib import Path

from nnunet_calib.data.files import write_whole

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"


def read_rows(file: Path) -> list[dict]:
    return json.loads(file.read_text())["rows"] if file.exists() else []


def write_rows(file: Path, rows: list[dict]) -> None:
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_whole(file, f'{{"rows": [\n{lines}\n]}}\n')


def put(rows: list[dict], row: dict, identity: tuple[str, ...]) -> None:
    """Put a row in the place of the one with the same values of these keys, or at the end.

    A row that is the same but for its date was not measured again, and stays.
    """
    same = [i for i, other in enumerate(rows) if all(other[key] == row[key] for key in identity)]
    if same:
        if rows[same[0]] | {"date": row.get("date")} != row:
            rows[same[0]] = row
    else:
        rows.append(row)


def number(value: float | str, digits: int = 6) -> float | str:
    """As JSON has it, rounded; what is no finite number as a word."""
    value = float(value)
    return round(value, digits) if math.isfinite(value) else str(value)


def csv_text(rows: list[dict]) -> str:
    """Rows of the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def machines(rows: list[dict]) -> dict[str, str]:
    """A letter for each machine."""
    return {machine: chr(ord("a") + i) for i, machine in enumerate(dict.fromkeys(row["machine"] for row in rows))}


def measured(rows: list[dict], how: str = "") -> str:
    """When and where, a line for each machine: its letter, the dates and what it is."""
    lines = []
    for machine, letter in machines(rows).items():
        days = sorted({row["date"] for row in rows if row["machine"] == machine})
        lines.append(f"- {letter}: {' to '.join(dict.fromkeys((days[0], days[-1])))}; {machine}{how}")
    return "\n".join(lines)


def write_between(document: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between the marks of a document."""
    before, _, rest = document.read_text().partition(marks[0])
    after = rest.partition(marks[1])[2]
    write_whole(document, f"{before}{marks[0]}\n{text}\n{marks[1]}{after}")


def write_csvs(stem: str, names: tuple[str, ...], text: str, folder: Path = FOLDER, measured: str = "") -> None:
    """Write the Markdown tables of a text as ``<stem>_<name>.csv``, one file for all tables with the same head.

    The heading or bold line above a table, if any, is the value of its first column, ``table``.

    Args:
        stem: of the file names.
        names: of the different heads, in the order in which they come.
        text: with the tables.
        folder: for the files.
        measured: when and where; the last column, if it is given.
    """
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    above, head = "", None
    for line in text.splitlines():
        if not line.startswith("|"):
            above, head = (line.strip("*#. ") if line.startswith(("**", "#")) else above), None
            continue
        cells = [re.sub(r"[*`]", "", cell).strip() for cell in line.strip("|").split("|")]
        if head is None:
            head = tuple(cells)
            tables.setdefault(head, [])
        elif not set(line) <= set("|-"):
            tables[head].append([above.replace("**", ""), *cells])
    if len(tables) != len(names):
        raise ValueError(f"{len(tables)} kinds of tables, not {len(names)}: {list(tables)}")
    for name, (columns, rows) in zip(names, tables.items(), strict=True):
        stream = io.StringIO()
        several = any(row[0] for row in rows)
        writer = csv.writer(stream, lineterminator="\n")
        last = [measured] if measured else []
        writer.writerow((["table"] if several else []) + list(columns) + ["measured" for _ in last])
        writer.writerows((row if several else row[1:]) + last for row in rows)
        write_whole(folder / f"{stem}_{name}.csv", stream.getvalue())
