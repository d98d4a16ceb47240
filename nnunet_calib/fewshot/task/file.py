"""A task: all that ``apply`` needs to know of a novel structure; those that were fitted together are one file.

The file is in the safetensors format: numbers as tensors, the rest as JSON in its header. Nothing in it can run code.
What registration needs of a support's image is in it once, whatever the number of structures.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import whole_file
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.features import DecoderFeatures
from nnunet_calib.fewshot.structure.background import Background
from nnunet_calib.fewshot.structure.fitted import Atlas, FittedStructure, Settings
from nnunet_calib.fewshot.structure.heads import HEADS
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.structure.platt import PlattScaling
from nnunet_calib.fewshot.structure.prior import Places, SizePrior
from nnunet_calib.fewshot.structure.trust import Trust
from nnunet_calib.fewshot.task.validity import check_parts
from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.atlas import Labelled
from nnunet_calib.fewshot.volume.frame import Frame
from nnunet_calib.fewshot.volume.registration import Registration

ENDING = ".fewshot"
# 2: the background of each support; 3: the supports' volumes, for registration; 4: several structures; 5: supports
# vote by how alike they look; 6: and from the places around
_FORMAT = 6
_KEY = "nnunet_calib_fewshot"
_COMPARED = ("classes", "plans", "trainer", "configuration")
_KEPT = 1000  # voxels of the structure, and of background, of each support: what a head is refined with
_SAMPLE = ("target", "weight", "position", "chunk", "support")


@dataclass(frozen=True)
class Task:
    """A novel structure, fitted to one model.

    Attributes:
        name: of the structure.
        model: fingerprint of the base model.
        orientation: of the supports; cases in another are turned.
        folds: of the base model, in the order of the heads.
        structure: what was fitted; its samples are a few voxels of each support where heads are refined on queries,
            and none where they are not.
        inside: base labels that the structure may override.
        background: features of the supports, of the first fold.
        report: what ``fit`` found; JSON.
    """

    name: str
    model: Mapping[str, Any]
    orientation: str
    folds: tuple[str, ...]
    structure: FittedStructure
    inside: tuple[int, ...]
    background: Background
    report: dict[str, Any]

    def __post_init__(self):
        parts = (self.name, self.model, self.orientation, self.folds, self.structure, self.inside)
        check_parts(*parts, self.background, self.report)

    def check(self, model: BaseModel, path: Path) -> None:
        """Refuse another model than the task was fitted to, and what does not fit this one.

        Raises:
            InputError: it is another, has a fold without head, or a class of the structure's name.
        """
        given = model.fingerprint()
        different = [name for name in _COMPARED if given[name] != self.model.get(name)]
        ours, theirs = self.model.get("checkpoints", {}), given["checkpoints"]
        different += [f"fold {fold}" for fold in theirs if fold not in ours]
        different += [f"checkpoint of fold {fold}" for fold in theirs if ours.get(fold, theirs[fold]) != theirs[fold]]
        if different:
            raise InputError(
                f"{path}: fitted to another model than {model.folder} (other {different[0]}); features of another "
                "network mean something else: fit the task to this one"
            )
        if self.name in model.dataset.content["labels"]:
            raise InputError(f"{path}: the model has a class {self.name!r} already; fit the task under another --name")
        if self.name.endswith(model.dataset.file_ending):
            raise InputError(f"{path}: {self.name!r} ends as image files do; fit the task under another --name")
        known = model.dataset.labels
        if unknown := [label for label in self.inside if label not in known]:
            raise InputError(f"{path}: it lies inside label {unknown[0]}; the model's are {', '.join(map(str, known))}")
        size = DecoderFeatures(model.network).size
        if (given_size := self.background.mean.shape[1]) != size:
            raise InputError(f"{path}: of {given_size} features, the model has {size}")

    def of_folds(self, folds: tuple[str, ...]) -> FittedStructure:
        """The structure with the heads of these folds only."""
        chosen = [self.folds.index(fold) for fold in folds]
        samples = [self.structure.samples[i] for i in chosen] if self.structure.samples else []
        return replace(self.structure, heads=[self.structure.heads[i] for i in chosen], samples=samples)


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Write one or more tasks of one model to a file, whole or not at all.

    Raises:
        ValueError: tasks that do not belong together.
    """
    _check_together(tasks)
    volumes: dict[str, Anatomy] = {}
    contents, tensors = [], dict[str, Tensor]()
    for number, task in enumerate(tasks):
        numbers = []
        for support in task.structure.atlas.supports if task.structure.atlas else ():
            volumes.setdefault(support.anatomy.digest, support.anatomy)
            numbers.append(list(volumes).index(support.anatomy.digest))
        contents.append(_content(task) | {"volumes": numbers})
        tensors |= {f"{number}.{name}": part for name, part in _tensors(task).items()}
    for number, anatomy in enumerate(volumes.values()):
        tensors |= {f"volume.{number}.{name}": torch.from_numpy(part) for name, part in _of_anatomy(anatomy).items()}
    first = tasks[0]
    content = {
        "format": _FORMAT,
        "model": dict(first.model),
        "orientation": first.orientation,
        "folds": list(first.folds),
        "structures": contents,
    }
    data = save(
        {name: part.contiguous() for name, part in tensors.items()},
        {_KEY: json.dumps(content, allow_nan=False)},
    )
    with whole_file(path) as stream:
        stream.write(data)


