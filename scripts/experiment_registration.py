"""What registration is worth to a new structure, without any network: alone, beside a head on intensities, and with it.

    python scripts/experiment_registration.py DATA -o WORK [--only chaos] [--arms registration] [--sets 2]
    python scripts/experiment_registration.py DATA -o WORK --csv

DATA holds ``Dataset035_Brain`` and ``Dataset020_CHAOST2`` in nnU-Net raw format. The volumes, spacings and structures
are those of ``experiment_fewshot.py``: the last two training cases and the test cases. The head is the default one on
ten Gaussian and gradient features in place of a network's; the class labels of a network are not there, so registration
starts from centres and ends, and heads are paired by the ends of the volumes. Resumable: WORK keeps registrations and a
line for every pair; ``--csv`` writes ``docs/results/fewshot_registration.csv``.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from experiment_fewshot import STUDIES, VALIDATED, VOXELS, Study, resampled
from kept import FOLDER, csv_text
from scipy import ndimage

from nnunet_calib.data.files import write_whole
from nnunet_calib.fewshot.measure.protocols import real_episodes, worst_tenth
from nnunet_calib.fewshot.measure.registered import propagated
from nnunet_calib.fewshot.measure.scores import novel_scores
from nnunet_calib.fewshot.structure.fitted import NovelMap, Settings
from nnunet_calib.fewshot.structure.from_supports import fit_structure
from nnunet_calib.fewshot.structure.in_query import apply_structure, carry_to
from nnunet_calib.fewshot.volume.anatomy import Anatomy, signed_distance
from nnunet_calib.fewshot.volume.atlas import CAP_MM, Labelled
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.registration import Registration
from nnunet_calib.fewshot.volume.sampling import sample_support
from nnunet_calib.fewshot.volume.scan import Scan
from nnunet_calib.fewshot.volume.support import Support

ARMS = {
    "registration": "labels carried by registration, their vote",
    "head": "the default head on ten intensity features",
    "both": "the same head with registration",
    "position": "the same head where the image says nothing",
}
HOW = Registration("deformable", limit_s=600.0)  # of a shared machine: nothing is cut short
NUMBERS = ("Dice", "HD95", "NLL_volume", "NLL_foreground", "seconds", "seconds_registration")
TABLE = "fewshot_registration.csv"


@dataclass(frozen=True, eq=False)
class Case:
    """A volume, its labels and its features; no network."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of_arrays(self.image, np.zeros(self.image.shape, np.uint8), self.spacing)

    @functools.cached_property
    def scan(self) -> Scan:
        return Scan(self.spacing, ((2, 1), (1, 1), (0, 1)), np.zeros(self.image.shape, np.uint8))

    @functools.cached_property
    def features(self) -> torch.Tensor:
        """Float32 (V, 10): the image; of three scales its Gaussian mean, gradient magnitude and Laplacian."""
        parts = [self.image]
        for sigma in (1.0, 2.0, 4.0):
            parts += [
                ndimage.gaussian_filter(self.image, sigma),
                ndimage.gaussian_gradient_magnitude(self.image, sigma),
                ndimage.gaussian_laplace(self.image, sigma),
            ]
        return torch.from_numpy(np.stack([part.ravel() for part in parts], axis=1).astype(np.float32))

    @functools.cache  # noqa: B019 (a case lives as long as the script)
    def labelled(self, value: int) -> Labelled:
        distance = signed_distance(self.labels == value, self.spacing, CAP_MM)
        return Labelled(self.anatomy, distance.astype(np.float16))

    def support(self, value: int) -> Support:
        structure = self.labels == value
        index, weight = sample_support(structure, self.scan.base, self.spacing, voxels=VOXELS)
        cut = any(structure.take(side, axis=axis).any() for axis in range(3) for side in (0, -1))
        mm3 = float(structure.sum() * np.prod(self.spacing))
        features = self.features[torch.from_numpy(index)]
        labelled = self.labelled(value)
        return Support(
            self.scan, index, structure.ravel()[index], weight, [features], mm3, features[:1], cut, labelled=labelled
        )


def read_case(study: Study, image: Path, label: Path) -> Case:
    """At the study's spacing; cropped to what is not 0 and scaled, as nnU-Net does for skull-stripped images."""
    volume = resampled(SimpleITK.ReadImage(str(image)), study.spacing, nearest=False)
    labels = SimpleITK.GetArrayFromImage(resampled(SimpleITK.ReadImage(str(label)), study.spacing, nearest=True))
    array = SimpleITK.GetArrayFromImage(volume).astype(np.float32)
    if study.name == "brain":
        box = tuple(slice(place.min(), place.max() + 1) for place in np.nonzero(array))
        array, labels = array[box], labels[box]
        inside = array != 0
        array = np.where(inside, (array - array[inside].mean()) / array[inside].std(), 0)
    else:
        array = (array - array.mean()) / array.std()
    x, y, z = (float(step) for step in volume.GetSpacing())
    return Case(array.astype(np.float32), labels, (z, y, x))


def read_cases(study: Study, data: Path) -> dict[str, Case]:
    """The volumes that are new to the base networks of ``experiment_fewshot.py``."""
    source = data / study.source
    training = sorted((source / "imagesTr").glob("*.nii.gz"))[-VALIDATED:]
    cases = {}
    for image in [*training, *sorted((source / "imagesTs").glob("*.nii.gz"))]:
        name = image.name.removesuffix("_0000.nii.gz")
        label = image.parent.with_name(image.parent.name.replace("images", "labels")) / f"{name}.nii.gz"
        cases[name] = read_case(study, image, label)
    return cases


