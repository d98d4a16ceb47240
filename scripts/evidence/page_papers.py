"""``docs/results/papers.md``: in the papers' own setting, does the order of their table hold?"""

from collections.abc import Callable

from matplotlib import rc_context
from matplotlib.figure import Figure
from pages import Page
from pairs import COLUMNS, head, rows_of, with_each
from scipy.stats import spearmanr
from scores import called
from tables import PAPER_MEASURES, RESULTS, STOCK

from nnunet_calib.posthoc.folders.crossfit import NONE
from nnunet_calib.report.diagram import COLOURS, STYLE, save

CE = "ce"
PUBLISHED = {
    STOCK: (0.828, 3.14, 0.137, 0.084),
    "fl": (0.620, 7.30, 0.153, 0.179),
    "ecp": (0.782, 4.44, 0.130, 0.094),
    "ls": (0.809, 3.30, 0.083, 0.093),
    "svls": (0.824, 2.81, 0.091, 0.083),
    "mbls": (0.827, 2.99, 0.103, 0.081),
    "nacl": (0.854, 2.55, 0.048, 0.061),
    "nacl-probabilities": (0.840, 2.66, 0.068, 0.071),
    "nacl-l2": (0.871, 1.78, 0.059, 0.080),
    "nacl-5x5": (0.813, 3.50, 0.078, 0.077),
}
"""DSC, HD (voxels), ECE and CECE on ACDC of Murugesan et al., MICCAI 2023 and Medical Image Analysis 2025."""
NAMES = {
    STOCK: "CE and Dice",
    "mbls": "MbLS",
    "nacl-probabilities": "NACL on probabilities",
    "nacl-l2": "NACL, L2",
    "nacl-5x5": "NACL, 5 x 5",
}
ROWS = rows_of("papers2d")


def written(label: str) -> str:
    return NAMES.get(label, label.upper())


def published() -> list[str]:
    """Every row by the numbers of the NACL code, beside what was published."""
    names = [measure.removesuffix(" nacl") for measure in PAPER_MEASURES]
    heads = ["trainings", *(f"{name}, here" for name in names), *(f"{name}, published" for name in names)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    places = (3, 2, 3, 3)
    for label in ROWS.labels:
        here = [f"{ROWS.mean(label, m).mean:.{n}f}" for m, n in zip(PAPER_MEASURES, places, strict=True)]
        known = PUBLISHED.get(label)
        theirs = [f"{v:.{n}f}" for v, n in zip(known, places, strict=True)] if known else [""] * len(places)
        number = str(len(ROWS.numbers_of(label)))
        lines.append(f"| {written(label)} | {' | '.join([number, *here, *theirs])} |")
    return lines


def ours() -> list[str]:
    """Every row by the numbers of the other pages."""
    lines = head("", "trainings")
    for label in ROWS.labels:
        cells = [with_each(ROWS.mean(label, column), column, "") for column in COLUMNS]
        lines.append(f"| {written(label)} | {len(ROWS.numbers_of(label))} | {' | '.join(cells)} |")
    return lines


def against(base: str, method: str = "") -> Callable[[], list[str]]:
    """Every other row minus one of them, with a calibrator or without."""

    def made() -> list[str]:
        lines = head(f"minus {written(base)}{f', {method}' if method else ''}")
        for label in (label for label in ROWS.labels if label != base):
            name = called(base, method or NONE)
            cells = [with_each(ROWS.effect(label, name, column), column) for column in COLUMNS]
            lines.append(f"| {written(label)} | {' | '.join(cells)} |")
        return lines

    return made


def compared() -> list[str]:
    """Labels with a row here and a published one."""
    return [label for label in ROWS.labels if label in PUBLISHED]


def number(what: str) -> float:
    """``order of ECE nacl`` is Spearman's correlation with the published column; all else as the rows have it."""
    if not what.startswith("order of "):
        return ROWS.number(what)
    measure = what.removeprefix("order of ")
    at = PAPER_MEASURES.index(measure)
    here = [ROWS.mean(label, measure).mean for label in compared()]
    return float(spearmanr(here, [PUBLISHED[label][at] for label in compared()]).statistic)


def figure() -> None:
    """DSC, ECE and CECE of every row: here, each training, and as published."""
    with rc_context(STYLE):
        drawn = Figure(figsize=(9, 0.9 + 0.27 * len(ROWS.labels)), layout="constrained")
        shown = [measure for measure in PAPER_MEASURES if not measure.startswith("HD")]
        for panel, measure in zip(drawn.subplots(1, len(shown)), shown, strict=True):
            at = PAPER_MEASURES.index(measure)
            for y, label in enumerate(ROWS.labels):
                mean = ROWS.mean(label, measure)
                hollow = {"color": "0.6", "markerfacecolor": "white", "markersize": 4}
                each = panel.plot(mean.each, [y] * len(mean.each), "o", **hollow)
                here = panel.plot(mean.mean, y, "D", color=COLOURS[0], markersize=4.5)
                if label in PUBLISHED:
                    published = panel.plot(PUBLISHED[label][at], y, "x", color=COLOURS[1], markersize=5)
            names = [written(label) for label in ROWS.labels]
            panel.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
            panel.set_title(measure.removesuffix(" nacl"), fontsize=9)
            panel.tick_params(labelsize=8, labelleft=measure == shown[0])
        told = ("here, each training", "here", "published")
        drawn.legend([*each, *here, *published], told, loc="outside lower center", ncols=3, fontsize=8)
        save(drawn, RESULTS.parent / "images" / "results_papers.svg")


PAGE = Page(
    RESULTS / "papers.md",
    {"published": published, "ours": ours, "minus CE": against(CE), "free step": against(STOCK, "temperature")},
    number,
    settings=frozenset({"0.1", "1.5625", "2.5"}),
    rows=(ROWS,),
    figure=figure,
)
