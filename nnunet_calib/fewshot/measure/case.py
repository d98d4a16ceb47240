"""One case of an evaluation: the volume and what the network says of it, as a support and as a query of each protocol.

Only here labels of queries are known: to score with, and in P1 for the extent that the papers take from them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from nnunet_calib.data.images import read_labels
from nnunet_calib.data.model import file_sha256
from nnunet_calib.fewshot.apply.merge import merge_labels
from nnunet_calib.fewshot.measure.cache import CachedPrediction, FeatureCache
from nnunet_calib.fewshot.measure.protocols import alpnet_parts, alpnet_support_slices
from nnunet_calib.fewshot.measure.scores import base_dice, mean_dice
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.structure.fitted import NovelMap
from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.atlas import Labelled
from nnunet_calib.fewshot.volume.files import IGNORED, STRUCTURE, Volume, read_volume, to_image_grid, turn_back
from nnunet_calib.fewshot.volume.sampling import drawn_evenly, sample_support
from nnunet_calib.fewshot.volume.scan import Scan, scan_of
from nnunet_calib.fewshot.volume.support import Support, overlaps

MEMORY = 2 << 30
"""Bytes of cases that are kept for the next pair; one case is kept whatever its size."""

_BOTTOM = -40.0  # log odds outside of what nnU-Net cropped to


@dataclass(frozen=True)
class Files:
    """A case on disk: one image file a channel, the label map with the structure, and the base classes' if there is."""

    images: tuple[Path, ...]
    label: Path
    base: Path | None = None

    @cached_property
    def checksums(self) -> list[str]:
        """Of all files."""
        paths = [*self.images, self.label, *([] if self.base is None else [self.base])]
        return [file_sha256(path) for path in paths]


