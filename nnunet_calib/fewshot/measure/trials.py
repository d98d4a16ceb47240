"""What is tried: protocols x heads x chunks x extents x k x registrations, each a row of the table."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_calib.data.errors import UsageError
from nnunet_calib.fewshot.measure.protocols import PAPER, PAPER_CHUNKS, REAL
from nnunet_calib.fewshot.measure.registered import REGISTRATION
from nnunet_calib.fewshot.structure.fitted import SUPERIOR, Settings
from nnunet_calib.fewshot.structure.heads.adapter import AdapterHead
from nnunet_calib.fewshot.structure.objective import PUBLISHED, Objective
from nnunet_calib.fewshot.structure.prior import MARGIN
from nnunet_calib.fewshot.task.adapters import FEWEST
from nnunet_calib.fewshot.volume.registration import Registration

ORACLE = "oracle"
OWN = "volume"
"""The refinement that `fit --refine` has: the volume prior as a hinge."""


@dataclass(frozen=True)
class Trial:
    """One row of the table: a protocol, the settings that are tried and k.

    Attributes:
        protocol: ``P1`` or ``P2``.
        settings: see there; of P1 the extent pairs no chunks.
        k: supports; 1 for P1.
        most_sets: of k supports; all windows if None.
        refinement: name of the settings' objective, ``OWN`` or of ``PUBLISHED``; None without.
    """

    protocol: str
    settings: Settings
    k: int = 1
    most_sets: int | None = None
    refinement: str | None = None

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
            "refinement": self.refinement,
            "registration": settings.registration.kind,
            "margin": settings.margin,
            "axis": settings.axis,
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
    margin: float = MARGIN,
    axis: int = SUPERIOR,
    refinements: Sequence[str] = (),
) -> list[Trial]:
    """All combinations; of P1 one chunk number, one support and no extent.

    Entropies and refinements (of ``PUBLISHED``) are for linear heads in P2.
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
            trials.append(Trial(PAPER, Settings(head, PAPER_CHUNKS, "hard", axis=axis, margin=margin, calibrate=False)))
    if REAL in protocols:
        refined: list[str | float | None] = [*entropies, *refinements]
        for how, head, n, extent, k, one in itertools.product(registrations, heads, chunks, extents, ks, refined):
            if one is None or head == "linear":
                objective, name = _objective(one, k)
                settings = Settings(head, n, mode, extent, axis, margin, objective, registration=how)
                trials.append(Trial(REAL, settings, k, most_sets, name))
        for how, extent, k in itertools.product(registrations, extents, ks):
            if adapted and k >= FEWEST:
                settings = Settings(AdapterHead.key, 1, mode, extent, axis, margin, registration=how)
                trials.append(Trial(REAL, settings, k, most_sets))
        kinds = [how for how in registrations if how.kind != "none"] or [Registration()]
        for how, k in itertools.product(kinds if alone else (), ks):
            settings = Settings(REGISTRATION, 1, mode, "volume", registration=how)
            trials.append(Trial(REAL, settings, k, most_sets))
    if not trials:
        raise UsageError(f"nothing to try: registration is for protocol P2, adapters too and for k of {FEWEST} or more")
    return trials


def _objective(refinement: str | float | None, k: int) -> tuple[Objective | None, str | None]:
    """A published objective, or ours with a weight of the entropy, and its name; neither for None."""
    if refinement is None:
        return None, None
    if isinstance(refinement, str):
        return PUBLISHED[refinement](k), refinement
    return Objective(entropy=refinement), OWN
