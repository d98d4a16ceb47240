"""Voxels of an annotated volume that a head is fitted on.

The structure is taken whole, up to half of what is drawn. The rest is background, the same number from each stratum:
the base model's class by the distance to the structure. Every voxel drawn has as its weight how many it stands for, so
that weighted sums estimate sums over the volume without bias.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from nnunet_calib.data.strata import draw

VOXELS = 30_000
"""Voxels drawn from each volume unless said otherwise."""

EVEN_VOXELS = 2000
"""Drawn evenly from a volume, to see how it differs from others."""

BANDS_MM = (3.0, 10.0, 30.0)
"""Ends of the bands of distance that tell background apart; the last band has no end."""


def sample_support(
    structure: np.ndarray,
    base: np.ndarray,
    spacing: Sequence[float],
    valid: np.ndarray | None = None,
    *,
    voxels: int = VOXELS,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw voxels of an annotated volume.

    Args:
        structure: bool (z, y, x), the novel structure.
        base: integer (z, y, x), not negative, the class that the base model predicts.
        spacing: mm between voxels along each axis.
        valid: bool (z, y, x), voxels whose annotation counts; all if None.
        voxels: how many to draw, about; all of a smaller volume.
        seed: the same seed draws the same voxels.

    Returns:
        Indices into the flat volume, int64 ascending, and weights float64: voxels that each stands for. The weights add
        up to the voxels that count, and those of the structure to its own.

    Raises:
        ValueError: no voxel of the structure that counts.
    """
    inside = structure if valid is None else structure & valid
    outside = ~structure if valid is None else ~structure & valid
    if not inside.any():
        raise ValueError("no voxel of the structure to draw")
    rng = np.random.default_rng(seed)
    drawn = [draw(np.zeros(inside.shape, np.uint8), inside, voxels // 2, rng)]
    if outside.any():
        bands = len(BANDS_MM) + 1
        stratum = distance_band(structure, spacing) + np.uint32(bands) * base.astype(np.uint32)
        drawn.append(draw(stratum, outside, voxels - drawn[0][0].size, rng))
    index, weight = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    order = np.argsort(index)
    return index[order], weight[order]


def distance_band(structure: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Band of ``BANDS_MM`` in which the distance of each voxel to the structure lies, uint8 (z, y, x), 0 the nearest.

    Distances are only taken where they can be less than the last end.
    """
    reach = [int(np.ceil(BANDS_MM[-1] / step)) for step in spacing]
    (box,) = ndimage.find_objects(structure.astype(np.uint8))
    near = tuple(slice(max(side.start - r, 0), side.stop + r) for side, r in zip(box, reach, strict=True))
    distance = ndimage.distance_transform_edt(~structure[near], sampling=spacing)
    band = np.full(structure.shape, len(BANDS_MM), dtype=np.uint8)
    band[near] = np.searchsorted(BANDS_MM, distance, side="right")
    return band


def drawn_evenly(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Indices int64 (2000, 3) of voxels of a volume, drawn evenly."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.integers(0, size, EVEN_VOXELS) for size in shape], axis=1)
