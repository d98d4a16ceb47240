"""``docs/results/free_step.md``: does a trainer beat a calibrator that is fitted afterwards? Hippocampus, and ACDC."""

import json

from page_acdc import PAIRS
from pages import Page
from pairs import COLUMNS
from pairs import head as head_of_differences
from scores import called
from tables import RESULTS, STOCK

from nnunet_calib.posthoc.folders.crossfit import NONE

ALONE = "`-tr` alone, the first 75% of its pair"
TRAINERS = ("MEEP", "NACL", "MbLS", "FL")
CHANGES = ("DSC", "HD95 mm", *COLUMNS[1:])


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def cells(means: dict) -> str:
    return " | ".join(
        f"{float(means[column]):.3f}" if column == "DSC" else f"{float(means[column]):.4f}" for column in COLUMNS
    )


def head(*first: str, columns: tuple[str, ...] = COLUMNS) -> list[str]:
    names = [*first, *columns]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def first_pair() -> list[str]:
    """Stock of pair 1 with every calibrator, and the trainers of the same pair."""
    lines = head("network", "calibrator", "voxels with another label")
    for row in rows("posthoc"):
        if row["network"] == "StockTrainer__pair" and row["method"] != "auto":
            lines.append(f"| stock | {row['method']} | {row['changed'] or 0} | {cells(row['means'])} |")
    for loss in TRAINERS:
        row = next(row for row in rows("hippocampus") if row["name"] == f"{loss}Trainer__pair")
        lines.append(f"| {loss}, `-tr` alone | none | | {cells(row['means'])} |")
    return lines


def both() -> list[str]:
    """Trainers of pair 1 (older defaults) with a calibrator, minus stock with the same one."""
    kept = {(row["network"], row["method"]): row.get("means") for row in rows("posthoc")}
    lines = head("network", "calibrator, of both")
    for network in ("MEEPTrainer__at_once_dice0p6", "MbLSTrainer__at_once_dice1"):
        for method in ("temperature", "classwise", "isotonic", "dirichlet", "local"):
            ours, stock = kept[network, method], kept["StockTrainer__pair", method]
            change = [f"{float(ours[c]) - float(stock[c]):+.{3 if c == 'DSC' else 4}f}" for c in COLUMNS]
            lines.append(f"| {network.partition('Trainer')[0]} | {method} | {' | '.join(change)} |")
    return lines


def changes() -> list[str]:
    """``-tr`` alone minus stock of the same pair, mean and range over pairs, and stock repeated minus itself."""
    kept = rows("hippocampus")
    by_training = {row["training"]: row["means"] for row in kept}
    lines = head("`-tr` alone, minus stock", "pairs", columns=CHANGES)
    for loss in TRAINERS:
        own = [row for row in kept if row["loss"] == loss and row["route"] == ALONE]
        lines.append(_line(loss, [(row["means"], by_training[row["start"]]) for row in own]))
    again = [row for row in kept if row["route"].startswith("stock again")]
    lines.append(_line("stock again", [(row["means"], by_training[row["start"]]) for row in again]))
    return lines


def _line(name: str, pairs: list[tuple[dict, dict]]) -> str:
    shown = []
    for column in CHANGES:
        digits = 2 if column == "HD95 mm" else 3
        away = [float(ours[column]) - float(stock[column]) for ours, stock in pairs]
        told = f"{sum(away) / len(away):+.{digits}f}"
        shown.append(told + (f" ({min(away):+.{digits}f} to {max(away):+.{digits}f})" if len(away) > 1 else ""))
    return f"| {name} | {len(pairs)} | {' | '.join(shown)} |"


def counts() -> list[str]:
    """On ACDC: how many trainers differ from stock plus isotonic in an interval that excludes no difference."""
    lines = head_of_differences("better, worse")
    for method in (NONE, "temperature", "isotonic"):
        cells = []
        for measure in COLUMNS:
            effects = [PAIRS.rows.effect(called(t, method), called(STOCK, "isotonic"), measure) for t in PAIRS.trainers]
            signs = [(effect.low > 0) - (effect.high < 0) for effect in effects]
            good = 1 if measure == "DSC" else -1
            cells.append(f"{signs.count(good)}, {signs.count(-good)}")
        name = "`-tr` alone" if method == NONE else f"`-tr` and {method}"
        lines.append(f"| {name}, of {len(PAIRS.trainers)} | {' | '.join(cells)} |")
    return lines


PAGE = Page(
    RESULTS / "free_step.md",
    {"first pair": first_pair, "both": both, "changes": changes, "counts": counts},
    PAIRS.rows.number,
    settings=frozenset({"0.6"}),
)
