"""A GPU that need not be there: tensors without values that say they are on one, and what a step would cost there.

PyTorch's fake tensors know shape, type and device of every result. Mixing devices raises, and so does an operation
that needs to read a value. PyTorch's autograd engine asks the driver for the device even then, so `fake_cuda` puts a
backward pass of a dozen lines in its place: the same nodes, in the same order.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.amp import common
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_calib.losses import base

CUDA = torch.device("cuda:0")


@contextlib.contextmanager
def fake_cuda(shape_env: Any = None) -> Iterator[FakeTensorMode]:
    """Mode in which tensors may be on `CUDA`.

    With a ``shape_env`` shapes may depend on values, and tensors made of numpy's arrays may go there.
    """
    # The first batch's look at the values is the only one, and on purpose.
    with (
        patch.object(base, "check_labels"),
        patch.object(base, "check_logits"),
        patch.object(torch.autograd, "grad", gradients),
        patch.object(common, "amp_definitely_not_available", lambda: False),  # so that autocast is what it is on a GPU
        FakeTensorMode(allow_non_fake_inputs=shape_env is not None, shape_env=shape_env) as mode,
    ):
        yield mode


@torch.no_grad()
def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | None = None,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` of one output and leaves, in Python."""
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    received: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    received[output.grad_fn][output.output_nr] = torch.ones_like(output) if grad_outputs is None else grad_outputs
    found: dict[int, Tensor] = {}
    for node in _in_order(output.grad_fn):
        grads = received.pop(node, {})
        if hasattr(node, "variable"):
            found[id(node.variable)] = grads[0]
            continue
        given = [grads.get(place) for place in range(len(node._input_metadata))]
        made = node.apply(*given) if hasattr(node, "apply") else node(*given)
        made = made if isinstance(made, tuple) else (made,)
        # Ours has tensors for its first arguments and passes nothing on to the others.
        for (following, place), grad in zip(node.next_functions, made, strict=False):
            if following is not None and grad is not None:
                wanted = following._input_metadata[place]
                grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)  # as the engine does after broadcasting
                known = received[following]
                known[place] = known[place] + grad if place in known else grad
    return tuple(found[id(leaf)] for leaf in leaves)


def _in_order(root: Any) -> list[Any]:
    """Nodes of a graph, each before those that it passes gradients to."""
    ordered: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            ordered.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return ordered[::-1]


class Cost(TorchDispatchMode):
    """Kernels that operations start, bytes that these read and write, and the peak of memory that they take.

    A kernel an operation, views none: what PyTorch does inside an operation is not seen. Broadcast elements are read
    once. Memory is that of the tensors made inside the mode, as their lifetimes have it, without the allocator's rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.peak = 0, 0, 0
        self._held = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if func.namespace == "aten" and not func.is_view:
            for tensor in made:
                self._hold(tensor)
            if "empty" not in func.name():
                given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
                self.kernels += 1
                self.bytes += sum(_bytes(tensor) for tensor in (*given, *made))
        return result

    def known(self, *tensors: Tensor) -> None:
        """Leave the arguments of the step out of its memory."""
        for tensor in tensors:
            self._storages[id(tensor.untyped_storage())] = weakref.ref(tensor.untyped_storage())

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages and self._storages[key]() is storage:
            return

        def release(reference: Any) -> None:
            self._held -= size
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, release)
        self._held += size
        self.peak = max(self.peak, self._held)


def _bytes(tensor: Tensor) -> int:
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    number = 1
    for side in sides:
        number *= side
    return number * tensor.element_size()
