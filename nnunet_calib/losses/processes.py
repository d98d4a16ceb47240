"""What a loss pools over the processes of multi-GPU training."""

import torch
from torch import Tensor, distributed


def mean_over_processes(sums: Tensor) -> Tensor:
    """Mean of ``sums`` over all processes; ``sums`` itself without multi-GPU training.

    DistributedDataParallel averages the gradients of the processes. A ratio of sums over all voxels of all processes
    is therefore each process' own sum over the *mean* of the denominators: the average of those is the pooled ratio,
    and so is the average of their gradients. The result has no gradient, and needs none where it is a denominator or a
    sign. Nothing waits for the device. As any collective operation, it must be called by all processes.

    Args:
        sums: any shape and number type, the same on all processes.

    Returns:
        The same shape; float64 (float32 on mps) in multi-GPU training.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return sums
    pooled = sums.detach().to(torch.float32 if sums.device.type == "mps" else torch.float64, copy=True)
    distributed.all_reduce(pooled)
    return pooled / distributed.get_world_size()
