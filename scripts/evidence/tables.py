"""Tables of a protocol's rows: means with intervals, and differences from stock. Statistics are those of ``compare``.

    docs/results/<protocol>/<training>.csv     a line for every calibrator and case: all else is computed from these
    docs/results/<protocol>.csv                a line for every training and calibrator: means, and what it came from
    docs/results/<protocol>_differences.csv    every label and calibrator minus stock raw, and minus stock with the same

Intervals are of 95 %, from a bootstrap over patients (BCa). A patient's value is the mean over its volumes, and that of
a label with several trainings the mean over them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from protocol import Protocol, checksum
from scores import OVERLAP, called, read_lines, runs_of, write_lines

from nnunet_calib.posthoc.folders.crossfit import NONE
from nnunet_calib.report.comparison import FOREGROUND, Comparison, compare
from nnunet_calib.report.groups import Groups
from nnunet_calib.report.runs import Run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
STOCK = "stock"
MEASURES = {
    "DSC": ("Dice", FOREGROUND),
    "HD95": ("HD95", FOREGROUND),
    **{
        f"{metric} {region}": (metric, region)
        for region in ("volume", "foreground", "reference_foreground")
        for metric in ("NLL", "ECE", "CECE", "Brier")
    },
}
"""Column to metric and place of ``compare``; DSC and HD95 are a case's means over its structures."""

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

    def file(self, training: str) -> Path:
        return self.folder / self.protocol.name / f"{training}.csv"

    @cached_property
    def trainings(self) -> list[str]:
        """Names of the scored trainings, in the order of the queue."""
        return [t.name for t in self.protocol.trainings if self.file(t.name).exists()]

    @cached_property
    def runs(self) -> dict[str, list[Run]]:
        """By training, one for every calibrator."""
        return {name: list(runs_of(self.file(name), self.protocol.training(name).label)) for name in self.trainings}

    def numbers_of(self, label: str) -> tuple[int, ...]:
        """Runs of a label that are scored."""
        return tuple(t.run for t in map(self.protocol.training, self.trainings) if t.label == label)

    @cached_property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(self.protocol.training(name).label for name in self.trainings))

    def patients(self) -> Groups:
        cases = {case: self.protocol.group(case) for run in self._all() for case in run.records}
        return Groups(cases, "patient", {})

    def _all(self) -> Iterator[Run]:
        for runs in self.runs.values():
            yield from runs

    @cached_property
    def comparisons(self) -> dict[tuple[tuple[int, ...], str], Comparison]:
        """By run numbers and baseline: all labels that have at least these runs, against stock of the same runs."""
        found = {}
        for numbers in {self.numbers_of(label) for label in self.labels}:
            runs = [
                run
                for label in self.labels
                if set(numbers) <= set(self.numbers_of(label))
                for number in numbers
                for run in self.runs[f"{label}_{number}"]
            ]
            names = dict.fromkeys(run.name for run in runs)
            for method in (NONE, *self.protocol.content["methods"]):
                baseline = called(STOCK, method)
                if baseline in names:
                    metrics = ("Dice", "HD95", "ECE", "CECE", "NLL", "Brier")
                    groups = self.patients()
                    found[numbers, baseline] = compare(runs, metrics=metrics, baseline=baseline, groups=groups)
        return found

    def effect(self, name: str, baseline: str, measure: str) -> Effect:
        """Of ``meep+isotonic`` against ``stock+isotonic``, over the trainings that both have."""
        label, base = (part.partition("+")[0] for part in (name, baseline))
        numbers = self.numbers_of(label)
        if base != STOCK or (numbers, baseline) not in self.comparisons:
            raise KeyError(f"{self.protocol.name}: no comparison of {name} with {baseline}")
        endpoint = self.comparisons[numbers, baseline].endpoint(*MEASURES[measure])
        if endpoint is None or name not in endpoint.methods:
            raise KeyError(f"{self.protocol.name}: no {measure} of {name}")
        paired = next(d.paired for d in endpoint.differences if d.method == name)
        each = zip(endpoint.methods[name].trainings, endpoint.methods[baseline].trainings, strict=True)
        # an infinite distance in both is no difference
        by_run = tuple(0.0 if a == b else a - b for a, b in each)
        return Effect(paired.mean, *paired.bca_interval, by_run, paired.n)

    def mean(self, name: str, measure: str) -> Effect:
        """Mean over patients and trainings, with its interval."""
        numbers = self.numbers_of(name.partition("+")[0])
        endpoint = self.comparisons[numbers, STOCK].endpoint(*MEASURES[measure])
        if endpoint is None or name not in endpoint.methods:
            raise KeyError(f"{self.protocol.name}: no {measure} of {name}")
        result = endpoint.methods[name]
        return Effect(result.spread.mean, *result.spread.bca_interval, tuple(result.trainings), result.spread.n)

    def index_lines(self, sources: Mapping[str, Mapping[str, str]]) -> list[dict]:
        """Means of every training and calibrator, by case and so by patient, and what they came from."""
        lines = []
        for name in self.trainings:
            training = self.protocol.training(name)
            for run in self.runs[name]:
                method = run.name.partition("+")[2] or NONE
                means = {measure: _mean(run, *place) for measure, place in MEASURES.items()}
                changed = sum(record["changed"] for record in run.records.values())
                lines.append(
                    {"training": name, "label": training.label, "run": training.run, "trainer": training.trainer}
                    | {"method": method, "cases": len(run.records), "changed": changed, **means}
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
                    if name == baseline:
                        continue
                    for measure in MEASURES:
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

    def write(self, sources: Mapping[str, Mapping[str, str]]) -> None:
        write_lines(self.index, self.index_lines(sources))
        write_lines(self.differences, self.difference_lines())


def _mean(run: Run, metric: str, place: str) -> float:
    if metric in ("Dice", "HD95"):
        by_case = [
            np.mean([scores[metric] for scores in record["metrics"].values()]) for record in run.records.values()
        ]
    else:
        by_case = [record["calibration"][place][metric] for record in run.records.values()]
    known = [value for value in by_case if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
