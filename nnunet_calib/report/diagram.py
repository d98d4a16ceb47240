"""Figures: reliability diagrams, differences with their intervals, risk against coverage, ranks.

All are read without colour: lines differ in dashes and markers too, and parts of a bar in lightness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_calib.data.files import whole_file
from nnunet_calib.metrics import Bins, expected_calibration_error
from nnunet_calib.report.comparison import Endpoint
from nnunet_calib.report.reliability import Reliability

AGGREGATIONS = ("mean", "pooled")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#000000", "#7f7f7f")  # Okabe and Ito
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "nnunet-calib",
    "pdf.fonttype": 42,
}
_GAP = "#b2182b"
FAINT = 0.005
"""Share of the voxels below which a bin is drawn faintly."""
_SETTLED = 0.05  # coverage from which a risk counts for the height of its diagram


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the format is that of the file's ending.

    Raises:
        ValueError: matplotlib does not know the ending.
    """
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
    with rc_context(STYLE), whole_file(path) as stream:
        figure.savefig(stream, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)


def calibration_error(bins: Bins, aggregation: str) -> float:
    """ECE of ``Bins`` (cases, B): the mean over cases, or that of all voxels together ("pooled")."""
    return float(expected_calibration_error(bins).mean() if aggregation == "mean" else _pooled_error(bins))


def _pooled_error(bins: Bins) -> np.ndarray:
    return expected_calibration_error(Bins(bins.n.sum(0), bins.confidence.sum(0), bins.correct.sum(0)))


def reliability_diagram(
    methods: Mapping[str, Reliability], problems: Sequence[str], names: Mapping[str, str], region: str, aggregation: str
) -> Figure:
    """A row per problem, a column per method: accuracy against confidence, with the share of voxels below.

    Bins with less than ``FAINT`` of the voxels are drawn faintly: a few voxels make a spike as high as half of them.

    The line is the accuracy of a bin: of all voxels together (``pooled``), or its mean over the cases with a voxel in
    it (``mean``), with a band from the first to the third quartile of the cases. Red: confidence above accuracy.

    Args:
        methods: counts by name.
        problems: keys of ``Reliability.problems``.
        names: of the problems, to read.
        region: of the voxels; for the title.
        aggregation: one of ``AGGREGATIONS``.
    """
    rows, columns = len(problems), len(methods)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.3 * columns + 0.7, 2.9 * rows + 0.5), layout="constrained")
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
        for row, problem in enumerate(problems):
            for column, (name, of) in enumerate(methods.items()):
                upper = figure.add_subplot(grid[2 * row, column])
                lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
                bins = of.problems[problem]
                _draw_reliability(upper, bins, aggregation)
                _draw_histogram(lower, bins)
                error = calibration_error(bins, aggregation)
                upper.set_title(f"{name}\n{names[problem]}, ECE {error:.3f}", fontsize=9)
                upper.tick_params(labelbottom=False)
                if column == 0:
                    upper.set_ylabel("accuracy" if problem == "top label" else "observed frequency")
                    lower.set_ylabel("voxels")
                else:
                    upper.tick_params(labelleft=False)
                    lower.tick_params(labelleft=False)
                if row == rows - 1:
                    lower.set_xlabel("confidence" if problem == "top label" else "probability")
        cases = max(len(of.cases) for of in methods.values())
        how = "mean over cases, band: quartiles" if aggregation == "mean" else "all voxels pooled"
        figure.suptitle(f"region {region.replace('_', ' ')}, {cases} cases, {how}", fontsize=9)
    return figure


def _draw_reliability(axes: Axes, bins: Bins, aggregation: str) -> None:
    confidence, accuracy, low, high = reliability_curve(bins, aggregation)
    n = bins.n.sum(axis=0)
    solid = (n >= FAINT * n.sum())[n > 0]
    axes.plot([0, 1], [0, 1], color="0.55", linewidth=0.8, linestyle="--")
    if aggregation == "mean":
        axes.fill_between(confidence, low, high, where=solid, color=COLOURS[0], alpha=0.22, linewidth=0)
    axes.fill_between(
        confidence,
        accuracy,
        confidence,
        where=(accuracy <= confidence) & solid,
        color=_GAP,
        alpha=0.3,
        linewidth=0,
        interpolate=True,
    )
    axes.plot(confidence, accuracy, color=COLOURS[0], marker="o", markersize=3, linewidth=1.2, alpha=0.25)
    accuracy = np.where(solid, accuracy, np.nan)
    axes.plot(confidence, accuracy, color=COLOURS[0], marker="o", markersize=3, linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])


