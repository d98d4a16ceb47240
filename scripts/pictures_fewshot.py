"""Pictures of a new structure from a few volumes: chunks of two volumes, and what is found in a query.

    python scripts/pictures_fewshot.py DATA -o WORK [--structure hippocampus]

DATA and WORK as of ``experiment_fewshot.py``, whose brain network must be trained. Of the volumes that the network was
not trained on, at their own 1 mm, the first three are the supports and the next is the query. A task
is fitted and applied with the defaults, without mirroring; what came of it is drawn into ``docs/images``.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from experiment_fewshot import STUDIES, Base, device
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from PIL import Image

from nnunet_calib.data.files import whole_file
from nnunet_calib.fewshot.apply.folder import apply_folder
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import SUPERIOR
from nnunet_calib.fewshot.task.file import Task
from nnunet_calib.fewshot.task.fit import fit_folder, scan_of
from nnunet_calib.fewshot.volume.files import read_volume

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SUPPORTS = 3
STRUCTURE = "#D55E00"  # Okabe and Ito's palette, for those who do not tell red from green too
BASE = ("#000000", "#56B4E9", "#F0E442", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#999999")
PALE = 0.4  # white in the colours of the base classes
BANDS = ("#56B4E9", "#F0E442")
PROBABILITY = "viridis"
COLOURS = 256  # of the files
SIZE = 11  # of letters


class Pictures:
    """A task, its supports and a query, and where they lie on disk."""

    def __init__(self, base: Base, structure: str):
        self.base, self.structure = base, structure
        self.value = base.labels[structure]
        self.folder = base.work / "pictures" / structure
        self.task_file = self.folder / f"{structure}.fewshot"
        self.segmented = self.folder / "segmented"
        names = sorted(file.name.removesuffix(".nii.gz") for file in (base.new / "labels").iterdir())
        self.supports, self.query = names[:SUPPORTS], names[SUPPORTS]
        self.report = self.segmented / f"{self.query}.fewshot.json"

    def write(self) -> None:
        """Fit and apply; what is there already is not done again."""
        parts = {"supports": self.supports, "query": [self.query]}
        for part, names in parts.items():
            for name in names:
                for kind, file in (("images", f"{name}_0000.nii.gz"), ("labels", f"{name}.nii.gz")):
                    link = self.folder / part / kind / file
                    link.parent.mkdir(parents=True, exist_ok=True)
                    if not link.exists():
                        link.symlink_to(self.source(kind, file))
        options = {"device": device(), "mirroring": False}
        if not self.task_file.exists():
            images, labels = (self.folder / "supports" / kind for kind in ("images", "labels"))
            fit_folder(
                self.base.model, images, labels, self.task_file, name=self.structure, value=self.value, **options
            )
        if not self.report.exists():
            images = self.folder / "query" / "images"
            apply_folder(self.base.model, [self.task_file], images, self.segmented, probabilities=True, **options)

    def source(self, kind: str, file: str) -> Path:
        """A file of the data set, of its training or its test cases."""
        return next(path for part in ("Tr", "Ts") if (path := self.base.source / f"{kind}{part}" / file).exists())

    def image(self, case: str) -> np.ndarray:
        return in_patient(self.source("images", f"{case}_0000.nii.gz"))

    def reference(self, case: str) -> np.ndarray:
        return in_patient(self.source("labels", f"{case}.nii.gz"))


def in_patient(file: Path) -> np.ndarray:
    """An image with its axes (superior, anterior, left), each growing that way."""
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(file)), "LAS")
    return SimpleITK.GetArrayFromImage(image)


def fullest(structure: np.ndarray, axis: int) -> int:
    """Slice along an axis that holds most of a mask."""
    return int(structure.sum(axis=tuple(other for other in range(3) if other != axis)).argmax())


def show(axes: Axes, image: np.ndarray) -> None:
    """A slice in grey; superior is up."""
    axes.imshow(image, cmap="gray", origin="lower", vmin=0, vmax=np.percentile(image, 99.5), interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def paler(colour: str) -> tuple[float, ...]:
    """A colour with white in it."""
    return tuple(PALE + (1 - PALE) * part for part in to_rgb(colour))


def direction(axes: Axes, axis: int) -> None:
    """What is on the right of a slice along an axis: anterior, or left."""
    letter = "A" if axis == 2 else "L"
    axes.text(0.98, 0.02, letter, color="white", ha="right", va="bottom", transform=axes.transAxes, fontsize=SIZE)


def draw_chunks(pictures: Pictures) -> Figure:
    """A support in two planes and the query, with the chunks of the task across them."""
    task = Task.load(pictures.task_file)
    settings, frame = task.structure.settings, task.structure.frame
    model = BaseModel(pictures.base.model)
    predictor = FeaturePredictor(model, device(), mirroring=False)
    support = pictures.supports[0]
    drawn = ((support, "support", 2), (support, "support", 1), (pictures.query, "query", 2))
    widths = [pictures.image(case).shape[3 - axis] for case, _, axis in drawn]  # of one scale
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=widths)
    edges = {}
    for case in (support, pictures.query):
        files = [pictures.source("images", f"{case}_0000.nii.gz")]
        volume = read_volume(model, case, files, orientation=task.orientation)
        scan = scan_of(model, volume, predictor.predict(torch.from_numpy(volume.image)).base)
        alignment = frame.align(scan.size, scan.landmarks)
        cuts = np.linspace(frame.low[SUPERIOR], frame.high[SUPERIOR], settings.chunks + 1)
        along = next(i for i, (axis, _) in enumerate(volume.axes) if axis == SUPERIOR)
        cropped = volume.properties["bbox_used_for_cropping"][along][0]  # voxels of 1 mm, from inferior as stored
        edges[case] = cropped + (cuts - alignment.shift[SUPERIOR]) / alignment.scale[SUPERIOR]
    for axes, (case, role, axis) in zip(panels, drawn, strict=True):
        image, structure = pictures.image(case), pictures.reference(case) == pictures.value
        place = fullest(structure, axis)
        show(axes, image.take(place, axis=axis))
        height, width = image.take(place, axis=axis).shape
        for number, (low, high) in enumerate(zip(edges[case], edges[case][1:], strict=False), start=1):
            low, high = max(low, 0), min(high, height)  # voxels of 1 mm
            if high > low:
                axes.axhspan(low - 0.5, high - 0.5, color=BANDS[number % 2], alpha=0.22, linewidth=0)
                axes.text(1.0, (low + high) / 2 - 0.5, str(number), color="white", fontsize=SIZE, va="center")
        axes.contour(structure.take(place, axis=axis), [0.5], colors=STRUCTURE, linewidths=2)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))
        axes.set_title(f"{role}, {'sagittal' if axis == 2 else 'coronal'}", fontsize=SIZE + 1)
        direction(axes, axis)
    return figure


def draw_query(pictures: Pictures) -> Figure:
    """Image, probability, merged segmentation and reference of the query, sagittal above coronal."""
    case, name = pictures.query, pictures.structure
    image, reference = pictures.image(case), pictures.reference(case)
    merged = in_patient(pictures.segmented / f"{case}.nii.gz")
    labels = json.loads((pictures.segmented / "dataset.json").read_text())["labels"]
    probability = probability_map(pictures, labels[name])
    # the reference in the labels of the merged segmentation; structures in neither are background there
    of_reference = np.zeros(max(pictures.base.labels.values()) + 1, dtype=np.uint8)
    for key, value in labels.items():
        of_reference[pictures.base.labels[key]] = value
    reference = of_reference[reference]
    colours = ListedColormap([*(paler(colour) for colour in BASE[: labels[name]]), STRUCTURE])
    figure = Figure(figsize=(11, 5.6), layout=ConstrainedLayoutEngine(h_pad=0.08))
    panels = figure.subplots(2, 4)
    structure = reference == labels[name]
    for row, axis in zip(panels, (2, 1), strict=True):
        place = fullest(structure, axis)
        grey, p, found, true = (volume.take(place, axis=axis) for volume in (image, probability, merged, reference))
        for axes in row:
            show(axes, grey)
            direction(axes, axis)
        row[0].contour(true == labels[name], [0.5], colors=STRUCTURE, linewidths=1.5)
        seen = row[1].imshow(
            np.ma.masked_less(p, 0.02), cmap=PROBABILITY, vmin=0, vmax=1, origin="lower", interpolation="nearest"
        )
        for axes, map_ in ((row[2], found), (row[3], true)):
            axes.imshow(np.ma.masked_equal(map_, 0), cmap=colours, vmin=-0.5, vmax=len(labels) - 0.5, origin="lower",
                        interpolation="nearest")  # fmt: skip
    found, true = merged == labels[name], structure
    dice = 2 * np.count_nonzero(found & true) / (np.count_nonzero(found) + np.count_nonzero(true))
    titles = ("image, reference outlined", f"probability, {name}", f"merged, DSC {dice:.2f}", "reference")
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title.replace("_", " "), fontsize=SIZE + 1)
    bar = figure.colorbar(seen, ax=panels[:, 1], location="bottom", shrink=0.9, aspect=20)
    bar.ax.tick_params(labelsize=SIZE)
    handles = [Patch(color=colours(value), label=key.replace("_", " ")) for key, value in labels.items() if value]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SIZE, frameon=False)
    return figure


def probability_map(pictures: Pictures, value: int) -> np.ndarray:
    """The structure's probability in the query, from the file that ``apply`` wrote."""
    image = SimpleITK.ReadImage(str(pictures.source("images", f"{pictures.query}_0000.nii.gz")))
    with np.load(pictures.segmented / f"{pictures.query}.npz", allow_pickle=False) as file:
        probability = SimpleITK.GetImageFromArray(file["probabilities"][value])
    probability.CopyInformation(image)
    return SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(probability, "LAS"))


def write_picture(figure: Figure, file: Path) -> None:
    """A PNG of few colours, which is small."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    picture = Image.open(stream).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small = io.BytesIO()
    picture.save(small, format="png", optimize=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as target:
        target.write(small.getvalue())
    print(f"{file}: {len(small.getvalue()) / 1000:.0f} kB")


def main() -> int:
    (study,) = (study for study in STUDIES if study.name == "brain")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--structure", choices=study.novel, default="hippocampus")
    args = parser.parse_args()
    pictures = Pictures(Base(study, 0, args.data.resolve(), args.work.resolve()), args.structure)
    pictures.write()
    write_picture(draw_chunks(pictures), IMAGES / "fewshot_chunks.png")
    write_picture(draw_query(pictures), IMAGES / "fewshot_query.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
