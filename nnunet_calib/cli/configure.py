"""``nnunet-calib configure``: write a plans configuration with settings, so that nobody edits JSON by hand."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

HELP = "write a plans configuration with settings for our trainers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags as nnU-Net names them."""
    parser.description = (
        "Add a configuration to the plans of a data set. It inherits from another, preprocessed data included, and\n"
        "has a results folder of its own. The settings are checked first; the old plans stay beside the new ones."
    )
    parser.epilog = (
        "examples:\n"
        "  nnunet-calib configure -d 4 -c 3d_fullres --name 3d_fullres_m10 --set margin=10 num_epochs=250\n"
        "  nnUNetv2_train 4 3d_fullres_m10 0 -tr MbLSTrainer\n\n"
        "  a small network and a short schedule, for a trial:\n"
        "  nnunet-calib configure -d 4 -c 3d_fullres --name trial --features 8 --batch_size 2 --set num_epochs=20\n\n"
        "settings of a trainer: nnunet-calib trainers NAME"
    )
    parser.add_argument("-d", required=True, metavar="ID", help="data set, number or name")
    parser.add_argument("-c", required=True, metavar="BASE", help="configuration to inherit from")
    parser.add_argument("--name", required=True, help="of the new configuration")
    parser.add_argument("--set", nargs="+", default=[], metavar="K=V", help="settings; values as in JSON")
    parser.add_argument("--batch_size", type=int, metavar="N", help="patches in a batch; else that of BASE")
    parser.add_argument("--patch_size", type=int, nargs="+", metavar="N", help="voxels of a patch, one number an axis")
    parser.add_argument(
        "--features",
        type=int,
        nargs="+",
        metavar="N",
        help="feature maps of each stage of the network, or of the first only: they then double up to those of BASE",
    )
    parser.add_argument("-tr", metavar="NAME", help="check the settings for this trainer only")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument("--previous-stage", metavar="C", help="cascade: configuration whose predictions it takes")
    parser.add_argument("--replace", action="store_true", help="overwrite a configuration of that name")


def run(args: argparse.Namespace) -> int:
    """Check the settings, write the configuration, say how to train it.

    Raises:
        UsageError: a setting that no trainer takes, an unusable name, or results that would be mixed up.
        InputError: the plans cannot be read.
    """
    from nnunet_calib.data.errors import UsageError
    from nnunet_calib.data.plans import (
        SETTINGS_KEY,
        add_configuration,
        preprocessed_folder,
        read_plans,
        resolve_configuration,
        smaller_network,
    )
    from nnunet_calib.training.catalogue import check_may_be_ours, listed_trainers
    from nnunet_calib.training.settings import RefusedSettings, check_of_any, check_settings, default_kernel_size

    settings = dict(setting_of(text) for text in args.set)
    if args.tr is not None:
        check_may_be_ours(args.tr)
    folder = preprocessed_folder(args.d)
    plans_file = folder / f"{args.p}.json"
    plans = read_plans(plans_file)
    overrides = smaller_network(plans, args.c, args.batch_size, args.patch_size, args.features)
    all_settings = {**resolve_configuration(plans, args.c).get(SETTINGS_KEY, {}), **settings}
    kernel_size = default_kernel_size(plans, args.c)
    try:
        # First what can be said without torch, of all; then all that a training would check.
        if args.tr is None:
            accepting = check_of_any(all_settings, kernel_size)
        else:
            accepting = [args.tr]
            if (listed := listed_trainers().get(args.tr)) is not None:
                check_settings(all_settings, listed.loss, listed.fixed, kernel_size)
        accepting = trainers_that_start(accepting, all_settings, kernel_size)
    except RefusedSettings as refusal:
        whose = f"{args.tr}: " if args.tr else ""
        raise UsageError(whose + str(refusal).removeprefix("nnunet-calib: ")) from refusal
    trained = _trained(folder.name, plans["plans_name"], args.name)
    if trained:
        raise UsageError(f"{trained} holds trainings of a configuration {args.name}; choose another name")
    backup = add_configuration(
        plans_file, args.name, args.c, settings, overrides, previous_stage=args.previous_stage, replace=args.replace
    )
    print(f"wrote {args.name} into {plans_file} (before: {backup.name})")
    to_train = args.tr or (accepting[0] if len(accepting) == 1 else "NAME")
    print(f"train: nnUNetv2_train {args.d} {args.name} 0 -tr {to_train} -p {args.p}")
    print(f"trainers that take these settings: {', '.join(accepting)}")
    return 0


def setting_of(text: str) -> tuple[str, Any]:
    """A setting and its value out of ``K=V``.

    Raises:
        UsageError: it is something else.
    """
    from nnunet_calib.data.errors import UsageError

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"--set wants K=V, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def trainers_that_start(names: list[str], settings: dict[str, Any], kernel_size: int | list[int]) -> list[str]:
    """Those that take the settings as a training does, which builds the loss; if none does, why the first does not."""
    from nnunet_calib.training.catalogue import listed_trainers
    from nnunet_calib.training.settings import accepting, resolve_settings

    def check(name: str) -> None:
        if (listed := listed_trainers().get(name)) is not None:
            resolve_settings(settings, listed.loss, listed.fixed, kernel_size)
        else:  # a user's own, made of one of ours
            from nnunet_calib.training.base import find_trainer

            find_trainer(name).check_settings(settings, kernel_size)

    return accepting(names, check)


def _trained(dataset: str, plans_name: str, configuration: str) -> Path | None:
    results = os.environ.get("nnUNet_results")
    found = Path(results, dataset).glob(f"*__{plans_name}__{configuration}/fold_*/checkpoint_*.pth") if results else ()
    return next((checkpoint.parent.parent for checkpoint in found), None)
