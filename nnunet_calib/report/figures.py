"""The figures of the report, each with the table of its numbers."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from nnunet_calib.report import diagram
from nnunet_calib.report.comparison import Comparison
from nnunet_calib.report.groups import by_unit
from nnunet_calib.report.reliability import TOP, Reliability, case_risk_coverage, risk_coverage
from nnunet_calib.report.tables import interval, needed, number, p_value, signed

FOREST = ("Dice", "NSD", "HD95", "ECE", "CECE", "NLL")


@dataclass(frozen=True)
class Drawn:
    """A figure of the page.

    Attributes:
        svg: the drawing.
        title: its heading.
        caption: what it shows, in words.
        head: of the table of its numbers.
        rows: of that table: what a reader of the screen, or of the page without pictures, gets.
    """

    svg: Markup
    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def forest(comparison: Comparison) -> Drawn | None:
    """Paired differences from the baseline; None without any."""
    endpoints = [e for name in FOREST for e in comparison.primary if e.metric == name]
    endpoints += [e for e in comparison.primary if e not in endpoints][: len(FOREST) - len(endpoints)]
    endpoints = [e for e in endpoints if e.differences]
    if not endpoints:
        return None
    rows = [
        [
            f"{e.term} ({e.name})", f"{d.method} - {d.baseline}", str(d.paired.n), signed(d.paired.mean),
            interval(d.paired.t_interval), interval(d.paired.bca_interval), f"{d.paired.d_z:.2f}",
            f"{d.paired.better:.0%}", p_value(d.wilcoxon_holm), p_value(d.permutation_holm),
            p_value(d.paired.false_claim), needed(d.paired.cases_needed),
        ]
        for e in endpoints for d in e.differences
    ]  # fmt: skip
    head = (
        *("metric", "difference", "n", "mean", "95 % (t)", "95 % (BCa)", "d_z", "better in", "p Wilcoxon, Holm"),
        *("p sign flips, Holm", "false claim", "cases needed"),
    )
    return Drawn(
        _svg(diagram.forest(endpoints, comparison.groups.unit_name)),
        "Differences from the baseline",
        f"Mean paired difference from {comparison.baseline} with its 95 % t interval, {len(comparison.units)} "
        f"{comparison.groups.unit_name}s. Circle: better than the baseline, square: worse, grey diamond: the same in "
        "every case; filled: shown after Holm.",
        head,
        rows,
    )


def diagram_of(
    comparison: Comparison, reliabilities: Mapping[str, Mapping[str, Reliability]], region: str, problems: Sequence[str]
) -> Drawn:
    """Reliability of some classes or regions, a panel for each method and class."""
    counted = {name: of[region] for name, of in reliabilities.items()}
    present = [p for p in problems if all(p in of.problems for of in counted.values())] or shared_problems(
        reliabilities, region
    )
    structures = next(iter(comparison.methods.values()))[0].structures
    names = {key: structures.get(key, "background" if key == "0" else key) for key in present}
    figure = diagram.reliability_diagram(counted, present, names, region, "mean")
    rows = []
    for name, of in counted.items():
        for key in present:
            bins = of.problems[key]
            gap = (bins.confidence - bins.correct).sum() / max(bins.n.sum(), 1)
            errors = diagram.expected_calibration_error(bins)
            q1, q3 = np.quantile(errors, [0.25, 0.75])
            cells = (diagram.calibration_error(bins, "mean"), q1, q3, diagram.calibration_error(bins, "pooled"))
            rows.append([name, names[key], str(len(of.cases)), *map(number, map(float, cells)), signed(float(gap))])
    return Drawn(
        _svg(figure),
        f"{', '.join(names[key] for key in present)} in the region {region.replace('_', ' ')}",
        "Accuracy against confidence, mean over cases with the quartiles of the cases as a band; red: more "
        "confident than right; faint: bins with less than 0.5 % of the voxels. Below: the share of voxels in each bin.",
        (
            "method",
            "of",
            "cases",
            "ECE, mean over cases",
            "first quartile",
            "third quartile",
            "ECE pooled",
            "confidence - accuracy",
        ),
        rows,
    )


def risks(comparison: Comparison, reliabilities: Mapping[str, Mapping[str, Reliability]]) -> list[Drawn]:
    """Risk against coverage, over voxels and over cases."""
    if not all(comparison.region in of for of in reliabilities.values()):
        return []
    region = comparison.region
    voxels = {name: risk_coverage(of[region].ranked) for name, of in reliabilities.items()}
    drawn = [
        _curves(
            voxels, "voxels", f"share of voxels kept, most confident first ({region.replace('_', ' ')})", "error rate"
        )
    ]
    overlap = comparison.endpoint("Dice", "foreground")
    if overlap is not None:
        cases = {}
        for i, (name, of) in enumerate(reliabilities.items()):
            bins = of[region].problems.get(TOP) or next(iter(of[region].problems.values()))
            mean = dict(zip(of[region].cases, bins.confidence.sum(1) / bins.n.sum(1), strict=True))
            confidence = np.array([mean.get(case, np.nan) for case in comparison.cases])
            units = [comparison.groups.unit[case] for case in comparison.cases]
            cases[name] = case_risk_coverage(by_unit(confidence, units), 1 - overlap.values[:, i])
        unit = comparison.groups.unit_name
        drawn.append(
            _curves(cases, f"{unit}s", f"share of {unit}s kept, highest mean confidence first", "mean 1 - DSC")
        )
    return drawn


def _curves(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], what: str, xlabel: str, ylabel: str) -> Drawn:
    at = (0.5, 0.8, 0.9, 1.0)
    rows = [
        [name, *(number(float(np.interp(share, x, y))) if len(x) else "-" for share in at)]
        for name, (x, y) in lines.items()
    ]
    return Drawn(
        _svg(diagram.curves(lines, xlabel, ylabel)),
        f"Risk against coverage, over {what}",
        f"What is left wrong ({ylabel}) when the least confident {what} are set aside. Lower is better.",
        ("method", *(f"{share:.0%} kept" for share in at)),
        rows,
    )


def ranks(comparison: Comparison) -> Drawn | None:
    """Ranks over bootstrap samples of the cases; None for a single method."""
    endpoints = [e for e in comparison.primary if e.ranks is not None][:6]
    if not endpoints:
        return None
    rows = []
    for endpoint in endpoints:
        assert endpoint.ranks is not None
        for i, name in enumerate(endpoint.methods):
            ranked = endpoint.ranks
            rows.append(
                [
                    f"{endpoint.term} ({endpoint.name})", name, f"{ranked.of_means[i]:g}", f"{ranked.of_ranks[i]:g}",
                    f"{ranked.mean_rank[i]:.2f}", f"{ranked.distribution[i][0]:.0%}",
                ]
            )  # fmt: skip
    return Drawn(
        _svg(diagram.rank_bars(endpoints)),
        "Ranks and their stability",
        "Share of 2000 bootstrap samples of the cases in which a method has each rank (1, darkest, is the best).",
        ("metric", "method", "rank of the mean", "rank by case, then mean", "mean rank", "first in"),
        rows,
    )


def shared_problems(reliabilities: Mapping[str, Mapping[str, Reliability]], region: str) -> list[str]:
    """Classes or regions that every method has a diagram of, without the top label."""
    every = [set(of[region].problems) for of in reliabilities.values()]
    first = next(iter(reliabilities.values()))[region].problems
    return [key for key in first if key != TOP and all(key in keys for keys in every)]


_DIGITS = re.compile(r"(\d+\.\d\d)\d+")  # hundredths of a point; in attributes alone, never in text


def _svg(figure: Figure) -> Markup:
    """The figure as an element of the page: no XML head, no numbers beyond what a screen shows, ids of its own."""
    stream = io.StringIO()
    with rc_context({**diagram.STYLE, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(d|transform|x|y|width|height)="[^"]*"', lambda found: _DIGITS.sub(r"\1", found[0]), text)
    prefix = f"f{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    return Markup(text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1))
