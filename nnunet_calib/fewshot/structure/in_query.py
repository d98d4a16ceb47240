"""A fitted structure in a query: projections of the network's features to its map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_calib.fewshot.structure.fitted import FittedStructure, NovelMap, chunk_weights, ensemble, expected_volume
from nnunet_calib.fewshot.structure.heads import Head
from nnunet_calib.fewshot.structure.platt import PlattScaling, expected_dice
from nnunet_calib.fewshot.structure.prior import (
    VolumeCurve,
    operating_shift,
    presence_score,
)
from nnunet_calib.fewshot.structure.trust import Trust, trust_of_one
from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.atlas import Carried, carry, sampled
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.scan import Scan

_SLAB = 1 << 19  # voxels whose log odds are computed at once
_BELOW = np.float32(1e-3)  # log odds under the cut
_FAR_MM = 10.0  # from where any support has the structure, beyond which a component is none of it


def apply_structure(
    fitted: FittedStructure,
    scan: Scan,
    projected: Sequence[Tensor],
    heads: Sequence[Head] | None = None,
    *,
    carried: Carried | None = None,
    parts: np.ndarray | None = None,
    counted: np.ndarray | None = None,
    expected_mm3: float | None = None,
) -> NovelMap:
    """The map of a structure in a query.

    Args:
        fitted: the structure.
        scan: the query.
        projected: of each fold float (R, *S), by the projections of the heads.
        heads: refined on the query; those of the fit if None.
        carried: from the supports, where the structure has an atlas.
        parts: int64 (V,), chunk of each voxel of the flat volume where the pairing is given, in evaluation.
        counted: bool (V,), voxels that the volume prior counts, in evaluation; all if None.
        expected_mm3: volume to expect, in evaluation; from the supports if None.
    """
    alignment = fitted.frame.align(scan.size, scan.landmarks)
    expected = expected_mm3 if expected_mm3 is not None else expected_volume(fitted, scan, alignment)
    heads = fitted.heads if heads is None else heads
    flat = [maps.flatten(1) for maps in projected]
    logit = np.empty(scan.base.size, dtype=np.float32)
    curve = VolumeCurve()
    trust = Trust()
    if fitted.atlas is not None:
        assert carried is not None
        assert carried.agreement is not None or fitted.atlas.trust is not None
        trust = fitted.atlas.trust or trust_of_one(carried.agreement or 1.0)
    for first in range(0, logit.size, _SLAB):
        index = np.arange(first, min(first + _SLAB, logit.size))
        position = torch.from_numpy(fitted.frame.position(alignment(scan.mm(index))).astype(np.float32))
        chunk = chunk_weights(fitted.settings, position, None if parts is None else parts[index])
        found = ensemble(
            [
                head.logit(maps[:, first : first + len(index)].T.float(), position, chunk)
                for head, maps in zip(heads, flat, strict=True)
            ]
        )
        if carried is not None:
            found = trust(found, *map(torch.from_numpy, carried.at(index, scan.base.shape)))
        logit[index] = found.numpy()
        curve.add(logit[index] if counted is None else logit[index][counted[index]], scan.voxel_mm3)
    shift, presence, absent = 0.0, np.inf, False
    if expected_mm3 is None and not fitted.share_in_view(scan, alignment):
        presence, absent = -np.inf, True  # whatever looks like it there is something else
    elif expected is not None:
        presence = presence_score(curve, expected)
        absent = presence < fitted.presence_limit
        shift = operating_shift(curve, expected, fitted.settings.margin, present=not absent)
    logit += shift
    threshold = fitted.calibration.cut(logit)
    whole, far_mm3 = logit.reshape(scan.base.shape), 0.0
    if carried is not None and not carried.failed:
        far_mm3 = scan.voxel_mm3 * _leave_far(whole, fitted.calibration, threshold, carried)
    dice = expected_dice(whole, fitted.calibration, threshold)
    return NovelMap(whole, fitted.calibration, threshold, presence, absent, expected, shift, far_mm3, dice)


def carry_to(fitted: FittedStructure, anatomy: Anatomy, registrar: Registrar) -> Carried | None:
    """What registration carries from the supports to a query; None of a structure without atlas."""
    if fitted.atlas is None:
        return None
    alone = fitted.atlas.trust is None
    return carry(anatomy, fitted.atlas.supports, fitted.settings.registration, registrar, compared=alone)


def _leave_far(logit: np.ndarray, calibration: PlattScaling, threshold: float, carried: Carried) -> int:
    """Bring components of the structure that lie far from that of any support below the threshold, in place.

    Args:
        logit: (*S).
        calibration: of the log odds.
        threshold: probability above which is the structure.
        carried: from the supports.

    Returns:
        How many voxels. None if no component is near: then the registration is more likely to be wrong than all of
        them.
    """
    cut = (float(np.log(threshold / (1 - threshold))) - calibration.bias) / calibration.slope
    components, count = ndimage.label(logit > cut, np.ones((3, 3, 3)))
    if count < 2:
        return 0
    inside = np.flatnonzero(components)
    number = components.ravel()[inside]
    nearest = sampled(carried.nearest, inside, logit.shape)
    highest = ndimage.maximum(nearest, number, np.arange(1, count + 1))
    far = np.asarray(highest) < -_FAR_MM
    if far.all() or not far.any():
        return 0
    left = inside[far[number - 1]]
    flat = logit.reshape(-1)
    flat[left] = np.minimum(flat[left], np.float32(cut) - _BELOW)
    return int(left.size)
