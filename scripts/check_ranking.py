"""Does ``fewshot rank`` put first what is segmented worst? The expected error of every case beside the true one.

    python scripts/check_ranking.py WORK/brain_035/combined/pairs.jsonl [...] [--csv]

The pairs are of ``experiment_combined.py`` or of ``fewshot evaluate``; files are told apart by the folder above. As
in ``rank``, the need of a case is 1 minus the expected Dice, 1 where the structure is called absent, the mean over
structures; its error is 1 minus the true Dice, the mean over the same. A row of ``docs/results/fewshot_ranking.csv``
has for a head and k Spearman's correlation of the two over the cases of each set of supports, the mean over sets, how
often the case that is put first is the worst, and the correlation over all pairs of a case and a structure.
"""

import argparse
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
from kept import FOLDER, csv_text
from scipy.stats import spearmanr

from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.measure.pairs import read_pairs

TABLE = "fewshot_ranking.csv"
FEWEST = 3  # cases that can be in an order that says anything


def rows(study: str, records: list[dict]) -> list[dict]:
    """A row for every head with probabilities, registration and k."""
    arms = defaultdict(list)
    for record in records:
        if record["protocol"] == "P2" and np.isfinite(record.get("expected_dice") or np.nan):
            arms[record["head"], record["registration"], record["k"]].append(record)
    made = []
    for (head, how, k), pairs in sorted(arms.items(), key=str):
        sets: dict[tuple, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        for one in pairs:
            need = 1.0 if one["absent"] else 1 - one["expected_dice"]
            sets[tuple(one["supports"])][one["query"]].append((need, 1 - one["Dice"]))
        found, first, chance = [], [], []
        for cases in sets.values():
            if len(cases) < FEWEST:
                continue
            need, error = np.array([np.mean(values, axis=0) for values in cases.values()]).T
            found.append(spearmanr(need, error).statistic)
            first.append(error[need.argmax()] == error.max())
            chance.append(1 / len(cases))
        every = np.array([value for cases in sets.values() for values in cases.values() for value in values]).T
        made.append(
            {
                "study": study,
                "head": head,
                "registration": how,
                "k": k,
                "sets": len(found),
                "cases_a_set": len(next(iter(sets.values()))),
                "spearman_of_cases": round(float(np.mean(found)), 3) if found else "",
                "first_is_worst": round(float(np.mean(first)), 3) if found else "",
                "by_chance": round(float(np.mean(chance)), 3) if found else "",
                "pairs": len(pairs),
                "spearman_of_pairs": round(float(spearmanr(*every).statistic), 3),
                "expected_error": round(float(every[0].mean()), 3),
                "error": round(float(every[1].mean()), 3),
                "date": str(date.today()),
            }
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", metavar="PAIRS", type=Path, nargs="+", help="pairs.jsonl")
    parser.add_argument("--csv", action="store_true", help=f"write docs/results/{TABLE}")
    args = parser.parse_args()
    text = csv_text([row for file in args.pairs for row in rows(file.parent.parent.name, read_pairs(file))])
    if args.csv:
        write_whole(FOLDER / TABLE, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
