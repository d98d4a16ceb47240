"""``nnunet-calib validate``: the validation of a trained model, with all of evaluate's numbers."""

import argparse
import sys
from pathlib import Path

from nnunet_calib.cli import checks

HELP = "validate a trained model: scores of each fold's own cases, and what calibrate fit needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Predict each fold's validation cases, as the end of its training does, and score them as\n"
        "evaluate does, from the logits in memory. Any model will do, of stock nnU-Net too. Results are\n"
        "beside the predictions, in fold_X/validation: summary.json, cases.csv, reliability.json, and\n"
        "for calibrate fit a sample of voxels of each case, in place of gigabytes of probabilities."
    )
    parser.epilog = (
        "example:\n  nnunet-calib validate nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres"
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of the model, with plans.json and fold_*")
    parser.add_argument("-f", dest="folds", nargs="+", help="folds (default: all that are trained)")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default: checkpoint_final.pth)")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="cuda (default), cpu or mps")
    parser.add_argument("-prev_stage_predictions", type=Path, help="of a cascade; nnU-Net's own if not given")
    parser.add_argument(
        "--probabilities",
        choices=["none", "compact", "npz", "nifti"],
        default="none",
        help="write them (default: no); calibrate fit --method local and --voxels need them, compact or npz",
    )


def run(args: argparse.Namespace) -> int:
    """Validate the folds; 1 if a case failed."""
    from nnunet_calib.data.errors import UsageError
    from nnunet_calib.data.model import checkpoints_of

    checkpoints_of(args.model, args.folds, args.chk)
    checks.folders(args.prev_stage_predictions)
    import os

    import torch
    from tqdm import tqdm

    from nnunet_calib.cli.evaluate import tables
    from nnunet_calib.pipeline.case import Wanted
    from nnunet_calib.pipeline.validation import validate_model

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; use -device cpu")
    torch.set_num_threads(os.cpu_count() or 1 if args.device == "cpu" else 1)
    summaries = validate_model(
        args.model,
        args.folds,
        checkpoint=args.chk,
        device=args.device,
        wanted=Wanted(args.probabilities),
        previous=args.prev_stage_predictions,
        on_failure=lambda line: tqdm.write(f"nnunet-calib validate: {line}", file=sys.stderr),
    )
    for fold, summary in summaries.items():
        print(f"fold {fold}")
        print("\n".join(tables(summary)))
        print(f"written to {args.model / f'fold_{fold}' / 'validation'}\n")
    return 1 if any(summary["failed"] for summary in summaries.values()) else 0
