"""Figure of docs/results/fewshot.md, from the rows kept there; the other pages have ``scripts/evidence/pages.py``.

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
        save(few_shot(), IMAGES / "results_fewshot_volumes.svg")


if __name__ == "__main__":
    main()
