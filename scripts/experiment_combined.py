"""Head, registration, and both, on the features of a base network that was trained for a few hundred steps.

    python scripts/experiment_combined.py DATA -o WORK [--only brain] [--sets 3] [-k 1 3]
    python scripts/experiment_combined.py DATA -o WORK --only brain --cropped
    python scripts/experiment_combined.py DATA -o WORK --csv

Data, base networks and structures are those of ``experiment_fewshot.py``, with fewer steps of training; in CHAOS two
organs are left out at once. Sets of k supports are fewer too. Resumable; the rows of WORK that are finished are written
to ``docs/results/fewshot_combined.csv`` by ``--csv``. ``--cropped`` tries other fields of view: three whole supports
and three queries that lack a half, and the reverse.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from experiment_fewshot import STUDIES, VOXELS, Base, Study
from kept import FOLDER, csv_text

from nnunet_calib.data.files import write_whole
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
from nnunet_calib.fewshot.measure.pairs import read_pairs
from nnunet_calib.fewshot.measure.protocols import REAL
from nnunet_calib.fewshot.measure.trials import Trial, grid
from nnunet_calib.fewshot.volume.registration import Registration

EPOCHS = {"brain": 8, "chaos": 6}
UNSEEN = {"chaos": (("liver", "left_kidney"), ("right_kidney", "spleen"))}
LIMIT_S = 600.0  # of a shared machine: nothing is cut short
NUMBERS = ("Dice", "HD95", "NLL_volume", "NLL_volume_oracle", "Brier_volume", "Brier_volume_oracle", "ECE_volume")
SECONDS = ("seconds", "seconds_registration")
TABLE = "fewshot_combined.csv"
VIEWS = ("whole", "queries_cropped", "supports_cropped")


def short(study: Study) -> Study:
    """With fewer steps, and fewer base networks."""
    return replace(study, epochs=EPOCHS[study.name], unseen=UNSEEN.get(study.name, study.unseen))


def trials(ks: Sequence[int], sets: int) -> list[Trial]:
    """Today's head, and both ways of registration beside it and alone."""
    alone = grid(["linear"], [12], ["aligned"], ks, [REAL], most_sets=sets)
    hows = [Registration(kind, LIMIT_S) for kind in ("deformable", "affine")]
    return alone + grid(["linear", "registration"], [12], ["aligned"], ks, [REAL], most_sets=sets, registrations=hows)


def evaluate(
    base: Base, tried: Sequence[Trial], checkpoint: str, model: Path | None = None, folder: str = "combined"
) -> None:
    """A line for every pair that has none yet; of the base network, or of one that was trained on from it."""
    for name in base.novel:
        evaluate_folder(
            model or base.model,
            base.new / "images",
            base.new / "labels",
            base.folder / folder,
            name=name,
            value=base.labels[name],
            trials=tried,
            base_labels=base.new / "base",
            folds=["0"],
            checkpoint=checkpoint,
            mirroring=False,
            voxels=VOXELS,
            progress=False,
        )
        print(base.study.name, name, "done", flush=True)