def found(
    arm: str, query: Case, supports: Sequence[Case], value: int, registrar: Registrar, fitted: Any
) -> tuple[NovelMap, float]:
    """The map of a structure in a query, and seconds of its registrations."""
    if arm == "registration":
        labelled = [case.labelled(value) for case in supports]
        novel, carried = propagated(query.anatomy, query.image.shape, labelled, HOW, registrar)
        return novel, carried.seconds
    carried = carry_to(fitted, query.anatomy, registrar)
    (weights,) = fitted.projections
    maps = (weights @ query.features.T).reshape(len(weights), *query.image.shape)
    novel = apply_structure(fitted, query.scan, [maps], carried=carried)
    return novel, 0.0 if carried is None else carried.seconds


def evaluate(study: Study, data: Path, work: Path, arms: Sequence[str], ks: Sequence[int], sets: int | None) -> None:
    """A line for every pair of supports and query that has none yet."""
    file = work / f"{study.name}.jsonl"
    done = {line_key(line) for line in read_lines(file)}
    values = json.loads((data / study.source / "dataset.json").read_text())["labels"]
    read = read_cases(study, data)
    blind = {name: replace(case, image=np.zeros_like(case.image)) for name, case in read.items()}
    registrar = Registrar(work / "registrations")
    for k, arm, name in itertools.product(ks, arms, study.novel):
        value = values[name]
        cases = blind if arm == "position" else read
        fitted: tuple[Any, Any] = (None, None)
        for episode in real_episodes(list(cases), list(cases), k, None if arm == "registration" else sets):
            key = {"arm": arm, "k": k, "structure": name, "supports": list(episode.supports), "query": episode.query}
            if line_key(key) in done:
                continue
            supports = [cases[one] for one in episode.supports]
            if arm != "registration" and fitted[0] != episode.supports:
                how = HOW if arm == "both" else Registration("none")
                settings = Settings(extent="volume", registration=how)
                of_each = [case.support(value) for case in supports]
                if arm in ("head", "position"):
                    of_each = [replace(one, labelled=None) for one in of_each]
                fitted = (episode.supports, fit_structure(of_each, settings, registrar))
            query = cases[episode.query]
            for case in supports if arm in ("registration", "both") else ():
                registrar(query.anatomy, case.anatomy, HOW)  # before the clock: it has its own
            begin = time.process_time()
            novel, registering = found(arm, query, supports, value, registrar, fitted[1])
            spent = time.process_time() - begin
            segmentation = (novel.probability > novel.threshold) & (not novel.absent)
            scores = novel_scores(novel.probability, query.labels == value, query.spacing, segmentation)
            trust = getattr(getattr(fitted[1], "atlas", None), "trust", None)  # None with one support too
            line = key | scores | {"seconds": spent, "seconds_registration": registering, "absent": novel.absent}
            line |= {"trust": None if trust is None else [trust.head, trust.vote, trust.distance, trust.bias]}
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        print(study.name, k, arm, name, "done", flush=True)


def line_key(line: dict) -> str:
    """What tells a pair from all others."""
    return json.dumps([line[name] for name in ("arm", "k", "structure", "supports", "query")])


def read_lines(file: Path) -> list[dict]:
    """Of a file that may have been cut off."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def table(work: Path) -> str:
    """CSV: means of every arm, k and structure, and of all structures where all are there."""
    rows: list[dict[str, Any]] = []
    machine = f"{os.cpu_count()} CPU cores of {platform.machine()}, SimpleITK {SimpleITK.Version_VersionString()}"
    for study in STUDIES:
        lines = read_lines(work / f"{study.name}.jsonl")
        for k, arm in itertools.product(sorted({line["k"] for line in lines}), ARMS):
            own = [line for line in lines if (line["k"], line["arm"]) == (k, arm)]
            groups = [(name, [line for line in own if line["structure"] == name]) for name in study.novel]
            if own and all(members for _, members in groups):
                groups.append(("all", own))
            for name, members in groups:
                if members:
                    rows.append({"study": study.name, "arm": arm, "k": k, "structure": name} | means(members))
    for row in rows:
        row |= {"date": str(date.today()), "machine": machine}
    return csv_text(rows)


def means(members: Sequence[dict]) -> dict[str, Any]:
    """Means over pairs; HD95 as the median too, for one missed structure makes the mean infinite."""
    row: dict[str, Any] = {"pairs": len(members)}
    for name in NUMBERS:
        values = np.array([float(line[name]) for line in members])
        row[name] = round(float(np.nanmean(values)), 4)
        if name == "HD95":
            row["HD95_median"] = round(float(np.nanmedian(values)), 2)
    row["Dice_worst_tenth"] = round(worst_tenth([line["Dice"] for line in members]), 4)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--only", choices=[study.name for study in STUDIES])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("-k", type=int, nargs="+", default=[1, 3, 5], help="supports (default: 1 3 5)")
    parser.add_argument("--sets", type=int, help="of k supports for the heads; default: as many as supports")
    parser.add_argument("--csv", action="store_true", help=f"write docs/results/{TABLE} from what is in WORK")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.csv:
        write_whole(FOLDER / TABLE, table(args.work))
        return 0
    torch.set_num_threads(1)
    for study in STUDIES:
        if args.only in (None, study.name):
            evaluate(study, args.data, args.work, args.arms, args.k, args.sets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
