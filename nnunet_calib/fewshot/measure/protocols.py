"""Which volumes support which query when a method is measured, and which voxels of the query count.

P1, the papers': one support volume, three chunks, and the extent of the structure is taken from the QUERY'S OWN LABELS
(``oracle``), both to pair chunks and to choose the slices that are scored (Ouyang et al., SSL-ALPNet, ECCV 2020,
authors' code). It is here to compare with published tables and says little of new cases.

P2, the real: the whole query volume, nothing known of it but the image. Every set of k supports meets every query.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_calib.data.errors import UsageError

PAPER, REAL = "P1", "P2"
PAPER_CHUNKS = 3
FOLDS = 5


@dataclass(frozen=True)
class Episode:
    """The names of the volumes that a task is fitted on, and of the one that it is tried on."""

    supports: tuple[str, ...]
    query: str


def paper_episodes(cases: Sequence[str], folds: int = FOLDS) -> list[Episode]:
    """ALPNet's folds: each fold of the sorted, circular list is supported by the scan that follows it.

    Of 20 scans and 5 folds: queries 0-3 with support 4, 4-7 with 8, ..., 16-19 with 0.

    Args:
        cases: their names; sorted by the integers in them, as the authors do.
        folds: at most as many as cases.

    Raises:
        UsageError: fewer than two cases.
    """
    if len(cases) < 2:
        raise UsageError(
            f"protocol {PAPER} takes support and query from one folder; it needs two cases, not {len(cases)}"
        )
    order = sorted(cases, key=_integers)
    folds = min(folds, len(order))
    cuts = [round(fold * len(order) / folds) for fold in range(folds + 1)]
    return [
        Episode((order[end % len(order)],), query)
        for start, end in zip(cuts, cuts[1:], strict=False)
        for query in order[start:end]
    ]


def real_episodes(
    supports: Sequence[str], queries: Sequence[str], k: int, most_sets: int | None = None
) -> list[Episode]:
    """Every set of k supports with every query that is not among them.

    The sets are the windows of k neighbours in the sorted, circular list of supports, so that every volume serves
    equally often; of one volume these are all sets there are.

    Args:
        supports: names of the annotated volumes.
        queries: names of the volumes to try on; they may be supports, which then do not support themselves.
        k: volumes in a set.
        most_sets: so many sets, evenly spread over the list; None: as many as there are supports.

    Raises:
        UsageError: k is not between 1 and the number of supports.
    """
    order = sorted(supports, key=_integers)
    if not 1 <= k <= len(order):
        raise UsageError(f"k = {k} volumes of {len(order)} supports: k must be between 1 and {len(order)}")
    number = 1 if k == len(order) else min(len(order), most_sets or len(order))
    starts = [round(i * len(order) / number) for i in range(number)]
    sets = [tuple(order[(start + i) % len(order)] for i in range(k)) for start in starts]
    return [
        Episode(chosen, query) for chosen in sets for query in sorted(queries, key=_integers) if query not in chosen
    ]


def alpnet_support_slices(slices: Sequence[int], count: int) -> list[int]:
    """The one annotated slice of each part, of the slices that hold the class (Ouyang et al., ECCV 2020).

    Z[int(q_i M)] with q_i = 1 / (2 n) + i / n, of the M slices Z.
    """
    return [slices[int((1 / (2 * count) + i / count) * len(slices))] for i in range(count)]


def alpnet_parts(z: np.ndarray, first: int, last: int, count: int) -> np.ndarray:
    """Part of each query slice, given the first and last slice of the class in the reference (an oracle).

    floor((z - first) / ((last - first) / n)), clipped to [0, n - 1]; 0 where the class has one slice.
    """
    z = np.asarray(z)
    if last == first:
        return np.zeros(z.shape, dtype=np.int64)
    return np.floor((z - first) / ((last - first) / count)).astype(np.int64).clip(0, count - 1)


def worst_tenth(values: Sequence[float]) -> float:
    """Mean of the lowest tenth of the values, of one at least; NaN of none."""
    known = np.sort([value for value in values if not np.isnan(value)])
    return float(known[: max(1, round(len(known) / 10))].mean()) if len(known) else float("nan")


def _integers(name: str) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", name)], name