def reliability_curve(bins: Bins, aggregation: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, accuracy and the quartiles of accuracy over cases, of the bins of (cases, B) that hold a voxel."""
    filled = bins.n.any(axis=0)
    n, confidence, correct = bins.n[:, filled], bins.confidence[:, filled], bins.correct[:, filled]
    with np.errstate(invalid="ignore"):
        by_case, own = correct / n, confidence / n
    if not filled.any():
        return (np.zeros(0),) * 4
    low, high = np.nanquantile(by_case, [0.25, 0.75], axis=0)
    if aggregation == "pooled":
        return confidence.sum(0) / n.sum(0), correct.sum(0) / n.sum(0), low, high
    return np.nanmean(own, axis=0), np.nanmean(by_case, axis=0), low, high


def _draw_histogram(axes: Axes, bins: Bins) -> None:
    share = bins.n.sum(axis=0) / max(bins.n.sum(), 1)
    edges = np.linspace(0, 1, len(share) + 1)
    axes.stairs(share, edges, fill=True, color="0.6")
    axes.set(ylim=(0, 1), yticks=[0, 1], yticklabels=["0", "1"], xlim=(0, 1))


def forest(endpoints: Sequence[Endpoint], units: str) -> Figure:
    """A panel per endpoint: differences from the baseline with t intervals; filled where shown after Holm."""
    methods = [difference.method for difference in endpoints[0].differences]
    columns = min(len(endpoints), 3)
    rows = -(-len(endpoints) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * columns + 0.6, rows * (0.75 + 0.32 * len(methods)) + 0.2), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for spare in axes.flat[len(endpoints) :]:
            spare.axis("off")
        for i, (panel, endpoint) in enumerate(zip(axes.flat, endpoints, strict=False)):
            panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
            for y, difference in enumerate(endpoint.differences):
                of = difference.paired
                panel.plot(of.t_interval, (y, y), color="#222222", linewidth=1.6)
                better = (of.mean > 0) == endpoint.higher_is_better
                marker, colour = ("o", COLOURS[0]) if better else ("s", COLOURS[1])
                if difference.same:
                    marker, colour = "d", "0.5"
                filled = colour if difference.shown else "white"
                panel.plot(of.mean, y, marker=marker, color=colour, markersize=6, markerfacecolor=filled)
            panel.set(ylim=(len(methods) - 0.5, -0.5), yticks=range(len(methods)), yticklabels=methods)
            if i % columns:
                panel.tick_params(labelleft=False)
            direction = "right" if endpoint.higher_is_better else "left"
            panel.set_title(f"{endpoint.term} ({endpoint.name})\nbetter to the {direction}", fontsize=9)
            panel.locator_params(axis="x", nbins=4)
    return figure


def curves(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str) -> Figure:
    """Lines by name; a legend instead of colours alone."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.subplots()
        for i, (name, (x, y)) in enumerate(lines.items()):
            shown = np.unique(np.linspace(0, max(len(x) - 1, 0), 120).astype(int))[: len(x)]
            axes.plot(
                x[shown], y[shown], color=COLOURS[i % 8], linestyle=DASHES[i % 8], linewidth=1.4, label=name,
                marker=MARKERS[i % 8], markersize=4, markevery=0.25,
            )  # fmt: skip
        axes.set(xlim=(0, 1), xlabel=xlabel, ylabel=ylabel)
        settled = [y[x >= _SETTLED] for x, y in lines.values()]  # the first voxels alone would squash the rest
        highest = max((float(y.max()) for y in settled if len(y)), default=0.0)
        axes.set_ylim(0, 1.15 * highest if highest > 0 else None)
        if lines:
            axes.legend(frameon=False, fontsize=8)
    return figure


def rank_bars(endpoints: Sequence[Endpoint]) -> Figure:
    """A panel per endpoint: for every method, the share of bootstrap samples in which it has each rank."""
    methods = list(endpoints[0].methods)
    columns = min(len(endpoints), 3)
    rows = -(-len(endpoints) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * columns + 0.6, rows * (0.75 + 0.32 * len(methods)) + 0.2), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for spare in axes.flat[len(endpoints) :]:
            spare.axis("off")
        for i, (panel, endpoint) in enumerate(zip(axes.flat, endpoints, strict=False)):
            shares = np.asarray(endpoint.ranks.distribution) if endpoint.ranks else np.zeros((len(methods),) * 2)
            left = np.zeros(len(methods))
            for rank, column in enumerate(np.nan_to_num(shares).T):
                grey = 0.25 + 0.65 * rank / max(len(methods) - 1, 1)
                panel.barh(range(len(methods)), column, left=left, color=str(grey), edgecolor="white", linewidth=0.6)
                for y, (start, share) in enumerate(zip(left, column, strict=True)):
                    if share >= 0.15:
                        panel.text(
                            start + share / 2, y, str(rank + 1), ha="center", va="center", fontsize=8,
                            color="white" if grey < 0.55 else "black",
                        )  # fmt: skip
                left += column
            panel.set(ylim=(len(methods) - 0.5, -0.5), yticks=range(len(methods)), yticklabels=methods, xlim=(0, 1))
            panel.set_xticks([0, 0.5, 1])
            if i % columns:
                panel.tick_params(labelleft=False)
            panel.set_title(f"{endpoint.term} ({endpoint.name})", fontsize=9)
    return figure
