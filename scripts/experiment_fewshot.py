"""A new structure from a few volumes: base networks that never saw it, then heads x chunks x extents x k.

    python scripts/experiment_fewshot.py DATA -o WORK [--only brain] [--stage base]
    python scripts/experiment_fewshot.py DATA -o WORK --csv

Finished rows are kept in ``docs/results/fewshot.json``; ``--csv`` adds those of WORK and writes the tables.

DATA holds ``Dataset035_Brain`` and ``Dataset020_CHAOST2`` in nnU-Net raw format with ``labelsTs``. Both are brought to
a coarser spacing and some structures become background; a small network is trained on the others with
``nnUNetv2_train``. Unattended and resumable: what is finished in WORK is not done again.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from kept import FOLDER, measured, number, put, read_rows, write_csvs, write_rows

from nnunet_calib.data.files import write_whole
from nnunet_calib.data.plans import add_configuration, read_plans
from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
from nnunet_calib.fewshot.measure.pairs import read_pairs
from nnunet_calib.fewshot.measure.protocols import REAL
from nnunet_calib.fewshot.measure.scores import summarise
from nnunet_calib.fewshot.measure.trials import Trial, grid

ARMS = {
    "new": "supports and queries that the base network was not trained on, each tried on the others",
    "trained": "supports out of the base network's training cases, queries that are new",
}
HEADS = ("linear", "local_prototypes", "prototype")
ADAPTER = "adapter"  # trained for each set of supports
CHUNKS = (1, 3, 6, 12)
EXTENTS = ("aligned", "volume")
KS = (1, 3, 5)
MAIN = ((HEADS[0], CHUNKS[-1]), (HEADS[-1], CHUNKS[0]))  # the default, and global prototypes
ENTROPIES = (0.0, 0.1, 1.0)  # weights of the entropy in the refinement on a query; 0 is the volume prior alone
SETS = 3  # of k supports, of as many as there are supports
VOXELS = 8000  # sampled of each support; its structures have 100 to 2,500

VALIDATED = 2  # training cases that nnU-Net validates on; they are supports like the others


@dataclass(frozen=True)
class Study:
    """Base networks of one kind, and the structures that each of them never saw."""

    name: str
    source: str
    """Data set in nnU-Net raw format."""
    unseen: tuple[tuple[str, ...], ...]
    """For each base network the labels that become background."""
    spacing: tuple[float | None, ...]
    """x, y, z in mm; None keeps the image's own."""
    patch: list[int]
    features: list[int]
    strides: list[list[int]]
    kernels: list[list[int]]
    epochs: int
    steps: int
    configuration: str = "3d_fullres"
    batch: int = 2

    @property
    def novel(self) -> tuple[str, ...]:
        """All structures that are novel to one of the base networks."""
        return tuple(itertools.chain.from_iterable(self.unseen))


STUDIES = (
    Study(
        name="brain",
        source="Dataset035_Brain",
        unseen=(("hippocampus", "amygdala", "putamen", "caudate", "brain_stem"),),
        spacing=(2.0, 2.0, 2.0),
        patch=[40, 48, 40],
        features=[16, 32, 64, 128],
        strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        kernels=[[3, 3, 3]] * 4,
        epochs=15,
        steps=100,
    ),
    Study(
        name="chaos",
        source="Dataset020_CHAOST2",
        unseen=(("liver",), ("right_kidney",), ("left_kidney",), ("spleen",)),
        spacing=(3.0, 3.0, None),
        patch=[16, 48, 80],
        features=[16, 32, 64, 128],
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
        kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        epochs=15,
        steps=100,
    ),
)


def resampled(image: SimpleITK.Image, spacing: tuple[float | None, ...], nearest: bool) -> SimpleITK.Image:
    """An image on a grid of other spacing over the same field of view (outer voxel faces aligned)."""
    old = np.array(image.GetSpacing())
    new = np.array([mm or own for mm, own in zip(spacing, old, strict=True)])
    size = np.maximum(np.round(np.array(image.GetSize()) * old / new), 1).astype(int)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = np.array(image.GetOrigin()) + direction @ ((new - old) / 2)
    interpolator = SimpleITK.sitkNearestNeighbor if nearest else SimpleITK.sitkLinear
    return SimpleITK.Resample(
        image, size.tolist(), SimpleITK.Transform(), interpolator, origin, new, image.GetDirection(), 0.0
    )