def read_tasks(path: Path) -> tuple[Task, ...]:
    """Read a task file.

    Raises:
        InputError: not a task file, damaged, or of another version.
    """
    content, tensors = _read(path)
    if content.get("format") != _FORMAT:
        raise InputError(f"{path}: of another version of nnunet-calib; fit the task again")
    try:
        volumes = _volumes(tensors)
        tasks = tuple(
            _task(content | own, _below(f"{number}.", tensors), volumes)
            for number, own in enumerate(content["structures"])
        )
        _check_together(tasks)
        return tasks
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a task file as fewshot fit writes it ({_line(error)})") from error


def _check_together(tasks: Sequence[Task]) -> None:
    if not 0 < len(tasks) == len({task.name for task in tasks}):
        raise ValueError(f"{len(tasks)} structures, of {len({task.name for task in tasks})} names")
    for task in tasks[1:]:
        if (task.model, task.orientation, task.folds) != (tasks[0].model, tasks[0].orientation, tasks[0].folds):
            raise ValueError("structures of different models")


def _content(task: Task) -> dict[str, Any]:
    """All of a structure but its tensors; JSON."""
    fitted, frame = task.structure, task.structure.frame
    return {
        "name": task.name,
        "settings": asdict(fitted.settings),
        "frame": {
            "extent": frame.extent,
            "low": frame.low.tolist(),
            "high": frame.high.tolist(),
            "landmarks": {str(c): _finite(place) for c, place in frame.landmarks.items()},
        },
        "prior": None if fitted.prior is None else asdict(fitted.prior),
        "presence_limit": fitted.presence_limit,
        "calibration": asdict(fitted.calibration),
        "left_out": fitted.left_out,
        "trust": asdict(fitted.atlas.trust) if fitted.atlas and fitted.atlas.trust else None,
        "inside": list(task.inside),
        "background_limit": task.background.limit,
        "report": task.report,
    }


def _tensors(task: Task) -> dict[str, Tensor]:
    fitted = task.structure
    tensors = {
        "places": torch.from_numpy(np.ascontiguousarray(fitted.places.points)),
        "background.mean": task.background.mean,
        "background.factor": task.background.factor,
    }
    for fold, head in zip(task.folds, fitted.heads, strict=True):
        tensors |= {f"head.{fold}.{name}": part for name, part in head.state().items()}
    for fold, sample in zip(task.folds, fitted.samples, strict=False):
        tensors[f"support.features.{fold}"] = sample[0].half()
        tensors |= {f"support.{name}": part for name, part in zip(_SAMPLE, sample[1:], strict=True)}
    for i, support in enumerate(fitted.atlas.supports if fitted.atlas else ()):
        tensors[f"atlas.{i}.distance"] = torch.from_numpy(np.ascontiguousarray(support.distance))
        if support.known is not None:
            tensors[f"atlas.{i}.known"] = torch.from_numpy(np.ascontiguousarray(support.known))
    return tensors


def thinned(fitted: FittedStructure, seed: int = 0) -> FittedStructure:
    """The structure with few voxels of each support, whose weights stand for the same volumes; for the file.

    None at all where heads are not refined on queries.
    """
    if fitted.settings.objective is None:
        return replace(fitted, samples=[])
    _, target, weight, _, _, support = fitted.samples[0]
    generator = np.random.default_rng(seed)
    chosen, changed = [], weight.clone()
    for one in support.unique():
        for inside in (True, False):
            index = torch.nonzero((support == one) & (target == inside))[:, 0]
            kept = index[generator.permutation(len(index))[:_KEPT]]
            changed[kept] *= weight[index].sum() / weight[kept].sum()
            chosen.append(kept)
    few = torch.cat(chosen).sort().values
    samples = []
    for sample in fitted.samples:
        features, _, _, position, chunk, _ = (part[few] for part in sample)
        samples.append((features, target[few], changed[few], position, chunk, support[few]))
    return replace(fitted, samples=samples)


