"""Registration alone, the baseline that needs no network: labels carried to the query, and their vote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_calib.fewshot.structure.fitted import NovelMap
from nnunet_calib.fewshot.structure.platt import PlattScaling
from nnunet_calib.fewshot.volume.anatomy import Anatomy, on_grid
from nnunet_calib.fewshot.volume.atlas import Carried, Labelled, carry
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.registration import Registration

REGISTRATION = "registration"
"""Its name where heads are named."""


def propagated(
    query: Anatomy, shape: Sequence[int], supports: Sequence[Labelled], how: Registration, registrar: Registrar
) -> tuple[NovelMap, Carried]:
    """The structure where most supports have it; nothing is fitted, and no volume is expected.

    Args:
        query: as registration sees it.
        shape: S of the map.
        supports: that labels are carried from.
        how: they are registered.
        registrar: does it.
    """
    carried = carry(query, supports, how, registrar)
    logit = on_grid(carried.log_odds, shape)
    return NovelMap(np.asarray(logit), PlattScaling(), 0.5, np.inf, False, None, 0.0), carried
