"""What the losses keep and hold in memory, and that cutting the batch into slabs changes no number."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_calib.losses import voxelwise

from .cases import DEFAULTS, FORMS, OPTIONS, Problem, anisotropic, name, problem

every_loss = pytest.mark.parametrize("case", DEFAULTS, ids=name)
every_option = pytest.mark.parametrize("case", OPTIONS, ids=name)
forms = pytest.mark.parametrize("form", FORMS)
masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


@pytest.mark.parametrize("case", [*OPTIONS, *anisotropic(3)], ids=name)
@forms
@masks
def test_slabs_change_nothing(case, form, masked, monkeypatch):
    given = problem(form, (5, 4, 3), masked=masked)
    value, gradient = given.gradient(case)
    parts = given.loss(case).parts(given.logits, given.target, given.valid)
    monkeypatch.setattr(voxelwise, "_SLAB_ON_CPU", 100)
    cut_value, cut_gradient = given.gradient(case)
    cut_parts = given.loss(case).parts(given.logits, given.target, given.valid)
    torch.testing.assert_close(cut_value, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut_parts, parts, rtol=1e-12, atol=1e-12)


@every_option
@forms
def test_parts_have_the_gradients_of_their_own(case, form):
    given = problem(form, (3, 2, 4), masked=True)
    loss = given.loss(case)
    logits = given.logits.clone().requires_grad_()
    parts = loss.parts(logits, given.target, given.valid)
    sum(weight * parts[part] for part, weight in loss._weights().items()).backward()
    torch.testing.assert_close(logits.grad, given.gradient(case)[1], rtol=1e-12, atol=1e-12)


class Kept:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@every_option
@forms
def test_nothing_but_the_arguments_and_the_gradient_is_kept(case, form):
    given = problem(form, (8, 8, 8), masked=True, classes=8, dtype=torch.float32)
    logits, saved = given.logits.requires_grad_(), []

    def pack(tensor):
        kept = Kept(tensor)
        saved.append(weakref.ref(kept))  # the graph alone keeps it alive
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        value = given.loss(case)(logits, given.target, given.valid)
    arguments = [tensor.data_ptr() for tensor in (logits, given.target, given.valid)]
    assert [reference().tensor.data_ptr() for reference in saved if reference() is not None] == arguments
    value.backward()


@every_loss
@forms
def test_a_retained_graph_gives_the_gradient_again(case, form):
    given = problem(form, (3, 2, 4), masked=True)
    _, expected = given.gradient(case)
    logits = given.logits.clone().requires_grad_()
    value = given.loss(case)(logits, given.target, given.valid)
    first, twice = (torch.autograd.grad(scale * value, logits, retain_graph=True)[0] for scale in (1, 2))
    assert torch.equal(first, expected)
    torch.testing.assert_close(twice, 2 * expected, rtol=1e-12, atol=0)
    value.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


class Sizes(TorchDispatchMode):
    """Bytes of the largest storages that operations make, by storage."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return result

    def above(self, size: int, given: Problem) -> int:
        known = {tensor.untyped_storage().data_ptr() for tensor in (given.logits, given.target)}
        return sum(storage.nbytes() > size for address, storage in self.storages.items() if address not in known)


@every_loss
@forms
def test_nothing_else_of_the_logits_size_is_made(case, form, monkeypatch):
    monkeypatch.setattr(voxelwise, "_SLAB_ON_CPU", 4096 // torch.get_num_threads())
    given = problem(form, (48, 8, 8), classes=8, dtype=torch.float32)
    given.logits.requires_grad_()
    loss, a_half = given.loss(case), given.logits.numel() * 4 // 2
    with Sizes() as sizes:
        value = loss(given.logits, given.target)
    assert sizes.above(a_half, given) == 1  # the gradient
    with Sizes() as sizes:
        value.backward()
    assert sizes.above(a_half, given) <= 1  # the same
    with torch.no_grad(), Sizes() as sizes:
        loss(given.logits, given.target)
    assert sizes.above(a_half, given) == 0
