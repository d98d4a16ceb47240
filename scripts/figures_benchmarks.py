"""Figures of docs/benchmarks.md, from the rows that the benchmarks keep in docs/results.

python scripts/figures_benchmarks.py
"""

from figures_results import IMAGES, rows
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_calib.report.diagram import COLOURS, STYLE, save

EVALUATION = {  # panels: the kept table, its volume, the title
    "distances": ("abdomen prediction", "distances of 13 organs"),
    "calibration": ("abdomen", "calibration of 14 classes"),
    "case": ("abdomen", "a whole case, files included"),
}
WORDS = {
    "decompressing the .npz (numpy)": "numpy, unpacking the .npz",
    "(a tenth)": "(on a tenth, x 10)",
    "threads2": "2 threads",
}
LOSSES = "labels, 2 x 14 x 128 x 128 x 128"


def bars(panel: Axes, names: list[str], values: list[float], unit: str) -> None:
    """Horizontal bars on a logarithmic axis, ours in colour, with their values."""
    ours = [name.startswith(("ours", "evaluate")) for name in names]
    panel.barh(range(len(names)), values, color=[COLOURS[0] if own else "0.7" for own in ours])
    for y, value in enumerate(values):
        panel.text(value, y, f" {value:.3g} {unit}", va="center", fontsize=8)
    panel.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xscale="log", xticks=[])
    panel.minorticks_off()
    panel.spines["bottom"].set_visible(False)
    panel.set_xlim(min(values) / 3, max(values) * 8)


def evaluation() -> Figure:
    """CPU seconds of every tool on the large volume."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    for panel, (part, (volume, title)) in zip(figure.subplots(1, 3), EVALUATION.items(), strict=True):
        own = [row for row in rows(f"benchmark_metrics_{part}") if row["volume"] == volume]
        names = [row["tool"] for row in own]
        for there, here in WORDS.items():
            names = [name.replace(there, here) for name in names]
        bars(panel, names, [float(row["CPU seconds"]) for row in own], "s")
        panel.set_title(title, fontsize=9)
        panel.tick_params(axis="y", labelsize=7.5)
    return figure


def losses() -> Figure:
    """A step of each loss, times torch's cross-entropy."""
    own = [row for row in rows("benchmark_losses_steps") if row["table"] == LOSSES]
    names = [row["loss"].removeprefix("ours ") for row in own]
    ours = [row["loss"].startswith("ours") for row in own]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for panel, column in zip(figure.subplots(1, 2), ("time x yardstick", "memory x yardstick"), strict=True):
        values = [float(row[column]) for row in own]
        panel.barh(range(len(own)), values, color=[COLOURS[0] if of_us else "0.7" for of_us in ours])
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:.2g}", va="center", fontsize=7.5)
        panel.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
        panel.set(yticks=range(len(own)), yticklabels=names, ylim=(len(own) - 0.5, -0.5))
        panel.set_title(f"{column.split()[0]}, times torch's cross-entropy", fontsize=9)
        panel.tick_params(axis="y", labelsize=7.5)
    figure.axes[1].tick_params(labelleft=False)
    return figure


def main() -> None:
    with rc_context(STYLE):
        for name, draw in (("evaluation", evaluation), ("losses", losses)):
            save(draw(), IMAGES / f"benchmarks_{name}.svg")


if __name__ == "__main__":
    main()
