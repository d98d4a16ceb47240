"""Features of whole volumes on disk: one network pass a case, whatever is tried on them afterwards.

Only evaluation keeps them. F features of a volume of V voxels take 2 F V bytes for each fold: 90 MB for 112 features of
400,000 voxels, 35 GB for 224 features of a CT of 79 million. ``fit`` and ``apply`` keep samples and projections only.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from nnunet_calib.data.files import whole_file
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor

_VOXELS = 1 << 20  # written or multiplied at once


@dataclass(frozen=True)
class CachedPrediction:
    """What the network says of a volume S of V voxels.

    Attributes:
        base: nnU-Net's logits (C, *S).
        features: of each fold float16 (V, F), mapped from disk.
    """

    base: Tensor
    features: list[np.ndarray]

    def sampled(self, index: np.ndarray) -> list[Tensor]:
        """Features float32 (N, F) of each fold, at indices into the flat volume."""
        return [torch.from_numpy(part[index]).float() for part in self.features]

    def projected(self, weights: list[Tensor]) -> list[Tensor]:
        """Projections float32 (R, *S) of each fold, by W (R, F) of each."""
        shape = self.base.shape[1:]
        maps = []
        for part, weight in zip(self.features, weights, strict=True):
            found = torch.empty((len(weight), len(part)))
            for rows in (slice(first, first + _VOXELS) for first in range(0, len(part), _VOXELS)):
                # a copy, for torch takes no array that cannot be written; its conversion is faster than numpy's
                found[:, rows] = weight.float() @ torch.from_numpy(np.array(part[rows])).float().T
            maps.append(found.reshape(len(weight), *shape))
        return maps


class FeatureCache:
    """Predictions of one model, kept in a folder.

    Args:
        folder: made if needed; what another model, or other options of the prediction, left there is not looked at.
        model: the base model.
        options: of the prediction, JSON.
        predictor: makes the predictor.
    """

    def __init__(
        self,
        folder: Path,
        model: BaseModel,
        predictor: Callable[[], FeaturePredictor],
        options: Mapping[str, Any] | None = None,
    ):
        made_from = json.dumps([model.fingerprint(), list(model.folds), dict(options or {})], sort_keys=True)
        identity = hashlib.sha256(made_from.encode()).hexdigest()[:12]
        self.folder = folder / identity
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make, self._folds = predictor, len(model.folds)

    @cached_property
    def predictor(self) -> FeaturePredictor:
        """Of the model; made when it is first needed."""
        return self._make()

    def predict(self, name: str, image: np.ndarray) -> CachedPrediction:
        """The prediction of a case, from disk or by the network.

        Args:
            name: of the files; what they hold is told apart by the image.
            image: float32 (channels, *S), preprocessed.
        """
        name = f"{name}.{hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()[:12]}"
        done = self.folder / f"{name}.base.npy"
        if not done.exists():
            self._run(name, image, done)
        folds = [self.folder / f"{name}.fold{fold}.npy" for fold in range(self._folds)]
        return CachedPrediction(
            torch.from_numpy(np.load(done, allow_pickle=False)),
            [np.load(file, mmap_mode="r", allow_pickle=False) for file in folds],
        )

    def _run(self, name: str, image: np.ndarray, done: Path) -> None:
        predictor = self.predictor
        identity = torch.eye(predictor.features.size)

        def keep(fold: int, _base: Tensor, projected: Tensor) -> Tensor:
            flat = projected.flatten(1)
            file = self.folder / f"{name}.fold{fold}.npy"
            stored = open_memmap(file, mode="w+", dtype=np.float16, shape=(flat.shape[1], flat.shape[0]))
            for rows in (slice(first, first + _VOXELS) for first in range(0, flat.shape[1], _VOXELS)):
                stored[rows] = flat[:, rows].T.half().cpu().numpy()
            stored.flush()
            return projected.new_empty(0)

        prediction = predictor.predict(torch.from_numpy(image), [identity] * predictor.folds, reduce=keep)
        with whole_file(done) as stream:  # last: its being there says that the features are
            np.save(stream, prediction.base.float().numpy())
