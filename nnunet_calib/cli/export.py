"""``nnunet-calib export``: a model that stock nnU-Net runs without this package."""

import argparse
from pathlib import Path

HELP = "write a model that stock nnU-Net runs without this package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags as nnU-Net names them."""
    parser.description = (
        "Write a trained model for a machine that has nnU-Net alone. The weights are the same, the trainer's name\n"
        "becomes that of nnU-Net's class whose network it is. A calibrator fitted to the model goes with it."
    )
    parser.epilog = (
        "example:\n"
        "  nnunet-calib export nnUNet_results/Dataset004_Hippocampus/NACLTrainer__nnUNetPlans__3d_fullres -o stock\n"
        "  nnUNetv2_predict_from_modelfolder -i IN -o OUT -m stock -f 0\n"
        "  nnunet-calib export MODEL -o model.zip && nnUNetv2_install_pretrained_model_from_zip model.zip"
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a trained model")
    parser.add_argument("-o", dest="output", required=True, type=Path, metavar="DIR|FILE.zip", help="new folder or zip")
    parser.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="folds; default: all that are trained")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: checkpoint_final.pth")
    parser.add_argument("--calibrator", type=Path, metavar="FILE", help="default: MODEL/calibrator.json if it is there")


def run(args: argparse.Namespace) -> int:
    """Export and say how to use it.

    Raises:
        UsageError: the output is there already, or a fold is not.
        InputError: no trained model, or one whose network is not nnU-Net's own.
    """
    from nnunet_calib.pipeline.export import export_model

    done = export_model(args.model, args.output, args.folds, args.chk, args.calibrator)
    folds = " ".join(done.folds)
    print(f"wrote {args.output}: a model of {done.stock_trainer}, fold {folds}")
    more = "" if args.chk == "checkpoint_final.pth" else f" -chk {args.chk}"
    if args.output.suffix.lower() == ".zip":
        trainer, plans, configuration = done.place.name.split("__")
        print(f"install: nnUNetv2_install_pretrained_model_from_zip {args.output}")
        print(
            f"predict: nnUNetv2_predict -i IN -o OUT -d {done.place.parent} -tr {trainer} -p {plans} "
            f"-c {configuration} -f {folds}{more}"
        )
    else:
        print(f"predict: nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {args.output} -f {folds}{more}")
    return 0
