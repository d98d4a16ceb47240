"""Tables of ``docs/results/free_step.md`` from the kept rows; ``verify`` compares them with what the page says.

python scripts/evidence/pages.py write
python scripts/evidence/pages.py verify
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from nnunet_calib.data.files import write_whole

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PAGE = RESULTS / "free_step.md"
COLUMNS = ("DSC", "NLL volume", "NLL foreground", "ECE foreground", "ECE reference_foreground", "ECE volume")
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


TABLES = {"first pair": first_pair, "both": both, "changes": changes}


def written(text: str) -> str:
    """The page with its tables written anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise ValueError(f"{PAGE}: no mark for the table {name}")
        table = "\n".join(make())
        text = f"{before}{start}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def differences(text: str) -> Iterator[str]:
    """Lines of the page that its rows do not give."""
    for said, computed in zip(text.splitlines(), written(text).splitlines(), strict=False):
        if said != computed:
            yield f"{PAGE.name} says {said!r}, the rows give {computed!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "verify"))
    args = parser.parse_args()
    text = PAGE.read_text()
    if args.verb == "write":
        write_whole(PAGE, written(text))
        return 0
    found = list(differences(text)) or ([] if text == written(text) else [f"{PAGE.name}: lines are missing"])
    print("\n".join(found) or f"{PAGE.name}: every number of its tables is what the rows give")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(main())
