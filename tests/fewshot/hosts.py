"""Model folders as ``nnUNetv2_train`` leaves them: a network of a few thousand random weights.

Only its last layer is fitted, to the two landmarks of the phantom (labels 1 and 2); the ball it does not know.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from scipy import ndimage

from nnunet_calib.fewshot.network.base_model import BaseModel

from ..training.toy import architecture, dataset_json, plans

PATCH = 24  # two windows cover a phantom
KINDS = ("plain", "residual")


def residual(made: dict[str, Any]) -> dict[str, Any]:
    made["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    made["arch_kwargs"]["n_blocks_per_stage"] = made["arch_kwargs"].pop("n_conv_per_stage")
    return made


def write_model(
    root: Path,
    *,
    axes: int = 3,
    kind: str = "plain",
    folds: tuple[str, ...] = ("0",),
    labels: str = "labels",
    mirroring: tuple[int, ...] | None = (0,),
    spacing: float = 1.0,
    transpose: tuple[int, int, int] = (0, 1, 2),
    reader: str = "SimpleITKIO",
    cascade: bool = False,
    **configuration: Any,
) -> Path:
    """A trained model's folder; ``kind`` is ``plain`` or ``residual``, ``labels`` as in ``toy.dataset_json``.

    With ``cascade`` the second stage of one, of labels.
    """
    network = architecture(axes, features=8)
    if kind == "residual":
        network = residual(network)
    base: dict[str, Any] = {"spacing": [spacing] * axes, "architecture": network, "patch_size": [PATCH] * axes}
    content = plans(axes, base, **configuration)
    content.pop("continue_training")
    backward = [transpose.index(axis) for axis in range(3)]
    content |= {"transpose_forward": list(transpose), "transpose_backward": backward, "image_reader_writer": reader}
    content["foreground_intensity_properties_per_channel"] = {"0": {}}
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    for name, change in (("data", {}), ("seg", {"is_seg": True, "order": 1}), ("probabilities", {"order": 1})):
        content["configurations"]["base"] |= {
            f"resampling_fn_{name}": "resample_data_or_seg_to_shape",
            f"resampling_fn_{name}_kwargs": resampling | change,
        }
    if cascade:
        content["configurations"]["base"]["previous_stage"] = "first"
        content["configurations"]["first"] = {"inherits_from": "base", "previous_stage": None}
    dataset = dataset_json(labels)
    folder = root / content["dataset_name"] / "nnUNetTrainer__nnUNetPlans__base"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    heads = 3 if labels.startswith("labels") else 2
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        built = get_network_from_plans(
            network["network_class_name"],
            network["arch_kwargs"],
            network["_kw_requires_import"],
            3 if cascade else 1,
            heads,
        )
        # Other norms than all ones.
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        _fit_last_layer(built, axes, labels.startswith("regions"), cascade)
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": built.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"plans": content, "configuration": "base", "fold": fold, "dataset_json": dataset},
            "inference_allowed_mirroring_axes": mirroring,
            "_best_ema": np.float64(0.5),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def model(root: Path, **options: Any) -> BaseModel:
    return BaseModel(write_model(root, **options))


def phantom(seed: int, shape=(20, 26, 24)) -> tuple[np.ndarray, np.ndarray]:
    """An image float32 (z, y, x) of a ball low on the right and two landmarks, and the ball's mask."""
    image, labels = _phantom(seed, shape)
    return image, labels == 3


def _phantom(seed: int, shape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).astype(float)
    size = np.array(shape, dtype=float)
    labels = np.zeros(shape, dtype=np.uint8)
    balls = (((0.65, 0.5, 0.65), 5), ((0.4, 0.7, 0.7), 3.5), ((0.35, 0.45, 0.3), 4))
    for label, (place, radius) in enumerate(balls, start=1):
        centre = np.multiply(place, size) + rng.uniform(-1, 1, 3)
        labels[((grid - centre[:, None, None, None]) ** 2).sum(axis=0) < radius**2] = label
    image = np.array([1.0, 2.5, 7.0, 4.0])[labels] + rng.normal(0, 0.3, shape)
    return ndimage.gaussian_filter(image, 0.5).astype(np.float32), labels


def landmarks(seed: int, shape=(20, 26, 24)) -> np.ndarray:
    """The landmarks of a phantom, as a first stage would predict them: uint8 (z, y, x), labels 1 and 2."""
    labels = _phantom(seed, shape)[1]
    return np.where(labels == 3, 0, labels).astype(np.uint8)


def _fit_last_layer(network: torch.nn.Module, axes: int, regions: bool, cascade: bool) -> None:
    """Logistic regression of the landmarks on the last stage's features."""
    images, targets = [], []
    for seed in (100, 101):
        image, labels = _phantom(seed, (16, 32, 32))
        image = (image - image.mean()) / image.std()
        labels = np.where(labels == 3, 0, labels)
        stage = [labels == 1, labels == 2] if cascade else []
        channels = torch.from_numpy(np.stack([image, *stage]).astype(np.float32))
        images += [channels[None]] if axes == 3 else [channels.transpose(0, 1)]
        targets.append(torch.from_numpy(labels.astype(np.int64)).flatten())
    seen: list[torch.Tensor] = []
    hook = network.decoder.stages[-1].register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        for image in images:
            network(image)
    hook.remove()
    features = torch.cat([part.movedim(1, -1).flatten(0, -2) for part in seen])
    target = torch.cat(targets)
    layer = torch.nn.Linear(features.shape[1], 2 if regions else 3)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")
    nested = torch.stack([target > 0, target == 2], dim=1).float()

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        z = layer(features)
        cross = torch.nn.functional
        value = cross.binary_cross_entropy_with_logits(z, nested) if regions else cross.cross_entropy(z, target)
        value.backward()
        return value

    optimiser.step(loss)
    last = network.decoder.seg_layers[-1]
    last.weight.data = layer.weight.data.reshape(last.weight.shape)
    last.bias.data = layer.bias.data


def write_image(path: Path, array: np.ndarray, orientation: str = "LPS", spacing=(1.0, 1.0, 1.0)) -> None:
    """Write an array (z, y, x) whose axes lie as LPS, the default of ITK, stored in another orientation."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(step) for step in spacing][::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path), True)
