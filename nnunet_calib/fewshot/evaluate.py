"""How well k volumes show a structure: heads x chunks x extents x k, under the papers' protocol and the real one.

Features of every case are computed once (``cache``); all that is tried is fitted to and applied on these. Every pair of
supports and query is a line of ``pairs.jsonl`` as soon as it is scored, and is not done again.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from tqdm import tqdm

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.images import read_labels
from nnunet_calib.fewshot.cache import CachedPrediction, FeatureCache
from nnunet_calib.fewshot.chunks import alpnet_parts, alpnet_support_slices
from nnunet_calib.fewshot.fit import nested, overlaps, scan_of
from nnunet_calib.fewshot.merge import merge_labels
from nnunet_calib.fewshot.method import (
    FittedStructure,
    NovelMap,
    Scan,
    Settings,
    Support,
    apply_structure,
    fit_structure,
    refine_on_query,
)
from nnunet_calib.fewshot.model import CHECKPOINT, BaseModel
from nnunet_calib.fewshot.predictor import FeaturePredictor
from nnunet_calib.fewshot.protocols import PAPER, PAPER_CHUNKS, REAL, Episode, paper_episodes, real_episodes
from nnunet_calib.fewshot.sampling import sample_support
from nnunet_calib.fewshot.scores import base_dice, mean_dice, novel_scores, summarise
from nnunet_calib.fewshot.transduction import Objective
from nnunet_calib.fewshot.volumes import STRUCTURE, Volume, find_supports, read_volume, to_image_grid, turn_back

ORACLE = "oracle"
GROUPS = ("structure", "protocol", "head", "chunks", "extent", "mode", "k", "entropy")
"""What tells the rows of a summary apart."""

_BOTTOM = -40.0  # log odds outside of what nnU-Net cropped to


@dataclass(frozen=True)
class Files:
    """A case on disk: one image file a channel, the label map with the structure, and the base classes' if there is."""

    images: tuple[Path, ...]
    label: Path
    base: Path | None = None


@dataclass(frozen=True)
class Trial:
    """One row of the table: a protocol, the settings that are tried and k.

    Attributes:
        protocol: ``P1`` or ``P2``.
        settings: see there; of P1 the extent pairs no chunks.
        k: supports; 1 for P1.
        most_sets: of k supports; all windows if None.
    """

    protocol: str
    settings: Settings
    k: int = 1
    most_sets: int | None = None

    def describe(self) -> dict[str, Any]:
        """The values of ``GROUPS`` but the structure."""
        settings = self.settings
        return {
            "protocol": self.protocol,
            "head": settings.head,
            "chunks": settings.chunks,
            "extent": ORACLE if self.protocol == PAPER else settings.extent,
            "mode": "hard" if self.protocol == PAPER else settings.mode,
            "k": self.k,
            "entropy": None if settings.objective is None else settings.objective.entropy,
        }


class Case:
    """One case and one structure in it, and what the base model says of it."""

    def __init__(self, name: str, files: Files, model: BaseModel, value: int, cache: FeatureCache, voxels: int):
        self.name, self._files, self._model, self._value, self._voxels = name, files, model, value, voxels
        self.volume: Volume = read_volume(model, name, files.images, label=files.label, value=value)
        self.predicted: CachedPrediction = cache.predict(name, self.volume.image)
        self.scan: Scan = scan_of(model, self.volume, self.predicted.base)

    @cached_property
    def structure(self) -> np.ndarray:
        """Bool (*S)."""
        assert self.volume.label is not None
        return self.volume.label == STRUCTURE

    @cached_property
    def support(self) -> Support:
        """The case as a support."""
        index, weight = sample_support(self.structure, self.scan.base, self.volume.spacing, voxels=self._voxels)
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
        every = np.concatenate(index)
        return self._support(every, np.ones(every.size), np.concatenate(part))

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
    def base_reference(self) -> np.ndarray | None:
        """Label map (z, y, x) of the base classes, if there is one."""
        return None if self._files.base is None else self._labels(self._files.base)

    @cached_property
    def image_spacing(self) -> tuple[float, ...]:
        """Mm between voxels of the image."""
        return tuple(float(step) for step in self.volume.file_properties["spacing"])

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
            self.volume.cut,
            part,
        )

    def _along(self, axis: int) -> tuple[int, int]:
        """Axis of S that runs along a patient axis, and its direction."""
        return next((i, direction) for i, (a, direction) in enumerate(self.volume.axes) if a == axis)

    def _labels(self, path: Path) -> np.ndarray:
        return read_labels(path, self._model.plans_manager.image_reader_writer_class, range(1 << 16)).labels


