"""Markdown tables of the kept rows of ``experiment_hippocampus.py``."""

import numpy as np
from kept import machines

from nnunet_calib.metrics.intervals import percentile_interval, resampled_means
from nnunet_calib.training.settings import CALIBRATE_FROM

REGIONS = ("volume", "reference_foreground", "foreground")
MEASURES = ("ECE", "CECE", "NLL", "Brier")
ALONE = "`-tr` alone, the first 75% of its pair"
PAIRED = ("DSC", "NLL foreground", "ECE foreground", "ECE volume")


def tables(rows: list[dict]) -> str:
    """Markdown: every kept row, its difference to stock of the same length, means by Dice weight, and the pairs."""
    columns = [f"{measure} {region}" for region in REGIONS for measure in MEASURES]
    first = [f"| loss | route | run | on | DSC | HD95 mm | {' | '.join(columns)} |", "|---" * (6 + len(columns)) + "|"]
    second = [f"| loss | route | run | minus stock | {' | '.join(PAIRED)} |", "|---" * (4 + len(PAIRED)) + "|"]
    letters = machines(rows)
    for row in rows:
        head, shown = f"| {row['loss']} | {row['route']} | {row['run']} |", row["means"]
        cells = [letters[row["machine"]], f"{float(shown['DSC']):.3f}", f"{float(shown['HD95 mm']):.2f}"]
        cells += [f"{float(shown[column]):.4f}" for column in columns]
        first.append(f"{head} {' | '.join(cells)} |")
        if row["loss"] != "Stock" and (cells := differences(row, rows)):
            second.append(f"{head} {' | '.join(cells)} |")
    return "\n\n".join("\n".join(lines) for lines in (first, second, by_dice_weight(rows), by_pair(rows)))


def differences(row: dict, rows: list[dict]) -> list[str]:
    """What a row is compared with, and its mean differences over the cases with 95 % bootstrap intervals.

    Trainings are not paired, only cases are: run 3 has no more to do with run 3 of stock than with run 1. So a row is
    compared, case by case, with the mean of all stock runs. Where it goes on from a finished stock network, or shares
    the first part with one, the chance of that training is in both, and only stock of the same start will do.

    Without values by case only the means are compared, and there is no interval. Rows whose values by case are lost
    keep the differences that they had.
    """
    if kept := row.get("differences"):
        return [f"run {kept['run']}", *(interval(*kept[column]) for column in PAIRED)]
    stock = runs_of(rows, f"StockTrainer__{row['control']}")
    same_start = [
        other for other in stock if row["control"] == "full" or row["start"] in (other["start"], other["training"])
    ]
    paired = [other for other in same_start if (other["cases"] or {}).get("case") == row["cases"]["case"]]
    if not paired:
        told = [f"{float(row['means'][c]) - mean_of(stock, c):+.4f}" for c in PAIRED] if stock else []
        return [f"mean of {len(stock)}, unpaired", *told] if told else []
    values = by_case(row) - np.mean([by_case(other) for other in paired], axis=0)
    resampled = resampled_means(values)
    cells = [f"mean of {len(paired)}" if len(paired) > 1 else f"run {paired[0]['run']}"]
    for column, mean in enumerate(values.mean(axis=0)):
        cells.append(interval(mean, *percentile_interval(resampled[:, column])))
    return cells


def runs_of(rows: list[dict], name: str) -> list[dict]:
    """All runs of a route of a trainer."""
    return [row for row in rows if row["name"].partition("_run")[0] == name]


def by_case(row: dict) -> np.ndarray:
    """(cases, ``PAIRED``)."""
    return np.array([row["cases"][column] for column in PAIRED], dtype=np.float64).T


def interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def mean_of(rows: list[dict], column: str) -> float:
    return float(np.mean([float(row["means"][column]) for row in rows]))


def by_dice_weight(rows: list[dict]) -> list[str]:
    """Markdown: losses that take over at once when the default would, minus the mean of all stock runs, by weight."""
    stock = runs_of(rows, "StockTrainer__full")
    switched = [row for row in rows if row["settings"].get("calibrate_from") == CALIBRATE_FROM]
    losses = list(dict.fromkeys(row["loss"] for row in switched))
    lines = [f"| Dice weight | minus stock | {' | '.join(losses)} |", "|---" * (2 + len(losses)) + "|"]
    for weight in sorted({row["settings"]["dice_weight"] for row in switched}):
        for column in ("DSC", "ECE foreground", "NLL foreground"):
            cells = []
            for loss in losses:
                own = [r for r in switched if (r["loss"], r["settings"]["dice_weight"]) == (loss, weight)]
                away = [float(row["means"][column]) - mean_of(stock, column) for row in own]
                digits = 3 if column != "NLL foreground" else 2
                told = f"{np.mean(away):+.{digits}f}" if own else "not run"
                if len(own) > 1:
                    told += f" ({', '.join(f'{value:+.{digits}f}' for value in away)})"
                cells.append(told)
            lines.append(f"| {weight:g} | {column} | {' | '.join(cells)} |")
    return lines


def by_pair(rows: list[dict]) -> list[str]:
    """Markdown: what another trainer does from the same first part, mean over pairs and each of them."""
    stocks = {row["training"]: row for row in runs_of(rows, "StockTrainer__pair")}
    number = {training: row["run"] for training, row in stocks.items()}
    ours = [row for row in rows if row["control"] == "pair" and row["start"] in stocks]
    columns = ("DSC", "ECE foreground", "NLL foreground", "ECE volume", "NLL volume")
    lines = [f"| loss | how | pairs | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    if stocks:
        cells = [f"{mean_of(list(stocks.values()), column):.4f}" for column in columns]
        lines.append(f"| Stock itself | | {len(stocks)} | {' | '.join(cells)} |")
    kinds = dict.fromkeys((row["loss"], row["route"]) for row in sorted(ours, key=lambda row: row["route"] != ALONE))
    for loss, route in kinds:
        own = sorted(
            (row for row in ours if (row["loss"], row["route"]) == (loss, route)), key=lambda r: number[r["start"]]
        )
        cells = []
        for column in columns:
            away = [float(row["means"][column]) - float(stocks[row["start"]]["means"][column]) for row in own]
            cells.append(f"{np.mean(away):+.4f} ({', '.join(f'{value:+.3f}' for value in away)})")
        told = "**`-tr` alone**" if route == ALONE else route.rpartition(",")[0]
        lines.append(f"| {loss} | {told} | {', '.join(str(number[r['start']]) for r in own)} | {' | '.join(cells)} |")
    return lines
