"""What every loss promises, whatever its formula: masks, extremes, symmetry, types, memory, no synchronisation."""

import pickle
import warnings
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_calib.losses import LOSSES, base

from .cases import DEFAULTS, FORMS, NACL_PRIORS, OPTIONS, SHAPES, Problem, anisotropic, name, problem

VARIANTS = [
    *DEFAULTS,
    *NACL_PRIORS[1:],
    ("meep", {"variant": "kl"}),
    ("meep", {"binary": True}),
    ("crac", {"border": "background"}),
    ("ace", {"soft": True}),
    ("ace", {"include_background": False, "ignore_absent_classes": False}),
]

every_loss = pytest.mark.parametrize("case", DEFAULTS, ids=name)
every_variant = pytest.mark.parametrize("case", VARIANTS, ids=name)
every_option = pytest.mark.parametrize("case", OPTIONS, ids=name)
forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def assert_close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


# -------------------------------------------------------------------------------------------------------- the formula


def assert_agrees_with_naive(case, given: Problem):
    expected = given.naive(case)
    assert given.value(case).item() == pytest.approx(expected["loss"], rel=1e-6)
    parts = given.loss(case).parts(given.logits, given.target, given.valid)
    assert parts.keys() | {"loss"} == expected.keys()
    assert {part: value.item() for part, value in parts.items()} == pytest.approx(
        {part: expected[part] for part in parts}, rel=1e-6
    )


def test_every_loss_of_the_registry_is_tested_here():
    assert {key for key, _ in DEFAULTS} == LOSSES.keys()


@every_option
@masks
@forms
@shapes
def test_agrees_with_the_naive_reference(case, shape, form, masked):
    assert_agrees_with_naive(case, problem(form, shape, masked=masked))


@pytest.mark.parametrize(("case", "shape"), [(c, s) for s in SHAPES.values() for c in anisotropic(len(s))], ids=name)
@masks
@forms
def test_agrees_with_the_naive_reference_with_a_kernel_per_axis(case, shape, form, masked):
    assert_agrees_with_naive(case, problem(form, shape, masked=masked, seed=1))


@pytest.mark.parametrize("shape", [(1, 4), (1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [("svls", {}), ("svls", {"kernel_size": 5}), *NACL_PRIORS, ("nacl", {"kernel_size": 5}), ("crac", {})],
    ids=name,
)
@masks
def test_agrees_with_the_naive_reference_where_the_window_is_larger_than_the_image(case, shape, masked):
    given = problem("labels", shape, masked=masked, seed=2)
    if given.valid is not None:
        given.valid[0] = True
    assert_agrees_with_naive(case, given)


@every_option
@masks
@shapes
def test_regions_are_the_two_class_problems_stacked(case, shape, masked):
    given = problem("regions", shape, masked=masked, seed=3)
    value, gradient = given.gradient(case)
    stacked_value, stacked_gradient = given.stacked().gradient(case)
    assert_close(value, stacked_value)
    assert_close(gradient, stacked_gradient[:, 1].reshape(gradient.shape))


@every_variant
@forms
@shapes
def test_gradient_is_that_of_the_value(case, shape, form):
    given = problem(form, shape, masked=True, seed=4, classes=3, scale=2.0)
    loss = given.loss(case)
    logits = given.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, given.target, given.valid), (logits,))


# ----------------------------------------------------------------------------------------------------------- the mask


@every_variant
@forms
@shapes
def test_masked_voxels_change_nothing(case, shape, form):
    clean = problem(form, shape, masked=True, seed=5)
    hidden = ~clean.valid
    junk = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -7.0], dtype=clean.logits.dtype)
    everywhere = junk[torch.arange(clean.logits.numel()) % len(junk)].reshape(clean.logits.shape)
    logits = torch.where(hidden, everywhere, clean.logits)
    if form == "regions":
        target = clean.target ^ hidden
    else:
        labels = torch.tensor([255, -1, 0, 1, 2, 3])[torch.arange(hidden.numel()) % 6].reshape(hidden.shape)
        target = torch.where(hidden, labels, clean.target)

    value, gradient = clean.gradient(case)
    junk_value, junk_gradient = Problem(form, logits, target, clean.valid).gradient(case)

    assert_close(junk_value, value)
    assert_close(junk_gradient, gradient)
    assert (gradient[hidden.expand_as(gradient)] == 0).all()
    assert (gradient[clean.valid.expand_as(gradient)] != 0).any()


@every_variant
@forms
def test_a_masked_image_leaves_the_batch(case, form):
    given = problem(form, SHAPES["2d"], masked=True, seed=6)
    given.valid[1] = False
    assert_close(given.value(case), given.map(lambda tensor: tensor[:1]).value(case))


