"""``docs/results/shift.md``: networks trained on ACDC, and calibrators from there, on another hospital's scans."""

from matplotlib import rc_context
from matplotlib.figure import Figure
from page_acdc import PAIRS
from pages import Page
from pairs import COLUMNS, Pairs, head, with_interval
from scores import called, read_lines
from tables import RESULTS, STOCK, Rows

from nnunet_calib.report.diagram import COLOURS, MARKERS, STYLE, save

ROWS = PAIRS.rows
THERE = Rows(ROWS.protocol.shifted())
SHOWN = ("ECE foreground", "NLL foreground", "ECE reference_foreground", "NLL volume")  # in the figure
CHECKS = RESULTS / "shift_check.csv"


def changes() -> list[str]:
    """Each calibrator of stock minus stock raw: at home by cross-fitting, and there."""
    lines = head("stock with, minus stock raw", "on", "patients")
    for rows, place in ((ROWS, "ACDC"), (THERE, "MS-CMR")):
        for method in rows.protocol.content["methods"]:
            effects = [rows.effect(called(STOCK, method), STOCK, column) for column in COLUMNS]
            cells = [with_interval(effect, column) for effect, column in zip(effects, COLUMNS, strict=True)]
            lines.append(f"| {method} | {place} | {effects[0].patients} | {' | '.join(cells)} |")
    return lines


def checks() -> list[str]:
    """What ``calibrate check`` says."""
    lines = ["| network | PSI | p | verdict | mean confidence there | at the fit | single cases unlike the fit |"]
    lines.append("|---" * 7 + "|")
    for line in read_lines(CHECKS):
        numbers = [f"{float(line[name]):.3f}" for name in ("psi", "p")]
        means = [f"{float(line[name]):.3f}" for name in ("confidence", "fit_confidence")]
        verdict = "unlike the fit" if line["shifted"] == "True" else "like the fit"
        single = f"{line['unlike']} of {line['cases']}"
        lines.append(f"| {line['training']} | {' | '.join(numbers)} | {verdict} | {' | '.join(means)} | {single} |")
    return lines


def figure() -> None:
    """What each calibrator changes: at home, there, and there when it was fitted there."""
    methods = ROWS.protocol.content["methods"]
    places = ((ROWS, "", "fitted and used on ACDC"), (THERE, "", "fitted on ACDC, used on MS-CMR"))
    places += ((THERE, "@new", "fitted and used on MS-CMR"),)
    with rc_context(STYLE):
        drawn = Figure(figsize=(9, 2.6), layout="constrained")
        panels = drawn.subplots(1, len(SHOWN))
        for panel, measure in zip(panels, SHOWN, strict=True):
            panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
            for place, (rows, fitted, name) in enumerate(places):
                how = {"color": ("0.35", *COLOURS)[place], "marker": MARKERS[place], "linestyle": "none"}
                effects = [rows.effect(called(STOCK, method + fitted), STOCK, measure) for method in methods]
                heights = [y + 0.25 * (place - 1) for y in range(len(methods))]
                for y, effect in zip(heights, effects, strict=True):
                    panel.plot([effect.low, effect.high], [y, y], color=how["color"], linewidth=1.2)
                panel.plot([effect.mean for effect in effects], heights, markersize=4.5, label=name, **how)
            panel.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.5, -0.5))
            panel.set_title(f"{measure.replace('reference_', 'reference ')}, minus raw", fontsize=9)
            panel.tick_params(labelsize=8, labelleft=measure == SHOWN[0])
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        save(drawn, RESULTS.parent / "images" / "results_shift.svg")


def number(what: str) -> float:
    """Marks of ACDC begin with ``ACDC``."""
    return ROWS.number(what.removeprefix("ACDC ")) if what.startswith("ACDC ") else THERE.number(what)


PAGE = Page(
    RESULTS / "shift.md",
    {"calibrated": Pairs(THERE).free_step, "changes": changes, "checks": checks, "trainers": Pairs(THERE).differences},
    number,
    rows=(THERE,),
    figure=figure,
)
