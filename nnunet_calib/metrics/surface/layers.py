"""Label maps made ready for a pass over them: regions that overlap told apart, everything around them cut off."""

from collections.abc import Sequence

import numpy as np

from nnunet_calib.metrics.overlap import Structure, labels_of


def disjoint(structures: Sequence[Structure]) -> list[list[int]]:
    """Structures, by position, in as few layers as are quickly found; in a layer no two share a label."""
    layers: list[tuple[list[int], set[int]]] = []
    for k, structure in enumerate(structures):
        members = set(labels_of(structure))
        for positions, taken in layers:
            if not taken & members:
                positions.append(k)
                taken |= members
                break
        else:
            layers.append(([k], members))
    return [positions for positions, _ in layers]


def relabelled(
    reference: np.ndarray, prediction: np.ndarray, members: dict[int, tuple[int, ...]]
) -> tuple[tuple[np.ndarray, np.ndarray], list[int]]:
    """Both label maps, cropped, with one label per structure, and that label of every structure.

    Label maps that are so already, as most are, are not copied.
    """
    if all(0 not in labels for labels in members.values()):  # background as a structure reaches to the image edge
        box = _union_box(_label_box(reference), _label_box(prediction))
        reference, prediction = reference[box], prediction[box]
    small = all(labels.dtype in (np.uint8, np.uint16) for labels in (reference, prediction))
    if small and all(len(labels) == 1 and 0 < labels[0] < 1 << 8 for labels in members.values()):
        return (reference, prediction), [labels[0] for labels in members.values()]
    top = max([int(labels.max()) for labels in (reference, prediction) if labels.size], default=0)
    new = np.zeros(1 + max([top, *(label for labels in members.values() for label in labels)]), dtype=np.uint16)
    for k, labels in enumerate(members.values(), start=1):
        new[list(labels)] = k
    if len(members) < 1 << 8:
        new = new.astype(np.uint8)
    return (new[reference], new[prediction]), list(range(1, len(members) + 1))


def _label_box(labels: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds every label but 0; empty if there is none."""
    if not labels.size:
        return (slice(0, 0),) * 3
    plane = labels.max(axis=0)
    sides = []
    for profile in (labels.reshape(len(labels), -1).max(axis=1), plane.max(axis=1), plane.max(axis=0)):
        hit = np.flatnonzero(profile)
        sides.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0))
    return tuple(sides)


def _union_box(*boxes: tuple[slice, ...]) -> tuple[slice, ...]:
    """Smallest box around the boxes that are not empty; one voxel if all are."""
    boxes = tuple(box for box in boxes if box[0].stop) or ((slice(0, 1),) * 3,)
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))