@every_variant
@forms
@shapes
def test_a_full_mask_is_no_mask(case, shape, form):
    given = problem(form, shape)
    full = Problem(form, given.logits, given.target, torch.ones_like(given.target[:, :1], dtype=torch.bool))
    assert_close(given.value(case), full.value(case))


@every_variant
@forms
@shapes
@pytest.mark.parametrize("fill", [1.0, float("nan")])
def test_nothing_to_learn_from_gives_zero_and_zero_gradients(case, shape, form, fill):
    given = problem(form, shape, masked=True)
    given.valid[:] = False
    logits = torch.full_like(given.logits, fill).requires_grad_()
    value = given.loss(case)(logits, given.target, given.valid)
    assert value.requires_grad
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("case", [("meep", {}), ("meep", {"variant": "kl"}), ("meep", {"binary": True})], ids=name)
@forms
def test_nothing_misclassified_leaves_the_base_term(case, form):
    given = problem(form, SHAPES["2d"])
    if form == "regions":
        given.logits = torch.where(given.target, 4.0, -4.0).double()
    else:
        given.logits = torch.zeros_like(given.logits).scatter_(1, given.target, 4.0)
    value, gradient = given.gradient(case)
    key, options = case
    assert_close(value, given.value((key, {**options, "weight": 0.0})))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_with_two_classes_there_is_nothing_to_exclude(masked):
    given = problem("labels", SHAPES["2d"], classes=2, masked=masked)
    parts = given.loss(("cpc", {})).parts(given.logits, given.target, given.valid)
    assert parts["exclusion"].item() == 0
    assert_agrees_with_naive(("cpc", {}), given)
    # With two classes the pair of the label and the other class is all there is.
    assert_close(parts["discrimination"], parts["cross_entropy"])


def test_many_classes_exclude_each_other_without_a_tensor_of_pairs():
    classes = 40
    given = problem("labels", (4, 4, 4), classes=classes, batch=1, dtype=torch.float32)
    largest = max(tensor.numel() for tensor in saved_for_backward(given, ("cpc", {})))
    assert largest <= given.logits.numel()
    assert given.value(("cpc", {})).item() == pytest.approx(given.naive(("cpc", {}))["loss"], rel=1e-5)


def test_a_class_absent_from_the_image_adds_nothing_but_counts_in_the_mean():
    given = problem("labels", SHAPES["2d"], classes=3)
    given.target = given.target.clamp(max=1)
    all_classes, present = (
        given.loss(("ace", {"ignore_absent_classes": ignored})).parts(given.logits, given.target)["calibration_error"]
        for ignored in (False, True)
    )
    without = Problem("labels", given.logits, given.target, None).naive(("ace", {}))["calibration_error"]
    assert present.item() == pytest.approx(without, rel=1e-6)
    assert present < all_classes


@pytest.mark.parametrize("soft", [False, True])
@forms
def test_logits_that_are_not_numbers_make_no_number_and_no_error(form, soft):
    """In mixed precision that is a step which the scaler skips."""
    given = problem(form, SHAPES["2d"])
    given.logits[0, 0, 0, 0] = float("nan")
    value, gradient = given.gradient(("ace", {"soft": soft}))
    assert value.isnan()
    assert gradient.isnan().any()


def test_confidence_that_equals_the_accuracy_costs_nothing():
    """Four voxels at p = (3/4, 1/4), three of them right."""
    logits = torch.tensor([3.0, 1.0]).log().reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    given = Problem("labels", logits, torch.tensor([[[[0, 0], [0, 1]]]]), None)
    parts = given.loss(("dca", {})).parts(given.logits, given.target)
    assert parts["difference"].item() == pytest.approx(0, abs=1e-7)


# ----------------------------------------------------------------------------------------------- numbers and symmetry


@pytest.mark.parametrize(
    "case",
    [
        *VARIANTS,
        *[("focal", {"gamma": gamma}) for gamma in (0.0, 0.5, 1.0)],
        ("mbls", {"penalty": "l2"}),
        ("nacl", {"penalty": "l2"}),
        ("nacl", {"on": "probabilities"}),
    ],
    ids=name,
)
@forms
@shapes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_extreme_logits_in_half_precision_under_autocast(case, shape, form, dtype):
    given = problem(form, shape)
    given.logits = (1e4 * given.logits.sign()).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        value, gradient = given.gradient(case)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    given.logits = given.logits.float()
    assert_close(value, given.value(case), rtol=1e-6)