def halves(base: Base) -> None:
    """Three cases to support and three to try on, each whole and without the half of lower x."""
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (base.new / "labels").iterdir())
    for number, case in enumerate(cases):
        part = "supports" if number % 2 else "queries"
        for kind, name in (("images", f"{case}_0000.nii.gz"), ("labels", f"{case}.nii.gz")):
            image = SimpleITK.ReadImage(str(base.new / kind / name))
            for view, made in (("whole", image), ("cropped", image[image.GetWidth() // 2 :, :, :])):
                target = base.folder / "views" / f"{part}_{view}" / kind / name
                target.parent.mkdir(parents=True, exist_ok=True)
                SimpleITK.WriteImage(made, str(target))


def evaluate_views(base: Base, checkpoint: str) -> None:
    """All supports and queries whole; then one of them cropped."""
    halves(base)
    hows = [Registration("deformable", LIMIT_S)]
    tried = grid(["linear"], [12], ["aligned"], [3], [REAL])
    tried += grid(["linear", "registration"], [12], ["aligned"], [3], [REAL], registrations=hows)
    for view in VIEWS:
        supports, queries = (
            base.folder / "views" / f"{part}_{'cropped' if view == part + '_cropped' else 'whole'}"
            for part in ("supports", "queries")
        )
        for name in base.novel:
            evaluate_folder(
                base.model,
                supports / "images",
                supports / "labels",
                base.folder / view,
                name=name,
                value=base.labels[name],
                trials=tried,
                query_images=queries / "images",
                query_labels=queries / "labels",
                folds=["0"],
                checkpoint=checkpoint,
                mirroring=False,
                voxels=VOXELS,
                progress=False,
            )
        print(base.study.name, view, "done", flush=True)


def views_table(bases: Sequence[Base]) -> str:
    """CSV: means over pairs and structures of every field of view and arm."""
    rows = []
    for base in bases:
        for view in VIEWS:
            records = read_pairs(base.folder / view / "pairs.jsonl")
            for arm in dict.fromkeys((one["head"], one["registration"]) for one in records):
                pairs = [one for one in records if (one["head"], one["registration"]) == arm]
                kind = {"study": base.study.name, "view": view, "head": arm[0], "registration": arm[1], "k": 3}
                rows.append(kind | means(pairs) | {"date": str(date.today())})
    return csv_text(rows)


def table(bases: Sequence[Base]) -> str:
    """CSV: means over pairs of every arm, k and structure; of all structures where all are there."""
    rows: list[dict[str, Any]] = []
    about = {"date": str(date.today()), "machine": f"{os.cpu_count()} CPU cores of {platform.machine()}"}
    for study in dict.fromkeys(base.study.name for base in bases):
        own = [base for base in bases if base.study.name == study]
        records = [record for base in own for record in read_pairs(base.folder / "combined" / "pairs.jsonl")]
        novel = [name for base in own for name in base.novel]
        arms = dict.fromkeys((record["head"], record["registration"], record["k"]) for record in records)
        for head, how, k in sorted(arms, key=str):
            pairs = [one for one in records if (one["head"], one["registration"], one["k"]) == (head, how, k)]
            groups = {name: [one for one in pairs if one["structure"] == name] for name in novel}
            if all(groups.values()):
                groups["all"] = pairs
            kind = {"study": study, "head": head, "registration": how, "k": k}
            rows += [kind | {"structure": name} | means(there) | about for name, there in groups.items() if there]
    return csv_text(rows)


def means(members: Sequence[dict]) -> dict[str, Any]:
    """Means over pairs; of HD95 the median besides, for one missed structure makes the mean infinite."""
    row: dict[str, Any] = {"pairs": len(members), "missed": sum(one["Dice"] == 0 for one in members)}
    for name in (*NUMBERS, *SECONDS):
        values = np.array([float(one.get(name, np.nan)) for one in members])
        row[name] = round(float(np.nanmean(values)), 4)
        if name == "HD95":
            row["HD95_median"] = round(float(np.nanmedian(values)), 2)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--only", choices=[study.name for study in STUDIES])
    parser.add_argument("-k", type=int, nargs="+", default=[1, 3, 5], help="supports (default: 1 3 5)")
    parser.add_argument("--sets", type=int, default=3, help="of k supports (default: 3)")
    parser.add_argument("-chk", default=CHECKPOINT, help=f"of the base networks (default: {CHECKPOINT})")
    parser.add_argument("--cropped", action="store_true", help="other fields of view instead, with three supports")
    parser.add_argument("--csv", action="store_true", help=f"write docs/results/{TABLE} from what is in WORK")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bases = [
        Base(short(study), index, args.data, args.work)
        for study in STUDIES
        if args.only in (None, study.name)
        for index in range(len(short(study).unseen))
    ]
    if args.csv:
        write_whole(FOLDER / TABLE, table([one for one in bases if (one.folder / "combined" / "pairs.jsonl").exists()]))
        if viewed := [one for one in bases if (one.folder / VIEWS[-1] / "pairs.jsonl").exists()]:
            write_whole(FOLDER / "fewshot_views.csv", views_table(viewed))
        return 0
    for base in bases:
        base.prepare()
        if not (base.model / "fold_0" / args.chk).exists():
            base.finish()
        if args.cropped:
            evaluate_views(base, args.chk)
        else:
            evaluate(base, trials(args.k, args.sets), args.chk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
