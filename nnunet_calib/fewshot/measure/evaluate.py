"""How well k volumes show a structure: heads x chunks x extents x k, under the papers' protocol and the real one.

Features of every case are computed once (``cache``); all that is tried is fitted to and applied on these, but adapters,
which are trained for each set of supports and look at each query anew. Every pair of supports and query is a line of
``pairs.jsonl`` as soon as it is scored, and is not done again.
"""

import hashlib
import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_named
from nnunet_calib.data.images import read_labels
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.data.software import installed_versions
from nnunet_calib.fewshot.apply.refine import refine_on_query
from nnunet_calib.fewshot.measure.cache import FeatureCache
from nnunet_calib.fewshot.measure.case import Case, Files
from nnunet_calib.fewshot.measure.pairs import identity, read_pairs, write_results
from nnunet_calib.fewshot.measure.protocols import PAPER, PAPER_CHUNKS, REAL, Episode, paper_episodes, real_episodes
from nnunet_calib.fewshot.measure.registered import REGISTRATION, propagated
from nnunet_calib.fewshot.measure.scores import novel_scores
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import (
    FittedStructure,
    NovelMap,
    Settings,
    apply_structure,
    carry_to,
    fit_structure,
)
from nnunet_calib.fewshot.structure.heads.adapter import AdapterHead
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.task.adapters import FEWEST, adapt
from nnunet_calib.fewshot.task.fit import nested
from nnunet_calib.fewshot.volume.atlas import Carried
from nnunet_calib.fewshot.volume.files import find_supports
from nnunet_calib.fewshot.volume.registration import Registrar, Registration
from nnunet_calib.fewshot.volume.support import FEWEST_VOXELS, Support

ORACLE = "oracle"

MEMORY = 2 << 30
"""Bytes of cases that are kept for the next pair; one case is kept whatever its size."""

_PACKAGES = ("nnunet-calib", "nnunetv2", "torch", "numpy", "SimpleITK")


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
            "registration": settings.registration.kind,
        }