class Case:
    """One case and one structure in it, and what the base model says of it.

    Args:
        name: of the case.
        files: of it.
        model: the base model.
        value: label of the structure.
        cache: of the model's features.
        voxels: drawn from it as a support.
        orientation: to turn it into, as ``fit`` and ``apply`` do; as stored if None.
        ignore: label of voxels that do not count; None: all count.
    """

    def __init__(
        self,
        name: str,
        files: Files,
        model: BaseModel,
        value: int,
        cache: FeatureCache,
        voxels: int,
        orientation: str | None = None,
        ignore: int | None = None,
    ):
        self.name, self._files, self._model, self._value, self._voxels = name, files, model, value, voxels
        self._ignore = ignore
        self.volume: Volume = read_volume(
            model, name, files.images, label=files.label, value=value, ignore=ignore, orientation=orientation
        )
        kept = f"{name}.as_{orientation}" if self.volume.turned else name
        self.predicted: CachedPrediction = cache.predict(kept, self.volume.image)
        self.scan: Scan = scan_of(model, self.volume, self.predicted.base)

    @property
    def size(self) -> int:
        """Bytes that it may take, with all that is computed of it."""
        voxels, grid = int(np.prod(self.volume.properties["shape_before_cropping"])), self.scan.base.size
        image, logits = self.volume.image.nbytes, self.predicted.base.nbytes
        return image + logits + 8 * grid + 16 * voxels + 4 * self._voxels * self.predicted.features[0].shape[1]

    @cached_property
    def structure(self) -> np.ndarray:
        """Bool (*S)."""
        assert self.volume.label is not None
        return self.volume.label == STRUCTURE

    @cached_property
    def valid(self) -> np.ndarray:
        """Bool (*S), voxels whose annotation counts."""
        assert self.volume.label is not None
        return self.volume.label != IGNORED

    @cached_property
    def anatomy(self) -> Anatomy:
        """The case as registration sees it."""
        return Anatomy.of(self.volume, self.scan)

    @cached_property
    def labelled(self) -> Labelled:
        """The case as labels are carried from it."""
        return Labelled.of(self.volume, self.anatomy)

    @cached_property
    def support(self) -> Support:
        """The case as a support."""
        index, weight = sample_support(
            self.structure, self.scan.base, self.volume.spacing, self.valid, voxels=self._voxels
        )
        return self._support(index, weight, None)

    def paper_support(self, axis: int, chunks: int) -> Support:
        """The case as the papers' support: one annotated slice a chunk, and its chunk known."""
        along, _ = self._along(axis)
        planes = np.moveaxis(self.structure, along, 0)
        held = np.flatnonzero(planes.any(axis=(1, 2)))
        index, part = [], []
        number = np.moveaxis(np.arange(self.structure.size).reshape(self.structure.shape), along, 0)
        order = held if self._along(axis)[1] > 0 else held[::-1]
        for i, z in enumerate(alpnet_support_slices(order.tolist(), chunks)):
            index.append(number[z].ravel())
            part.append(np.full(number[z].size, i))
        every, parts = np.concatenate(index), np.concatenate(part)
        known = self.valid.ravel()[every]
        return self._support(every[known], np.ones(np.count_nonzero(known)), parts[known])

    def paper_query(self, axis: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunk of each voxel and whether it is scored, by the extent in the case's own labels: flat int64 and bool."""
        along, direction = self._along(axis)
        held = np.flatnonzero(np.moveaxis(self.structure, along, 0).any(axis=(1, 2)))
        z = np.arange(self.structure.shape[along])
        first, last = (held[0], held[-1]) if direction > 0 else (-held[-1], -held[0])
        parts = alpnet_parts(z if direction > 0 else -z, int(first), int(last), chunks)
        inside = (z >= held[0]) & (z <= held[-1])
        shape = [1, 1, 1]
        shape[along] = -1
        wide = np.broadcast_to(parts.reshape(shape), self.structure.shape)
        counted = np.broadcast_to(inside.reshape(shape), self.structure.shape)
        return wide.ravel(), counted.ravel()

    def paper_volume(self, axis: int, support: "Case", chunks: int) -> float:
        """Volume that the support's annotated slices and the query's extent lead to expect, mm3."""
        along, _ = self._along(axis)
        height = np.count_nonzero(self.structure.any(axis=tuple(a for a in range(3) if a != along)))
        drawn = support.paper_support(axis, chunks)
        area = drawn.target.sum() / chunks * support.scan.voxel_mm3 / support.volume.spacing[support._along(axis)[0]]
        return float(area * height * self.volume.spacing[along])

    @cached_property
    def reference(self) -> np.ndarray:
        """Bool (z, y, x) of the image."""
        return self._labels(self._files.label) == self._value

    @cached_property
    def counted(self) -> np.ndarray | None:
        """Bool (z, y, x) of the image, voxels that are scored; None: all."""
        return None if self._ignore is None else self._labels(self._files.label) != self._ignore

    @cached_property
    def base_reference(self) -> np.ndarray | None:
        """Label map (z, y, x) of the base classes, if there is one."""
        return None if self._files.base is None else self._labels(self._files.base)

    @cached_property
    def image_spacing(self) -> tuple[float, ...]:
        """Mm between voxels of the image."""
        return self.volume.place.spacing

    @cached_property
    def base(self) -> tuple[np.ndarray, np.ndarray]:
        """The base model's labels (z, y, x) as ``nnUNetv2_predict`` writes them, and its probability of each."""
        model, logits = self._model, self.predicted.base
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.numpy(), model.plans_manager, model.configuration_manager, model.label_manager,
            self.volume.properties,
        )  # fmt: skip
        confidence = np.asarray(model.label_manager.apply_inference_nonlin(logits)).max(axis=0)
        return turn_back(self.volume, labels[None])[0], to_image_grid(model, self.volume, confidence[None], 1.0)[0]

    def on_image_grid(self, logit: np.ndarray) -> np.ndarray:
        """Log odds (z, y, x) of a map (*S)."""
        return to_image_grid(self._model, self.volume, logit[None], _BOTTOM)[0]

    @cached_property
    def overlaps(self) -> dict[int, tuple[float, float]]:
        """As ``fit`` looks at a support: what the base model predicts in the structure."""
        return overlaps(self.structure, self.scan.base)

    def base_scores(self, probability: np.ndarray, found: NovelMap, inside: Sequence[int]) -> dict[str, float]:
        """Mean Dice of the base classes before and after the structure is merged in; NaN without their labels."""
        if self.base_reference is None:
            return {"base_before": float("nan"), "base_after": float("nan")}
        structures, value = self._model.dataset.structures, max(self._model.dataset.labels) + 1
        labels, confidence = self.base
        novel = np.zeros_like(probability) if found.absent else probability
        merged = merge_labels(labels, confidence, novel[None], [value], [found.threshold], [inside])
        merged[merged == value] = 0
        before, after = (base_dice(self.base_reference, one, structures) for one in (labels, merged))
        return {"base_before": mean_dice(before), "base_after": mean_dice(after)}

    def _support(self, index: np.ndarray, weight: np.ndarray, part: np.ndarray | None) -> Support:
        assert self.volume.structure_mm3 is not None
        return Support(
            self.scan,
            index,
            self.structure.ravel()[index],
            weight,
            self.predicted.sampled(index),
            self.volume.structure_mm3,
            self.predicted.sampled(np.ravel_multi_index(drawn_evenly(self.volume.shape).T, self.volume.shape))[0],
            self.volume.cut,
            part,
        )

    def _along(self, axis: int) -> tuple[int, int]:
        """Axis of S that runs along a patient axis, and its direction."""
        return next((i, direction) for i, (a, direction) in enumerate(self.volume.axes) if a == axis)

    def _labels(self, path: Path) -> np.ndarray:
        return read_labels(path, self._model.plans_manager.image_reader_writer_class, range(1 << 16)).labels


class Cases:
    """The cases that were used last, in bounded memory."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Case] = OrderedDict()

    def get(self, name: str, make: Callable[[], Case]) -> Case:
        """A case; read again if it had to make room for others."""
        if name not in self._kept:
            self._kept[name] = make()
        self._kept.move_to_end(name)
        total = sum(case.size for case in self._kept.values())
        while total > MEMORY and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.size
        return self._kept[name]

    def forget(self, name: str) -> None:
        """Read a case again when it is next wanted."""
        self._kept.pop(name, None)
