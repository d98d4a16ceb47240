"""Areas of the pieces of a surface between the voxels of a mask (lengths in 2D), for DeepMind's surface distances.

Between 2 x 2 x 2 neighbouring voxel centres, some inside and some outside, the surface crosses the edges of that cell
at their midpoints. Its crossings join to loops, and the loops are cut into triangles, as in marching cubes (Lorensen
and Cline, SIGGRAPH 1987). Two choices make the areas those of DeepMind's ``surface-distance``: where a face of the cell
has two inside corners across its diagonal, the rarer kind of corner in the cell (inside, if both are four) is kept
apart; and a loop that is not flat is cut so that its area in a cubic cell is the largest.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

_Point = tuple[float, ...]
_Triangle = tuple[_Point, _Point, _Point]


def corner_offsets(axes: int) -> list[tuple[int, ...]]:
    """Corners of a cell; a cell's code has bit k set where corner k is inside."""
    return list(itertools.product((0, 1), repeat=axes))


def surfel_areas(spacing: Sequence[float]) -> np.ndarray:
    """Area of the surface in a cell, by its code.

    Args:
        spacing: mm per axis; 3 axes, or 2 for the length of a contour, or 1 for the number of crossings.

    Returns:
        float64 (2 ** (2 ** axes),): mm2 for 3 axes, mm for 2.
    """
    step = np.asarray(spacing, dtype=np.float64)
    codes, pieces = _pieces(step.size)
    if step.size == 3:
        sides = (pieces[:, 1:] - pieces[:, :1]) * step
        sizes = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2
    else:
        sizes = np.linalg.norm((pieces[:, 1] - pieces[:, 0]) * step, axis=1) if step.size == 2 else np.ones(len(codes))
    return np.bincount(codes, weights=sizes, minlength=1 << (1 << step.size))


@functools.cache
def _pieces(axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangles (segments, points) of every code, in a cell of side one: codes (n,), pieces (n, axes, axes)."""
    pieces: list[tuple[int, tuple[_Point, ...]]] = []
    for code in range(1 << (1 << axes)):
        inside = _kept_apart(code, axes)
        if axes == 3:
            pieces += [(code, triangle) for triangle in _triangles(inside)]
        elif axes == 2:
            pieces += [(code, segment) for segment in _segments(inside, corner_offsets(2))]
        elif inside:
            pieces.append((code, ((0.5,),)))
    codes, corners = zip(*pieces, strict=True)
    return np.array(codes), np.array(corners)


@functools.cache
def _triangles(inside: frozenset[tuple[int, ...]]) -> tuple[_Triangle, ...]:
    corners = corner_offsets(3)
    links: dict[_Point, list[_Point]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        face = [corner for corner in corners if corner[axis] == side]
        for start, end in _segments(inside, face):
            links.setdefault(start, []).append(end)
            links.setdefault(end, []).append(start)
    return tuple(triangle for loop in _loops(links) for triangle in max(_cuts(loop), key=_area))


def _kept_apart(code: int, axes: int) -> frozenset[tuple[int, ...]]:
    """The inside corners of a cell, or the outside ones if those are fewer: the surface is the same."""
    corners = corner_offsets(axes)
    inside = frozenset(corner for k, corner in enumerate(corners) if code >> k & 1)
    outside = frozenset(corners) - inside
    return inside if len(inside) <= len(outside) else outside


def _segments(inside: frozenset[tuple[int, ...]], face: list[tuple[int, ...]]) -> Iterator[tuple[_Point, _Point]]:
    """Where the surface crosses one face, given by its four corners in the order of ``corner_offsets``."""
    ring = [face[0], face[1], face[3], face[2]]
    kinds = [corner in inside for corner in ring]
    middles = [tuple((a + b) / 2 for a, b in zip(ring[k], ring[(k + 1) % 4], strict=True)) for k in range(4)]
    crossed = [k for k in range(4) if kinds[k] != kinds[(k + 1) % 4]]
    if len(crossed) == 2:
        yield middles[crossed[0]], middles[crossed[1]]
    elif len(crossed) == 4:
        yield from ((middles[k - 1], middles[k]) for k in range(4) if kinds[k])


def _loops(links: dict[_Point, list[_Point]]) -> Iterator[list[_Point]]:
    left = set(links)
    while left:
        loop = [min(left)]
        while loop[-1] in left:
            left.remove(loop[-1])
            loop += [point for point in links[loop[-1]] if point in left][:1]
        yield loop


def _cuts(loop: list[_Point]) -> list[list[_Triangle]]:
    """Every way to cut a loop into triangles."""
    if len(loop) < 3:
        return [[]]
    return [
        [*before, (loop[0], loop[k], loop[-1]), *after]
        for k in range(1, len(loop) - 1)
        for before in _cuts(loop[: k + 1])
        for after in _cuts(loop[k:])
    ]


def _area(triangles: list[_Triangle]) -> float:
    total = 0.0
    for a, b, c in triangles:
        u, v = [q - p for p, q in zip(a, b, strict=True)], [q - p for p, q in zip(a, c, strict=True)]
        total += math.hypot(u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0])
    return round(total, 9)  # cuts of the same area differ by rounding alone: take the first