@every_variant
@forms
def test_half_precision_computes_in_float32(case, form):
    given = problem(form, SHAPES["3d"], dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = given.value(case)
    given.logits = given.logits.double()
    assert_close(value.double(), given.value(case), rtol=1e-5)


@pytest.mark.parametrize("case", [*NACL_PRIORS, ("svls", {}), ("svls", {"kernel_size": 5, "sigma": 1.0})], ids=name)
@shapes
def test_few_valid_neighbours_cost_no_precision(case, shape):
    given = problem("labels", tuple(3 * size for size in shape), seed=11)
    given.valid = torch.rand(given.target.shape, generator=torch.Generator().manual_seed(0)) > 0.9
    value, gradient = given.gradient(case)
    given.logits = given.logits.float()
    value_32, gradient_32 = given.gradient(case)
    assert_close(value_32.double(), value, rtol=1e-5)
    assert (gradient_32 - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("sigma", [0.3, 0.5, 4.0])
@shapes
def test_half_of_a_soft_target_is_the_neighbours_whatever_sigma(sigma, shape):
    given = problem("labels", shape, dtype=torch.float32)
    case = ("svls", {"sigma": sigma})
    assert given.value(case).item() == pytest.approx(given.naive(case)["loss"], rel=1e-5)


@every_variant
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_result_is_a_scalar_of_the_logits_precision(case, form, dtype):
    value = problem(form, SHAPES["2d"], dtype=dtype, masked=True).value(case)
    assert value.shape == ()
    assert value.dtype == dtype


@every_variant
@forms
@shapes
def test_permuting_the_batch_changes_nothing(case, shape, form):
    given = problem(form, shape, masked=True, batch=3, seed=7)
    order = torch.tensor([2, 0, 1])
    value, gradient = given.gradient(case)
    permuted_value, permuted_gradient = given.map(lambda tensor: tensor[order]).gradient(case)
    assert_close(permuted_value, value)
    assert_close(permuted_gradient, gradient[order])


@every_variant
@forms
@shapes
def test_flipping_axes_changes_nothing(case, shape, form):
    given = problem(form, shape, masked=True, seed=8)
    value, gradient = given.gradient(case)
    for axes in ([2], [3], list(range(2, 2 + len(shape)))):
        flipped_value, flipped_gradient = given.map(lambda tensor, axes=axes: tensor.flip(axes)).gradient(case)
        assert_close(flipped_value, value)
        assert_close(flipped_gradient, gradient.flip(axes))


@every_variant
@forms
@shapes
def test_swapping_axes_of_an_isotropic_kernel_changes_nothing(case, shape, form):
    given = problem(form, shape, masked=True, seed=9)
    assert_close(given.map(lambda tensor: tensor.transpose(2, 3).contiguous()).value(case), given.value(case))


@every_variant
@forms
@shapes
def test_memory_layout_changes_nothing_and_inputs_are_left_alone(case, shape, form):
    given = problem(form, shape, masked=True, seed=10)
    layout = torch.channels_last if len(shape) == 2 else torch.channels_last_3d
    strided = given.map(lambda tensor: tensor.clone().contiguous(memory_format=layout))
    value, gradient = given.gradient(case)
    strided_value, strided_gradient = strided.gradient(case)
    assert_close(strided_value, value)
    assert_close(strided_gradient, gradient)
    for before, after in ((given.logits, strided.logits), (given.target, strided.target), (given.valid, strided.valid)):
        assert torch.equal(before, after)


# --------------------------------------------------------------------------------------------------- types and errors


@every_variant
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8], ids=str)
def test_labels_of_any_integer_type(case, dtype):
    given = problem("labels", SHAPES["2d"], masked=True)
    expected, expected_gradient = given.gradient(case)
    given.target = given.target.to(dtype)
    value, gradient = given.gradient(case)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)


