"""How supports vote: what was chosen from, on volumes that the other tables do not show, by registration alone.

    python scripts/experiment_vote.py DATA -o WORK

DATA holds ``Dataset035_Brain`` and ``Dataset020_CHAOST2``; the volumes are the first five training cases of each, those
that networks of ``experiment_fewshot.py`` are trained on (no network is used here), every one a query of all sets of k
neighbours. Spacings and structures are those of the other tables. WORK keeps registrations; the rows are
``docs/results/fewshot_vote.csv``.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from experiment_fewshot import STUDIES, VALIDATED, Study
from experiment_registration import HOW, Case, read_case
from kept import FOLDER, csv_text

from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.volume import atlas
from nnunet_calib.fewshot.volume.registrar import Registrar

TABLE = "fewshot_vote.csv"
CASES = 5
HERE = [(0, 0, 0)]
VOTES = {
    "one vote each": {"_STEPS": HERE, "_POWER": 0},
    "by likeness at the place": {"_STEPS": HERE, "_WINDOW": 1.5, "_POWER": 2},
    "and at 18 places around": {"_STEPS": atlas._STEPS},
    "window 1": {"_WINDOW": 1.0},
    "window 1.5": {"_WINDOW": 1.5},
    "exponent 2": {"_POWER": 2},
    "exponent 4": {"_POWER": 4},
    "noise 0.03": {"_LEAST": 3e-2},
}
"""Names of what is chosen, and the constants of ``atlas`` that differ from the third, the default."""


def neighbours(cases: list[str], k: int) -> Iterator[tuple[list[str], str]]:
    """Every set of k neighbours, and each case outside of it."""
    for first in range(len(cases)):
        supports = [cases[(first + i) % len(cases)] for i in range(k)]
        yield from ((supports, query) for query in cases if query not in supports)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * np.count_nonzero(one & other) / max(np.count_nonzero(one) + np.count_nonzero(other), 1))


def rows(study: Study, data: Path, work: Path, ks: list[int]) -> Iterator[dict]:
    """Mean DSC over structures and pairs of a set and a query, by vote and k."""
    source = data / study.source
    values = json.loads((source / "dataset.json").read_text())["labels"]
    images = sorted((source / "imagesTr").glob("*.nii.gz"))[:-VALIDATED][:CASES]
    cases: dict[str, Case] = {}
    for image in images:
        name = image.name.removesuffix("_0000.nii.gz")
        cases[name] = read_case(study, image, source / "labelsTr" / f"{name}.nii.gz")
    registrar = Registrar(work / "registrations")
    for vote, constants in VOTES.items():
        for k in ks:
            found, begin = [], time.process_time()
            for supports, query in neighbours(list(cases), k):
                for name in study.novel:
                    labelled = [cases[one].labelled(values[name]) for one in supports]
                    with mock.patch.multiple(atlas, **constants):
                        carried = atlas.carry(cases[query].anatomy, labelled, HOW, registrar)
                    found.append(dice(carried.log_odds > 0, cases[query].labels == values[name]))
            spent = (time.process_time() - begin) / len(found)
            about = {"study": study.name, "vote": vote, "k": k, "pairs": len(found), "date": str(date.today())}
            yield about | {"Dice": round(float(np.mean(found)), 4), "seconds": round(spent, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("-o", dest="work", metavar="WORK", type=Path, required=True)
    parser.add_argument("-k", type=int, nargs="+", default=[1, 3], help="supports (default: 1 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = []
    for study in STUDIES:
        for row in rows(study, args.data, args.work, args.k):
            print(row, flush=True)
            made.append(row)
    write_whole(FOLDER / TABLE, csv_text(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
