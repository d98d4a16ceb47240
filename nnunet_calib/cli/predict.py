"""``nnunet-calib predict``: nnU-Net's prediction with probabilities, maps, a calibrator and scores in one pass."""

import argparse
import os
import sys
from pathlib import Path

from nnunet_calib.cli import checks

HELP = "predict with a trained model: label maps, calibrated probabilities, maps and scores in one pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Predict a folder of images as nnUNetv2_predict does, voxel by voxel the same labels, and in\n"
        "the same pass what is asked for: probabilities, calibrated ones too, maps of confidence and\n"
        "entropy, what the folds disagree about, and scores against references. A command that was\n"
        "interrupted goes on where it stopped; cases that are there and up to date are kept."
    )
    parser.epilog = (
        "example:\n  nnunet-calib predict -i imagesTs -o predictions -d 4 -c 3d_fullres -f 0 \\\n"
        "    --calibrator calibrator.json --probabilities compact --confidence --reference labelsTs"
    )
    add = parser.add_argument
    add("-i", dest="images", type=Path, required=True, help="folder of images, named <case>_0000 and so on")
    add("-o", dest="output", type=Path, required=True, help="folder for the predictions")
    add("-d", dest="dataset", help="data set of the model, its number or name, under nnUNet_results")
    add("-c", dest="configuration", help="its configuration")
    add("-tr", dest="trainer", default="nnUNetTrainer", help="its trainer (default: nnUNetTrainer)")
    add("-p", dest="plans", default="nnUNetPlans", help="its plans (default: nnUNetPlans)")
    add("-m", dest="model", type=Path, help="folder of the model, instead of -d, -c, -tr and -p")
    add("-f", dest="folds", nargs="+", help="folds (default: all that are trained)")
    add("-chk", default="checkpoint_final.pth", help="checkpoint of each fold (default: checkpoint_final.pth)")
    add("-step_size", type=float, default=0.5, help="of the sliding window, in patches (default: 0.5)")
    add("--disable_tta", action="store_true", help="no mirroring")
    add("--not_on_device", action="store_true", help="results in the computer's memory, not the device's")
    for flag, work in (("-npp", "images preprocessed"), ("-nps", "cases exported")):
        default = os.environ.get(f"nnUNet_{flag[1:]}", "1")  # a string that is no integer is refused as one given
        said = f"{work} at the same time, in threads (default: nnUNet_{flag[1:]}, or 1)"
        add(flag, type=int, default=default, help=said)
    add("-prev_stage_predictions", type=Path, help="label maps of the previous stage, for a cascade")
    add("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="cuda (default), cpu or mps")
    add("-num_parts", type=int, default=1, help="into how many parts the cases are divided (default: 1)")
    add("-part_id", type=int, default=0, help="which part to predict, from 0")
    add("--continue_prediction", "--c", action="store_true", help="as nnU-Net's; it is the default here")
    add("--fresh", action="store_true", help="predict every case again")
    add("--verbose", action="store_true", help="nnU-Net's lines about preprocessing and windows")
    add("--disable_progress_bar", action="store_true", help="no bar of each case's windows")
    add("--calibrator", type=Path, metavar="FILE", help="calibrate the probabilities (of calibrate fit)")
    add("--any-model", action="store_true", help="a calibrator of another model will do")
    add("--reference", type=Path, metavar="DIR", help="label maps to score against, as evaluate does")
    add("--probabilities", choices=["none", "compact", "npz", "nifti"], default="none", help="write them (default: no)")
    add("--save_probabilities", action="store_true", help="as --probabilities npz")
    add("--confidence", action="store_true", help="write the largest probability of every voxel")
    add("--entropy", action="store_true", help="write the entropy of every voxel, in nats")
    add("--members", action="store_true", help="each fold's probabilities, their mean, and what they disagree about")


def run(args: argparse.Namespace) -> int:
    """Predict the folder; 1 if a case failed."""
    folder = args.model or _folder(args)
    from nnunet_calib.data.cases import find_images
    from nnunet_calib.data.dataset import read_dataset
    from nnunet_calib.data.errors import UsageError
    from nnunet_calib.data.model import checkpoints_of

    checks.folders(args.images, args.reference, args.prev_stage_predictions)
    checks.at_least(1, num_parts=args.num_parts)
    checks.at_least(0, npp=args.npp, nps=args.nps)
    checks.step_size(args.step_size)
    if not 0 <= args.part_id < args.num_parts:
        raise UsageError(f"-part_id is from 0 to {args.num_parts - 1}, not {args.part_id}")
    checkpoints_of(folder, args.folds, args.chk)
    calibration = None
    if args.calibrator:
        from nnunet_calib.posthoc.folders.apply import open_calibration

        files = (folder / "dataset.json", folder / "plans.json")
        calibration = open_calibration(args.calibrator, folder, *files, model=folder, any_model=args.any_model)
    find_images(args.images, read_dataset(folder / "dataset.json", folder / "plans.json").file_ending)
    import torch
    from tqdm import tqdm

    from nnunet_calib.pipeline.case import Wanted
    from nnunet_calib.pipeline.predict import Options, predict_folder
    from nnunet_calib.prediction.model import TrainedModel

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; use -device cpu")
    torch.set_num_threads(os.cpu_count() or 1 if args.device == "cpu" else 1)  # as nnUNetv2_predict
    model = TrainedModel(folder, args.folds, args.chk)
    done = predict_folder(
        model,
        args.images,
        args.output,
        Wanted(
            "npz" if args.save_probabilities else args.probabilities,
            args.confidence,
            args.entropy,
            args.members,
            None if calibration is None else calibration.calibrator,
        ),
        Options(
            args.device,
            args.step_size,
            not args.disable_tta,
            not args.not_on_device,
            args.npp,
            args.nps,
            not args.disable_progress_bar and sys.stderr.isatty(),
            args.verbose,
        ),
        reference=args.reference,
        previous=args.prev_stage_predictions,
        calibrator=None if calibration is None else calibration.describe(),
        parts=(args.num_parts, args.part_id),
        fresh=args.fresh,
        on_failure=lambda line: tqdm.write(f"nnunet-calib predict: {line}", file=sys.stderr),
    )
    if done["summary"] is not None:
        from nnunet_calib.cli.evaluate import tables

        print("\n".join(tables(done["summary"])))
    kept, failed = len(done["kept"]), len(done["failed"])
    print(
        f"{len(done['predicted'])} predicted"
        + (f", {kept} kept" if kept else "")
        + (f", {failed} failed" if failed else "")
        + f"; written to {args.output}"
    )
    return 1 if failed else 0


def _folder(args: argparse.Namespace) -> Path:
    from nnunet_calib.data.errors import UsageError

    if not args.dataset or not args.configuration:
        raise UsageError("name the model: -d DATASET -c CONFIGURATION, or -m FOLDER")
    root = os.environ.get("nnUNet_results")
    if not root:
        raise UsageError("nnUNet_results is not set; export it as for nnUNetv2_predict, or name the model with -m")
    pattern = f"Dataset{int(args.dataset):03d}_*" if args.dataset.isdecimal() else args.dataset
    name = f"{args.trainer}__{args.plans}__{args.configuration}"
    found = sorted(folder / name for folder in Path(root).glob(pattern) if (folder / name).is_dir())
    if len(found) != 1:
        raise UsageError(f"{'no' if not found else len(found)} model {pattern}/{name} in {root}; is it trained?")
    return found[0]