def _task(content: Mapping[str, Any], tensors: Mapping[str, Tensor], volumes: Sequence[Anatomy]) -> Task:
    settings, frame, prior = _settings(content["settings"]), content["frame"], content["prior"]
    folds = tuple(content["folds"])
    heads = [HEADS[settings.head].from_state(_below(f"head.{fold}.", tensors)) for fold in folds]
    low, high = (np.array(frame[end], dtype=np.float64) for end in ("low", "high"))
    landmarks = {
        int(c): np.array([[_number(x) for x in row] for row in rows]) for c, rows in frame["landmarks"].items()
    }
    samples = []
    if f"support.features.{folds[0]}" in tensors:
        shared = [tensors[f"support.{name}"] for name in _SAMPLE]
        samples = [(tensors[f"support.features.{fold}"].float(), *shared) for fold in folds]
    fitted = FittedStructure(
        settings=settings,
        heads=heads,
        frame=Frame(frame["extent"], low, high, landmarks),
        prior=None if prior is None else SizePrior(**prior | {"body": {int(c): v for c, v in prior["body"].items()}}),
        places=Places(tensors["places"].numpy()),
        calibration=PlattScaling(**content["calibration"]),
        presence_limit=content["presence_limit"],
        samples=samples,  # type: ignore[arg-type]
        left_out=list(content["left_out"]),
        atlas=_atlas(settings, content, tensors, volumes),
    )
    background = Background(tensors["background.mean"], tensors["background.factor"], content["background_limit"])
    return Task(
        name=content["name"],
        model=dict(content["model"]),
        orientation=content["orientation"],
        folds=folds,
        structure=fitted,
        inside=tuple(content["inside"]),
        background=background,
        report=dict(content["report"]),
    )


def _of_anatomy(anatomy: Anatomy) -> dict[str, np.ndarray]:
    """Arrays of a support's volume, as small as registration lets them be."""
    parts = {
        "image": anatomy.image.astype(np.float16),
        "base": anatomy.base if anatomy.base.dtype == np.uint8 else anatomy.base.astype(np.int32),
        "spacing": np.array(anatomy.spacing, dtype=np.float64),
    }
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}


def _volumes(tensors: Mapping[str, Tensor]) -> list[Anatomy]:
    volumes: list[Anatomy] = []
    while parts := _below(f"volume.{len(volumes)}.", tensors):
        arrays = {name: part.numpy() for name, part in parts.items()}
        base = arrays["base"]
        if not (np.issubdtype(base.dtype, np.integer) and base.size and 0 <= base.min() <= base.max() < 1 << 16):
            raise ValueError("labels of a support's volume")
        first, second, third = (float(step) for step in arrays["spacing"])
        kind = np.uint8 if base.dtype == np.uint8 else np.uint16
        volumes.append(Anatomy(arrays["image"].astype(np.float32), base.astype(kind), (first, second, third)))
    return volumes


def _atlas(
    settings: Settings, content: Mapping[str, Any], tensors: Mapping[str, Tensor], volumes: Sequence[Anatomy]
) -> Atlas | None:
    numbers, trust = content["volumes"], content["trust"]
    if not settings.registered:
        if trust is not None or numbers or _below("atlas.", tensors):
            raise ValueError("volumes of the supports without registration")
        return None
    if not numbers or not set(numbers) <= set(range(len(volumes))):
        raise ValueError("the volumes of the supports, which registration needs, are not in it: fit the task again")
    supports = []
    for i, number in enumerate(numbers):
        own = _below(f"atlas.{i}.", tensors)
        known = own["known"].numpy() if "known" in own else None
        supports.append(Labelled(volumes[number], own["distance"].numpy(), known))
    return Atlas(tuple(supports), None if trust is None else Trust(**trust))


def _settings(content: Mapping[str, Any]) -> Settings:
    objective = content["objective"]
    objective = None if objective is None else Objective(**objective)
    how = Registration(**content["registration"])
    settings = Settings(**dict(content) | {"objective": objective, "registration": how})
    if settings.head not in HEADS:
        raise ValueError(f"head {settings.head!r:.30}")
    return settings


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"{path}: no such task file")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            if not isinstance(content, dict):
                raise ValueError("no JSON object in it")
            return content, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, LookupError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a task file of fewshot fit, or damaged ({_line(error)})") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _finite(place: np.ndarray) -> list[list[float | None]]:
    return [[float(x) if math.isfinite(x) else None for x in row] for row in place]


def _number(x: float | None) -> float:
    return math.nan if x is None else float(x)
