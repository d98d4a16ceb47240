"""``nnunet-calib predict`` beside ``nnUNetv2_predict``, whole commands: the same files, and how long each takes.

    python scripts/check_predict.py -o WORK --data ../shared/data [--only Hippocampus ...] [--time]
    python scripts/check_predict.py -o WORK --table docs/benchmarks_pipeline.md

Data sets are planned by nnU-Net (``--no_pp``); networks are the plans', of four features in the first stage, with
random weights: their labels are as ragged as can be, which is the hardest for an export that leaves out what it need
not compute. Those of regions, of the ignore label and of the cascade are trained for some steps on the data's own
images. ACDC is a trained network, whose folder ``--acdc`` names. The CT of 117 classes is made. Compared are the label
maps, voxel by voxel, and the probabilities in ``.npz``. With ``--time`` both commands write labels alone, in turn.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from kept import write_between
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import (
    convert_labelmap_to_one_hot,
    determine_num_input_channels,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy import ndimage
from torch import nn

from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.software import installed_versions

FEATURES = 4
STEPS, CROP, LOWER = 40, 64, 1.6  # of a training, voxels of its crops, coarser in a cascade's first stage
MARKS = ("<!-- tables of scripts/check_predict.py -->", "<!-- end of tables of scripts/check_predict.py -->")


@dataclass(frozen=True)
class Setup:
    """A model and images.

    Attributes:
        name: of the row.
        number: of the data set.
        configuration: of its plans.
        folds: how many networks.
        images: how many are compared.
        steps: of training.
        regions: its labels become these: names and labels.
        scribbles: it is trained on these, and what they do not reach is ignored.
        transpose: axes of the file in the order in which the network sees them.
        around: voxels of empty background put around each image.
        previous: name of the setup that is the first stage of a cascade.
    """

    name: str
    number: int
    configuration: str
    folds: int = 1
    images: int = 4
    steps: int = 0
    regions: tuple[tuple[str, tuple[int, ...]], ...] = ()
    scribbles: bool = False
    transpose: tuple[int, int, int] = (0, 1, 2)
    around: int = 0
    previous: str | None = None

    @property
    def folder(self) -> str:
        """A name for files."""
        return self.name.replace(" ", "_").replace(",", "")


SETUPS = (
    Setup("Hippocampus", 4, "3d_fullres", images=8),
    Setup("Hippocampus, two folds", 4, "3d_fullres", folds=2, images=8),
    Setup("CHAOS T2 MR, anisotropic", 20, "3d_fullres"),
    Setup("CHAOS T2 MR, 2d", 20, "2d"),
    Setup("Brain, 13 classes", 35, "3d_fullres"),
    Setup("ACDC, 2d, trained", 27, "2d", images=8),
    Setup("CT, 117 classes", 117, "3d_fullres", images=1),
    Setup(
        *("Brain, regions, background around, transposed", 35, "3d_fullres"),
        images=2,
        steps=STEPS,
        regions=(("brain", tuple(range(1, 13))), ("nuclei", (5, 7, 8, 9)), ("temporal", (10, 11))),
        transpose=(2, 0, 1),
        around=12,
    ),
    Setup("Hippocampus, regions", 4, "3d_fullres", steps=STEPS, images=8, regions=(("whole", (1, 2)), ("back", (2,)))),
    Setup("ACDC, 2d, ignore label (scribbles)", 27, "2d", steps=STEPS, images=8, scribbles=True),
    Setup("CHAOS, first stage", 20, "3d_lowres", steps=STEPS, images=2),
    Setup("CHAOS, second stage", 20, "3d_cascade_fullres", steps=STEPS, images=2, previous="CHAOS, first stage"),
)
SHOWN = ("cases", "voxels", "labels", "different")
CLASSES, SHAPE, SPACING = 117, (40, 160, 160), (3.0, 1.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="work", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--acdc", type=Path, help="folder of a network trained on ACDC")
    parser.add_argument("--only", nargs="+", default=[], help="names begin with this")
    parser.add_argument("--make", action="store_true", help="only make models and images")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--volumes", type=int, default=8, help="of --time")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    file = args.work / "results.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if args.table:
        write_between(args.table, MARKS, tables(kept))
        return
    for setup in SETUPS:
        if args.only and not any(setup.name.startswith(name) for name in args.only):
            continue
        model = make_model(setup, args)
        images = take_images(setup, args, args.volumes if args.time else setup.images)
        if args.make:
            continue
        more = []
        if setup.previous is not None:
            first = next(one for one in SETUPS if one.name == setup.previous)
            more = ["-prev_stage_predictions", str(args.work / "predicted" / "first")]
            run("stock", make_model(first, args), images, Path(more[1]), args)
        found = timed(model, images, args, more) if args.time else compared(model, images, args, more)
        versions = ", ".join(map(" ".join, installed_versions(("nnunetv2", "torch", "numpy", "numba")).items()))
        found |= {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores of {platform.machine()}, no GPU",
        }
        found["machine"] += f"; {versions}"
        kept[("time " if args.time else "same ") + setup.name] = found
        print(setup.name, json.dumps(found), flush=True)
        write_whole(file, json.dumps(kept, indent=1))


def environment(args: argparse.Namespace) -> dict[str, str]:
    folders = {
        "nnUNet_raw": args.data,
        "nnUNet_preprocessed": args.work / "planned",
        "nnUNet_results": args.work / "results",
    }
    return dict(os.environ) | {name: str(Path(folder).resolve()) for name, folder in folders.items()}


def make_model(setup: Setup, args: argparse.Namespace) -> Path:
    """The folder of a trained model."""
    if setup.number == 27 and not setup.scribbles:
        return args.acdc
    folder = args.work / "results" / setup.folder / "model"
    if (folder / "plans.json").exists():
        return folder
    (args.work / "planned").mkdir(parents=True, exist_ok=True)
    if setup.number == 117:
        plans, dataset = made_plans()
    else:
        name = next(args.data.glob(f"Dataset{setup.number:03d}_*")).name
        file = args.work / "planned" / name / "nnUNetPlans.json"
        if not file.exists():
            command = ["nnUNetv2_plan_and_preprocess", "-d", str(setup.number), "--no_pp", "-npfp", "1"]
            subprocess.run(command, env=environment(args), check=True, stdout=subprocess.DEVNULL)
        plans, dataset = (json.loads(one.read_text()) for one in (file, file.parent / "dataset.json"))
    change(setup, plans, dataset)
    managers = PlansManager(plans), PlansManager(plans).get_configuration(setup.configuration)
    network = managers[1].configuration["architecture"]
    channels = determine_num_input_channels(*managers, dataset)
    heads = managers[0].get_label_manager(dataset).num_segmentation_heads
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for fold in range(setup.folds):
        torch.manual_seed(fold)
        built = get_network_from_plans(
            *(network["network_class_name"], network["arch_kwargs"], network["_kw_requires_import"], channels, heads),
            deep_supervision=False,
        )
        if setup.steps:
            fit(built, setup, *managers, dataset, args)
        else:
            for parameter in built.decoder.seg_layers.parameters():
                parameter.data *= 6  # logits of a trained network's size
        (folder / f"fold_{fold}").mkdir()
        arguments = {"plans": plans, "configuration": setup.configuration, "fold": fold, "dataset_json": dataset}
        checkpoint = {
            "network_weights": built.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": arguments,
            "inference_allowed_mirroring_axes": None,
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "plans.json").write_text(json.dumps(plans))
    return folder


def change(setup: Setup, plans: dict, dataset: dict) -> None:
    """Make the plans those of a small network, and plans and labels what the setup says."""
    configurations = plans["configurations"]
    for configuration in configurations.values():
        architecture = configuration["architecture"]["arch_kwargs"]
        architecture["features_per_stage"] = [min(FEATURES << stage, 32) for stage in range(architecture["n_stages"])]
    if setup.configuration not in configurations:  # nnU-Net plans a cascade for larger images
        whole = configurations["3d_fullres"]
        spacing = [step * LOWER for step in whole["spacing"]]
        configurations["3d_lowres"] = whole | {"spacing": spacing, "next_stage": "3d_cascade_fullres"}
        second = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        configurations["3d_cascade_fullres"] = second
    plans["transpose_forward"] = list(setup.transpose)
    plans["transpose_backward"] = [setup.transpose.index(axis) for axis in range(3)]
    if setup.regions:
        dataset["labels"] = {"background": 0} | {name: list(labels) for name, labels in setup.regions}
        dataset["regions_class_order"] = [labels[0] for _, labels in setup.regions]
    if setup.scribbles:
        dataset["labels"]["ignore"] = max(dataset["labels"].values()) + 1


def fit(
    network: nn.Module,
    setup: Setup,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset: dict,
    args: argparse.Namespace,
) -> None:
    """Train some steps, with every class as heavy as the others, on crops of the first training images."""
    source = next(args.data.glob(f"Dataset{setup.number:03d}_*"))
    labels, rng = plans.get_label_manager(dataset), np.random.default_rng(0)
    cases = []
    for file in sorted((source / "imagesTr").iterdir())[:3]:
        reference = source / ("scribblesTr" if setup.scribbles else "labelsTr") / file.name.replace("_0000.", ".")
        data, seg, _ = configuration.preprocessor_class(verbose=False).run_case(
            [str(file)], str(reference), plans, configuration, dataset
        )
        seg = np.maximum(seg, 0)
        if setup.previous is not None:
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels.foreground_labels, data.dtype)))
        cases.append((data, seg[0].astype(np.int64)))
    size = [1, *configuration.patch_size] if len(configuration.patch_size) == 2 else configuration.patch_size
    crop = [min(CROP, n) for n in size]
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network.train()
    for _ in range(setup.steps):
        data, seg = cases[rng.integers(len(cases))]
        starts = [int(rng.integers(max(1, n - m + 1))) for n, m in zip(seg.shape, crop, strict=True)]
        box = tuple(slice(start, start + m) for start, m in zip(starts, crop, strict=True))
        lacking = [(0, m - seg[box].shape[axis]) for axis, m in enumerate(crop)]
        image = torch.from_numpy(np.pad(data[(slice(None), *box)], [(0, 0), *lacking])).float()[None]
        target = torch.from_numpy(np.pad(seg[box], lacking))[None]
        if len(configuration.patch_size) == 2:
            image, target = image[:, :, 0], target[:, 0]
        logits = network(image)
        if labels.has_regions:
            members = [torch.isin(target, torch.tensor(region)) for region in labels.foreground_regions]
            truth = torch.stack(members, dim=1).float()
            rare = (truth.numel() / len(members) / (truth.sum(dim=(0, 2, 3, 4)) + 1)).clamp(1, 100)
            rare = rare.reshape(-1, *[1] * (truth.dim() - 2))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, truth, pos_weight=rare)
        else:
            counts = torch.bincount(target.reshape(-1), minlength=logits.shape[1])[: logits.shape[1]]
            ignored = -100 if labels.ignore_label is None else labels.ignore_label
            weight = (counts.sum() / (counts + 1)).clamp(1, 100)
            loss = nn.functional.cross_entropy(logits, target, weight, ignore_index=ignored)
        optimizer.zero_grad()
        loss.nan_to_num().backward()  # a crop without any scribble
        optimizer.step()
    network.eval()


def made_plans() -> tuple[dict, dict]:
    """Of a CT with as many classes as TotalSegmentator has."""
    stages, kernel = 4, [3, 3, 3]
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [kernel] * stages,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
            "n_conv_per_stage": [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [32, 64, 64],
        "spacing": [3.0, 1.5, 1.5],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "architecture": network,
        "batch_dice": True,
    }
    for name, change in (("data", {}), ("seg", {"is_seg": True, "order": 1}), ("probabilities", {"order": 1})):
        configuration |= {
            f"resampling_fn_{name}": "resample_data_or_seg_to_shape",
            f"resampling_fn_{name}_kwargs": resampling | change,
        }
    intensities = {"mean": 0.0, "std": 400.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
    plans = {
        "dataset_name": "Dataset117_Made",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": configuration},
    }
    labels = {"background": 0} | {f"organ {c}": c for c in range(1, CLASSES)}
    return plans, {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}


def take_images(setup: Setup, args: argparse.Namespace, count: int) -> Path:
    """A folder of so many images."""
    folder = args.work / "images" / (f"{setup.number}_{count}" + (f"_{setup.around}" if setup.around else ""))
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    if setup.number == 117:
        for case in range(count):
            field = np.random.default_rng(case).normal(size=SHAPE).astype(np.float32)
            image = sitk.GetImageFromArray(ndimage.gaussian_filter(field, (2, 6, 6)) * 20_000)
            image.SetSpacing(SPACING[::-1])
            sitk.WriteImage(image, str(folder / f"made_{case}_0000.nii.gz"))
        return folder
    source = next(args.data.glob(f"Dataset{setup.number:03d}_*"))
    images = [*sorted((source / "imagesTs").iterdir()), *sorted((source / "imagesTr").iterdir())]
    for image in images[:count]:
        if setup.around:
            sides = [setup.around] * 3
            sitk.WriteImage(sitk.ConstantPad(sitk.ReadImage(str(image)), sides, sides), str(folder / image.name))
        else:
            shutil.copy(image, folder / image.name)
    return folder


def run(
    tool: str, model: Path, images: Path, output: Path, args: argparse.Namespace, *more: str
) -> tuple[float, float]:
    """Seconds that a command took, of the clock and of the processors."""
    shutil.rmtree(output, ignore_errors=True)
    folds = [path.name.removeprefix("fold_") for path in sorted(model.glob("fold_*"))]
    words = ["-i", str(images), "-o", str(output), "-m", str(model), "-device", "cpu", "-f", *folds, "--disable_tta"]
    name = {"ours": ["nnunet-calib", "predict"], "stock": ["nnUNetv2_predict_from_modelfolder"]}[tool]
    begin, used = time.perf_counter(), os.times()
    done = subprocess.run([*name, *words, *more], env=environment(args), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(name)}: {done.stderr[-2000:]}")
    now = os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return time.perf_counter() - begin, cpu


def compared(model: Path, images: Path, args: argparse.Namespace, more: list[str]) -> dict:
    """How much the files differ."""
    ending = read_dataset(model / "dataset.json").file_ending
    folders = {tool: args.work / "predicted" / tool for tool in ("ours", "stock")}
    for tool, folder in folders.items():
        run(tool, model, images, folder, args, "--save_probabilities", *more)
    different, largest, voxels, seen = 0, 0.0, 0, set()
    labels = sorted(folders["stock"].glob(f"*{ending}"))
    for theirs in labels:
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / theirs.name))) for folder in folders.values())
        different, voxels = different + int(np.count_nonzero(a != b)), voxels + a.size
        seen |= set(np.unique(b).tolist())
        name = theirs.name.removesuffix(ending) + ".npz"
        p, q = (np.load(folder / name)["probabilities"] for folder in folders.values())
        largest = max(largest, max(float(np.abs(x - y).max()) for x, y in zip(p, q, strict=True)))
    return {"cases": len(labels), "voxels": voxels, "labels": len(seen), "different": different, "largest": largest}


def timed(model: Path, images: Path, args: argparse.Namespace, more: list[str]) -> dict:
    """Median seconds of both commands, labels alone."""
    seconds: dict[str, list[tuple[float, float]]] = {tool: [] for tool in ("ours", "stock")}
    for _ in range(args.rounds):
        for tool, taken in seconds.items():
            taken.append(run(tool, model, images, args.work / "timed", args, *more))
    found: dict = {"cases": len(list(images.iterdir())), "rounds": args.rounds}
    for at, clock in enumerate(("", "_cpu")):
        found |= {f"{tool}{clock}": statistics.median(one[at] for one in taken) for tool, taken in seconds.items()}
    return found


def tables(kept: dict[str, dict]) -> str:
    """Markdown."""
    lines = [*dict.fromkeys(f"{found['date']}; {found['machine']}" for found in kept.values()), ""]
    lines += ["| model | images | voxels | labels seen | labels that differ | largest difference of a probability |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, found in kept.items():
        if name.startswith("same "):
            cells = [
                name.removeprefix("same "),
                *(str(found[one]) for one in ("cases", "voxels", "labels", "different")),
            ]
            lines.append(f"| {' | '.join(cells)} | {found['largest']:.1e} |")
    lines += ["", "| model | images | ours, s | stock, s | stock / ours | ours, CPU s | stock, CPU s | rounds |"]
    lines += ["|---|" + "---|" * 7]
    for name, found in kept.items():
        if name.startswith("time "):
            cells = [name.removeprefix("time "), str(found["cases"]), f"{found['ours']:.1f}", f"{found['stock']:.1f}"]
            cells += [f"{found['stock'] / found['ours']:.2f}"]
            cells += [f"{found[one]:.1f}" if one in found else "" for one in ("ours_cpu", "stock_cpu")]
            lines.append(f"| {' | '.join(cells)} | {found['rounds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
