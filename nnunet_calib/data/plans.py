"""nnU-Net's plans files: find them, add a configuration."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json, write_whole

SETTINGS_KEY = "nnunet_calib"
"""Key of a configuration that holds the settings of our trainers."""


def preprocessed_folder(dataset: str) -> Path:
    """Folder of a data set under ``nnUNet_preprocessed``.

    Args:
        dataset: its number or full name, as ``nnUNetv2_train`` takes it.

    Raises:
        UsageError: the variable is not set, or the data set is not there (or more than once).
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise UsageError("nnUNet_preprocessed is not set; export it as for nnUNetv2_train")
    if not re.fullmatch(r"[0-9]{1,3}|Dataset[0-9]{3}_[^/\\*?\[]+", dataset):
        raise UsageError(
            f"{dataset!r} is not a data set; give its number or its full name, like Dataset004_Hippocampus"
        )
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdecimal() else dataset
    found = sorted(folder for folder in Path(root).glob(pattern) if folder.is_dir())
    if len(found) != 1:
        what = "no data set" if not found else f"{len(found)} data sets"
        raise UsageError(f"{what} {pattern} in {root}; run nnUNetv2_plan_and_preprocess -d {dataset} first")
    return found[0]


def read_plans(file: str | Path) -> dict[str, Any]:
    """Read a plans file.

    Raises:
        InputError: it is missing, not JSON, or has no configurations.
    """
    plans = read_json(Path(file))
    if not isinstance(plans.get("configurations"), dict) or "plans_name" not in plans:
        raise InputError(f"{file} is not a plans file of nnU-Net v2: no 'configurations' or 'plans_name' in it")
    return plans


def lineage(plans: Mapping[str, Any], name: str) -> list[str]:
    """A configuration and those it inherits from, nearest first.

    Raises:
        UsageError: the plans do not have one of them, or it inherits from itself.
    """
    names: list[str] = []
    step: str | None = name
    while step is not None:
        if step not in plans["configurations"] or step in names:
            what = "inherits from itself" if step in names else "is not in the plans"
            known = ", ".join(plans["configurations"])
            raise UsageError(f"configuration {step} {what}; {plans['plans_name']} has {known}")
        names.append(step)
        step = plans["configurations"][step].get("inherits_from")
    return names


