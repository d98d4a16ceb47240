"""``docs/results/shift.md``: networks trained on ACDC, and calibrators from there, on another hospital's scans."""

from page_acdc import COLUMNS, ROWS, digits, free_step, head, with_interval
from pages import Page
from scores import called, read_lines
from tables import RESULTS, STOCK, Rows

from nnunet_calib.posthoc.folders.crossfit import NONE

THERE = Rows(ROWS.protocol.shifted())
CHECKS = RESULTS / "shift_check.csv"


def calibrated() -> list[str]:
    """Stock on the other data set with calibrators from here and from there."""
    return free_step(THERE)


def changes() -> list[str]:
    """Each calibrator of stock minus stock raw: at home by cross-fitting, and there."""
    lines = head("stock with, minus stock raw", "on", "patients")
    for rows, place in ((ROWS, "ACDC"), (THERE, "MS-CMR")):
        for method in rows.protocol.content["methods"]:
            effects = [rows.effect(called(STOCK, method), STOCK, column) for column in COLUMNS]
            cells = [with_interval(effect, column) for effect, column in zip(effects, COLUMNS, strict=True)]
            lines.append(f"| {method} | {place} | {effects[0].patients} | {' | '.join(cells)} |")
    return lines


def trainers() -> list[str]:
    """Every trainer there, minus stock there."""
    lines = head("minus stock", "pairs")
    for label in (label for label in THERE.labels if label != STOCK):
        cells = []
        for column in COLUMNS:
            effect = THERE.effect(called(label, NONE), STOCK, column)
            each = ", ".join(f"{value:+.{digits(column)}f}" for value in effect.each)
            cells.append(with_interval(effect, column) + (f"; each {each}" if len(effect.each) > 1 else ""))
        lines.append(f"| {label} | {len(THERE.numbers_of(label))} | {' | '.join(cells)} |")
    return lines


def checks() -> list[str]:
    """What ``calibrate check`` says."""
    lines = [
        "| network | PSI | largest by chance | shifted | mean confidence there | at the fit | cases above their limit |"
    ]
    lines.append("|---" * 7 + "|")
    for line in read_lines(CHECKS):
        numbers = [f"{float(line[name]):.3f}" for name in ("psi", "limit")]
        means = [f"{float(line[name]):.3f}" for name in ("confidence", "fit_confidence")]
        lines.append(
            f"| {line['training']} | {' | '.join(numbers)} | {'yes' if line['shifted'] == 'True' else 'no'} | "
            f"{' | '.join(means)} | {line['cases_above']} of 20 |"
        )
    return lines


def number(what: str) -> float:
    """Marks of ACDC begin with ``ACDC``."""
    return ROWS.number(what.removeprefix("ACDC ")) if what.startswith("ACDC ") else THERE.number(what)


PAGE = Page(
    RESULTS / "shift.md",
    {"calibrated": calibrated, "changes": changes, "checks": checks},
    number,
    rows=(THERE,),
)
