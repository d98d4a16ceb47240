"""Adapters trained on annotated volumes, and what they say of each volume without having seen its annotation.

A branch knows the voxels it was trained on, so calibration and the Dice of left-out supports need others: every support
is looked at by a branch trained on the rest, k + 1 trainings in all. The log odds of the branch then take the place of
the features, and everything else is as with other heads.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.structure.from_supports import expected_without_fit
from nnunet_calib.fewshot.structure.heads.adapter import AdapterHead
from nnunet_calib.fewshot.task.adapter_training import AdapterSettings, AnnotatedImage, fit_adapters
from nnunet_calib.fewshot.volume.files import IGNORED, STRUCTURE, Volume
from nnunet_calib.fewshot.volume.scan import Scan
from nnunet_calib.fewshot.volume.support import Support

FEWEST = 3
"""With fewer supports nothing tells the adapters what varies between patients."""


def adapt(
    model: BaseModel,
    predictor: FeaturePredictor,
    volumes: Sequence[Volume],
    supports: Sequence[Support],
    unlabelled: Sequence[tuple[Volume, Scan]] = (),
    settings: Settings | None = None,
    training: AdapterSettings | None = None,
    progress: bool = True,
) -> tuple[list[Support], list[AdapterHead]]:
    """Train adapters on all supports, and on all but each.

    Args:
        model: the base model.
        predictor: of the model.
        volumes: preprocessed, with labels.
        supports: sampled from them.
        unlabelled: volumes without annotation; the training keeps the structure near the volume that the supports it
            sees lead to expect there. Of no use where they lead to expect none.
        settings: of the structure: what volumes are aligned by; the defaults if None.
        training: the defaults if None.
        progress: show a bar.

    Returns:
        The supports with the log odds of a branch that has not seen them as their one feature, and a head for each
        fold, trained on all.

    Raises:
        UsageError: a model of slices.
        InputError: fewer than three supports.
    """
    patch = list(model.configuration_manager.patch_size)
    if len(patch) != 3:
        raise UsageError("adapters are for 3D configurations; use head linear")
    if len(volumes) < FEWEST:
        raise InputError(f"adapters need {FEWEST} supports or more, there are {len(volumes)}; use head linear")
    images = [annotated(volume, patch) for volume in volumes]
    without = [_padded(torch.from_numpy(volume.image), patch) for volume, _ in unlabelled]
    scans = [scan for _, scan in unlabelled]
    everyone = range(len(images))
    groups = [*([j for j in everyone if j != i] for i in everyone), list(everyone)]
    features: list[list[Tensor]] = [[] for _ in supports]
    trained: list[list[dict[str, Tensor]]] = []
    with tqdm(total=len(groups) * predictor.folds, desc="adapters", unit="training", disable=not progress) as bar:
        for group in groups:
            expected = expected_without_fit([supports[i] for i in group], settings or Settings(), scans)
            sized = [
                (image, volume / scan.voxel_mm3)
                for image, scan, volume in zip(without, scans, expected, strict=True)
                if volume is not None
            ]
            states = []
            for weights in model.weights:
                predictor.network.load_state_dict(weights)
                branch = fit_adapters(
                    predictor.network,
                    [images[i] for i in group],
                    patch,
                    sized,
                    settings=training,
                    multilabel=model.dataset.has_regions,
                )
                states.append({name: parameter.detach().cpu() for name, parameter in branch.trained().items()})
                bar.update()
            trained.append(states)
    for volume, support, states, found in zip(volumes, supports, trained, features, strict=False):
        index = torch.from_numpy(support.index)
        for logit in predictor.project_adapted(torch.from_numpy(volume.image), states):
            found.append(logit.reshape(-1)[index][:, None].float())
    heads = [AdapterHead(state) for state in trained[-1]]
    return [replace(support, features=found) for support, found in zip(supports, features, strict=True)], heads


def annotated(volume: Volume, patch: Sequence[int]) -> AnnotatedImage:
    """A volume as the training takes it, at least a patch large; what is added at its ends does not count."""
    assert volume.label is not None
    label = torch.from_numpy(volume.label)
    return AnnotatedImage(
        _padded(torch.from_numpy(volume.image), patch),
        _padded(label == STRUCTURE, patch),
        _padded(label != IGNORED, patch),
    )


def _padded(array: Tensor, patch: Sequence[int]) -> Tensor:
    """(..., *S) with zeros after the ends of S, at least a patch large."""
    # torch pads the last axis first
    sizes = zip(patch[::-1], array.shape[::-1], strict=False)
    return pad(array, [part for size, own in sizes for part in (0, max(0, size - own))])
