"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import nnunet_calib
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import write_whole
from nnunet_calib.metrics import Bins
from nnunet_calib.report import diagram, figures
from nnunet_calib.report.comparison import Comparison, Endpoint
from nnunet_calib.report.reliability import TOP, Reliability, read_reliabilities
from nnunet_calib.report.slices import CasePictures, case_pictures, scored_probabilities
from nnunet_calib.report.tables import answer, number, p_value, signed

PICTURED = 8
"""Cases shown with slices unless said otherwise: the worst."""


def write_report(
    comparison: Comparison,
    path: Path,
    *,
    title: str = "Segmentation and calibration",
    images: Path | None = None,
    dataset: Dataset | None = None,
    pictured: int = PICTURED,
) -> list[str]:
    """Write the page, whole or not at all.

    Args:
        comparison: what it shows.
        path: of the HTML file.
        title: of the page.
        images: folder of the cases' images, for slices of the worst cases; needs ``dataset``.
        dataset: of the predictions.
        pictured: how many cases get slices.

    Returns:
        What could not be shown, a line each.

    Raises:
        InputError: bin counts that cannot be used.
    """
    reliabilities = {name: read_reliabilities(runs, comparison.cases) for name, runs in comparison.methods.items()}
    regions = [r for r in next(iter(reliabilities.values())) if all(r in of for of in reliabilities.values())]
    cases = _case_table(comparison, reliabilities)
    pictures, problems = _pictures(comparison, cases, images, dataset, pictured)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnunet_calib.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "p": p_value}
    ordered = sorted(regions, key=lambda region: region != comparison.region)
    page = environment.get_template("report.html").render(
        title=title,
        version=nnunet_calib.__version__,
        comparison=comparison,
        answer=answer(comparison),
        overconfidence=_where_overconfident(comparison, reliabilities),
        runs=_runs(comparison),
        protocol=next(iter(comparison.methods.values()))[0].protocol,
        software=next(iter(comparison.methods.values()))[0].software,
        forest=figures.forest(comparison),
        diagrams=[figures.diagram_of(comparison, reliabilities, region, [TOP]) for region in ordered]
        + [
            figures.diagram_of(comparison, reliabilities, region, [key])
            for region in ordered[:1]
            for key in figures.shared_problems(reliabilities, region)
        ],
        risks=figures.risks(comparison, reliabilities),
        ranks=figures.ranks(comparison),
        subgroups=_subgroups(comparison),
        case_data=Markup(_script_json(cases)),
        case_columns=[_column(endpoint) for endpoint in comparison.primary],
        pictures=pictures,
        methods_text=_methods_paragraph(comparison),
    )
    write_whole(path, page)
    return problems


def _runs(comparison: Comparison) -> list[dict[str, Any]]:
    """A line per training: folder, cases, failures, missed structures, checksum."""
    lines = []
    for name, trainings in comparison.methods.items():
        for run in trainings:
            counts = [of for record in run.records.values() for of in record["metrics"].values()]
            missed = sum(of["n_ref"] > 0 and of["n_pred"] == 0 for of in counts)
            spurious = sum(of["n_ref"] == 0 and of["n_pred"] > 0 for of in counts)
            calibrator = run.protocol.get("calibrator") or run.protocol.get("calibrated_from")
            lines.append(
                {
                    "name": name,
                    "folder": _from_their_root(run.folder, comparison),
                    "cases": len(run.records),
                    "failed": len(run.failed),
                    "missed": missed,
                    "spurious": spurious,
                    "calibrator": calibrator.get("method", "yes") if isinstance(calibrator, dict) else "none",
                    "checksum": run.checksum,
                }
            )
    return lines


def _from_their_root(folder: Path, comparison: Comparison) -> str:
    """A run's folder below what all runs share: the page is sent to others, who have other folders."""
    every = [run.folder.resolve() for trainings in comparison.methods.values() for run in trainings]
    shared = Path(os.path.commonpath(every))
    return str(folder.resolve().relative_to(shared if len(set(every)) > 1 else shared.parent))