def grid(
    heads: Sequence[str],
    chunks: Sequence[int],
    extents: Sequence[str],
    ks: Sequence[int],
    protocols: Sequence[str] = (PAPER, REAL),
    entropies: Sequence[float | None] = (None,),
    most_sets: int | None = None,
    mode: str = "interpolated",
    registrations: Sequence[Registration] = (Registration("none"),),
) -> list[Trial]:
    """All combinations; of P1 one chunk number, one support and no extent. Entropies are for linear heads.

    Adapters are for P2 with three supports or more, in one chunk. P1 knows no registration. Registration alone is one
    trial for each k and each kind of registration, ``deformable`` if none is named.

    Raises:
        UsageError: none is left.
    """
    trials = []
    adapted, alone = AdapterHead.key in heads, REGISTRATION in heads
    heads = [head for head in heads if head not in (AdapterHead.key, REGISTRATION)]
    if PAPER in protocols:
        for head in heads:
            trials.append(Trial(PAPER, Settings(head, PAPER_CHUNKS, "hard", calibrate=False)))
    if REAL in protocols:
        for how, head, n, extent, k, entropy in itertools.product(registrations, heads, chunks, extents, ks, entropies):
            if entropy is None or head == "linear":
                objective = None if entropy is None else Objective(entropy=entropy)
                settings = Settings(head, n, mode, extent, objective=objective, registration=how)
                trials.append(Trial(REAL, settings, k, most_sets))
        for how, extent, k in itertools.product(registrations, extents, ks):
            if adapted and k >= FEWEST:
                settings = Settings(AdapterHead.key, 1, mode, extent, registration=how)
                trials.append(Trial(REAL, settings, k, most_sets))
        kinds = [how for how in registrations if how.kind != "none"] or [Registration()]
        for how, k in itertools.product(kinds if alone else (), ks):
            settings = Settings(REGISTRATION, 1, mode, "volume", registration=how)
            trials.append(Trial(REAL, settings, k, most_sets))
    if not trials:
        raise UsageError(f"nothing to try: registration is for protocol P2, adapters too and for k of {FEWEST} or more")
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
    run: str = "",
    registrar: Registrar | None = None,
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
        output: folder of ``pairs.jsonl``; lines that are there, and were made from the same, are not computed again.
        trials: from ``grid``.
        voxels: drawn from each support.
        run: what all pairs were made with, as ``evaluate_folder`` says it.
        registrar: of volumes; a new one if None.
        progress: show a bar.

    Returns:
        The records of these trials and this structure.

    Raises:
        UsageError: trials that ask for more supports than there are with the structure.
        InputError: no support has the structure.
    """
    output.mkdir(parents=True, exist_ok=True)
    registrar = registrar or Registrar()
    file = output / "pairs.jsonl"
    known_files = {**supports, **queries}
    cases = _Cases()
    orientation: str | None = None

    def case(name: str) -> Case:
        return cases.get(name, lambda: Case(name, known_files[name], model, value, cache, voxels, orientation))

    reader = model.plans_manager.image_reader_writer_class
    with_structure = {
        name
        for name, files in {**supports, **queries}.items()
        if (read_labels(files.label, reader, range(1 << 16)).labels == value).any()
    }
    if not with_structure & supports.keys():
        raise InputError(f"{next(iter(supports.values())).label.parent}: no label map holds {value}")
    # A query without the structure is a question of P2; P1 has no slice of it to score.
    annotated = []
    for name in supports:
        if name in with_structure:
            read = case(name)
            # all lie as the first support that can be used, as in ``fit``
            if np.count_nonzero(read.structure) >= FEWEST_VOXELS:
                annotated.append(name)
                orientation = orientation or read.volume.orientation
            elif orientation is None:
                cases.forget(name)  # as a query it lies as the first support
    if not annotated:
        folder = next(iter(supports.values())).label.parent
        raise InputError(f"{folder}: no case has {FEWEST_VOXELS} voxels of {value} at the model's spacing")
    if PAPER in {trial.protocol for trial in trials}:
        with_structure = {
            name
            for name in with_structure
            if name in annotated or (name in queries and np.count_nonzero(case(name).structure) >= FEWEST_VOXELS)
        }
    done = {
        identity(record): record
        for record in read_pairs(file)
        if record["structure"] == structure and _holds(record, known_files, run, value)
    }
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
            record = done.get(identity(known))
            if record is None:
                known |= {"run": run, "made_from": _made_from(known, known_files, run, value)}
                if trial.settings.head == REGISTRATION:
                    record = known | _score_registration(model, trial, episode, case, registrar)
                else:
                    if fitted[0] != (trial, episode.supports):
                        fitted = ((trial, episode.supports), _fit(model, cache, trial, episode, case, registrar))
                    assert fitted[1] is not None
                    record = known | _score(model, cache, trial, episode, fitted[1], case, registrar)
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
            found[case] = Files(tuple(channels), label, own if own is not None and is_named(own) else None)
        return found

    supports = files(Path(images), Path(labels))
    queries = supports if query_images is None or query_labels is None else files(query_images, query_labels)
    if shared := sorted(supports.keys() & queries.keys()) if queries is not supports else []:
        raise UsageError(f"{shared[0]} is both a support and a query; leave the queries out, or rename one")

    def predictor() -> FeaturePredictor:
        return FeaturePredictor(model, device, step_size=step_size, mirroring=mirroring)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    options = {"step_size": step_size, "mirroring": mirroring}
    cache = FeatureCache(output / "features", model, predictor, options)
    software = installed_versions(_PACKAGES)
    run = _hash([model.fingerprint(), list(model.folds), options, voxels, software])
    registrar = Registrar(output / "registrations" if any(trial.settings.registered for trial in trials) else None)
    evaluate_structure(
        model,
        cache,
        supports,
        queries,
        name,
        value,
        output,
        trials,
        voxels=voxels,
        run=run,
        registrar=registrar,
        progress=progress,
    )
    everything = read_pairs(output / "pairs.jsonl")
    kept = [
        record
        for record in everything
        if record.get("run") == run
        and (record["structure"] != name or _holds(record, {**supports, **queries}, run, value))
    ]
    about = {
        "model": model.fingerprint(),
        "supports": sorted(supports),
        "queries": sorted(queries),
        "label": value,
        "voxels": voxels,
        **options,
        "software": software,
        "pairs_left_out": len(everything) - len(kept),  # made from something else
    }
    rows = write_results(output, kept, about)
    return [row for row in rows if row["structure"] == name]


def _made_from(record: Mapping[str, Any], files: Mapping[str, Files], run: str, value: int) -> str | None:
    """What the numbers of a pair would be made from today; None if a case of it is not there any more."""
    names = [*record["supports"], record["query"]]
    if any(name not in files for name in names):
        return None
    return _hash([run, value, [files[name].checksums for name in names]])


def _holds(record: Mapping[str, Any], files: Mapping[str, Files], run: str, value: int) -> bool:
    now = _made_from(record, files, run, value)
    return now is not None and record.get("made_from") == now


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _Cases:
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


def _fit(
    model: BaseModel,
    cache: FeatureCache,
    trial: Trial,
    episode: Episode,
    case: Callable[[str], Case],
    registrar: Registrar,
) -> FittedStructure:
    settings = trial.settings
    if settings.head == AdapterHead.key:
        volumes = [case(name).volume for name in episode.supports]
        seen = _supports(trial, episode, case)
        seen, trained = adapt(model, cache.predictor, volumes, seen, settings=settings, progress=False)
        return replace(fit_structure(seen, settings, registrar), heads=list(trained))
    if trial.protocol == PAPER:
        supports = [case(name).paper_support(settings.axis, settings.chunks) for name in episode.supports]
    else:
        supports = _supports(trial, episode, case)
    return fit_structure(supports, settings, registrar)


def _supports(trial: Trial, episode: Episode, case: Callable[[str], Case]) -> list[Support]:
    """Of P2, with their volumes where they are registered."""
    if not trial.settings.registered:
        return [case(name).support for name in episode.supports]
    return [replace(case(name).support, labelled=case(name).labelled) for name in episode.supports]


def _score(
    model: BaseModel,
    cache: FeatureCache,
    trial: Trial,
    episode: Episode,
    fitted: FittedStructure,
    case: Callable[[str], Case],
    registrar: Registrar,
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
    for support in fitted.atlas.supports if fitted.atlas is not None else ():
        registrar(query.anatomy, support.anatomy, settings.registration)  # before the clock: it has its own
    begin = time.process_time()
    heads = None
    if settings.objective is not None:
        heads = refine_on_query(fitted, query.scan, query.predicted.sampled, settings.objective)
    if settings.head == AdapterHead.key:
        image = torch.from_numpy(query.volume.image)
        projected = cache.predictor.project_adapted(image, [head.state() for head in fitted.heads])
    else:
        projected = query.predicted.projected([head.projections for head in heads or fitted.heads])
    carried = None if fitted.atlas is None else carry_to(fitted, query.anatomy, registrar)
    found = apply_structure(fitted, query.scan, projected, heads, carried=carried)
    spent = time.process_time() - begin
    return _score_map(model, episode, found, case) | _cost(spent, carried)


def _score_registration(
    model: BaseModel, trial: Trial, episode: Episode, case: Callable[[str], Case], registrar: Registrar
) -> dict[str, Any]:
    query, how = case(episode.query), trial.settings.registration
    supports = [case(name).labelled for name in episode.supports]
    for support in supports:
        registrar(query.anatomy, support.anatomy, how)  # before the clock: it has its own
    begin = time.process_time()
    found, carried = propagated(query.anatomy, query.structure.shape, supports, how, registrar)
    spent = time.process_time() - begin
    return _score_map(model, episode, found, case) | _cost(spent, carried)


def _score_map(model: BaseModel, episode: Episode, found: NovelMap, case: Callable[[str], Case]) -> dict[str, Any]:
    """Scores of P2: the whole query, on the grid of its image."""
    query = case(episode.query)
    logit = query.on_image_grid(found.logit)
    probability = found.calibration.probability(torch.from_numpy(logit)).numpy()
    segmentation = (probability > found.threshold) & (not found.absent)
    scores = novel_scores(probability, query.reference, query.image_spacing, segmentation)
    inside, _ = nested(model, [case(name).overlaps for name in episode.supports], None)
    return scores | _about(found) | query.base_scores(probability, found, inside)


def _cost(spent: float, carried: Carried | None) -> dict[str, Any]:
    """Seconds of the processor that a query took, without the network; registrations as when they were made."""
    if carried is None:
        return {"seconds": round(spent, 3), "seconds_registration": 0.0, "registrations_limited": 0}
    limited = sum(warp.limited or warp.failed for warp in carried.warps)
    return {
        "seconds": round(spent, 3),
        "seconds_registration": round(carried.seconds, 3),
        "registrations_limited": limited,
    }


def _about(found: NovelMap) -> dict[str, Any]:
    return {
        "presence": float(np.clip(found.presence, -1e6, 1e6)),
        "absent": found.absent,
        "expected_mm3": found.expected_mm3,
    }
