"""Few-shot under domain shift: the right ventricle, which a 2d network of ACDC never saw, on ACDC and on MS-CMR.

    python scripts/experiment_heart.py DATA -o WORK [--sets 2] [-k 1 3 5]
    python scripts/experiment_heart.py DATA -o WORK --csv

DATA holds ``Dataset027_ACDC`` and ``Dataset019_MSCMRbSSFP``. Eight patients of each, end-diastole in ACDC, are supports
and queries: from the same data set, and from the other. MS-CMR's labels get ACDC's values. The public copy of ACDC has
nominal spacing and axes: distances are told in no table, and MS-CMR's volumes are laid like those of ACDC, slices from
base to apex in the same axes, or they would lie across them. Resumable; ``--csv`` writes
``docs/results/fewshot_heart.csv``.
"""

import argparse
import itertools
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from experiment_combined import LIMIT_S, means
from experiment_fewshot import VOXELS, Base, Study, resampled
from kept import FOLDER, csv_text

from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
from nnunet_calib.fewshot.measure.pairs import read_pairs
from nnunet_calib.fewshot.measure.protocols import REAL
from nnunet_calib.fewshot.measure.trials import grid
from nnunet_calib.fewshot.volume.registration import Registration

HEART = Study(
    name="heart",
    source="Dataset027_ACDC",
    unseen=(("rv",),),
    spacing=(2.5, 2.5, None),
    patch=[96, 96],
    features=[12, 24, 48, 96, 96],
    strides=[[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]],
    kernels=[[3, 3]] * 5,
    epochs=10,
    steps=100,
    configuration="2d",
    batch=8,
)
OTHER, TO_ACDC = "Dataset019_MSCMRbSSFP", {1: 2, 2: 3, 3: 1}
CASES = 8  # of each data set
STRUCTURE = "rv"
ARMS = tuple(itertools.product(("ACDC", "MS-CMR"), repeat=2))  # supports, queries


def laid_as(axes: tuple[float, ...], image: SimpleITK.Image) -> SimpleITK.Image:
    """The same voxels with the axes of another volume."""
    image.SetDirection(axes)
    return image


def write_cases(base: Base, data: Path) -> None:
    """The eight cases of each data set, at the network's spacing, with ACDC's values and axes."""
    ends = sorted((base.source / "labelsTs").glob("*_frame01.nii.gz"))[:CASES]
    axes = SimpleITK.ReadImage(str(ends[0])).GetDirection()
    others = sorted((data / OTHER / "labelsTs").glob("*.nii.gz"))[:CASES]
    for name, labels, values in (("ACDC", ends, {1: 1, 2: 2, 3: 3}), ("MS-CMR", others, TO_ACDC)):
        for file in labels:
            case = file.name.removesuffix(".nii.gz")
            target = base.folder / name / "labels" / file.name
            if target.exists():
                continue
            (base.folder / name / "images").mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            scan = SimpleITK.ReadImage(str(file.parents[1] / "imagesTs" / f"{case}_0000.nii.gz"))
            image = resampled(scan, base.study.spacing, nearest=False)
            given = resampled(SimpleITK.ReadImage(str(file)), base.study.spacing, nearest=True)
            if name == "MS-CMR":
                image, given = (laid_as(axes, one[:, :, ::-1]) for one in (image, given))
            SimpleITK.WriteImage(image, str(base.folder / name / "images" / f"{case}_0000.nii.gz"))
            voxels = SimpleITK.GetArrayFromImage(given)
            mapped = np.zeros(voxels.shape, np.uint8)
            for value, ours in values.items():
                mapped[voxels == value] = ours
            made = SimpleITK.GetImageFromArray(mapped)
            made.CopyInformation(given)
            SimpleITK.WriteImage(made, str(target))


def evaluate(base: Base, ks: list[int], sets: int) -> None:
    """A line for every pair that has none yet."""
    tried = grid(["linear"], [12], ["aligned"], ks, [REAL], most_sets=sets)
    tried += grid(["prototype"], [1], ["aligned"], ks, [REAL], most_sets=sets)
    how = [Registration("deformable", LIMIT_S)]
    tried += grid(["linear", "registration"], [12], ["aligned"], ks, [REAL], most_sets=sets, registrations=how)
    for supports, queries in ARMS:
        same = supports == queries
        evaluate_folder(
            base.model,
            base.folder / supports / "images",
            base.folder / supports / "labels",
            base.folder / f"from {supports} to {queries}",
            name=STRUCTURE,
            value=base.labels[STRUCTURE],
            trials=tried,
            query_images=None if same else base.folder / queries / "images",
            query_labels=None if same else base.folder / queries / "labels",
            folds=["0"],
            mirroring=False,
            voxels=VOXELS,
            progress=False,
        )
        print(supports, queries, "done", flush=True)


def table(base: Base) -> str:
    """CSV: means over pairs, of every direction, head and k."""
    rows: list[dict[str, Any]] = []
    about = {"date": str(date.today()), "machine": f"{os.cpu_count()} CPU cores of {platform.machine()}"}
    for supports, queries in ARMS:
        records = read_pairs(base.folder / f"from {supports} to {queries}" / "pairs.jsonl")
        for head, how, k in sorted({(one["head"], one["registration"], one["k"]) for one in records}, key=str):
            pairs = [one for one in records if (one["head"], one["registration"], one["k"]) == (head, how, k)]
            kind = {"supports": supports, "queries": queries, "head": head, "registration": how, "k": k}
            rows.append(kind | {name: v for name, v in means(pairs).items() if "HD95" not in name} | about)
    return csv_text(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("-k", type=int, nargs="+", default=[1, 3, 5], help="supports (default: 1 3 5)")
    parser.add_argument("--sets", type=int, default=2, help="of k supports (default: 2)")
    parser.add_argument("--csv", action="store_true", help="write docs/results/fewshot_heart.csv from what is in WORK")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = Base(HEART, 0, args.data, args.work)
    if args.csv:
        write_whole(FOLDER / "fewshot_heart.csv", table(base))
        return 0
    base.prepare()
    write_cases(base, args.data)
    base.finish()
    evaluate(base, args.k, args.sets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