def _where_overconfident(comparison: Comparison, reliabilities: Mapping[str, Mapping[str, Reliability]]) -> list[str]:
    """A sentence per method: how much of its error is overconfidence, at which confidence, and of which class.

    Of the voxels of all cases together. The two parts are those of the ECE: bins in which confidence is above accuracy,
    and the others. Added with their signs they would hide each other.
    """
    structures = next(iter(comparison.methods.values()))[0].structures
    said = []
    for name, regions in reliabilities.items():
        if comparison.region not in regions:
            continue
        of = regions[comparison.region].problems
        bins = of.get(TOP) or next(iter(of.values()))
        total = Bins(bins.n.sum(0), bins.confidence.sum(0), bins.correct.sum(0))
        gap = total.confidence - total.correct
        worst, share = int(np.abs(gap).argmax()), np.abs(gap).max() / max(np.abs(gap).sum(), 1e-12)
        mean, right = (part[worst] / max(total.n[worst], 1) for part in (total.confidence, total.correct))
        over, under = (part.sum() / max(total.n.sum(), 1) for part in (gap.clip(min=0), (-gap).clip(min=0)))
        said.append(
            f"{name}: ECE {over + under:.3f} with all voxels pooled (the table: mean over cases), of which "
            f"{over:.3f} is overconfidence and {under:.3f} underconfidence; {share:.0%} of it at a confidence of "
            f"{mean:.0%}, where {right:.0%} are right" + _worst_class(of, structures)
        )
    return said


def _worst_class(problems: Mapping[str, Bins], structures: Mapping[str, str]) -> str:
    errors = {
        structures[key]: diagram.calibration_error(of, "pooled") for key, of in problems.items() if key in structures
    }
    if len(errors) < 2:
        return "."
    worst = max(errors, key=lambda name: errors[name])
    return f". Of the structures, {worst} has the largest class-wise error ({errors[worst]:.3f})."


def _subgroups(comparison: Comparison) -> list[dict[str, Any]]:
    """Per column of the group file, means by value; cases, not patients, for a value may differ within a patient."""
    tables = []
    for column, value_of in comparison.groups.subgroups.items():
        rows = []
        for value in sorted(set(value_of.values())):
            inside = [case for case in comparison.cases if value_of[case] == value]
            for name, trainings in comparison.methods.items():
                cells = []
                for endpoint in comparison.primary:
                    values = np.array([_case_value(trainings, case, endpoint) for case in inside])
                    known = values[~np.isnan(values)]
                    cells.append(number(float(known.mean())) if known.size else "-")
                rows.append([value, name, str(len(inside)), *cells])
        tables.append(
            {"column": column, "head": [column, "method", "cases", *map(_column, comparison.primary)], "rows": rows}
        )
    return tables


def _case_value(trainings: Sequence[Any], case: str, endpoint: Endpoint) -> float:
    values = []
    for run in trainings:
        if endpoint.calibration or endpoint.place != "foreground":
            values.append(run.value(case, endpoint.metric, endpoint.place, endpoint.calibration))
        else:
            own = np.array([run.value(case, endpoint.metric, key, False) for key in run.structures])
            values.append(float(own[~np.isnan(own)].mean()) if (~np.isnan(own)).any() else float("nan"))
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _case_table(comparison: Comparison, reliabilities: Mapping[str, Mapping[str, Reliability]]) -> list[dict[str, Any]]:
    """A line per case and method, worst first: the sum of its ranks over Dice and the calibration error."""
    lines = []
    for case in comparison.cases:
        for name, trainings in comparison.methods.items():
            values = [_case_value(trainings, case, endpoint) for endpoint in comparison.primary]
            missed = sum(
                of["n_ref"] > 0 and of["n_pred"] == 0
                for run in trainings
                for of in run.records.get(case, {}).get("metrics", {}).values()
            )
            lines.append({"case": case, "method": name, "missed": missed, "values": values})
    badness = np.zeros(len(lines))
    for i, endpoint in enumerate(comparison.primary):
        if endpoint.metric in ("Dice", "ECE"):
            column = np.array([line["values"][i] for line in lines])
            cost = np.where(np.isnan(column), -np.inf, -column if endpoint.higher_is_better else column)
            badness += np.argsort(np.argsort(cost, kind="stable"), kind="stable")
    return [lines[i] for i in np.argsort(-badness, kind="stable")]