def grid(
    heads: Sequence[str],
    chunks: Sequence[int],
    extents: Sequence[str],
    ks: Sequence[int],
    protocols: Sequence[str] = (PAPER, REAL),
    entropies: Sequence[float | None] = (None,),
    most_sets: int | None = None,
    mode: str = "interpolated",
) -> list[Trial]:
    """All combinations; of P1 one chunk number, one support and no extent. Entropies are for linear heads."""
    trials = []
    if PAPER in protocols:
        for head in heads:
            trials.append(Trial(PAPER, Settings(head, PAPER_CHUNKS, "hard", calibrate=False)))
    if REAL in protocols:
        for head, n, extent, k, entropy in itertools.product(heads, chunks, extents, ks, entropies):
            if entropy is None or head == "linear":
                objective = None if entropy is None else Objective(entropy=entropy)
                trials.append(Trial(REAL, Settings(head, n, mode, extent, objective=objective), k, most_sets))
    return trials


def evaluate_structure(
    model: BaseModel,
    cache: FeatureCache,
    supports: Mapping[str, Files],
    queries: Mapping[str, Files],
    structure: str,
    value: int,
    output: Path,
    trials: Sequence[Trial],
    *,
    voxels: int = 30_000,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Score every pair of every trial.

    Args:
        model: the base model.
        cache: of its features.
        supports: annotated cases that serve as supports of P2.
        queries: cases to try on, of both protocols; they may be supports too.
        structure: its name.
        value: its label.
        output: folder of ``pairs.jsonl``; lines that are there are not computed again.
        trials: from ``grid``.
        voxels: drawn from each support.
        progress: show a bar.

    Returns:
        The records of these trials and this structure.

    Raises:
        UsageError: trials that ask for more supports than there are with the structure.
        InputError: no support has the structure.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "pairs.jsonl"
    done = {_identity(record): record for record in read_pairs(file)}
    cases: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in cases:
            files = queries.get(name) or supports[name]
            found = Case(name, files, model, value, cache, voxels)
            first = next(iter(cases.values()), found).volume
            if found.volume.orientation != first.orientation:
                raise InputError(
                    f"{files.images[0]}: stored {found.volume.orientation}, {first.case} is {first.orientation}; bring "
                    "all cases to one orientation to evaluate them"
                )
            cases[name] = found
        return cases[name]

    reader = model.plans_manager.image_reader_writer_class
    with_structure = {
        name
        for name, files in {**supports, **queries}.items()
        if (read_labels(files.label, reader, range(1 << 16)).labels == value).any()
    }
    if not with_structure & supports.keys():
        raise InputError(f"{next(iter(supports.values())).label.parent}: no label map holds {value}")
    # A query without the structure is a question of P2; P1 has no slice of it to score.
    annotated = [name for name in supports if name in with_structure]
    wanted = []
    for trial in trials:
        episodes = (
            paper_episodes([name for name in queries if name in with_structure])
            if trial.protocol == PAPER
            else real_episodes(annotated, list(queries), trial.k, trial.most_sets)
        )
        wanted += [(trial, episode) for episode in episodes]
    records = []
    fitted: tuple[Any, FittedStructure | None] = (None, None)
    ended = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a") as stream, tqdm(total=len(wanted), desc=structure, unit="pair", disable=not progress) as bar:
        if not ended:  # a line that was cut off
            stream.write("\n")
        for trial, episode in wanted:
            known = {
                "structure": structure,
                **trial.describe(),
                "supports": list(episode.supports),
                "query": episode.query,
            }
            record = done.get(_identity(known))
            if record is None:
                if fitted[0] != (trial, episode.supports):
                    fitted = ((trial, episode.supports), _fit(trial, episode, case))
                assert fitted[1] is not None
                record = known | _score(model, trial, episode, fitted[1], case)
                stream.write(json.dumps(record) + "\n")
                stream.flush()
            records.append(record)
            bar.update()
    return records


def evaluate_folder(
    model_folder: str | Path,
    images: str | Path,
    labels: str | Path,
    output: str | Path,
    *,
    name: str,
    value: int,
    trials: Sequence[Trial],
    query_images: Path | None = None,
    query_labels: Path | None = None,
    base_labels: Path | None = None,
    folds: Sequence[str | int] | None = None,
    checkpoint: str = CHECKPOINT,
    device: str = "cpu",
    step_size: float = 0.5,
    mirroring: bool = True,
    voxels: int = 30_000,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate one structure on folders in nnU-Net's raw layout.

    Args:
        model_folder: of the base model.
        images: of the annotated cases that serve as supports.
        labels: their label maps.
        output: folder for ``pairs.jsonl``, ``pairs.csv``, ``summary.json`` and ``features``, which may be deleted.
            Structures that are written to the same folder share its files.
        name: of the structure.
        value: its label value.
        trials: what is tried.
        query_images: of other cases to try on; the supports themselves if None.
        query_labels: their label maps.
        base_labels: label maps of the queries with the model's own labels.
        folds: of the base model; all if None.
        checkpoint: its name in each fold.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window.
        mirroring: test-time augmentation of the base classes.
        voxels: drawn from each support.
        progress: show bars.

    Returns:
        The rows of the summary that are of this structure.

    Raises:
        UsageError: options or folders that make no sense.
        InputError: files that cannot be used.
    """
    if (query_images is None) != (query_labels is None):
        raise UsageError("queries need both images and labels: their labels are what they are scored with")
    model = BaseModel(model_folder, folds, checkpoint)
    if model.previous_stage is not None:
        raise UsageError(f"{model.folder} continues {model.previous_stage}; evaluate a model that is no cascade")
    ending = model.dataset.file_ending

    def files(image_folder: Path, label_folder: Path) -> dict[str, Files]:
        found = {}
        for case, (channels, label) in find_supports(image_folder, label_folder, ending).items():
            own = None if base_labels is None else base_labels / (case + ending)
            found[case] = Files(tuple(channels), label, own if own is not None and own.is_file() else None)
        return found

    supports = files(Path(images), Path(labels))
    queries = supports if query_images is None or query_labels is None else files(query_images, query_labels)
    if shared := sorted(supports.keys() & queries.keys()) if queries is not supports else []:
        raise UsageError(f"{shared[0]} is both a support and a query; leave the queries out, or rename one")

    def predictor() -> FeaturePredictor:
        return FeaturePredictor(model, device, step_size=step_size, mirroring=mirroring)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache(output / "features", model, predictor)
    evaluate_structure(model, cache, supports, queries, name, value, output, trials, voxels=voxels, progress=progress)
    about = {"model": model.fingerprint(), "supports": sorted(supports), "queries": sorted(queries), "voxels": voxels}
    rows = write_results(output, read_pairs(output / "pairs.jsonl"), about)
    return [row for row in rows if row["structure"] == name]


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Records of ``pairs.jsonl``; a line that was cut off is left out."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_results(output: Path, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write ``pairs.csv`` and ``summary.json``; the rows of the summary are returned."""
    if not records:
        raise InputError(f"{output}: no pair was scored")
    columns = list(dict.fromkeys(name for record in records for name in record if name != "base_classes"))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(dict(record) | {"supports": " ".join(record["supports"])})
    write_whole(output / "pairs.csv", text.getvalue())
    rows = summarise(records, GROUPS)
    content = {"about": dict(about), "rows": [{name: _json(value) for name, value in row.items()} for row in rows]}
    write_whole(output / "summary.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return rows


def _fit(trial: Trial, episode: Episode, case: Callable[[str], Case]) -> FittedStructure:
    settings = trial.settings
    if trial.protocol == PAPER:
        supports = [case(name).paper_support(settings.axis, settings.chunks) for name in episode.supports]
    else:
        supports = [case(name).support for name in episode.supports]
    return fit_structure(supports, settings)


def _score(
    model: BaseModel, trial: Trial, episode: Episode, fitted: FittedStructure, case: Callable[[str], Case]
) -> dict[str, Any]:
    query, settings = case(episode.query), trial.settings
    if trial.protocol == PAPER:
        parts, counted = query.paper_query(settings.axis, settings.chunks)
        expected = query.paper_volume(settings.axis, case(episode.supports[0]), settings.chunks)
        projected = query.predicted.projected(fitted.projections)
        found = apply_structure(fitted, query.scan, projected, parts=parts, counted=counted, expected_mm3=expected)
        scores = novel_scores(
            found.probability,
            query.structure,
            query.volume.spacing,
            found.probability > found.threshold,
            counted.reshape(query.structure.shape),
        )
        return scores | _about(found) | {"base_before": float("nan"), "base_after": float("nan")}
    heads = None
    if settings.objective is not None:
        heads = refine_on_query(fitted, query.scan, query.predicted.sampled, settings.objective)
    weights = fitted.projections if heads is None else [head.projections for head in heads]
    found = apply_structure(fitted, query.scan, query.predicted.projected(weights), heads)
    logit = query.on_image_grid(found.logit)
    probability = fitted.calibration.probability(torch.from_numpy(logit)).numpy()
    segmentation = (probability > found.threshold) & (not found.absent)
    scores = novel_scores(probability, query.reference, query.image_spacing, segmentation)
    inside, _ = nested(model, [case(name).overlaps for name in episode.supports], None)
    return scores | _about(found) | query.base_scores(probability, found, inside)


def _about(found: NovelMap) -> dict[str, Any]:
    return {"presence": float(min(found.presence, 1e6)), "absent": found.absent, "expected_mm3": found.expected_mm3}


def _identity(record: Mapping[str, Any]) -> str:
    return json.dumps([*(record[name] for name in GROUPS), *record["supports"], record["query"]])


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