WRONG_INPUTS = {
    "logits without spatial axes": ("labels", (2, 3), torch.float32, (2, 1), torch.int64, None, None),
    "logits of one axis": ("labels", (2, 3, 4), torch.float32, (2, 1, 4), torch.int64, None, None),
    "logits of four axes": ("labels", (2, 3, 2, 2, 2, 2), torch.float32, (2, 1, 2, 2, 2, 2), torch.int64, None, None),
    "integer logits": ("labels", (2, 3, 4, 5), torch.int64, (2, 1, 4, 5), torch.int64, None, None),
    "target without the channel": ("labels", (2, 3, 4, 5), torch.float32, (2, 4, 5), torch.int64, None, None),
    "target of another size": ("labels", (2, 3, 4, 5), torch.float32, (2, 1, 4, 4), torch.int64, None, None),
    "target of another batch": ("labels", (2, 3, 4, 5), torch.float32, (1, 1, 4, 5), torch.int64, None, None),
    "labels one-hot": ("labels", (2, 3, 4, 5), torch.float32, (2, 3, 4, 5), torch.int64, None, None),
    "labels as float": ("labels", (2, 3, 4, 5), torch.float32, (2, 1, 4, 5), torch.float32, None, None),
    "labels as bool": ("labels", (2, 3, 4, 5), torch.float32, (2, 1, 4, 5), torch.bool, None, None),
    "regions as labels": ("regions", (2, 3, 4, 5), torch.float32, (2, 1, 4, 5), torch.bool, None, None),
    "regions as float": ("regions", (2, 3, 4, 5), torch.float32, (2, 3, 4, 5), torch.float32, None, None),
    "mask as float": ("labels", (2, 3, 4, 5), torch.float32, (2, 1, 4, 5), torch.int64, (2, 1, 4, 5), torch.float32),
    "mask a class": ("labels", (2, 3, 4, 5), torch.float32, (2, 1, 4, 5), torch.int64, (2, 3, 4, 5), torch.bool),
    "mask without the channel": (
        "labels",
        (2, 3, 4, 5),
        torch.float32,
        (2, 1, 4, 5),
        torch.int64,
        (2, 4, 5),
        torch.bool,
    ),
    "mask of another size": (
        "labels",
        (2, 3, 4, 5),
        torch.float32,
        (2, 1, 4, 5),
        torch.int64,
        (2, 1, 4, 4),
        torch.bool,
    ),
}


@every_loss
@pytest.mark.parametrize("wrong", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_wrong_shapes_and_types_are_refused(case, wrong):
    form, shape, dtype, target_shape, target_dtype, valid_shape, valid_dtype = wrong
    valid = None if valid_shape is None else torch.ones(valid_shape, dtype=valid_dtype)
    given = Problem(form, torch.zeros(shape, dtype=dtype), torch.zeros(target_shape, dtype=target_dtype), valid)
    with pytest.raises(ValueError, match=r"logits|target|valid"):
        given.value(case)


@pytest.mark.parametrize(
    ("key", "option", "value", "allowed"),
    [
        ("mbls", "penalty", "l3", ("l1", "l2")),
        ("nacl", "penalty", "huber", ("l1", "l2")),
        ("nacl", "on", "softmax", ("logits", "probabilities")),
        ("nacl", "prior", "median", ("mean", "gaussian")),
        ("nacl", "border", "reflect", ("replicate", "background", "zero")),
        ("meep", "variant", "dice", ("entropy", "kl")),
        ("crac", "border", "zero", ("replicate", "background")),
    ],
)
def test_an_unknown_choice_is_refused_with_the_allowed_ones(key, option, value, allowed):
    with pytest.raises(ValueError, match=option) as refusal:
        LOSSES[key](**{option: value})
    assert all(choice in str(refusal.value) for choice in (*allowed, value))


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("focal", {"gamma": -1.0}),
        ("flsd", {"gamma": -1.0}),
        ("ls", {"alpha": -0.1}),
        ("ls", {"alpha": 1.1}),
        ("svls", {"sigma": 0.0}),
        ("svls", {"sigma": 0.2}),
        ("svls", {"kernel_size": 2}),
        ("svls", {"kernel_size": (3, 4)}),
        ("mbls", {"margin": -1.0}),
        ("nacl", {"kernel_size": 0}),
        ("nacl", {"kernel_size": -3}),
        ("nacl", {"kernel_size": 4}),
        ("nacl", {"sigma": -1.0}),
        ("mbls", {"margin": float("nan")}),
        ("nacl", {"weight": float("inf")}),
        ("nacl", {"weight": "0.1"}),
        ("nacl", {"kernel_size": 3.0}),
        ("svls", {"kernel_size": None}),
        ("cpc", {"discrimination_weight": -1.0}),
        ("cpc", {"exclusion_weight": float("nan")}),
        ("crac", {"margin": -1.0}),
        ("crac", {"kernel_size": 2}),
        ("crac", {"rho": 0.0}),
        ("crac", {"rho_growth": 0.9}),
        ("crac", {"rho_every": 0}),
        ("crac", {"rho_max": 0.01}),
        ("ace", {"weight": -1.0}),
        ("ace", {"bins": 0}),
        ("ace", {"bins": 20.0}),
        ("ace", {"soft": 1}),
        ("dca", {"weight": -1.0}),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused_by_name(key, options):
    (option,) = options
    with pytest.raises(ValueError, match=option):
        LOSSES[key](**options)


@pytest.mark.parametrize("key", ["svls", "nacl", "crac"])
def test_a_kernel_for_other_axes_is_refused(key):
    given = problem("labels", SHAPES["2d"])
    with pytest.raises(ValueError, match="kernel_size"):
        given.value((key, {"kernel_size": (1, 3, 3)}))


# ------------------------------------------------------------------------------------------------------ what it costs


@every_variant
@forms
def test_evaluation_without_gradients_and_copies_of_the_module_give_the_same(case, form):
    given = problem(form, SHAPES["3d"], masked=True)
    expected, _ = given.gradient(case)
    copied = pickle.loads(pickle.dumps(given.loss(case)))  # as spawned processes get it
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(copied(given.logits, given.target, given.valid), expected)


def saved_for_backward(given: Problem, case) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    logits = given.logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        given.loss(case)(logits, given.target, given.valid)
    return saved


@every_variant
@forms
@masks
def test_little_is_kept_for_backward(case, form, masked):
    given = problem(form, (8, 16, 16), masked=masked, batch=1, classes=16, dtype=torch.float32)
    saved = saved_for_backward(given, case)
    # As two-class problems regions have twice the logits, and labels and one-class terms of their own.
    limit = {"labels": 3, "regions": 12}[form]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    assert sum(storages.values()) <= limit * given.logits.numel() * 4


@every_variant
def test_no_onehot_is_kept_for_backward(case):
    given = problem("labels", (8, 8, 8), batch=1, classes=16, dtype=torch.float32)
    for tensor in saved_for_backward(given, case):
        if tensor.numel() == given.logits.numel():
            values = tensor.detach().double().reshape(given.logits.shape)
            assert not torch.equal(values, torch.zeros_like(values).scatter_(1, given.target, 1.0))


class Recorder(TorchDispatchMode):
    """The names of the operations, and of those that read a tensor's values back or pick voxels by a mask."""

    READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"})

    def __init__(self):
        super().__init__()
        self.operations: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func.name().removeprefix("aten::").split(".")[0]
        self.operations.append(operation)
        indices = args[1] if operation.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 else ()
        picks = isinstance(indices, (list, tuple)) and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
        )
        if operation in self.READS or picks:
            self.reads.append(operation)
        return func(*args, **(kwargs or {}))


