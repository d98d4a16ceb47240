"""``nnunet-calib calibrate``: fit, apply and check calibrators of a trained model."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_calib.cli.words import counted

HELP = "calibrated probabilities from a trained model: fit a calibrator, apply it, check where it is used"

_METHODS = ("temperature", "classwise", "cmsop", "cmsap", "vector", "isotonic", "dirichlet", "local")
_REGIONS = ("volume", "foreground", "boundary")
_SCORES = ("NLL", "Brier", "ECE", "CECE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Calibrate the probabilities of any trained nnU-Net, without training it again: fit on\n"
        "validation cases, apply to new ones."
    )
    parser.epilog = (
        "examples:\n"
        "  nnunet-calib calibrate fit $nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres "
        "-o calibrator\n"
        "  nnunet-calib calibrate fit predictions --reference labels -o calibrator\n"
        "  nnunet-calib calibrate apply calibrator -i predictions -o calibrated"
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    fit = steps.add_parser("fit", help="fit a calibrator to validation cases", formatter_class=raw)
    fit.description = (
        "Fit a calibrator to the validation cases of a trained model (each predicted by the fold\n"
        "that was not trained on it; run nnunet-calib validate MODEL first), or to a folder of\n"
        "predictions with probabilities. Prints what it is worth on cases it was not fitted on and\n"
        "writes OUT/calibrator.json."
    )
    fit.epilog = "example:\n  nnunet-calib calibrate fit predictions --reference labels -o calibrator"
    fit.add_argument("folder", metavar="MODEL_OR_FOLDER", type=Path, help="a trained model, or predictions")
    fit.add_argument("--reference", metavar="DIR", type=Path, help="label maps; default for a model: nnU-Net's own")
    fit.add_argument("-djfile", type=Path, help="dataset.json; else the one in or near the folder")
    fit.add_argument(
        "--method",
        metavar="M",
        nargs="+",
        choices=("auto", "any", *_METHODS),
        default=["auto"],
        help=f"one or more of {', '.join(_METHODS)}; of several the best on cases it was not fitted on is kept, "
        "or a simpler one that is not told from it; "
        "auto (default): all that change no label, without local (minutes); in the foreground "
        "temperature only; any: those that may change labels too",
    )
    fit.add_argument("--region", choices=_REGIONS, default="volume", help="voxels to fit on (default: volume)")
    fit.add_argument("--voxels", metavar="N", type=int, default=10_000, help="drawn from each case (default: 10000)")
    fit.add_argument("--seed", metavar="N", type=int, default=0, help="of the sample and the folds (default: 0)")
    fit.add_argument("-np", type=int, default=1, help="cases read at the same time (default: 1)")
    fit.add_argument("-o", dest="output", metavar="OUT", type=Path, required=True, help="folder for calibrator.json")

    apply = steps.add_parser("apply", help="write calibrated probabilities", formatter_class=raw)
    apply.description = (
        "Write calibrated probabilities, and the segmentation: unchanged by temperatures; of other\n"
        "methods with the voxels whose decision changes, which are counted."
    )
    apply.epilog = "example:\n  nnunet-calib calibrate apply calibrator -i predictions -o calibrated"
    _add_predictions(apply)
    apply.add_argument("-o", dest="output", metavar="DIR", type=Path, required=True, help="folder for the results")

    check = steps.add_parser(
        "check", help="are new cases like those of the fit? needs no references", formatter_class=raw
    )
    check.description = (
        "Compare the confidences of new cases, without references, with those of the cases the\n"
        "calibrator was fitted to, and warn where they differ more than chance explains. PSI, the\n"
        "population stability index, is 0 for the same confidences and grows with the difference;\n"
        "p is the share of cases like those of the fit that differ as much. Each case, and all of\n"
        "them together, are called unlike the fit from p = 0.05 down."
    )
    check.epilog = "example:\n  nnunet-calib calibrate check calibrator -i predictions"
    _add_predictions(check)


def _add_predictions(parser: argparse.ArgumentParser) -> None:
    """A calibrator and what it is used on."""
    parser.add_argument("calibrator", metavar="FILE", type=Path, help="calibrator.json, or its folder")
    parser.add_argument("-i", dest="predictions", metavar="DIR", type=Path, required=True, help="predictions")
    parser.add_argument("-djfile", type=Path, help="dataset.json; else the one in or near the predictions")
    parser.add_argument("--model", metavar="DIR", type=Path, help="trained model of the predictions, to be compared")
    parser.add_argument("--any-model", action="store_true", help="also for another model than it was fitted to")


def run(args: argparse.Namespace) -> int:
    """Do one step and print what came of it."""
    return {"fit": _fit, "apply": _apply, "check": _check}[args.step](args)


def _fit(args: argparse.Namespace) -> int:
    from nnunet_calib.posthoc.folders.fit import fit_folder

    content = fit_folder(
        args.folder,
        args.output,
        args.reference,
        args.djfile,
        methods=args.method,
        region=args.region,
        voxels=args.voxels,
        seed=args.seed,
        processes=args.np,
    )
    print("\n".join(_table(content)))
    _tell_left_out(content["without_probabilities"])
    print(content["choice"])
    if content["method"] == "temperature":
        print(f"temperature {content['temperature']:.4g}")
    for note in content["notes"]:
        print(f"note: {note}")
    print(f"written to {args.output / 'calibrator.json'}")
    return 0


def _apply(args: argparse.Namespace) -> int:
    from nnunet_calib.posthoc.folders.apply import apply_folder

    done = apply_folder(
        args.calibrator, args.predictions, args.output, args.djfile, model=args.model, any_model=args.any_model
    )
    cases = done["cases"].values()
    changed, voxels = (sum(case[name] for case in cases) for name in ("changed", "voxels"))
    labels = "segmentations unchanged" if done["keeps_labels"] else f"{changed} of {voxels} voxels have another label"
    _tell_left_out(done["without_probabilities"])
    print(f"{counted(len(cases), 'case')} calibrated ({done['method']}); {labels}; written to {args.output}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from nnunet_calib.posthoc.folders.check import check_folder

    found = check_folder(args.calibrator, args.predictions, args.djfile, model=args.model, any_model=args.any_model)
    for name, case in sorted(found["cases"].items(), key=lambda item: -item[1]["psi"]):
        verdict = "  unlike the fit" if case["unlike"] else ""
        print(f"{name:<32} PSI {case['psi']:.3f}  p {case['p']:.3f}{verdict}")
    for name in found["left_out"]:
        print(f"{name:<32} no foreground predicted")
    _tell_left_out(found["without_probabilities"])
    if not found["cases"]:
        print("no foreground is predicted in any case: nothing to compare")
    else:
        print("\n".join(_verdicts(found)))
    if found["shifted"]:
        print(
            "nnunet-calib calibrate: warning: the confidences of these cases are not like those of the fit; "
            "do not rely on the calibrator here before checking it on cases with references",
            file=sys.stderr,
        )
    return 0


def _verdicts(found: dict[str, Any]) -> Iterator[str]:
    """One sentence on single cases, one on all of them."""
    from nnunet_calib.posthoc.folders.check import FEWEST, LEVEL

    new, fitted = len(found["cases"]), counted(found["fit_cases"], "case")
    if found["fit_cases"] < FEWEST:
        yield f"single cases: not judged; the fit has {fitted}, {FEWEST} are needed to tell one from them"
    else:
        unlike = sum(case["unlike"] for case in found["cases"].values())
        chance = f"of cases like those of the fit at most {LEVEL:.0%} are called so"
        yield f"single cases: {unlike} of {new} unlike the {fitted} of the fit; {chance}"
    yield (
        f"mean confidence in the predicted foreground: {found['confidence']:.2f} here, "
        f"{found['fit_confidence']:.2f} in the cases of the fit"
    )
    like = "do not look" if found["shifted"] else "look"
    yield f"all together, PSI {found['psi']:.3f}, p {found['p']:.3f}: these cases {like} like those of the fit"


def _tell_left_out(names: list[str]) -> None:
    if names:
        print(f"{counted(len(names), 'case')} without probabilities left out: {', '.join(names)}")


def _table(content: dict[str, Any]) -> Iterator[str]:
    """Cross-fitted scores: mean over cases, 95 % interval of the first."""
    if not content["cross_fit"]:
        return
    yield f"on cases not fitted on, {content['voxels_per_case']} sampled voxels of each; mean over cases"
    for region in _REGIONS:
        yield f"{region:<14}" + f"{'NLL [95 %]':>26}" + "".join(f"{name:>9}" for name in _SCORES[1:])
        for method, regions in content["cross_fit"].items():
            row = regions[region]
            nll = f"{_number(row['NLL']['mean'])} [{_number(row['NLL']['low'])}, {_number(row['NLL']['high'])}]"
            rest = "".join(f"{_number(row[name]['mean']):>9}" for name in _SCORES[1:])
            yield f"  {method:<12}{nll:>26}{rest}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"
