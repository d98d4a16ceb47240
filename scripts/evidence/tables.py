"""Tables of a protocol's rows: means with intervals, and differences from stock, as ``nnunet-calib compare`` has them.

    docs/results/<protocol>/<training>.csv     a line for every calibrator and case: all else is computed from these
    docs/results/<protocol>.csv                a line for every training and calibrator: means, and what it came from
    docs/results/<protocol>_differences.csv    every label and calibrator minus stock raw, and minus stock with the same

Intervals are of 95 %, from a bootstrap over patients (BCa). A patient's value is the mean over its volumes, and that of
a label with several trainings the mean over them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from protocol import Protocol, checksum
from scores import CALIBRATION, PAPERS, REGIONS, as_csv, called, read_lines, write_lines

from nnunet_calib.metrics.intervals import Bootstrap
from nnunet_calib.posthoc.folders.crossfit import NONE
from nnunet_calib.report.groups import by_unit

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
STOCK = "stock"
MEASURES = ("DSC", "HD95", *(f"{metric} {region}" for region in REGIONS for metric in CALIBRATION))
"""Numbers of a case: DSC and HD95 are the mean over its structures."""
PAPER_MEASURES = tuple(f"{metric} nacl" for metric in PAPERS)
"""Further ones of protocols that ask for them."""

_WHAT = re.compile(r"(.+?) of (\S+)( (minus|relative to) (\S+))?(?: (low|high|smallest|largest))?")
SOURCES = ("checkpoint", "predictions", "references", "settings", "date", "machine")
"""What a row came from; cannot be recomputed."""


@dataclass(frozen=True)
class Effect:
    """A difference.

    Attributes:
        mean, low, high: over patients, with its interval.
        each: of every training.
        patients: with a value in both.
    """

    mean: float
    low: float
    high: float
    each: tuple[float, ...]
    patients: int


class Rows:
    """All scored rows of a protocol."""

    def __init__(self, protocol: Protocol, folder: Path = RESULTS):
        self.protocol, self.folder = protocol, folder
        self.index = folder / f"{protocol.name}.csv"
        self.differences = folder / f"{protocol.name}_differences.csv"

    @property
    def measures(self) -> tuple[str, ...]:
        return MEASURES + (PAPER_MEASURES if self.protocol.content.get("nacl") else ())

    def file(self, training: str) -> Path:
        return self.folder / self.protocol.name / f"{training}.csv"

    @cached_property
    def trainings(self) -> list[str]:
        """Names of the scored trainings, in the order of the queue."""
        return [t.name for t in self.protocol.trainings if self.file(t.name).exists()]

    @cached_property
    def lines(self) -> dict[str, list[dict[str, str]]]:
        """Lines of every row file, by training."""
        return {name: read_lines(self.file(name)) for name in self.trainings}

    @cached_property
    def cases(self) -> list[str]:
        """Of all row files.

        Raises:
            ValueError: not all have the same.
        """
        every = {name: tuple(dict.fromkeys(line["case"] for line in lines)) for name, lines in self.lines.items()}
        if len(set(every.values())) != 1:
            raise ValueError(f"{self.protocol.name}: the trainings were not scored on the same cases")
        return list(next(iter(every.values())))

    @cached_property
    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """By training and calibrator, float (cases, ``measures``)."""
        found = {}
        for training, lines in self.lines.items():
            for method in dict.fromkeys(line["method"] for line in lines):
                own = {line["case"]: line for line in lines if line["method"] == method}
                found[training, method] = np.array([measures(own[case], self.measures) for case in self.cases])
        return found

    def changed(self, training: str, method: str) -> int:
        """Voxels that a calibrator gave another label."""
        return sum(int(line["changed"]) for line in self.lines[training] if line["method"] == method)

    def numbers_of(self, label: str) -> tuple[int, ...]:
        """Runs of a label that are scored."""
        return tuple(t.run for t in map(self.protocol.training, self.trainings) if t.label == label)

    @cached_property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(self.protocol.training(name).label for name in self.trainings))

    def of(self, name: str, numbers: tuple[int, ...]) -> np.ndarray:
        """Of ``meep+isotonic``: float (runs, cases, ``measures``).

        Raises:
            KeyError: it was not scored.
        """
        label, _, method = name.partition("+")
        return np.stack([self.values[f"{label}_{number}", method or NONE] for number in numbers])

    def _effects(self, name: str, baseline: str | None, table: np.ndarray) -> dict[str, Effect]:
        """Of values or differences (runs, cases, ``measures``); infinite ones, of missed structures, are left out."""
        key = (name, baseline)
        if key not in self._known:
            finite = np.where(np.isfinite(table), table, np.nan)
            by_patient = by_unit(finite.mean(axis=0), [self.protocol.group(case) for case in self.cases])
            found = Bootstrap.of_means(by_patient)
            each_run = np.full((len(self.measures), len(table)), np.nan)
            known = np.isfinite(table).sum(axis=1).T
            np.divide(np.nansum(finite, axis=1).T, known, out=each_run, where=known > 0)
            columns = zip(self.measures, found.estimate, found.intervals(), found.known, each_run, strict=True)
            self._known[key] = {
                measure: Effect(settled(mean), settled(low), settled(high), tuple(map(settled, each)), int(known))
                for measure, mean, (low, high), known, each in columns
            }
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[str, str | None], dict[str, Effect]]:
        return {}

    def effect(self, name: str, baseline: str, measure: str) -> Effect:
        """Of ``meep+isotonic`` minus ``stock+isotonic``, run by run, over the runs that both have so far.

        Raises:
            KeyError: there is none.
        """
        theirs = self.numbers_of(baseline.partition("+")[0])
        numbers = tuple(number for number in self.numbers_of(name.partition("+")[0]) if number in theirs)
        if not numbers:
            raise KeyError(f"{self.protocol.name}: no run of {name} has one of {baseline} beside it")
        with np.errstate(invalid="ignore"):
            ours, base = self.of(name, numbers), self.of(baseline, numbers)
            difference = np.where(ours == base, 0.0, ours - base)  # of two infinite distances too
        return self._effects(name, baseline, difference)[measure]

    def mean(self, name: str, measure: str) -> Effect:
        """Mean over patients and runs, with its interval."""
        return self._effects(name, None, self.of(name, self.numbers_of(name.partition("+")[0])))[measure]

    def index_lines(self, sources: Mapping[str, Mapping[str, str]]) -> list[dict]:
        """Means of every training and calibrator, by case and so by patient, and what they came from."""
        lines = []
        for (name, method), table in self.values.items():
            training = self.protocol.training(name)
            means = dict(zip(self.measures, map(settled, table.mean(axis=0)), strict=True))
            lines.append(
                {"training": name, "label": training.label, "run": training.run, "trainer": training.trainer}
                | {"method": method, "cases": len(table), "changed": self.changed(name, method), **means}
                | {"lines": checksum(self.file(name))}
                | {source: sources[name][source] for source in SOURCES}
            )
        return lines

    def difference_lines(self) -> list[dict]:
        lines = []
        for label in self.labels:
            for method in (NONE, *self.protocol.content["methods"]):
                name = called(label, method)
                for baseline in dict.fromkeys((STOCK, called(STOCK, method))):
                    if name == baseline or not set(self.numbers_of(label)).intersection(self.numbers_of(STOCK)):
                        continue
                    for measure in self.measures:
                        effect = self.effect(name, baseline, measure)
                        lines.append(
                            {"label": label, "method": method, "minus": baseline, "measure": measure}
                            | {"runs": len(effect.each), "patients": effect.patients, "mean": effect.mean}
                            | {"low": effect.low, "high": effect.high}
                            | {"each": " ".join(f"{value:.5g}" for value in effect.each)}
                        )
        return lines

    def sources(self) -> dict[str, dict[str, str]]:
        """By training, as the index has them."""
        return {line["training"]: line for line in read_lines(self.index)}

    def wrong(self) -> Iterator[str]:
        """Lines of the two tables that the row files do not give."""
        computed = {self.index: self.index_lines(self.sources()), self.differences: self.difference_lines()}
        for file, lines in computed.items():
            said, given = file.read_text().splitlines(), as_csv(lines).splitlines()
            yield from (
                f"{file.name} says {a!r}, the rows give {b!r}" for a, b in zip(said, given, strict=False) if a != b
            )
            if len(said) != len(given):
                yield f"{file.name}: {len(said)} lines, the rows give {len(given)}"

    def number(self, what: str) -> float:
        """``ECE foreground of meep``, ``... minus stock`` or ``... relative to stock`` (the change over stock).

        Each also with `` low`` or `` high`` of its interval; differences with `` smallest`` and `` largest`` training.
        """
        found = _WHAT.fullmatch(what)
        if not found:
            raise KeyError(f"{self.protocol.name}: {what!r} cannot be read")
        measure, name, _, how, baseline, part = found.groups()
        if not baseline:
            return getattr(self.mean(name, measure), part or "mean")
        effect = self.effect(name, baseline, measure)
        if part in ("smallest", "largest"):
            return (min if part == "smallest" else max)(effect.each)
        value = getattr(effect, part or "mean")
        return value / self.mean(baseline, measure).mean if how == "relative to" else value

    def write(self, sources: Mapping[str, Mapping[str, str]]) -> None:
        write_lines(self.index, self.index_lines(sources))
        write_lines(self.differences, self.difference_lines())


def settled(value: float) -> float:
    """Without the last bits, which depend on a machine's order of summation: what is rounded from it is the same."""
    return float(f"{value:.12g}")


def measures(line: Mapping[str, str], wanted: tuple[str, ...] = MEASURES) -> list[float]:
    """Those of a line of a row file."""
    structures = [column.partition(" ")[2] for column in line if column.startswith("Dice ")]
    overlap = [float(np.mean([float(line[f"{metric} {s}"]) for s in structures])) for metric in ("Dice", "HD95")]
    return [*overlap, *(float(line[measure]) for measure in wanted[2:])]
