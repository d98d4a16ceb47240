"""All that is made of one case's logits: its label map, probabilities, maps and scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol as Structure

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from torch import Tensor

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.images import LabelImage, predicted_at
from nnunet_calib.evaluation.case import CaseResult, read_reference, score
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.pipeline import maps
from nnunet_calib.pipeline.files import write_label_map, write_probabilities, write_volume
from nnunet_calib.posthoc.folders.samples import write_sample
from nnunet_calib.posthoc.folders.sampling import Sampler, decide
from nnunet_calib.posthoc.maps.calibrator import Calibrator
from nnunet_calib.posthoc.maps.volume import calibrate_case
from nnunet_calib.prediction import Grid, Part, PredictedCase
from nnunet_calib.prediction.model import TrainedModel


class Model(Structure):
    """What ``Prediction`` asks of a model: nnU-Net's managers and the names of the folds."""

    plans_manager: Any
    configuration_manager: Any
    folds: Any

    @property
    def label_manager(self) -> Any:
        """nnU-Net's, of the data set."""


@dataclass(frozen=True)
class Wanted:
    """What is to be made of every case besides its label map.

    Attributes:
        probabilities: one of ``files.FORMATS``.
        confidence, entropy: maps, see ``maps``.
        members: each fold's probabilities (compact), their mean, and the maps of what the folds disagree about.
        calibrator: of the probabilities and of all that is made of them; not of the members.
    """

    probabilities: str = "none"
    confidence: bool = False
    entropy: bool = False
    members: bool = False
    calibrator: Calibrator | None = None

    @property
    def changes_labels(self) -> bool:
        """The label map is that of the calibrated probabilities."""
        return self.calibrator is not None and not self.calibrator.keeps_labels