def rounds() -> list[tuple[str, list[Trial]]]:
    """Arms and what is tried in them, the most telling first; each is done for every structure before the next."""
    main = grid(HEADS[:1], CHUNKS[-1:], EXTENTS[:1], KS) + grid(HEADS[-1:], CHUNKS[:1], EXTENTS[:1], KS)
    trained = [replace(trial, most_sets=SETS) for trial in main if trial.protocol == REAL]
    chunked = grid(HEADS[:1], CHUNKS[:-1], EXTENTS[:1], KS[:1], [REAL], most_sets=SETS)
    chunked += grid(HEADS[:1], CHUNKS[-1:], EXTENTS[1:], KS[:1], [REAL], most_sets=SETS)
    refined = grid(HEADS[:1], CHUNKS[-1:], EXTENTS[:1], (3, 5, 1), [REAL], ENTROPIES, SETS)
    one = grid(HEADS, CHUNKS, EXTENTS[:1], KS[:1], most_sets=SETS)
    more = grid(HEADS, CHUNKS, EXTENTS[:1], KS[1:], [REAL], most_sets=SETS)
    volume = [grid(heads, CHUNKS, EXTENTS[1:], KS, [REAL], most_sets=SETS) for heads in (HEADS[:1], HEADS[1:])]
    hard = [
        grid(heads, CHUNKS[1:], EXTENTS[:1], KS[:1], [REAL], most_sets=SETS, mode="hard")
        for heads in (HEADS[:1], HEADS[1:])
    ]
    adapted = grid([ADAPTER], CHUNKS[:1], EXTENTS[:1], KS[1:2], [REAL], most_sets=1)
    new = [chunked, hard[0], one, refined, volume[0], more, hard[1], volume[1], adapted]
    return [("new", main), ("trained", trained), *(("new", trials) for trials in new)]


