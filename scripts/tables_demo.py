"""The tables of ``docs/demo.md`` from finished demos, one a seed; the first is shown whole.

for seed in 0 1 2 3 4; do nnunet-calib demo --seed $seed -o demo_$seed; done
python scripts/tables_demo.py demo_0 demo_1 demo_2 demo_3 demo_4
"""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

from nnunet_calib.data.files import read_json, write_whole
from nnunet_calib.demo.workflow import CALIBRATED, FINETUNED, NAMES, STOCK, Workflow

ROOT = Path(__file__).resolve().parents[1]
PAGE, ROWS = ROOT / "docs" / "demo.md", ROOT / "docs" / "results" / "demo.csv"
START, END = "<!-- seeds -->\n", "<!-- end of seeds -->"
FIELDS = ("seed", "name", "dice", "hd95", "ece", "cece", "nll")


def rows(folder: Path) -> list[dict]:
    """The rows of a finished demo, with its seed."""
    seed = read_json(folder / "demo.json")["seed"]
    return [{"seed": seed, **asdict(row)} for row in Workflow(folder, "cpu", seed).rows()]


def tables(found: list[dict]) -> str:
    """One seed whole, and ECE of all of them."""
    seeds = sorted({int(row["seed"]) for row in found})
    of = {(int(row["seed"]), row["name"]): {name: float(row[name]) for name in FIELDS[2:]} for row in found}
    lines = [f"| seed {seeds[0]} | DSC | HD95 mm | ECE | CECE | NLL |", "|---" * 6 + "|"]
    for name in NAMES.values():
        row = of[seeds[0], name]
        digits = (f"{row[key]:.{2 if key == 'hd95' else 3}f}" for key in FIELDS[2:])
        lines.append(f"| {name} | {' | '.join(digits)} |")
    lines += ["", f"| ECE by seed | {' | '.join(map(str, seeds))} |", "|---" * (len(seeds) + 1) + "|"]
    for name in NAMES.values():
        errors = (of[seed, name]["ece"] for seed in seeds)
        lines.append(f"| {name} | {' | '.join(f'{error:.3f}' for error in errors)} |")
    stock = NAMES[STOCK]
    for run, short in (*CALIBRATED.items(), (FINETUNED, "MEEP")):
        ratios = (of[seed, NAMES[run]]["ece"] / of[seed, stock]["ece"] for seed in seeds)
        lines.append(f"| {short} / stock | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    dice = (f"{of[seed, stock]['dice']:.3f}, {of[seed, NAMES[FINETUNED]]['dice']:.3f}" for seed in seeds)
    return "\n".join([*lines, f"| DSC of stock, MEEP | {' | '.join(dice)} |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", nargs="*", type=Path, help="their folders; rows of other seeds are kept")
    args = parser.parse_args()
    kept = {}
    if ROWS.exists():
        with ROWS.open(newline="") as stream:
            kept = {(row["seed"], row["name"]): row for row in csv.DictReader(stream)}
    for folder in args.demos:
        kept |= {(str(row["seed"]), row["name"]): row for row in rows(folder)}
    with ROWS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept.values(), key=lambda row: int(row["seed"])))
    before, _, rest = PAGE.read_text().partition(START)
    write_whole(PAGE, f"{before}{START}{tables(list(kept.values()))}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
