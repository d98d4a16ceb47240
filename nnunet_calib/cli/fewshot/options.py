"""Flags that the steps of ``fewshot`` share, and what is refused before anything takes seconds."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_calib.cli import checks
from nnunet_calib.data.errors import UsageError

if TYPE_CHECKING:
    from nnunet_calib.data.dataset import Dataset

HEADS = ("linear", "prototype", "local_prototypes", "adapter")
FEWEST_SAMPLED = 100
"""Voxels of a volume without which a head has nothing to be fitted on."""

MOST_CHUNKS = 1000

REGISTRATIONS = ("none", "affine", "deformable")
LIMIT_S = 120.0
"""Seconds that registering a pair of volumes may take by default."""

AXES = {"lr": 0, "ap": 1, "is": 2}


def add_supports(parser: argparse.ArgumentParser) -> None:
    """The model, and the annotated volumes."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a trained model")
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="images, named as in imagesTr")
    parser.add_argument("--labels", metavar="DIR", type=Path, required=True, help="label maps, named as in labelsTr")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """The model, and the tasks that were fitted to it."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="the model that the tasks were fitted to")
    parser.add_argument("tasks", metavar="TASK", type=Path, nargs="+", help="task files, or folders of them")


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Flag of the time that a registration may take."""
    parser.add_argument(
        "--registration_limit",
        metavar="S",
        type=float,
        default=LIMIT_S,
        help="seconds that a pair of volumes may take; what is reached by then is used, and told (default: 120)",
    )


def add_registrations(parser: argparse.ArgumentParser, limit: bool = False) -> None:
    """Flags of registrations that are kept, and with ``limit`` of the time that one may take."""
    if limit:
        add_limit(parser)
    parser.add_argument(
        "--registrations", metavar="DIR", type=Path, help="folder where registrations are kept for the next run"
    )


def check_structures(labels: Sequence[int], names: Sequence[str]) -> None:
    """Refuse labels and names that are no pairs, or there twice."""
    if len(labels) != len(names):
        raise UsageError(f"--label has {len(labels)} values, --name {len(names)} names; give one name for each value")
    for flag, given in (("--label", labels), ("--name", names)):
        if twice := [one for one in given if list(given).count(one) > 1]:
            raise UsageError(f"{flag} {twice[0]} is there twice")


def check_labels(label: int, ignore: int | None) -> None:
    """Refuse label values that cannot be a structure and voxels that do not count."""
    if label < 1:
        raise UsageError(f"--label {label}: label maps hold a structure as 1 or more; 0 is background")
    if ignore is not None and ignore in (0, label):
        what = "background" if ignore == 0 else "the structure"
        raise UsageError(f"--ignore {ignore} is {what}; name the value of voxels that do not count")


def check_margin(margin: float) -> None:
    """Refuse a margin outside of [0, 1)."""
    if not 0 <= margin < 1:
        raise UsageError(f"--margin {margin:g}: it must be at least 0 and below 1")


def check_limit(seconds: float) -> None:
    """Refuse a time that is none."""
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--registration_limit {seconds:g}: it must be above 0 seconds")


def check_files(args: argparse.Namespace, *folders: Path | None) -> "Dataset":
    """Refuse a model or folders that are not there; the model's labels."""
    from nnunet_calib.data.dataset import read_dataset
    from nnunet_calib.data.model import checkpoints_of

    checks.step_size(args.step_size)
    checks.folders(*folders, args.prev_stage_predictions)
    checkpoints_of(args.model, args.folds, args.chk)
    return read_dataset(args.model / "dataset.json", args.model / "plans.json")


def shown_size(measured: Mapping[str, Any]) -> str:
    """Size of a structure: ml, or what a 2D image has instead."""
    if "area_mm2" in measured:
        return f"{measured['area_mm2']:.1f} mm2"
    return f"{measured['pixels']:.0f} pixels" if "pixels" in measured else f"{measured['volume_mm3'] / 1000:.2f} ml"


def add_prediction(parser: argparse.ArgumentParser, folds: str) -> None:
    """Flags of nnUNetv2_predict."""
    parser.add_argument("-f", dest="folds", metavar="F", nargs="+", help=f"folds of the model ({folds})")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="name of the checkpoint (checkpoint_final.pth)")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, else cpu")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the sliding window (default: 0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, base classes less accurate")
    parser.add_argument(
        "-prev_stage_predictions", metavar="DIR", type=Path, help="of a cascade, segmentations of the stage before"
    )


def prediction_of(args: argparse.Namespace) -> dict[str, Any]:
    """How the network is used, as keyword arguments."""
    import multiprocessing

    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = args.device or ("cuda" if there["cuda"] else "cpu")
    if not there[device]:
        raise UsageError(f"-device {device}: torch finds none here; use -device cpu")
    if device == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())  # as nnUNetv2_predict does
    return {
        "folds": args.folds,
        "checkpoint": args.chk,
        "device": device,
        "step_size": args.step_size,
        "mirroring": not args.disable_tta,
        "previous": args.prev_stage_predictions,
    }
