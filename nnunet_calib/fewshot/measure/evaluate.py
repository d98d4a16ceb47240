"""How well k volumes show a structure: heads x chunks x extents x k, under the papers' protocol and the real one.

Features of every case are computed once (``cache``); all that is tried is fitted to and applied on these, but adapters,
which are trained for each set of supports and look at each query anew. Every pair of supports and query is a line of
``pairs.jsonl`` as soon as it is scored, and is not done again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_named
from nnunet_calib.data.images import read_labels
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.data.software import installed_versions
from nnunet_calib.fewshot.measure.cache import FeatureCache
from nnunet_calib.fewshot.measure.case import Case, Cases, Files
from nnunet_calib.fewshot.measure.pair import fit_trial, score_pair, score_registration
from nnunet_calib.fewshot.measure.pairs import identity, read_pairs, write_results
from nnunet_calib.fewshot.measure.protocols import PAPER, paper_episodes, real_episodes
from nnunet_calib.fewshot.measure.registered import REGISTRATION
from nnunet_calib.fewshot.measure.trials import Trial
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import FittedStructure
from nnunet_calib.fewshot.volume.atlas import VOTE
from nnunet_calib.fewshot.volume.files import find_supports
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.support import FEWEST_VOXELS

_PACKAGES = ("nnunet-calib", "nnunetv2", "torch", "numpy", "SimpleITK")


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
    ignore: int | None = None,
    inside: Sequence[int] | None = None,
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
        ignore: label value of voxels that do not count, in supports nor in scores.
        inside: base labels that the structure may override; those that it is found in if None.
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
    cases = Cases()
    orientation: str | None = None

    def case(name: str) -> Case:
        return cases.get(name, lambda: Case(name, known_files[name], model, value, cache, voxels, orientation, ignore))

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
                    record = known | score_registration(model, trial, episode, case, registrar, inside)
                else:
                    if fitted[0] != (trial, episode.supports):
                        fitted = ((trial, episode.supports), fit_trial(model, cache, trial, episode, case, registrar))
                    assert fitted[1] is not None
                    record = known | score_pair(model, cache, trial, episode, fitted[1], case, registrar, inside)
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
    ignore: int | None = None,
    inside: Sequence[int] | None = None,
    registrations: Path | None = None,
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
        ignore: label value of voxels that do not count, in supports nor in scores.
        inside: base labels that the structure may override; those that it is found in if None.
        registrations: folder where registrations are kept; one in ``output`` if None.
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
    if unknown := sorted(set(inside or ()) - set(model.dataset.labels)):
        raise UsageError(f"--inside {unknown[0]}: the model's labels are {', '.join(map(str, model.dataset.labels))}")
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
    chosen = {"ignore": ignore, "inside": None if inside is None else sorted(set(inside))}
    run = _hash([model.fingerprint(), list(model.folds), options, voxels, chosen, software, VOTE])
    registered = any(trial.settings.registered for trial in trials)
    registrar = Registrar((registrations or output / "registrations") if registered else None)
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
        ignore=ignore,
        inside=inside,
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
        **chosen,
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
