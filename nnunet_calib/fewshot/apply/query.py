"""One query: the base model's logits, and every novel structure, from one pass of the network.

What is known of a query is its image. Labels of queries have no place here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.apply.refine import refine_on_query
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import FittedStructure, NovelMap
from nnunet_calib.fewshot.structure.heads import AdapterHead, Head
from nnunet_calib.fewshot.structure.in_query import apply_structure, carry_to
from nnunet_calib.fewshot.task.file import Task
from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.atlas import Carried
from nnunet_calib.fewshot.volume.files import Volume
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.sampling import drawn_evenly
from nnunet_calib.fewshot.volume.scan import Scan, scan_of


@dataclass(frozen=True)
class Structures:
    """Tasks to be applied together.

    Attributes:
        tasks: fitted to the model.
        fitted: of each, the heads of the folds in use.
        values: label of each in a merged segmentation.
    """

    tasks: tuple[Task, ...]
    fitted: tuple[FittedStructure, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A structure in a query.

    Attributes:
        novel: log odds and decisions on the network's grid.
        distance: of the query's features from the supports'.
        landmarks: base classes that the query was aligned by.
        in_view: share of the structure that the field of view can hold.
        shown: float (3,), share of the query's extent along each patient axis that the supports show too.
        carried: what registration brought from the supports.
    """

    novel: NovelMap
    distance: float
    landmarks: int
    in_view: float
    shown: np.ndarray
    carried: Carried | None = None


def find_structures(
    model: BaseModel,
    predictor: FeaturePredictor,
    volume: Volume,
    structures: Structures,
    seed: int = 0,
    registrar: Registrar | None = None,
) -> tuple[Tensor, list[Found]]:
    """The base model's logits (C, *S) of a query, and every structure in it.

    One pass of the network, whatever the number of tasks; two plain passes more for each task that is refined on the
    query, one for each with adapters.
    """
    image = torch.from_numpy(volume.image)
    some = torch.from_numpy(drawn_evenly(volume.shape, seed))
    plain = [fitted for fitted in structures.fitted if _in_one_pass(fitted)]
    weights = _projections([fitted.heads for fitted in plain], predictor.folds)
    seen = predictor.predict(image, weights, some)
    scan = scan_of(model, volume, seen.base)
    rows = _rows(seen.projected, [fitted.heads for fitted in plain])
    registrar = registrar or Registrar()
    anatomy = Anatomy.of(volume, scan) if any(fitted.atlas for fitted in structures.fitted) else None
    carried = {
        id(fitted): None if anatomy is None else carry_to(fitted, anatomy, registrar) for fitted in structures.fitted
    }
    first = iter(
        [
            apply_structure(fitted, scan, maps, carried=carried[id(fitted)])
            for fitted, maps in zip(plain, rows, strict=True)
        ]
    )
    seen.projected.clear()  # they are large, and other passes may follow
    found = []
    for task, fitted in zip(structures.tasks, structures.fitted, strict=True):
        brought = carried[id(fitted)]
        novel = next(first) if _in_one_pass(fitted) else _in_own_passes(fitted, predictor, image, scan, seed, brought)
        found.append(_found(task, fitted, scan, novel, seen.sampled[0], brought))
    return seen.base, found


def _in_one_pass(fitted: FittedStructure) -> bool:
    """All that is wanted of the query is projections, known before it is looked at."""
    return fitted.settings.objective is None and fitted.settings.head != AdapterHead.key


def _in_own_passes(
    fitted: FittedStructure,
    predictor: FeaturePredictor,
    image: Tensor,
    scan: Scan,
    seed: int,
    carried: Carried | None,
) -> NovelMap:
    if fitted.settings.objective is None:
        maps = predictor.project_adapted(image, [head.state() for head in fitted.heads])
        return apply_structure(fitted, scan, maps, carried=carried)
    heads = refine_on_query(fitted, scan, partial(_sampled, predictor, image), fitted.settings.objective, seed=seed)
    maps = predictor.project(image, [head.projections for head in heads])
    return apply_structure(fitted, scan, maps, heads, carried=carried)


def _sampled(predictor: FeaturePredictor, image: Tensor, index: np.ndarray) -> list[Tensor]:
    return predictor.features_at(image, torch.from_numpy(np.stack(np.unravel_index(index, image.shape[1:]), axis=1)))


def _found(
    task: Task, fitted: FittedStructure, scan: Scan, novel: NovelMap, features: Tensor, carried: Carried | None
) -> Found:
    alignment = fitted.frame.align(scan.size, scan.landmarks)
    return Found(
        novel,
        task.background.distance(features),
        int(alignment.landmarks[fitted.settings.axis]),
        fitted.share_in_view(scan, alignment),
        fitted.frame.shown(scan.size, alignment),
        carried,
    )


def _projections(heads: Sequence[Sequence[Head]], folds: int) -> list[Tensor] | None:
    """W of each fold: the rows of all tasks, one below the other."""
    if not heads:
        return None
    return [torch.cat([of_folds[fold].projections for of_folds in heads]) for fold in range(folds)]


def _rows(projected: Sequence[Tensor], heads: Sequence[Sequence[Head]]) -> Iterator[list[Tensor]]:
    """Of each task its projections of every fold."""
    first = [0] * len(projected)
    for of_folds in heads:
        counts = [len(head.projections) for head in of_folds]
        yield [maps[a : a + n] for maps, a, n in zip(projected, first, counts, strict=True)]
        first = [a + n for a, n in zip(first, counts, strict=True)]