def _pictures(
    comparison: Comparison,
    lines: Sequence[Mapping[str, Any]],
    images: Path | None,
    dataset: Dataset | None,
    pictured: int,
) -> tuple[list[CasePictures], list[str]]:
    """Of the worst cases, those of the baseline and of the best calibrated method; and what went wrong."""
    if images is None or dataset is None:
        return [], []
    shown, problems = [], []
    endpoint = next((e for e in comparison.primary if e.metric == "ECE"), comparison.primary[0])
    methods = list(dict.fromkeys([comparison.baseline, *endpoint.best()[:1]]))
    for case in list(dict.fromkeys(line["case"] for line in lines))[:pictured]:
        slices = None  # every method of a case is shown in the same ones, and with the same panels
        runs = [next((run for run in comparison.methods[name] if case in run.records), None) for name in methods]
        middle = any(run is not None and scored_probabilities(run, case) is not None for run in runs)
        for name, run in zip(methods, runs, strict=True):
            if run is None:
                continue
            try:
                shown.append(case_pictures(run, case, images, dataset, slices, middle=middle))
                slices = shown[-1].slices
            except InputError as error:
                problems.append(f"no slices of {case} ({name}): {error}")
    return shown, problems


def _column(endpoint: Endpoint) -> str:
    return endpoint.term + (" mm" if endpoint.metric in ("HD", "HD95", "ASSD", "MASD") else "")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; non-finite numbers as strings, as in all our files."""
    from nnunet_calib.evaluation.write import numbers_as_json

    def rounded(entry: Any) -> Any:
        if isinstance(entry, float) and math.isfinite(entry):
            return float(f"{entry:.6g}")
        return entry

    lines = [{**line, "values": [rounded(entry) for entry in line["values"]]} for line in value]
    return json.dumps(numbers_as_json(lines), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _methods_paragraph(comparison: Comparison) -> str:
    """To paste into a paper."""
    unit, n = comparison.groups.unit_name, len(comparison.units)
    protocol = next(iter(comparison.methods.values()))[0].protocol
    metrics = ", ".join(dict.fromkeys(f"{e.metric} ({e.name})" for e in comparison.primary))
    bins = f" with {protocol['bins']} equal-width bins" if "bins" in protocol else ""
    trainings = {name: len(of) for name, of in comparison.methods.items()}
    trained = "; ".join(f"{name}: {count} training{'s' if count > 1 else ''}" for name, count in trainings.items())
    return (
        f"We compared {len(comparison.methods)} methods ({trained}) on {len(comparison.cases)} cases"
        + (f" of {n} {unit}s (values of a {unit}'s cases were averaged)" if unit != "case" else "")
        + f". Metrics, declared beforehand, were {metrics}; calibration errors were computed{bins} in the region "
        f"'{comparison.region}'. A missed structure has an infinite distance and counts as such in ranks and "
        "signed-rank tests. We report means with 95 % confidence intervals (t and BCa bootstrap with 2000 resamples "
        f"over {unit}s), paired differences from {comparison.baseline}, two-sided Wilcoxon signed-rank and sign-flip "
        "permutation tests, each with Holm's correction over all declared metrics and comparisons, and the stability "
        f"of ranks over bootstrap samples. Evaluation: nnunet-calib {nnunet_calib.__version__}."
    )
