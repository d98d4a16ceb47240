"""Adapters trained on annotated volumes, and what they say of each volume without having seen its annotation.

A branch knows the voxels it was trained on, so calibration and the Dice of left-out supports need others: every support
is looked at by a branch trained on the rest, k + 1 trainings in all. The log odds of the branch then take the place of
the features, and everything else is as with other heads.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad
from tqdm import tqdm

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.heads.adapter import AdapterHead, AdapterSettings, AnnotatedImage, fit_adapters
from nnunet_calib.fewshot.method import Support
from nnunet_calib.fewshot.model import BaseModel
from nnunet_calib.fewshot.predictor import FeaturePredictor
from nnunet_calib.fewshot.volumes import IGNORED, STRUCTURE, Volume

FEWEST = 3
"""With fewer supports nothing tells the adapters what varies between patients."""


def adapt(
    model: BaseModel,
    predictor: FeaturePredictor,
    volumes: Sequence[Volume],
    supports: Sequence[Support],
    settings: AdapterSettings | None = None,
    progress: bool = True,
) -> tuple[list[Support], list[AdapterHead]]:
    """Train adapters on all supports, and on all but each.

    Args:
        model: the base model.
        predictor: of the model.
        volumes: preprocessed, with labels.
        supports: sampled from them.
        settings: of the training.
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
    multilabel = model.dataset.has_regions
    groups = [[image for j, image in enumerate(images) if j != i] for i in range(len(images))]
    features: list[list[torch.Tensor]] = [[] for _ in supports]
    trained: list[list[dict[str, torch.Tensor]]] = []
    with tqdm(total=(len(groups) + 1) * predictor.folds, desc="adapters", unit="training", disable=not progress) as bar:
        for group in [*groups, images]:
            states = []
            for weights in model.weights:
                predictor.network.load_state_dict(weights)
                branch = fit_adapters(predictor.network, group, patch, settings=settings, multilabel=multilabel)
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
    # torch pads the last axis first, and after the end
    missing = [
        part for size, own in zip(patch[::-1], volume.shape[::-1], strict=True) for part in (0, max(0, size - own))
    ]
    return AnnotatedImage(
        pad(torch.from_numpy(volume.image), missing),
        pad(label == STRUCTURE, missing),
        pad(label != IGNORED, missing, value=False),
    )
