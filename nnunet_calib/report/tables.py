"""A comparison as text: the table in the terminal, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.evaluation.write import numbers_as_json
from nnunet_calib.report.comparison import Comparison, Difference, Endpoint, usual_name

FILES = ("comparison.md", "comparison.tex", "comparison.csv", "comparison.json")
KIND = "nnunet-calib comparison"
SAME = "the same in every case"
"""Stands where a difference's test would: a calibrator that keeps the labels leaves every overlap as it is."""
_TOLD = 4  # methods with a clause of their own in the answer
_UNIT = {"HD": " mm", "ASSD": " mm", "MASD": " mm"}


def write_tables(comparison: Comparison, folder: Path, dataset: str, beside: Sequence[Path] = ()) -> None:
    """Write the four files of ``FILES``.

    Args:
        comparison: what to write.
        folder: made if needed.
        dataset: its name in the LaTeX table.
        beside: ``comparison.json`` files of other data sets, to stand beside this one in the LaTeX table.

    Raises:
        InputError: one of ``beside`` is no comparison.
        UsageError: the folder cannot be made.
    """
    content = as_json(comparison, dataset)
    texts = (
        markdown(comparison),
        latex([*map(read_comparison, beside), content]),
        csv_rows(comparison),
        json.dumps(numbers_as_json(content), indent=1, allow_nan=False) + "\n",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder ({error.strerror})") from error
    for name, text in zip(FILES, texts, strict=True):
        write_whole(folder / name, text)


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a ``comparison.json``.

    Raises:
        InputError: it is none.
    """
    content = read_json(path)
    try:
        if content["kind"] != KIND:
            raise ValueError
        for endpoint in content["endpoints"]:
            for method in endpoint["methods"].values():
                float(method["spread"]["mean"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a comparison.json of nnunet-calib compare") from error
    return content


def as_json(comparison: Comparison, dataset: str) -> dict[str, Any]:
    """Everything but the values of the cases, which the summaries hold."""
    endpoints = []
    for endpoint in comparison.endpoints:
        entry = {name: getattr(endpoint, name) for name in ("metric", "place", "name", "calibration", "primary")}
        entry["better"] = "higher" if endpoint.higher_is_better else "lower"
        entry["methods"] = {name: asdict(result) for name, result in endpoint.methods.items()}
        entry["differences"] = [asdict(difference) for difference in endpoint.differences]
        entry["ranks"] = endpoint.ranks and asdict(endpoint.ranks)
        endpoints.append(entry)
    runs = {
        name: [
            {"folder": str(run.folder), "cases": len(run.records), "failed": len(run.failed), "sha256": run.checksum}
            for run in trainings
        ]
        for name, trainings in comparison.methods.items()
    }
    first = next(iter(comparison.methods.values()))[0]
    return {
        "kind": KIND,
        "dataset": dataset,
        "baseline": comparison.baseline,
        "methods": runs,
        "cases": comparison.cases,
        "left_out": comparison.left_out,
        "unit": comparison.groups.unit_name,
        "units": len(comparison.units),
        "region": comparison.region,
        "endpoints": endpoints,
        "notes": comparison.notes,
        "warnings": comparison.warnings,
        "protocol": dict(first.protocol),
        "software": dict(first.software),
    }


def answer(comparison: Comparison) -> str:
    """One or two sentences: which method, and how sure."""
    endpoint = next((e for e in comparison.primary if e.metric == "ECE"), comparison.primary[0])
    what = f"{endpoint.term} ({endpoint.name})"
    best = endpoint.best()
    if len(comparison.methods) == 1 or not best:
        name = next(iter(comparison.methods))
        spread = endpoint.methods[name].spread
        return f"{name}: {what} {number(spread.mean)} ({interval(spread.t_interval)}), {spread.n} {_units(comparison)}."
    difference = next(
        (d for d in endpoint.differences if {d.method, d.baseline} == {best[0], comparison.baseline}), None
    )
    if best[0] == comparison.baseline or difference is None:
        own = number(endpoint.methods[comparison.baseline].spread.mean)
        said = f"No method has a better {what} than {comparison.baseline} ({own})"
        said += f"; {len(comparison.units)} {_units(comparison)}."
        return said + _the_others(comparison, endpoint, best) + _shown_worse(comparison)
    direction = "higher" if endpoint.higher_is_better else "lower"
    if difference.paired.mean and (difference.paired.mean > 0) != endpoint.higher_is_better:  # a structure was missed
        said = (
            f"{best[0]} has the better mean {what} than {comparison.baseline}, which misses more; in the other pairs "
        )
        said += f"it is the other way round: {_effect(difference)}, {_p(difference)}. "
        said += f"{len(comparison.units)} {_units(comparison)}."
        return said + _the_others(comparison, endpoint, best[1:]) + _shown_worse(comparison)
    shown = difference.shown and _excludes_zero(difference.paired.t_interval)
    verb = "has a" if shown else "seems to have a"
    said = f"{best[0]} {verb} {direction} {what} than {comparison.baseline}: {_effect(difference)}, {_p(difference)}"
    if not shown:
        said += ", which is not enough to claim it"
        if difference.paired.n < difference.paired.cases_needed < math.inf:
            said += f" (about {difference.paired.cases_needed:.0f} {_units(comparison)} would be)"
    overlap = next((e for e in comparison.primary if e.metric == "Dice" and e is not endpoint), None)
    if overlap is not None:
        other = _from_baseline(overlap, best[0], comparison)
        if other is not None and other.same:
            said += ". Its DSC is the same in every case"
        elif other is not None:
            said += f". Its DSC differs by {_effect(other)}, {_p(other)}"
    said += f". {len(comparison.units)} {_units(comparison)}."
    return said + _the_others(comparison, endpoint, best[1:]) + _shown_worse(comparison)


def _the_others(comparison: Comparison, endpoint: Endpoint, methods: Sequence[str]) -> str:
    """A clause for each method that is not named yet, the best first: the reader asks for every one of them."""
    found = (_from_baseline(endpoint, name, comparison) for name in methods)
    differences = [difference for difference in found if difference is not None]
    told = [f"{d.method} {SAME if d.same else f'{_effect(d)}, {_p(d)}'}" for d in differences[:_TOLD]]
    if len(differences) > _TOLD:
        told.append(f"{len(differences) - _TOLD} more in the table")
    if not told:
        return ""
    said = f" {endpoint.term} against {comparison.baseline}: {'; '.join(told)}."
    between = any(d.baseline != comparison.baseline for d in endpoint.differences)
    return (
        said
        if between or len(comparison.methods) < 3
        else f"{said} Others are not compared in pairs (compare --all-pairs)."
    )


def _shown_worse(comparison: Comparison) -> str:
    """What was shown to be worse than the baseline: a gain in one metric must not hide a loss in another."""
    worse: dict[str, list[str]] = {}
    for endpoint in comparison.primary:
        for d in endpoint.differences:
            if d.baseline == comparison.baseline and d.shown and (d.paired.mean > 0) != endpoint.higher_is_better:
                worse.setdefault(d.method, []).append(f"{endpoint.term} {signed(d.paired.mean)}")
    told = "; ".join(f"{method} ({', '.join(metrics)})" for method, metrics in worse.items())
    return f" Shown to be worse than {comparison.baseline}: {told}." if told else ""


def _from_baseline(endpoint: Endpoint, method: str, comparison: Comparison) -> Difference | None:
    wanted = (method, comparison.baseline)
    return next((d for d in endpoint.differences if (d.method, d.baseline) == wanted), None)


def _effect(difference: Difference) -> str:
    of = difference.paired
    return f"{signed(of.mean)} (95 % interval {interval(of.t_interval)})"


def _p(difference: Difference) -> str:
    return f"p {p_value(difference.wilcoxon_holm)} after Holm"


def _excludes_zero(interval: tuple[float, float]) -> bool:
    return interval[0] > 0 or interval[1] < 0


def _units(comparison: Comparison) -> str:
    return f"{comparison.groups.unit_name}s"


def short_table(comparison: Comparison) -> Iterable[str]:
    """Lines for the terminal: means of the primary endpoints, then the differences."""
    primary = comparison.primary
    width = max(len(name) for name in comparison.methods) + 2
    heads = [_heading(endpoint) for endpoint in primary]
    columns = [max(9, len(head) + 2) for head in heads]
    yield f"{'mean over ' + _units(comparison):<{width}}" + "".join(
        f"{head:>{c}}" for head, c in zip(heads, columns, strict=True)
    )
    for name in comparison.methods:
        cells = [number(endpoint.methods[name].spread.mean) for endpoint in primary]
        yield f"{name:<{width}}" + "".join(f"{cell:>{c}}" for cell, c in zip(cells, columns, strict=True))
    if len(comparison.methods) < 2:
        return
    yield ""
    yield (
        f"{'difference':<{2 * width + 12}}{'mean':>9}  {'95 % (t)':<20}{'p (Holm)':>9}{'better':>8}"
        f"{'false claim':>13}{'cases needed':>14}"
    )
    for endpoint in primary:
        for d in endpoint.differences:
            label = f"{_heading(endpoint):<10} {d.method} - {d.baseline}"
            if d.same:
                yield f"{label:<{2 * width + 12}}{SAME:>29}"
                continue
            yield (
                f"{label:<{2 * width + 12}}{signed(d.paired.mean):>9}  {interval(d.paired.t_interval):<20}"
                f"{p_value(d.wilcoxon_holm):>9}{d.paired.better:>8.0%}{p_value(d.paired.false_claim):>13}"
                f"{needed(d.paired.cases_needed):>14}"
            )


def markdown(comparison: Comparison) -> str:
    """All endpoints, with notes and warnings."""
    lines = ["# Comparison", "", answer(comparison), ""]
    for title, entries in (("Warnings", comparison.warnings), ("Notes", comparison.notes)):
        if entries:
            lines += [f"## {title}", "", *(f"- {entry}" for entry in entries), ""]
    for title, primary in (("Declared family", True), ("Structures and regions (a second family)", False)):
        endpoints = [endpoint for endpoint in comparison.endpoints if endpoint.primary == primary]
        if not endpoints:
            continue
        lines += [f"## {title}", ""]
        lines += _markdown_table(_METHOD_HEAD, [row for e in endpoints for row in _method_rows(e)])
        if len(comparison.methods) > 1:
            lines += ["", *_markdown_table(_DIFFERENCE_HEAD, [row for e in endpoints for row in _difference_rows(e)])]
        lines.append("")
    lines += [
        "Mean: inf if a structure was missed; (t) and (BCa): 95 % intervals of the mean of the finite values. "
        f"Difference: method minus baseline, paired by {comparison.groups.unit_name}. p: Wilcoxon signed ranks, and "
        "sign flips, each after Holm over its family. False claim: probability that the one that looks better is not. "
        f"Needed: {_units(comparison)} that show such a difference with power 0.8.",
        "",
    ]
    return "\n".join(lines)


_METHOD_HEAD = (
    *("metric", "where", "method", "n", "missed", "absent", "mean", "SD", "median", "quartiles"),
    *("mean (t)", "mean (BCa)", "between trainings", "rank", "rank by case"),
)
_DIFFERENCE_HEAD = (
    *("metric", "where", "difference", "n", "mean", "(t)", "(BCa)", "d_z", "better in", "p Wilcoxon", "p flips"),
    *("false claim", "needed"),
)


def _method_rows(endpoint: Endpoint) -> Iterable[list[str]]:
    for i, (name, result) in enumerate(endpoint.methods.items()):
        spread, ranked = result.spread, endpoint.ranks
        yield [
            *(endpoint.term, endpoint.name, name, str(spread.n)),
            "" if result.missed is None else str(result.missed),
            str(result.absent),
            number(spread.mean) + (f" (finite: {number(spread.finite_mean)})" if spread.infinite else ""),
            number(spread.sd),
            number(spread.quartiles[1]),
            f"{number(spread.quartiles[0])}, {number(spread.quartiles[2])}",
            interval(spread.t_interval),
            interval(spread.bca_interval),
            "" if math.isnan(result.trainings_sd) else f"SD {number(result.trainings_sd)} of {len(result.trainings)}",
            f"{ranked.of_means[i]:g}" if ranked else "",
            f"{ranked.of_ranks[i]:g}" if ranked else "",
        ]


def _difference_rows(endpoint: Endpoint) -> Iterable[list[str]]:
    for d in endpoint.differences:
        of = d.paired
        if d.same:  # no test says anything about it
            row = [endpoint.term, endpoint.name, f"{d.method} - {d.baseline}", str(of.n + of.infinite), SAME]
            yield row + ["-"] * (len(_DIFFERENCE_HEAD) - len(row))
            continue
        yield [
            *(endpoint.term, endpoint.name, f"{d.method} - {d.baseline}"),
            f"{of.n}" + (f" + {of.infinite} inf" if of.infinite else ""),
            *(signed(of.mean), interval(of.t_interval), interval(of.bca_interval)),
            *(f"{of.d_z:.2f}", f"{of.better:.0%}", p_value(d.wilcoxon_holm), p_value(d.permutation_holm)),
            *(f"{of.false_claim:.2g}", needed(of.cases_needed)),
        ]


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def latex(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """A booktabs table: rows are methods, columns the primary metrics by data set; best bold, second best underlined.

    Args:
        comparisons: as ``as_json`` or ``read_comparison``.
    """
    methods = list(dict.fromkeys(name for content in comparisons for name in content["methods"]))
    blocks = [[e for e in content["endpoints"] if e["primary"]] for content in comparisons]
    cells: dict[str, list[str]] = {name: [] for name in methods}
    for endpoints in blocks:
        for endpoint in endpoints:
            means = {name: float(of["spread"]["mean"]) for name, of in endpoint["methods"].items()}
            known = sorted({m for m in means.values() if not math.isnan(m)}, reverse=endpoint["better"] == "higher")
            for name in methods:
                cells[name].append(_latex_cell(means.get(name, float("nan")), known))
    first, sizes = 2, [len(block) for block in blocks]
    groups, rules = [], []
    for content, size in zip(comparisons, sizes, strict=True):
        groups.append(f"\\multicolumn{{{size}}}{{c}}{{{_tex(content['dataset'])} ($n={content['units']}$)}}")
        rules.append(f"\\cmidrule(lr){{{first}-{first + size - 1}}}")
        first += size
    heads = [_tex(usual_name(e["metric"])) + _arrow(e["better"]) for block in blocks for e in block]
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'c' * sum(sizes)}}}",
        "\\toprule",
        " & " + " & ".join(groups) + r" \\",
        " ".join(rules),
        " & " + " & ".join(heads) + r" \\",
        "\\midrule",
        *(f"{_tex(name)} & " + " & ".join(cells[name]) + r" \\" for name in methods),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(mean: float, ordered: Sequence[float]) -> str:
    if math.isnan(mean):
        return "--"
    text = "$\\infty$" if math.isinf(mean) else number(mean)
    if len(ordered) > 1 and mean == ordered[0]:
        return f"\\textbf{{{text}}}"
    return f"\\underline{{{text}}}" if len(ordered) > 2 and mean == ordered[1] else text


def _arrow(better: str) -> str:
    return r" $\uparrow$" if better == "higher" else r" $\downarrow$"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\&%$#_{}~^]", lambda found: special.get(found[0], "\\" + found[0]), text)


def csv_rows(comparison: Comparison) -> str:
    """A row per endpoint and method, with its difference from the baseline where there is one."""
    text = io.StringIO()
    writer: csv.DictWriter | None = None
    for endpoint in comparison.endpoints:
        for i, name in enumerate(endpoint.methods):
            row = _csv_row(endpoint, name, i, comparison.baseline)
            if writer is None:
                writer = csv.DictWriter(text, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
    return text.getvalue()


def _csv_row(endpoint: Endpoint, name: str, i: int, baseline: str) -> dict[str, Any]:
    result, spread = endpoint.methods[name], endpoint.methods[name].spread
    row: dict[str, Any] = {
        "metric": endpoint.metric,
        "place": endpoint.place,
        "where": endpoint.name,
        "family": "primary" if endpoint.primary else "secondary",
        "method": name,
        "n": spread.n,
        "infinite": spread.infinite,
        "absent": result.absent,
        "missed": result.missed,
        "spurious": result.spurious,
        "mean": spread.mean,
        "finite_mean": spread.finite_mean,
        "sd": spread.sd,
        **dict(zip(("q1", "median", "q3"), spread.quartiles, strict=True)),
        **dict(zip(("t_low", "t_high"), spread.t_interval, strict=True)),
        **dict(zip(("bca_low", "bca_high"), spread.bca_interval, strict=True)),
        "trainings": len(result.trainings),
        "trainings_sd": result.trainings_sd,
        "rank_of_mean": endpoint.ranks and endpoint.ranks.of_means[i],
        "rank_of_ranks": endpoint.ranks and endpoint.ranks.of_ranks[i],
    }
    found = next((d for d in endpoint.differences if (d.method, d.baseline) == (name, baseline)), None)
    of = found and found.paired
    return row | {
        "baseline": found and found.baseline,
        "pairs": of and of.n,
        "pairs_infinite": of and of.infinite,
        "unpaired": found and found.unpaired,
        "difference": of and of.mean,
        **dict(zip(("difference_t_low", "difference_t_high"), of.t_interval if of else (None, None), strict=True)),
        **dict(
            zip(("difference_bca_low", "difference_bca_high"), of.bca_interval if of else (None, None), strict=True)
        ),
        **{key: of and getattr(of, key) for key in ("d_z", "better", "t_p", "wilcoxon_p", "permutation_p")},
        "wilcoxon_holm": found and found.wilcoxon_holm,
        "permutation_holm": found and found.permutation_holm,
        "false_claim": of and of.false_claim,
        "cases_needed": of and of.cases_needed,
    }


def number(value: float) -> str:
    """Three digits after the point up to 10, two up to 100."""
    if not math.isfinite(value):
        return str(value)
    return (
        f"{value:.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 1}f}" if abs(value) >= 0.01 else f"{value:.4f}"
    )


def signed(value: float) -> str:
    """``number`` with its sign."""
    return ("+" if value >= 0 else "") + number(value)


def p_value(p: float) -> str:
    """Two digits, or a bound."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def interval(bounds: tuple[float, float]) -> str:
    """``low to high``."""
    return "-" if math.isnan(bounds[0]) else f"{number(bounds[0])} to {number(bounds[1])}"


def needed(cases: float) -> str:
    """Cases needed, to read."""
    return "-" if math.isnan(cases) else "many" if math.isinf(cases) else f"{cases:.0f}"


def _heading(endpoint: Endpoint) -> str:
    unit = next((unit for start, unit in _UNIT.items() if endpoint.metric.startswith(start)), "")
    return endpoint.term + unit