def resolve_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with all that it inherits.

    Raises:
        UsageError: the plans do not have one of them, or it inherits from itself.
    """
    merged: dict[str, Any] = {}
    for step in reversed(lineage(plans, name)):
        merged |= plans["configurations"][step]
    merged.pop("inherits_from", None)
    return merged


def first_kernel(plans: Mapping[str, Any], name: str) -> list[int]:
    """Kernel size of the first convolution of a configuration, a number an axis; 3 where the plans do not say it.

    Raises:
        UsageError: as ``resolve_configuration``.
    """
    configuration = resolve_configuration(plans, name)
    arguments = configuration.get("architecture", {}).get("arch_kwargs", {})
    # The second name is that of plans before nnU-Net 2.5.
    kernels = arguments.get("kernel_sizes", configuration.get("conv_kernel_sizes", 3))
    first = kernels if isinstance(kernels, int) else kernels[0]
    return [first] * len(configuration["patch_size"]) if isinstance(first, int) else list(first)


def add_configuration(
    plans_file: str | Path,
    name: str,
    base: str,
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    previous_stage: str | None = None,
    replace: bool = False,
) -> Path:
    """Add a configuration that inherits from another; the old file stays beside it as a backup.

    Args:
        plans_file: nnU-Net's plans, in the ``nnUNet_preprocessed`` folder of a data set.
        name: of the new configuration; letters, digits and single underscores.
        base: configuration to inherit from, preprocessed data included.
        settings: for our trainers, besides those of the base.
        overrides: other keys of the configuration, such as ``batch_size``.
        previous_stage: of a cascade, the configuration whose predictions it takes; the base's if None.
        replace: overwrite a configuration of that name if it is one of ours.

    Returns:
        The backup.

    Raises:
        InputError: the plans cannot be read.
        UsageError: the name is taken or unusable, or the base is not there.
    """
    plans_file = Path(plans_file)
    plans = read_plans(plans_file)
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise UsageError(f"{name!r} cannot name a configuration; use letters, digits and single underscores")
    there = plans["configurations"].get(name)
    if there is not None and not (replace and SETTINGS_KEY in there):
        ours = "choose another name or pass --replace" if not replace else "it is nnU-Net's own, choose another name"
        raise UsageError(f"{plans_file} has a configuration {name} already; {ours}")
    if name in lineage(plans, base):
        raise UsageError(f"configuration {name} cannot inherit from itself")
    inherited = resolve_configuration(plans, base)
    configuration: dict[str, Any] = {
        "inherits_from": base,
        **(overrides or {}),
        # nnU-Net inherits key by key: without the base's settings in it this key would drop them.
        SETTINGS_KEY: {**inherited.get(SETTINGS_KEY, {}), **settings},
    }
    stage = previous_stage or inherited.get("previous_stage")
    if stage is not None:
        # nnU-Net exports the first stage's predictions for every configuration that it lists as next.
        configuration["previous_stage"] = stage
        first = resolve_configuration(plans, stage)
        following = first.get("next_stage") or []
        following = [following] if isinstance(following, str) else list(following)
        plans["configurations"][stage]["next_stage"] = [*following, *([] if name in following else [name])]
    if inherited.get("next_stage"):
        # The base's next stage takes the base's predictions, not those of this configuration.
        configuration["next_stage"] = []
    plans["configurations"][name] = configuration
    backup = _unused(plans_file.with_name(plans_file.name + ".bak"))
    shutil.copy2(plans_file, backup)
    write_whole(plans_file, json.dumps(plans, indent=4) + "\n")
    return backup


def smaller_network(
    plans: Mapping[str, Any],
    base: str,
    batch_size: int | None = None,
    patch_size: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The keys of a configuration that change the size of the network and of what it sees at a time.

    Args:
        plans: of nnU-Net.
        base: the configuration they replace keys of.
        batch_size: patches in a batch.
        patch_size: voxels, an axis each; every stage of the network must halve it without remainder.
        features: feature maps of every stage, or of the first alone: they then double from stage to stage, up to the
            largest number of the base.

    Returns:
        ``overrides`` for ``add_configuration``; empty if nothing is asked for.

    Raises:
        UsageError: the base is not there, or no network can be built like that.
    """
    changed: dict[str, Any] = {}
    configuration = resolve_configuration(plans, base)
    if batch_size is not None:
        if batch_size < 1:
            raise UsageError(f"the batch size must be 1 or more, not {batch_size}")
        changed["batch_size"] = batch_size
    if patch_size is None and features is None:
        return changed
    try:
        architecture = configuration["architecture"]
        strides, own_features = (architecture["arch_kwargs"][name] for name in ("strides", "features_per_stage"))
        axes = len(configuration["patch_size"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"configuration {base} does not say its {error}; patch and features cannot be set") from error
    if patch_size is not None:
        changed["patch_size"] = _checked_patch(patch_size, axes, strides, base)
    if features is not None:
        if min(features) < 1 or len(features) not in (1, len(own_features)):
            raise UsageError(
                f"{base} has {len(own_features)} stages: give so many numbers of features of 1 or more, or the first "
                f"stage's alone; not {' '.join(map(str, features))}"
            )
        if len(features) == 1:
            features = [min(features[0] * 2**stage, max(own_features)) for stage in range(len(own_features))]
        arguments = {**architecture["arch_kwargs"], "features_per_stage": list(features)}
        changed["architecture"] = {**architecture, "arch_kwargs": arguments}
    return changed


def _checked_patch(patch_size: Sequence[int], axes: int, strides: Sequence[Any], base: str) -> list[int]:
    """A patch that every stage of the network can halve, with more than one voxel left."""
    if len(patch_size) != axes:
        raise UsageError(f"{base} has {axes} axes: give {axes} numbers for the patch size, not {len(patch_size)}")
    whole = [prod(stride if isinstance(stride, int) else stride[axis] for stride in strides) for axis in range(axes)]
    if any(size < 1 or size % step for size, step in zip(patch_size, whole, strict=True)):
        raise UsageError(
            f"the network of {base} needs a patch size that is a multiple of {' '.join(map(str, whole))}, "
            f"not {' '.join(map(str, patch_size))}"
        )
    if all(size == step for size, step in zip(patch_size, whole, strict=True)):
        raise UsageError(
            f"a patch of {' '.join(map(str, patch_size))} leaves a single voxel in the last stage of {base}, too few "
            "to normalise; double one of the numbers"
        )
    return list(patch_size)


def _unused(file: Path) -> Path:
    candidates = [file, *(file.with_name(f"{file.name}{i}") for i in range(1, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def read_splits(file: Path) -> list[dict[str, list[str]]]:
    """The folds of a ``splits_final.json``: for each the names of its ``train`` and ``val`` cases.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({str(error).splitlines()[0]})") from error

    def names(entry: Any) -> bool:
        return isinstance(entry, list) and all(isinstance(name, str) for name in entry)

    if not isinstance(splits, list) or not all(
        isinstance(fold, dict) and names(fold.get("train")) and names(fold.get("val")) for fold in splits
    ):
        raise InputError(f"{file}: not the splits of nnU-Net: a list of folds with 'train' and 'val' is expected")
    return splits