class Base:
    """One base network of a study, its data, and the commands that make them."""

    def __init__(self, study: Study, index: int, data: Path, work: Path):
        self.study, self.work, self.novel = study, work, study.unseen[index]
        self.source = data / study.source
        self.number = f"{int(study.source[7:10]) + 100 * index:03d}"
        dataset = f"Dataset{self.number}_{study.source[11:]}Base"
        self.folder = work / f"{study.name}_{self.number}"
        self.raw = work / "raw" / dataset
        self.supports, self.queries, self.new = (self.folder / part for part in ("supports", "queries", "new"))
        self.plans = work / "preprocessed" / dataset / "nnUNetPlans.json"
        self.model = work / "results" / dataset / "StockTrainer__nnUNetPlans__small"
        self.predictions = self.folder / "base"
        self.environment = {
            **os.environ,
            "nnUNet_raw": str(work / "raw"),
            "nnUNet_preprocessed": str(work / "preprocessed"),
            "nnUNet_results": str(work / "results"),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
        }
        self.labels = json.loads((self.source / "dataset.json").read_text())["labels"]

    def write_data(self) -> None:
        """Raw data set without the novel structures; the same cases with all labels as supports and queries."""
        kept = [name for name in self.labels if name not in self.novel]
        lookup = np.zeros(max(self.labels.values()) + 1, np.uint8)
        for value, name in enumerate(kept):
            lookup[self.labels[name]] = value
        for part, folder in (("Tr", self.supports), ("Ts", self.queries)):
            for sub in (self.raw / f"images{part}", self.raw / f"labels{part}", folder / "images", folder / "labels"):
                sub.mkdir(parents=True, exist_ok=True)
            for file in sorted((self.source / f"images{part}").glob("*.nii.gz")):
                image = resampled(SimpleITK.ReadImage(str(file)), self.study.spacing, nearest=False)
                for target in (self.raw / f"images{part}", folder / "images"):
                    SimpleITK.WriteImage(image, str(target / file.name))
            for file in sorted((self.source / f"labels{part}").glob("*.nii.gz")):
                label = resampled(SimpleITK.ReadImage(str(file)), self.study.spacing, nearest=True)
                SimpleITK.WriteImage(label, str(folder / "labels" / file.name))
                base = SimpleITK.GetImageFromArray(lookup[SimpleITK.GetArrayFromImage(label)])
                base.CopyInformation(label)
                SimpleITK.WriteImage(base, str(self.raw / f"labels{part}" / file.name))
        dataset = json.loads((self.source / "dataset.json").read_text())
        dataset["labels"] = {name: value for value, name in enumerate(kept)}
        # Last: its being there says that the rest is.
        write_whole(self.raw / "dataset.json", json.dumps(dataset, indent=1))

    def prepare(self) -> None:
        """Write the data, plan, preprocess, add the small configuration."""
        if not (self.raw / "dataset.json").exists():
            self.write_data()
        done = self.plans.with_name("preprocessed.done")
        if not done.exists():
            words = ["-d", self.number, "-c", self.study.configuration, "-np", "1", "-npfp", "1"]
            self.call("plan", [str(Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")), *words])
            done.touch()
        cases = self.training_cases()
        self.link_new()
        split = [{"train": cases[:-VALIDATED], "val": cases[-VALIDATED:]}]
        write_whole(self.plans.with_name("splits_final.json"), json.dumps(split, indent=1))
        there = read_plans(self.plans)["configurations"]
        if "small" not in there:
            study, architecture = self.study, there[self.study.configuration]["architecture"]
            stages = len(study.features)
            architecture["arch_kwargs"] |= {
                "n_stages": stages,
                "features_per_stage": study.features,
                "strides": study.strides,
                "kernel_sizes": study.kernels,
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
            }
            settings = {"num_epochs": study.epochs, "num_iterations_per_epoch": study.steps}
            settings |= {"num_val_iterations_per_epoch": 5, "save_every": 1}
            overrides = {"batch_size": study.batch, "patch_size": study.patch, "architecture": architecture}
            add_configuration(self.plans, "small", study.configuration, settings, overrides)

    def finish(self) -> None:
        """Train, predict the queries and score them, each step only if it is not done yet."""
        fold = self.model / "fold_0"
        if not (fold / "validation" / "summary.json").exists():
            trained = (fold / "checkpoint_final.pth").exists()
            resume = ["--val"] if trained else ["--c"] if (fold / "checkpoint_latest.pth").exists() else []
            words = [self.number, "small", "0", "-tr", "StockTrainer", "-device", device(), *resume]
            self.call("train", [str(Path(sys.executable).with_name("nnUNetv2_train")), *words])
        if not (self.predictions / "done").exists():
            words = ["-i", str(self.queries / "images"), "-o", str(self.predictions), "-d", self.number, "-c", "small"]
            words += ["-tr", "StockTrainer", "-f", "0", "--disable_tta", "-device", device(), "-npp", "1", "-nps", "1"]
            self.call("predict", [str(Path(sys.executable).with_name("nnUNetv2_predict")), *words])
            (self.predictions / "done").touch()
        scores = self.folder / "base_scores"
        if not (scores / "summary.json").exists():
            words = ["evaluate", str(self.raw / "labelsTs"), str(self.predictions), "-o", str(scores), "-np", "1"]
            self.call("evaluate", [sys.executable, "-m", "nnunet_calib.cli.main", *words])

    def evaluate(self, arm: str, trials: list[Trial]) -> None:
        """Try the structures that the base network never saw."""
        supports = self.supports if arm == "trained" else self.new
        for name in self.novel:
            evaluate_folder(
                self.model,
                supports / "images",
                supports / "labels",
                self.pairs(arm),
                name=name,
                value=self.labels[name],
                trials=trials,
                query_images=self.queries / "images" if arm == "trained" else None,
                query_labels=self.queries / "labels" if arm == "trained" else None,
                base_labels=self.new / "base",
                device=device(),
                mirroring=False,
                voxels=VOXELS,
                progress=False,
            )
            print(self.study.name, arm, name, len(trials), "trials done", flush=True)

    def pairs(self, arm: str) -> Path:
        """Folder of what was scored."""
        return self.folder / f"pairs_{arm}"

    def link_new(self) -> None:
        """Validation and test cases together: what the network was not trained on; features of both arms together."""
        cases = [(self.supports, case, "Tr") for case in self.training_cases()[-VALIDATED:]]
        cases += [(self.queries, file.name, "Ts") for file in sorted((self.queries / "labels").iterdir())]
        for folder, case, part in cases:
            name = case.removesuffix(".nii.gz")
            links = {
                self.new / "images" / f"{name}_0000.nii.gz": folder / "images" / f"{name}_0000.nii.gz",
                self.new / "labels" / f"{name}.nii.gz": folder / "labels" / f"{name}.nii.gz",
                self.new / "base" / f"{name}.nii.gz": self.raw / f"labels{part}" / f"{name}.nii.gz",
            }
            for link, target in links.items():
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(target.resolve())
        features = self.folder / "features"
        for arm in ARMS:
            features.mkdir(exist_ok=True)
            self.pairs(arm).mkdir(exist_ok=True)
            if not (self.pairs(arm) / "features").exists():
                (self.pairs(arm) / "features").symlink_to(features.resolve())

    def training_cases(self) -> list[str]:
        """Names of the cases of the raw data set, those that nnU-Net validates on last."""
        return sorted(file.name.removesuffix(".nii.gz") for file in (self.raw / "labelsTr").glob("*.nii.gz"))

    def base_dice(self) -> dict[str, float]:
        """Mean Dice of every base structure over the queries."""
        summary = json.loads((self.folder / "base_scores" / "summary.json").read_text())
        names = {str(v): k for k, v in json.loads((self.raw / "dataset.json").read_text())["labels"].items()}
        return {names[label]: float(scores["Dice"]) for label, scores in summary["mean"].items()}

    def call(self, log: str, words: list[str]) -> None:
        """Run a command with its output in a log of the study."""
        file = self.folder / f"{log}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            code = subprocess.run(
                words, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment
            ).returncode
        if code:
            raise RuntimeError(f"{log} failed with exit code {code}, see {file}")


def device() -> str:
    """What nnU-Net's commands run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep(study: Study, bases: list[Base]) -> None:
    """Keep the base networks' scores and the means of every trial that is finished for all structures."""
    machine = (bases[0].work / "machine.txt").read_text()
    common = {"study": study.name, "machine": machine, "date": str(date.today())}
    rows = read_rows(KEPT)
    for base in bases:
        dice = {name: number(value, DIGITS) for name, value in base.base_dice().items()}
        kind = {"arm": "base", "structure": ", ".join(base.novel), **dict.fromkeys(ROW)}
        put(rows, common | kind | {"dice": dice}, IDENTITY)
    for arm in ARMS:
        records = [record for base in bases for record in read_pairs(base.pairs(arm) / "pairs.jsonl")]
        whole = [row for row in summarise(records, ROW) if row["structures"] == len(study.novel)]
        shown = [{"structure": "all"} | row for row in whole]
        shown += [row for row in summarise(records, ("structure", *ROW)) if is_main(row)]
        for row in shown:
            rounded = {name: number(v, DIGITS) if isinstance(v, float) else v for name, v in row.items()}
            put(rows, common | {"arm": arm} | rounded, IDENTITY)
    write_rows(KEPT, rows)


def is_main(row: dict) -> bool:
    """The default, or the baseline that it is compared with."""
    kind = (row["head"], row["chunks"])
    settings = (row["protocol"], row["extent"], row["mode"], row["entropy"])
    return kind in MAIN and settings == (REAL, EXTENTS[0], "interpolated", None)


def tables(study: Study, rows: list[dict]) -> str:
    """Markdown: the base network; for both arms heads x chunks x extents x k, and every structure by itself."""
    rows = [row for row in rows if row["study"] == study.name]
    lines = [
        measured(rows),
        "",
        f"Base networks: {study.epochs} x {study.steps} steps, patch {study.patch}, batch 2, features "
        f"{'-'.join(map(str, study.features))}; their DSC on the test cases:",
        "",
    ]
    for row in rows:
        if row["arm"] == "base":
            dice = ", ".join(f"{name} {value:.3f}" for name, value in row["dice"].items())
            mean = np.mean(list(row["dice"].values()))
            lines.append(f"- never saw {row['structure']}: {dice}; mean {mean:.3f}".replace("_", " "))
    for arm, meaning in ARMS.items():
        if own := [row for row in rows if row["arm"] == arm]:
            lines += ["", f"**{arm}**: {meaning}.", "", *_grid_table(own), "", *_structure_table(own, study.novel)]
    return "\n".join(lines)


def _grid_table(rows: list[dict]) -> list[str]:
    lines = [
        "| protocol | head | chunks | extent | mode | entropy | k | pairs | DSC | worst tenth | HD95 mm | missed "
        "| ECE volume | ECE foreground | if calibrated | Brier volume | NLL volume | base DSC change |",
        "|---" * 18 + "|",
    ]
    whole = sorted(
        (row for row in rows if row["structure"] == "all"),
        key=lambda row: (
            row["protocol"], (*HEADS, ADAPTER).index(row["head"]), row["entropy"] is not None, row["entropy"] or 0,
            row["mode"], row["extent"], row["chunks"], row["k"],
        ),
    )  # fmt: skip
    for row in whole:
        cells = [row["protocol"], row["head"], row["chunks"], row["extent"], row["mode"]]
        cells += ["" if row["entropy"] is None else f"{row['entropy']:g}", row["k"], row["pairs"]]
        value = {name: float(row[name]) for name in (*SHOWN, "base_after", "base_before")}
        cells += [f"{value['Dice']:.3f}", f"{value['Dice_worst_tenth']:.3f}", f"{value['HD95_median']:.1f}"]
        cells += [row["missed"], *(f"{value[name]:.4f}" for name in SHOWN[3:])]
        change = value["base_after"] - value["base_before"]
        cells.append("" if np.isnan(change) else f"{change:+.4f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _structure_table(rows: list[dict], novel: tuple[str, ...]) -> list[str]:
    lines = ["| structure | k | DSC, global prototype | DSC, default | ECE foreground, default |", "|---" * 5 + "|"]
    each = {(row["structure"], row["k"], row["head"]): row for row in rows if is_main(row)}
    for name, k in itertools.product((*novel, "all"), KS):
        plain, default = (each.get((name, k, head)) for head in (HEADS[-1], HEADS[0]))
        if plain and default:
            scores = f"{plain['Dice']:.3f} | {default['Dice']:.3f} | {default['ECE_foreground']:.3f}"
            lines.append(f"| {name.replace('_', ' ')} | {k} | {scores} |")
    return lines


ROW = ("protocol", "head", "chunks", "extent", "mode", "k", "entropy")
IDENTITY = ("study", "arm", "structure", *ROW)
SHOWN = (
    *("Dice", "Dice_worst_tenth", "HD95_median", "ECE_volume", "ECE_foreground", "ECE_foreground_if_calibrated"),
    *("Brier_volume", "NLL_volume"),
)
TABLES = ("grid", "structures")
KEPT = FOLDER / "fewshot.json"
DIGITS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--only", choices=[study.name for study in STUDIES])
    parser.add_argument("--stage", choices=("data", "base", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=len(rounds()), help="of trials, the most telling first")
    parser.add_argument("--csv", action="store_true", help="write docs/results/fewshot_*.csv from all that is kept")
    args = parser.parse_args()
    studies = [
        (study, [Base(study, index, args.data, args.work) for index in range(len(study.unseen))])
        for study in STUDIES
        if args.only in (None, study.name)
    ]
    if args.csv:
        for study, bases in studies:
            if all((base.folder / "base_scores" / "summary.json").exists() for base in bases):
                keep(study, bases)
        for study in STUDIES:
            if any(row["study"] == study.name for row in read_rows(KEPT)):
                write_csvs(f"fewshot_{study.name}", TABLES, tables(study, read_rows(KEPT)))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if device() == "cuda" else "no GPU"
    (args.work / "machine.txt").write_text(
        f"{os.cpu_count()} cores of {platform.machine()}, {gpu}, torch {torch.__version__}"
    )
    for study, bases in studies:
        for base in bases:
            base.prepare()
            if args.stage != "data":
                base.finish()
                print(study.name, base.novel, "base Dice", base.base_dice(), flush=True)
        if args.stage == "all":
            for arm, trials in rounds()[: args.rounds]:
                for base in bases:
                    base.evaluate(arm, trials)
    return 0


if __name__ == "__main__":
    sys.exit(main())
