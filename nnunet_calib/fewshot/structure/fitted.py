"""The method on arrays: sampled supports to a fitted structure, projections of a query to its map.

    s(v) = head(W f(v), u(v), a(v))         one head for each fold, averaged as probabilities
    z(v) = trust(s(v), r(v), d(v))          with registration, what it carries from the supports (``trust``, ``atlas``)
    z(v) + shift                            the volume above 0 is what the supports lead to expect, within a margin
    p(v) = 1 / (1 + exp(-slope (z(v) + shift) - bias))      fitted to supports that the others predict
    structure where p(v) is above the threshold of largest expected Dice (one support: where z(v) + shift > 0), unless
    it is absent; with registration, components that lie far from where any support has it are left out

`from_supports` fits it, `in_query` applies it. Nothing here knows files, networks or labels of queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.fewshot.structure.heads import Head
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.structure.platt import PlattScaling
from nnunet_calib.fewshot.structure.prior import (
    MARGIN,
    Places,
    SizePrior,
)
from nnunet_calib.fewshot.structure.trust import Trust
from nnunet_calib.fewshot.volume.atlas import Labelled
from nnunet_calib.fewshot.volume.frame import Alignment, Chunks, Frame
from nnunet_calib.fewshot.volume.registration import Registration
from nnunet_calib.fewshot.volume.scan import Scan

SUPERIOR = 2
"""Patient axis from inferior to superior."""

_CERTAIN = 1e-7


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        head: key of ``HEADS``.
        chunks: n.
        mode: ``hard`` or ``interpolated``.
        extent: ``aligned`` or ``volume``.
        axis: of the patient that the chunks divide: 0 left-right, 1 posterior-anterior, 2 inferior-superior.
        margin: of the volume prior.
        objective: of the refinement on the query; None: no refinement.
        calibrate: fit slope and bias to left-out supports where there are two or more.
        options: arguments of ``Head.fit``.
        registration: of the supports to each other and to queries; the command's default is deformable.
    """

    head: str = "linear"
    chunks: int = 12
    mode: str = "interpolated"
    extent: str = "aligned"
    axis: int = SUPERIOR
    margin: float = MARGIN
    objective: Objective | None = None
    calibrate: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    registration: Registration = Registration("none")

    @property
    def registered(self) -> bool:
        """Supports are registered."""
        return self.registration.kind != "none"


@dataclass(frozen=True, eq=False)
class Atlas:
    """The supports as volumes, and how far what registration carries from them is to be trusted.

    Attributes:
        supports: of each its volume.
        trust: learned from left-out supports; None with one: the query tells (``trust_of_one``).
    """

    supports: tuple[Labelled, ...]
    trust: Trust | None


@dataclass(frozen=True)
class FittedStructure:
    """A structure fitted to k supports.

    Attributes:
        settings: as given.
        heads: of each fold.
        frame: coordinates of the task.
        prior: None if the field of view cuts the structure in all supports.
        places: where the supports have the structure.
        calibration: from left-out supports; the identity with one.
        presence_limit: presence scores below say that a query lacks the structure.
        samples: of each fold what the heads were fitted on, for the refinement on a query.
        left_out: Dice of each support predicted by the others, on its sample; empty with one.
        atlas: where supports are registered to queries.
    """

    settings: Settings
    heads: list[Head]
    frame: Frame
    prior: SizePrior | None
    places: Places
    calibration: PlattScaling
    presence_limit: float
    samples: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    left_out: list[float]
    atlas: Atlas | None = None

    @property
    def calibrated(self) -> bool:
        """There were left-out supports to calibrate on."""
        return self.calibration != PlattScaling()

    def share_in_view(self, scan: Scan, alignment: Alignment) -> float:
        """Share of the places of the structure that lie in the field of view of a query."""
        low, high = (self.frame.position(alignment(end)) for end in (np.zeros(3), scan.size))
        return self.places.share_inside(low, high)

    @property
    def projections(self) -> list[Tensor]:
        """W of each fold, float32 (R, F)."""
        return [head.projections for head in self.heads]


@dataclass(frozen=True)
class NovelMap:
    """A structure in a query.

    Attributes:
        logit: float32 (*S), log odds with the volume prior, before the calibration.
        calibration: of the structure.
        threshold: probability above which is the structure.
        presence: score; below the limit of the fit the structure is called absent.
        absent: it is.
        expected_mm3: volume expected; None without prior.
        shift: what the volume prior added to the log odds.
        far_mm3: volume of components that were left out, for no support has the structure near.
        expected_dice: that the probabilities let expect; 0 to 1.
    """

    logit: np.ndarray
    calibration: PlattScaling
    threshold: float
    presence: float
    absent: bool
    expected_mm3: float | None
    shift: float
    far_mm3: float = 0.0
    expected_dice: float = float("nan")

    @property
    def probability(self) -> np.ndarray:
        """Calibrated, float32 (*S); computed anew."""
        return self.calibration.probability(torch.from_numpy(self.logit)).numpy()


def expected_volume(fitted: FittedStructure, scan: Scan, alignment: Alignment) -> float | None:
    """Volume of the structure to expect in a query, mm3; None without prior, 0 out of view."""
    return expected_in(fitted.prior, fitted.frame, fitted.places, scan, alignment)


def chunk_weights(settings: Settings, position: Tensor, part: np.ndarray | None = None) -> Tensor:
    """Weights float32 (N, n) of the chunks at positions (N, 3) of the frame, or of given chunks."""
    if part is not None:
        return torch.nn.functional.one_hot(torch.from_numpy(part), settings.chunks).float()
    return Chunks(settings.chunks, settings.mode).weights(position[:, settings.axis])


def ensemble(logits: Sequence[Tensor]) -> Tensor:
    """Log odds of the mean probability of the folds, of the shape of each."""
    if len(logits) == 1:
        return logits[0]
    mean = torch.stack([logit.double().sigmoid() for logit in logits]).mean(dim=0)
    return torch.logit(mean.clamp(_CERTAIN, 1 - _CERTAIN)).float()


def expected_in(
    prior: SizePrior | None, frame: Frame, places: Places, scan: Scan, alignment: Alignment
) -> float | None:
    """As ``expected_volume``, of a scan that lies in a frame."""
    if prior is None:
        return None
    low, high = (frame.position(alignment(end)) for end in (np.zeros(3), scan.size))
    return prior.expected(scan.body, places.share_inside(low, high))
