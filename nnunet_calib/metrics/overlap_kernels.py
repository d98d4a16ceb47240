"""The pass that counts overlap, compiled (numba, optional): the same numbers as the numpy function, sooner.

Imported only where numba is there and asked for. Most voxels are as their neighbours: voxels are looked at in runs,
many an instruction, and one by one only where something differs.
"""

import numpy as np

from nnunet_calib.metrics.compiled import compiled

_COUNTED = 64  # voxels of a run


@compiled()
def joint_counts(reference, prediction, valid, index, size):
    """Voxels by (reference, prediction) index, int64 (size * size); flat maps, ``valid`` empty where all count."""
    joint = np.zeros(size * size, np.int64)
    masked = valid.size > 0
    for start in range(0, reference.size, _COUNTED):
        stop = min(start + _COUNTED, reference.size)
        theirs, ours = reference[start:stop], prediction[start:stop]
        first, other = theirs[0], ours[0]
        mixed = masked
        for i in range(theirs.size):
            mixed |= (theirs[i] != first) | (ours[i] != other)
        if not mixed:
            joint[index[first] * size + index[other]] += theirs.size
            continue
        count = 0
        for i in range(theirs.size):
            if masked and not valid[start + i]:
                continue
            if theirs[i] != first or ours[i] != other:
                joint[index[first] * size + index[other]] += count
                first, other, count = theirs[i], ours[i], 0
            count += 1
        joint[index[first] * size + index[other]] += count
    return joint
