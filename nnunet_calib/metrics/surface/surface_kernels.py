"""The passes that find surfaces, compiled (numba, optional): the same numbers as the numpy functions, sooner.

Imported only where numba is there and asked for. Most voxels are as their neighbours: voxels are looked at in runs,
many an instruction, and one by one only where something differs.
"""

import numpy as np

from nnunet_calib.metrics.compiled import compiled

_COMPARED = 512  # voxels of a run; a multiple of 8
_ROOM = 1 << 15  # positions, to begin with


@compiled()
def surface_voxels(labels, strides, place, structures):
    """Surface voxels of the structures of a padded label map, indices int32 (3, n), and where each structure starts.

    Structures are numbered; ``place`` gives the one of a label, or ``structures`` for none. Neighbours lie at
    ``strides``, of which some may be 0; positions have their type.
    """
    flat = labels.reshape(-1)
    far, near, next_ = strides
    margin = max(far, near, next_)
    different, found, count = np.zeros(_COMPARED, np.uint8), np.empty(_ROOM, strides.dtype), 0
    for start in range(margin, flat.size - margin, _COMPARED):
        size = min(_COMPARED, flat.size - margin - start)
        here = flat[start : start + size]
        if not _any(here):
            continue
        left, right = flat[start - next_ : start - next_ + size], flat[start + next_ : start + next_ + size]
        above, below = flat[start - near : start - near + size], flat[start + near : start + near + size]
        front, back = flat[start - far : start - far + size], flat[start + far : start + far + size]
        for i in range(size):
            c = here[i]
            beside = (left[i] ^ c) | (right[i] ^ c) | (above[i] ^ c) | (below[i] ^ c) | (front[i] ^ c) | (back[i] ^ c)
            different[i] = (beside != 0) & (c != 0)
        found, count = _append(found, count, start, different, size)
    values, no_codes = np.empty(count, flat.dtype), np.empty(0, np.uint8)
    for i in range(count):
        values[i] = flat[found[i]]
    points, starts, _ = _by_structure(found[:count], values, no_codes, labels.shape, place, structures)
    return points, starts


@compiled()
def surface_cells(labels, corners, place, structures):
    """The same for the cells between voxels that a structure's surface crosses; besides, the codes of their corners.

    A cell has the position of its first corner; bit k of its code is set where ``corners[k]`` is inside.
    """
    flat = labels.reshape(-1)
    different, found, count = np.zeros(_COMPARED, np.uint8), np.empty(_ROOM, corners.dtype), 0
    last = corners[-1]
    for start in range(0, flat.size - last, _COMPARED):
        size = min(_COMPARED, flat.size - last - start)
        here = flat[start : start + size]
        different[:size] = 0
        for corner in corners[1:]:
            there = flat[start + corner : start + corner + size]
            for i in range(size):
                different[i] |= here[i] != there[i]
        found, count = _append(found, count, start, different, size)
    cells, values = np.empty(count * corners.size, corners.dtype), np.empty(count * corners.size, flat.dtype)
    codes = np.empty(count * corners.size, np.uint8)
    entries = 0
    around = np.empty(corners.size, flat.dtype)
    for position in found[:count]:
        for k in range(corners.size):
            around[k] = flat[position + corners[k]]
        seen = 0
        for k in range(corners.size):
            if around[k] == 0 or seen >> k & 1:
                continue
            code = 0
            for other in range(corners.size):
                code |= (around[other] == around[k]) << other
            seen |= code
            cells[entries], values[entries], codes[entries] = position, around[k], code
            entries += 1
    return _by_structure(cells[:entries], values[:entries], codes[:entries], labels.shape, place, structures)


@compiled()
def _any(labels):
    some = False
    for i in range(labels.size):
        some |= labels[i] != 0
    return some


@compiled()
def _append(found, count, start, marks, size):
    """Add the positions of a run that are marked with 1."""
    marks[size:] = 0
    if found.size < count + _COMPARED:
        found = np.concatenate((found, np.empty_like(found)))
    words = marks.view(np.uint64)
    for word in range(words.size):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                found[count] = start + i  # no branch: the next one is written over it unless it counts
                count += marks[i]
    return found, count


@compiled()
def _by_structure(positions, values, codes, shape, place, structures):
    """Indices of ascending positions in a flattened label map, where each structure starts, and the codes likewise."""
    height, width = shape[1], shape[2]
    starts = np.zeros(structures + 2, np.int64)
    for value in values:
        starts[place[value] + 1] += 1
    starts = np.cumsum(starts)
    at = starts.copy()
    points, ordered = np.empty((3, positions.size), np.int32), np.empty(codes.size, np.uint8)
    z, y, row = 0, 0, 0  # the row of the last position, and where it begins
    for i in range(positions.size):
        while row + width <= positions[i]:
            row += width
            y += 1
            if y == height:
                y = 0
                z += 1
        k = at[place[values[i]]]
        points[0, k], points[1, k], points[2, k] = z, y, positions[i] - row
        at[place[values[i]]] = k + 1
        if codes.size:
            ordered[k] = codes[i]
    return points, starts, ordered