class Prediction:
    """A case whose network has been run.

    Args:
        name: of the case.
        logits: averaged over folds, (C, *S) on the CPU.
        members: of each fold; empty where they are not wanted.
        properties: what nnU-Net's preprocessor says of the case.
        model: that predicted it.
        device: where probabilities are made.
    """

    def __init__(
        self,
        name: str,
        logits: Tensor,
        members: Sequence[Tensor],
        properties: Mapping[str, Any],
        model: Model,
        device: str = "cpu",
    ):
        self.name, self.properties, self._model = name, properties, model
        self.grid = Grid.of(tuple(logits.shape), properties, model.plans_manager, model.configuration_manager)
        self._case, *self._members = (
            PredictedCase(one, self.grid, model.label_manager, model.configuration_manager, device)
            for one in (logits, *members)
        )

    def write(
        self, output: Path, dataset: Dataset, reader: type[BaseReaderWriter], wanted: Wanted
    ) -> tuple[np.ndarray, list[Path]]:
        """Write what is wanted; returns the label map, axes in the order of the plans, and the files.

        Raises:
            InputError: logits that are not finite.
        """
        grid, multilabel, ending = self.grid, dataset.has_regions, dataset.file_ending
        parts = partial(self.parts, wanted.calibrator)
        labels = self._decided(parts, dataset) if wanted.changes_labels else self._case.label_map()
        written: list[Path] = []
        if wanted.probabilities != "none":
            written += write_probabilities(output, self.name, wanted.probabilities, parts(), grid, self.properties)
        kinds = {"confidence": maps.confidence} if wanted.confidence else {}
        kinds |= {"entropy": maps.entropy} if wanted.entropy else {}
        volumes = {kind: np.empty(grid.shape, dtype=np.float32) for kind in kinds}
        for part in parts() if volumes else ():
            for kind, volume in volumes.items():
                volume[part.planes] = kinds[kind](part.probabilities, multilabel=multilabel)
        if self._members:
            more, files = self._of_members(output, dataset)
            volumes, written = volumes | more, written + files
        for kind, volume in volumes.items():
            written.append(output / kind / f"{self.name}.nii.gz")
            written[-1].parent.mkdir(exist_ok=True)
            write_volume(written[-1], volume.transpose(grid.to_image), self.properties)
        path = output / (self.name + ending)
        write_label_map(labels.transpose(grid.to_image), path, reader, dict(self.properties))
        return labels, [*written, path]

    def score(
        self,
        files: CaseFiles,
        labels: np.ndarray,
        dataset: Dataset,
        reader: type[BaseReaderWriter],
        protocol: Protocol,
        calibrator: Calibrator | None = None,
        *,
        leave_sample: bool = False,
    ) -> CaseResult:
        """The case's scores, as ``evaluate`` has them of files, from the logits in memory.

        Args:
            files: of the case.
            labels: the label map, axes in the order of the plans.
            dataset: of the model.
            reader: of the reference.
            protocol: the options.
            calibrator: of the probabilities.
            leave_sample: leave a sample of voxels for ``calibrate fit`` beside the prediction.

        Raises:
            InputError: a reference that cannot be used or lies elsewhere.
        """
        reference = read_reference(files.reference, dataset, reader)
        ours = predicted_at(reference, files.prediction, labels.transpose(self.grid.to_image), self.properties)
        sampler = None
        if leave_sample and (dataset.ignore_label is None or (reference.labels != dataset.ignore_label).any()):
            sampler = Sampler(files, dataset, reference, ours, axes=self.grid.from_image)

        def parts() -> Iterator[tuple[slice, np.ndarray]]:
            for part in self.parts(calibrator):
                if sampler is not None:
                    sampler.take(part.planes, part.probabilities)
                yield part.planes, part.probabilities

        result = score(files, dataset, self._as_seen(reference), self._as_seen(ours), protocol, parts())
        if sampler is not None:
            write_sample(sampler.sample(), dataset)
        return result

    def parts(self, calibrator: Calibrator | None = None) -> Iterator[Part]:
        """The probabilities, some planes after the others; a calibrator that looks around has them all at once."""
        if calibrator is None:
            yield from self._case.parts()
        elif calibrator.margin:
            whole = np.empty((self.grid.channels, *self.grid.shape), dtype=np.float32)
            for part in self._case.parts():
                whole[:, part.planes] = part.probabilities
            yield Part(slice(0, self.grid.shape[0]), calibrate_case(calibrator, whole))
        else:
            for part in self._case.parts():
                yield Part(part.planes, calibrate_case(calibrator, part.probabilities))

    def _decided(self, parts: Any, dataset: Dataset) -> np.ndarray:
        """The label map of calibrated probabilities: another than the network's only where the decision changes."""
        labels = self._case.label_map()
        for before, after in zip(self._case.parts(), parts(), strict=True):
            was, now = decide(before.probabilities, dataset), decide(after.probabilities, dataset)
            np.copyto(labels[after.planes], now, where=was != now, casting="unsafe")
        return labels

    def _of_members(self, output: Path, dataset: Dataset) -> tuple[dict[str, np.ndarray], list[Path]]:
        """Maps of the members' disagreement, and files of their probabilities and of the mean of these."""
        files: list[Path] = []
        for fold, member in zip(self._model.folds, self._members, strict=True):
            folder = output / "members" / f"fold_{fold}"
            folder.mkdir(parents=True, exist_ok=True)
            files += write_probabilities(folder, self.name, "compact", member.parts(), self.grid, self.properties)
        (output / "members" / "mean").mkdir(exist_ok=True)
        files += write_probabilities(
            output / "members" / "mean", self.name, "compact", self._mean_parts(), self.grid, self.properties
        )
        information = np.empty(self.grid.shape, dtype=np.float32)
        for together in zip(*(member.parts() for member in self._members), strict=True):
            each = [part.probabilities for part in together]
            information[together[0].planes] = maps.mutual_information(each, multilabel=dataset.has_regions)
        labels = [member.label_map() for member in self._members]
        return {"mutual_information": information, "disagreement": maps.disagreement(labels)}, files

    def _mean_parts(self) -> Iterator[Part]:
        for together in zip(*(member.parts() for member in self._members), strict=True):
            mean = np.mean([part.probabilities for part in together], axis=0, dtype=np.float32)
            yield Part(together[0].planes, np.asarray(mean))

    def _as_seen(self, image: LabelImage) -> LabelImage:
        """A label map with its axes in the order of the plans."""
        order = self.grid.from_image
        return LabelImage(image.path, image.labels.transpose(order), image.place.with_axes(order))


def check_members(model: TrainedModel) -> None:
    """Refuse members of a single network.

    Raises:
        InputError: there is one fold.
    """
    if len(model.folds) < 2:
        raise InputError(f"--members needs two folds or more; {model.folder} is used with fold {model.folds[0]} alone")