def recorded(given: Problem, case) -> Recorder:
    logits = given.logits.clone().requires_grad_()
    loss = given.loss(case)
    # On a GPU the values of the first batch only are looked at.
    with patch.object(base, "check_labels"), patch.object(base, "check_logits"), Recorder() as recorder:
        loss(logits, given.target, given.valid).backward()
    return recorder


@every_option
@forms
@shapes
@masks
def test_nothing_waits_for_the_device_and_nothing_is_unfolded(case, shape, form, masked):
    recorder = recorded(problem(form, shape, masked=masked, dtype=torch.float32), case)
    assert recorder.reads == []
    assert not {"im2col", "unfold"} & set(recorder.operations)


@every_variant
@forms
def test_the_number_of_operations_does_not_grow_with_the_image(case, form):
    small = recorded(problem(form, (4, 5, 3), masked=True, dtype=torch.float32), case)
    large = recorded(problem(form, (8, 7, 9), masked=True, dtype=torch.float32), case)
    assert len(small.operations) == len(large.operations)


@every_variant
@forms
def test_values_are_never_needed_to_run(case, form):
    with (
        patch.object(base, "check_labels"),
        patch.object(base, "check_logits"),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
    ):  # tensors without values: reading one raises
        given = problem(form, SHAPES["3d"], masked=True).map(fake.from_tensor)
        value, gradient = given.gradient(case)
    assert value.shape == ()
    assert gradient.shape == given.logits.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_variant
@forms
def test_no_synchronisation_on_a_gpu(case, form):
    given = problem(form, (8, 8, 8), masked=True, dtype=torch.float32)
    expected, expected_gradient = given.gradient(case)
    on_gpu = given.map(lambda tensor: tensor.cuda())
    loss, logits = on_gpu.loss(case), on_gpu.logits.requires_grad_()
    loss(logits, on_gpu.target, on_gpu.valid).backward()  # the first call looks at values and may load kernels
    logits.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(logits, on_gpu.target, on_gpu.valid)
        value.backward()
        gradient = logits.grad
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(value.cpu(), expected, rtol=1e-5)
    assert_close(gradient.cpu(), expected_gradient, rtol=1e-5)
