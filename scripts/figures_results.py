"""Figures of the pages in docs/results, from the rows kept there.

python scripts/figures_results.py
"""

import csv

from kept import FOLDER
from matplotlib import rc_context
from matplotlib.figure import Figure

from nnunet_calib.report.diagram import COLOURS, DASHES, MARKERS, STYLE, save

IMAGES = FOLDER.parent / "images"


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def pairs() -> Figure:
    """What -tr alone changes, in each pair."""
    measures = ("DSC", "ECE foreground", "NLL foreground")
    own = [row for row in rows("hippocampus_pairs") if row["how"] == "-tr alone"]
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    for panel, measure in zip(figure.subplots(1, 3), measures, strict=True):
        panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
        for y, row in enumerate(own):
            mean, _, each = row[measure].rstrip(")").partition(" (")
            values = [float(value) for value in each.split(", ")]
            panel.plot(values, [y] * len(values), "o", color="0.6", markersize=4, markerfacecolor="white")
            panel.plot(float(mean), y, "D", color=COLOURS[0], markersize=6)
        panel.set(yticks=range(len(own)), yticklabels=[row["loss"] for row in own], ylim=(len(own) - 0.5, -0.5))
        panel.set_title(f"{measure}, minus stock", fontsize=9)
        if measure != "DSC":
            panel.tick_params(labelleft=False)
    return figure


def afterwards() -> Figure:
    """NLL and ECE of the foreground without and with one temperature."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    for panel, measure in zip(figure.subplots(1, 2), ("ECE foreground", "NLL foreground"), strict=True):
        own = rows("posthoc_methods")
        stock = [row for row in own if row["table"] == own[0]["table"]]
        values = [float(row[measure]) for row in stock]
        panel.barh(range(len(stock)), values, color=["0.35" if row["method"] == "none" else "0.7" for row in stock])
        for y, value in enumerate(values):
            panel.text(value, y, f" {value:.3f}", va="center", fontsize=8)
        panel.set(yticks=range(len(stock)), yticklabels=[row["method"] for row in stock], ylim=(len(stock) - 0.5, -0.5))
        panel.set_title(f"{measure}, the stock network", fontsize=9)
        if measure != "ECE foreground":
            panel.tick_params(labelleft=False)
    return figure


def few_shot() -> Figure:
    """DSC by the number of annotated volumes: the default head and global prototypes."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    for panel, study in zip(figure.subplots(1, 2, sharey=True), ("brain", "chaos"), strict=True):
        own = [row for row in rows(f"fewshot_{study}_structures") if row["structure"] == "all"]
        own = [row for row in own if row.get("table", "new").startswith("new")]
        for i, column in enumerate(("DSC, default", "DSC, global prototype")):
            known = [row for row in own if row[column].replace(".", "").isdigit()]
            panel.plot(
                [int(row["k"]) for row in known], [float(row[column]) for row in known],
                color=COLOURS[i], linestyle=DASHES[i], marker=MARKERS[i], label=column.partition(", ")[2],
            )  # fmt: skip
        panel.set(xlabel="annotated volumes", title=study, ylim=(0, 1))
        panel.set_xticks([1, 3, 5])
    figure.axes[0].set_ylabel("mean DSC")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    with rc_context(STYLE):
        for name, draw in (("training_pairs", pairs), ("calibration_stock", afterwards), ("fewshot_volumes", few_shot)):
            save(draw(), IMAGES / f"results_{name}.svg")


if __name__ == "__main__":
    main()
