"""The searches of the surface distances in torch, for a GPU; the same numbers as in numpy.

Arrays come and go as numpy's; what is in between stays on the device.
"""

import numpy as np
import torch

_PAIRS = 1 << 24  # points compared at once: some hundred megabytes of the device


def surface_voxels(flat: np.ndarray, strides: np.ndarray, device: str) -> np.ndarray:
    """Positions in a padded, flattened label map of the labelled voxels with another value beside them."""
    labels = _on(device, flat.astype(np.int32))
    margin = int(strides.max())
    here = labels[margin : labels.numel() - margin]
    different = torch.zeros_like(here, dtype=torch.bool)
    for stride in (int(stride) for step in strides if step for stride in (step, -step)):
        different |= labels[margin + stride : labels.numel() - margin + stride] != here
    return (torch.nonzero(different & (here != 0))[:, 0] + margin).cpu().numpy()


def mixed_cells(flat: np.ndarray, corners: np.ndarray, device: str) -> np.ndarray:
    """Positions of the cells whose corners do not all hold the same value."""
    labels = _on(device, flat.astype(np.int32))
    size = labels.numel() - int(corners[-1])
    mixed = torch.zeros(size, dtype=torch.bool, device=labels.device)
    for corner in (int(corner) for corner in corners[1:]):
        mixed |= labels[corner : size + corner] != labels[:size]
    return torch.nonzero(mixed)[:, 0].cpu().numpy()


def probe(
    at: np.ndarray, there: np.ndarray, voxels: int, steps: np.ndarray, squares: np.ndarray, device: str
) -> np.ndarray:
    """Squared distances of the points with a target within the probes; infinity for the others."""
    is_target = torch.zeros(voxels, dtype=torch.bool, device=device)
    is_target[_on(device, there)] = True
    left = _on(device, at)
    squared = torch.full((at.size,), torch.inf, dtype=torch.float64, device=device)
    for step, square in zip(steps[::-1].tolist(), squares[::-1].tolist(), strict=True):
        squared[is_target[left + step]] = square  # the nearest is written last
    return squared.cpu().numpy()


def search(source: np.ndarray, target: np.ndarray, spacing: np.ndarray, device: str) -> np.ndarray:
    """Squared distances by comparing every point with every target."""
    ours, theirs = _on(device, source), _on(device, target)
    squared = torch.empty(source.shape[1], dtype=torch.float64, device=device)
    rows = max(1, _PAIRS // target.shape[1])
    for start in range(0, source.shape[1], rows):
        part = ours[:, start : start + rows]
        total = torch.zeros(part.shape[1], target.shape[1], dtype=torch.float64, device=device)
        for axis, step in enumerate(spacing.tolist()):
            total += ((part[axis, :, None] - theirs[axis]).double() * step).square_()
        squared[start : start + rows] = total.amin(dim=1)
    return squared.cpu().numpy()


def _on(device: str, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
