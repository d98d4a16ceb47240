"""Pairs of supports and a query that were scored: a line each in ``pairs.jsonl``, and the tables made of them."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.measure.scores import IF_CALIBRATED, summarise
from nnunet_calib.fewshot.measure.trials import OWN

GROUPS = (
    *("structure", "protocol", "head", "chunks", "extent", "mode", "k", "refinement", "entropy", "registration"),
    *("margin", "axis"),
)
"""What tells the rows of a summary apart."""
_FORMER = "ECE_foreground_honest"  # what IF_CALIBRATED was called until 2026-11


def identity(record: Mapping[str, Any]) -> str:
    """What tells a pair from all others."""
    return json.dumps([*(record[name] for name in GROUPS), *record["supports"], record["query"]])


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Records of ``pairs.jsonl``, of a pair that is there twice the later; a line that was cut off is left out."""
    if not file.exists():
        return []
    records = {}
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
            # Until 2026-11 there was one refinement, and only its entropy was told.
            record.setdefault("refinement", None if record["entropy"] is None else OWN)
            if _FORMER in record:
                record[IF_CALIBRATED] = record.pop(_FORMER)
            records[identity(record)] = record
        except (json.JSONDecodeError, LookupError, TypeError):
            continue
    return list(records.values())


def write_results(output: Path, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write ``pairs.csv`` and ``summary.json``; the rows of the summary are returned."""
    if not records:
        raise InputError(f"{output}: no pair was scored")
    columns = list(
        dict.fromkeys(name for record in records for name in record if name not in ("base_classes", "run", "made_from"))
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(dict(record) | {"supports": " ".join(record["supports"])})
    write_whole(output / "pairs.csv", text.getvalue())
    rows = summarise(records, GROUPS)
    content = {"about": dict(about), "rows": [{name: _json(value) for name, value in row.items()} for row in rows]}
    write_whole(output / "summary.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return rows


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
