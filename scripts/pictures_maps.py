"""The picture and the table of ``docs/maps.md``: what ``predict`` says about its own certainty, on real scans.

    python scripts/pictures_maps.py ../shared/data/Dataset004_Hippocampus -o WORK

The data set is the Hippocampus of the Medical Segmentation Decathlon in nnU-Net's raw format (CC BY-SA 4.0), whose
pictures may be passed on. Two folds of a small 2d network are trained for some minutes on CPU and predict test scans.
The picture shows one of them, in the slice with the largest structures. The table says how many of the wrong voxels of
all of them are found among the least certain ones, by each map.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import matplotlib
import nibabel
import numpy as np
from kept import write_between

from nnunet_calib.data.files import whole_file
from nnunet_calib.data.software import installed_versions

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURE, PAGE = DOCS / "images" / "maps.png", DOCS / "maps.md"
MARKS = ("<!-- table of scripts/pictures_maps.py -->", "<!-- end of table of scripts/pictures_maps.py -->")
SETTINGS = ("num_epochs=8", "num_iterations_per_epoch=100", "num_val_iterations_per_epoch=2")
FOLDS = ("0", "1")
MAPS = {  # folder: title, least and largest value shown; of three classes and two folds few can be larger
    "confidence": ("confidence", 1 / 3, 1.0),
    "entropy": ("entropy, nats", 0.0, float(np.log(3))),
    "mutual_information": ("mutual information, nats", 0.0, 0.35),  # half of what it can be
    "disagreement": ("disagreement of two folds", 0.0, 0.5),
}
LOOKED_AT = (0.01, 0.02, 0.05)  # of the voxels, the least certain first
MARGIN = 6  # voxels around the structures
CASES = 8
REFERENCE, PREDICTION = "#56b4e9", "#d55e00"


def train(dataset: Path, work: Path) -> Path:
    """The folder of the model of two folds; what is finished is not done again."""
    number = str(int(dataset.name[7:10]))
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.update(folders, nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", nnUNet_compile="f")
    link = work / "raw" / dataset.name
    if not link.exists():
        link.symlink_to(dataset)
    model = work / "results" / dataset.name / "StockTrainer__nnUNetPlans__small"
    if not (work / "preprocessed" / dataset.name / "nnUNetPlans_2d").exists():
        run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-npfp", "2", "-np", "2")
        small = ("--features", "16", "--batch_size", "32", "--set", *SETTINGS)
        run("nnunet-calib", "configure", "-d", number, "-c", "2d", "--name", "small", *small)
    wanted = [fold for fold in FOLDS if not (model / f"fold_{fold}" / "checkpoint_final.pth").exists()]
    with ThreadPoolExecutor(len(FOLDS)) as pool:
        words = ("nnUNetv2_train", number, "small")
        list(pool.map(lambda fold: run(*words, fold, "-tr", "StockTrainer", "-device", "cpu"), wanted))
    return model


def run(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True)


def draw(output: Path, dataset: Path, case: str, picture: Path) -> None:
    """The image with the contours of reference and prediction, and each map with that of the reference."""
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    image = load(dataset / "imagesTs" / f"{case}_0000.nii.gz")
    reference, prediction = load(dataset / "labelsTs" / f"{case}.nii.gz"), load(output / f"{case}.nii.gz")
    k = int((reference > 0).sum(axis=(0, 1)).argmax())
    inside = np.nonzero((reference > 0)[:, :, k])
    box = tuple(slice(max(0, at.min() - MARGIN), at.max() + MARGIN + 1) for at in inside)

    def shown(volume: np.ndarray) -> np.ndarray:
        return volume[box[0], box[1], k].T

    figure = Figure(figsize=(14, 2.8), layout="constrained")
    panels = figure.subplots(1, 2 + len(MAPS))
    pictures = [
        (image, "reference (solid),\nprediction (dashed)", "gray", *np.percentile(shown(image), (1, 99))),
        (reference != prediction, "wrong voxels", "inferno", 0, 1),
        *(
            # dark is certain in every map
            (load(output / name / f"{case}.nii.gz"), title, "inferno_r" if name == "confidence" else "inferno", *limits)
            for name, (title, *limits) in MAPS.items()
        ),
    ]
    for number, (panel, (volume, title, colours, least, largest)) in enumerate(zip(panels, pictures, strict=True)):
        drawn = panel.imshow(shown(volume), cmap=colours, origin="lower", vmin=least, vmax=largest)
        panel.set_title(title, fontsize=10)
        bar = figure.colorbar(drawn, ax=panel, orientation="horizontal", fraction=0.06, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.ax.set_visible(number > 1)  # there so that all panels are of one size
        for value in (1, 2):
            panel.contour(shown(reference) == value, [0.5], colors=REFERENCE, linewidths=1)
        panel.set_axis_off()
    for value in (1, 2):
        panels[0].contour(shown(prediction) == value, [0.5], colors=PREDICTION, linestyles="dashed", linewidths=1.2)
    with whole_file(picture) as stream:
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})


def table(output: Path, dataset: Path, cases: list[str]) -> str:
    """Markdown: of the wrong voxels of all cases, how many are among the least certain ones of all of them."""
    versions = ", ".join(map(" ".join, installed_versions(("nnunetv2", "torch")).items()))
    wrong = np.concatenate(
        [
            (load(output / f"{case}.nii.gz") != load(dataset / "labelsTs" / f"{case}.nii.gz")).reshape(-1)
            for case in cases
        ]
    )
    lines = [f"{date.today()}; {os.cpu_count()} CPU cores, no GPU; {versions}", ""]
    lines += [f"{len(cases)} scans, {wrong.size} voxels, of which {wrong.sum()} ({wrong.mean():.1%}) are wrong.", ""]
    lines += [f"| voxels looked at | {' | '.join(title for title, _, _ in MAPS.values())} |"]
    lines += ["|---|" + "---|" * len(MAPS)]
    order = {}
    for name in MAPS:
        values = np.concatenate([load(output / name / f"{case}.nii.gz").reshape(-1) for case in cases])
        # Equal values, of which the disagreement has two, in an order that says nothing.
        shuffled = np.random.default_rng(0).permutation(values.size)
        doubt = -values if name == "confidence" else values
        order[name] = shuffled[np.argsort(-doubt[shuffled], kind="stable")]
    for share in LOOKED_AT:
        count = round(share * wrong.size)
        found = [f"{wrong[order[name][:count]].sum() / wrong.sum():.0%}" for name in MAPS]
        lines.append(f"| {share:.0%} | {' | '.join(found)} |")
    return "\n".join(lines)


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--case", help="of the picture (default: the first)")
    args = parser.parse_args()
    work, dataset = args.work.resolve(), args.dataset.resolve()
    model = train(dataset, work)
    ending = "_0000.nii.gz"
    names = sorted(file.name.removesuffix(ending) for file in (dataset / "imagesTs").glob(f"*{ending}"))
    cases = list(dict.fromkeys([*([args.case] if args.case else []), *names]))[:CASES]
    images = work / "images"
    images.mkdir(exist_ok=True)
    for case in cases:
        if not (images / f"{case}{ending}").exists():
            (images / f"{case}{ending}").symlink_to(dataset / "imagesTs" / f"{case}{ending}")
    output = work / "maps"
    maps = ("--confidence", "--entropy", "--members", "-device", "cpu")
    run("nnunet-calib", "predict", "-m", str(model), "-f", *FOLDS, "-i", str(images), "-o", str(output), *maps)
    draw(output, dataset, cases[0], PICTURE)
    write_between(PAGE, MARKS, table(output, dataset, cases))


if __name__ == "__main__":
    main()
