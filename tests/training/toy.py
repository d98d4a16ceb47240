"""Trainers on made-up plans: a network of a few hundred weights, random patches, no data on disk."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

import nnunet_calib.training

KINDS = ("labels", "labels_ignore", "regions", "regions_ignore")
DATASET, PLANS = "Dataset001_Toy", "nnUNetPlans"
_LABELS: dict[str, dict[str, Any]] = {
    "labels": {"background": 0, "a": 1, "b": 2},
    "regions": {"background": 0, "whole": [1, 2], "core": [2]},
}
IGNORE = 3
BATCH, PATCH = 2, 16


def dataset_json(kind: str) -> dict[str, Any]:
    what, _, ignore = kind.partition("_")
    labels = _LABELS[what] | ({"ignore": IGNORE} if ignore else {})
    order = {"regions_class_order": [1, 2]} if what == "regions" else {}
    return {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz", **order}


def plans(axes: int = 3, base: dict[str, Any] | None = None, **configuration: Any) -> dict[str, Any]:
    """Plans as nnU-Net writes them, with the configurations ``base`` and ``small``, which inherits from it.

    Args:
        axes: 2 or 3.
        base: more keys of ``base``.
        configuration: keys of ``small``; ``nnunet_calib`` for the settings.
    """
    first = {
        "data_identifier": "toy",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": BATCH,
        "patch_size": [PATCH] * axes,
        "median_image_size_in_voxels": [float(PATCH)] * axes,
        "spacing": [1.0] * axes,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": axes == 2,
        "architecture": architecture(axes),
    }
    return {
        "dataset_name": DATASET,
        "plans_name": PLANS,
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": list(range(3)),
        "transpose_backward": list(range(3)),
        "configurations": {"base": first | (base or {}), "small": {"inherits_from": "base", **configuration}},
        "continue_training": False,
    }


def architecture(axes: int, first_kernel: int = 3, features: int = 4) -> dict[str, Any]:
    """Four stages, so that two scales count in deep supervision; the first kernel has ``first_kernel`` on axis 0."""
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 4,
            "features_per_stage": [features, features, 2 * features, 2 * features],
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [[first_kernel, *[3] * (axes - 1)], *[[3] * axes] * 3],
            "strides": [[1] * axes, *[[2] * axes] * 3],
            "n_conv_per_stage": [1] * 4,
            "n_conv_per_stage_decoder": [1] * 3,
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def prepare_folders(root: Path) -> dict[str, str]:
    """nnU-Net's folders with just what a trainer looks at; returns the variables that point there."""
    data = root / "preprocessed" / DATASET / "toy"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()
    (data.parent / "dataset_fingerprint.json").write_text(json.dumps({}))
    return {"nnUNet_preprocessed": str(root / "preprocessed"), "nnUNet_results": str(root / "results")}


def construct(
    name: str,
    settings: Any = None,
    *,
    kind: str = "labels",
    axes: int = 3,
    configuration: str = "small",
    continued: bool = False,
    trainer: type[nnUNetTrainer] | None = None,
    **overrides: Any,
) -> nnUNetTrainer:
    """A trainer as ``nnUNetv2_train`` constructs it; ``name`` is ours or nnU-Net's own."""
    if settings is not None:
        overrides["nnunet_calib"] = settings
    given = copy.deepcopy(plans(axes, **overrides)) | {"continue_training": continued}
    of_name = nnUNetTrainer if name == "nnUNetTrainer" else getattr(nnunet_calib.training, name)
    return (trainer or of_name)(given, configuration, 0, dataset_json(kind), torch.device("cpu"))


def build(name: str, settings: Any = None, *, deep_supervision: bool = True, **options: Any) -> nnUNetTrainer:
    """The same, initialized: with network, optimizer and loss."""
    trainer = construct(name, settings, **options)
    trainer.enable_deep_supervision = deep_supervision
    torch.manual_seed(0)
    trainer.initialize()
    return trainer


def scales(trainer: nnUNetTrainer) -> list[int]:
    """By how much each output of the network is coarser than the patch."""
    return (
        [2**i for i in range(len(trainer._get_deep_supervision_scales()))] if trainer.enable_deep_supervision else [1]
    )


def target(kind: str, shape: tuple[int, ...], all_ignored: bool = False, seed: int = 0) -> torch.Tensor:
    """What nnU-Net's data loader gives: int16 labels (B, 1, *S), or bool regions with the ignore mask as last."""
    what, _, ignore = kind.partition("_")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, IGNORE + 1 if ignore else IGNORE, (BATCH, 1, *shape), generator=generator)
    if all_ignored:
        labels.fill_(IGNORE)
    if what == "labels":
        return labels.to(torch.int16)
    channels = [(labels == 1) | (labels == 2), labels == 2, *([labels == IGNORE] if ignore else [])]
    return torch.cat(channels, dim=1)


def batch(trainer: nnUNetTrainer, kind: str, all_ignored: bool = False, seed: int = 0) -> dict[str, Any]:
    """A batch of random images for ``train_step``."""
    axes = len(trainer.configuration_manager.patch_size)
    targets = [target(kind, (PATCH // scale,) * axes, all_ignored, seed) for scale in scales(trainer)]
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(BATCH, 1, *(PATCH,) * axes, generator=generator)
    return {"data": data, "target": targets if trainer.enable_deep_supervision else targets[0]}


def logits(trainer: nnUNetTrainer, seed: int = 0) -> Any:
    """Random outputs of the network, with gradient: a list where there is deep supervision."""
    axes = len(trainer.configuration_manager.patch_size)
    heads = trainer.label_manager.num_segmentation_heads
    generator = torch.Generator().manual_seed(seed)
    outputs = [
        (3 * torch.randn(BATCH, heads, *(PATCH // scale,) * axes, generator=generator)).requires_grad_()
        for scale in scales(trainer)
    ]
    return outputs if trainer.enable_deep_supervision else outputs[0]
