"""The picture of ``docs/fewshot.md``: a structure that a network was never taught, from three annotated scans.

    python scripts/pictures_fewshot.py ../shared/data/Dataset004_Hippocampus -o WORK

The data set is the Hippocampus of the Medical Segmentation Decathlon in nnU-Net's raw format (CC BY-SA 4.0), whose
pictures may be passed on. A small 2d network is trained for some minutes on CPU with the anterior part alone; the
posterior part is background to it. ``fewshot fit`` learns it from three other scans, ``fewshot apply`` finds it in test
scans, and the first of these is drawn, in the slice with most of the structure. Prints the mean Dice of all of them.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import nibabel
import numpy as np

from nnunet_calib.data.files import whole_file

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "fewshot.png"
DATASET = "Dataset504_Anterior"
TRAINED, SUPPORTS, QUERIES = 40, 3, 8  # scans
SETTINGS = ("num_epochs=6", "num_iterations_per_epoch=100", "num_val_iterations_per_epoch=2")
NEW, NAME = 2, "posterior"
REFERENCE, PREDICTION = "#56b4e9", "#d55e00"
ENDING = "_0000.nii.gz"
MARGIN = 6  # voxels around the structures


def run(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True)


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)


def link(source: Path, cases: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if not (folder / f"{case}{ENDING}").exists():
            (folder / f"{case}{ENDING}").symlink_to(source / f"{case}{ENDING}")


def train(dataset: Path, work: Path, cases: list[str]) -> Path:
    """The folder of the model that knows the anterior part; what is finished is not done again."""
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.update(folders, nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1", nnUNet_compile="f")
    raw, number = work / "raw" / DATASET, DATASET[7:10]
    link(dataset / "imagesTr", cases, raw / "imagesTr")
    (raw / "labelsTr").mkdir(exist_ok=True)
    for case in cases:
        image = nibabel.load(dataset / "labelsTr" / f"{case}.nii.gz")
        labels = np.asarray(image.dataobj)
        kept = np.where(labels == NEW, 0, labels).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(kept, image.affine), raw / "labelsTr" / f"{case}.nii.gz")
    content = json.loads((dataset / "dataset.json").read_text())
    content |= {"labels": {"background": 0, "anterior": 1}, "numTraining": len(cases)}
    (raw / "dataset.json").write_text(json.dumps(content))
    model = work / "results" / DATASET / "StockTrainer__nnUNetPlans__small"
    if not (model / "fold_0" / "checkpoint_final.pth").exists():
        run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-npfp", "1", "-np", "1")
        small = ("--features", "16", "--batch_size", "32", "--replace", "--set", *SETTINGS)
        run("nnunet-calib", "configure", "-d", number, "-c", "2d", "--name", "small", *small)
        run("nnUNetv2_train", number, "small", "0", "-tr", "StockTrainer", "-device", "cpu")
    return model


def draw(support: tuple[np.ndarray, np.ndarray], query: tuple[np.ndarray, ...], picture: Path) -> None:
    """A support with its annotation; the query as it is, with both contours, and with the probability."""
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    def shown(volumes: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        reference = volumes[1] > 0
        i = int(reference.sum(axis=(1, 2)).argmax())
        inside = np.nonzero(reference[i])
        box = tuple(slice(max(0, at.min() - MARGIN), at.max() + MARGIN + 1) for at in inside)
        return [volume[i][box].T.astype(np.float32) for volume in volumes]

    image, annotated = shown(support)
    query_image, reference, prediction, probability = shown(query)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    titles = (
        "support, annotated",
        "query",
        "reference (solid),\nprediction (dashed)",
        "probability of the new structure",
    )
    for panel, title, volume in zip(panels, titles, (image, query_image, query_image, probability), strict=True):
        limits = (0, 1) if volume is probability else np.percentile(volume, (1, 99))
        drawn = panel.imshow(
            volume, cmap="inferno" if volume is probability else "gray", origin="lower", vmin=limits[0], vmax=limits[1]
        )
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()
    figure.colorbar(drawn, ax=panels[3], fraction=0.05)
    panels[0].contour(annotated, [0.5], colors=REFERENCE, linewidths=1.3)
    for panel in panels[2:]:
        panel.contour(reference, [0.5], colors=REFERENCE, linewidths=1.3)
    panels[2].contour(prediction, [0.5], colors=PREDICTION, linestyles="dashed", linewidths=1.3)
    with whole_file(picture) as stream:
        figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    args = parser.parse_args()
    dataset, work = args.dataset.resolve(), args.work.resolve()
    cases, queries = (
        sorted(file.name.removesuffix(ENDING) for file in (dataset / part).glob(f"*{ENDING}"))
        for part in ("imagesTr", "imagesTs")
    )
    model = train(dataset, work, cases[:TRAINED])
    supports, queries = cases[TRAINED : TRAINED + SUPPORTS], queries[:QUERIES]
    link(dataset / "imagesTr", supports, work / "supports")
    link(dataset / "imagesTs", queries, work / "queries")
    labels = work / "annotated"
    labels.mkdir(exist_ok=True)
    for case in supports:
        if not (labels / f"{case}.nii.gz").exists():
            (labels / f"{case}.nii.gz").symlink_to(dataset / "labelsTr" / f"{case}.nii.gz")
    task, found = work / f"{NAME}.fewshot", work / "found"
    annotated = ("--images", str(work / "supports"), "--labels", str(labels), "--label", str(NEW), "--name", NAME)
    alone = ("--registration", "none", "-device", "cpu")
    run("nnunet-calib", "fewshot", "fit", str(model), *annotated, "-o", str(task), *alone)
    wanted = ("-i", str(work / "queries"), "-o", str(found), "--save_probabilities", "-device", "cpu")
    run("nnunet-calib", "fewshot", "apply", str(model), str(task), *wanted)

    dice = []
    for case in queries:
        mine, true = load(found / f"{case}.nii.gz") == NEW, load(dataset / "labelsTs" / f"{case}.nii.gz") == NEW
        dice.append(2 * (mine & true).sum() / (mine.sum() + true.sum()))
    print(f"mean Dice of {NAME} in {len(dice)} scans: {np.mean(dice):.3f}; of the one drawn {dice[0]:.3f}")
    case = queries[0]
    with np.load(found / f"{case}.npz") as file:
        probability = file["probabilities"][NEW].T
    draw(
        (load(dataset / "imagesTr" / f"{supports[0]}{ENDING}"), load(labels / f"{supports[0]}.nii.gz") == NEW),
        (
            load(dataset / "imagesTs" / f"{case}{ENDING}"),
            load(dataset / "labelsTs" / f"{case}.nii.gz") == NEW,
            load(found / f"{case}.nii.gz") == NEW,
            probability,
        ),
        PICTURE,
    )


if __name__ == "__main__":
    main()
