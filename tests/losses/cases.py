"""The losses with the options under test, and random problems to put to them."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from nnunet_calib.losses import LOSSES

from . import naive

Case = tuple[str, dict]

# One case a loss. The margin lies inside the range of the random logits, so that both sides of the hinge occur.
DEFAULTS: list[Case] = [
    ("ce", {}),
    ("focal", {}),
    ("flsd", {}),
    ("ecp", {}),
    ("ls", {}),
    ("svls", {}),
    ("mbls", {"margin": 3.0}),
    ("nacl", {}),
    ("meep", {}),
    ("cpc", {}),
    ("crac", {}),
    ("ace", {}),
    ("dca", {}),
]

NACL_PRIORS: list[Case] = [
    ("nacl", {"prior": prior, "border": border})
    for prior, border in itertools.product(("mean", "gaussian"), ("replicate", "background", "zero"))
]

# Options whose values need no number of axes.
OPTIONS: list[Case] = [
    *DEFAULTS,
    ("focal", {"gamma": 0.0}),
    ("focal", {"gamma": 0.5}),
    ("focal", {"gamma": 1.0}),
    ("focal", {"gamma": 2.0}),
    ("flsd", {"gamma": 2.0}),
    ("ecp", {"class_mean": True, "weight": 0.7}),
    ("ls", {"alpha": 0.3}),
    ("svls", {"sigma": 1.0}),
    ("svls", {"sigma": 1.0, "kernel_size": 5}),
    ("mbls", {"margin": 0.0}),
    ("mbls", {"margin": 3.0, "penalty": "l2", "weight": 0.5}),
    *NACL_PRIORS[1:],
    *[("nacl", {**options, "kernel_size": 5}) for _, options in NACL_PRIORS],
    *[("nacl", {**options, "on": "probabilities", "penalty": "l2", "weight": 0.5}) for _, options in NACL_PRIORS],
    ("nacl", {"on": "probabilities"}),
    ("nacl", {"penalty": "l2"}),
    *[("nacl", {**options, "balanced": True}) for _, options in NACL_PRIORS],
    ("nacl", {"balanced": True, "on": "probabilities", "penalty": "l2", "weight": 0.5, "kernel_size": 5}),
    ("nacl", {"prior": "gaussian", "sigma": 0.6}),
    ("nacl", {"prior": "gaussian", "sigma": 0.6, "border": "zero"}),
    ("meep", {"variant": "kl"}),
    ("meep", {"weight": 1.5}),
    ("meep", {"binary": True}),
    ("meep", {"binary": True, "variant": "kl"}),
    ("cpc", {"discrimination_weight": 1.0, "exclusion_weight": 0.0}),
    ("cpc", {"discrimination_weight": 0.0, "exclusion_weight": 2.0}),
    ("crac", {"border": "background"}),
    ("crac", {"margin": 0.0}),
    ("crac", {"margin": 2.0, "rho": 3.0, "kernel_size": 5}),
    ("crac", {"border": "background", "kernel_size": 5}),
    ("ace", {"soft": True}),
    ("ace", {"bins": 1}),
    ("ace", {"bins": 7, "weight": 3.0}),
    ("ace", {"bins": 1, "soft": True}),
    ("ace", {"bins": 7, "soft": True}),
    ("ace", {"ignore_absent_classes": False}),
    ("ace", {"ignore_absent_classes": False, "soft": True}),
    ("ace", {"include_background": False}),
    ("ace", {"include_background": False, "soft": True}),
    ("dca", {"weight": 1.0}),
]

SHAPES = {"2d": (4, 5), "3d": (3, 2, 4)}
FORMS = ("labels", "regions")


def anisotropic(axes: int) -> list[Case]:
    """A kernel of its own along each axis; 1 keeps neighbouring slices apart."""
    kernels = {2: [(1, 3), (3, 5)], 3: [(1, 3, 3), (3, 5, 1)]}[axes]
    borders = [options for _, options in NACL_PRIORS if options != {"prior": "gaussian", "border": "background"}]
    return [
        *[("svls", {"kernel_size": kernel}) for kernel in kernels],
        *[("nacl", {**options, "kernel_size": kernel}) for options in borders for kernel in kernels],
        *[("crac", {"border": border, "kernel_size": k}) for border in ("replicate", "background") for k in kernels],
    ]


def name(value: object) -> str | None:
    """Readable test names: `nacl-border=zero`."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        key, options = value
        return "-".join([key, *(f"{option}={setting}" for option, setting in options.items())]).replace(" ", "")
    return None


@dataclass
class Problem:
    """Logits `(B, C, *S)`, target as the form wants it, and the voxels that count `(B, 1, *S)` or None."""

    form: str
    logits: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor | None

    def loss(self, case: Case) -> torch.nn.Module:
        key, options = case
        return LOSSES[key](**options, multilabel=self.form == "regions")

    def value(self, case: Case) -> torch.Tensor:
        return self.loss(case)(self.logits, self.target, self.valid)

    def gradient(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits.detach().clone().requires_grad_()
        value = self.loss(case)(logits, self.target, self.valid)
        value.backward()
        assert logits.grad is not None
        return value.detach(), logits.grad

    def naive(self, case: Case) -> dict[str, float]:
        key, options = case
        logits, target = self.logits.double().numpy(), self.target.numpy()
        valid = None if self.valid is None else self.valid[:, 0].numpy()
        arrays = naive.two_class(logits, target, valid) if self.form == "regions" else (logits, target[:, 0], valid)
        return naive.NAIVE[key](*arrays, **options)

    def stacked(self) -> "Problem":
        """Regions as labels: one image of the two classes (0, z) a region."""
        arrays = naive.two_class(
            self.logits.numpy(), self.target.numpy(), None if self.valid is None else self.valid[:, 0].numpy()
        )
        logits, target, valid = map(torch.from_numpy, arrays)
        return Problem("labels", logits, target[:, None], valid[:, None])

    def map(self, function) -> "Problem":
        """The same function on logits, target and mask."""
        valid = None if self.valid is None else function(self.valid)
        return replace(self, logits=function(self.logits), target=function(self.target), valid=valid)


def problem(
    form: str,
    shape: tuple[int, ...],
    *,
    masked: bool = False,
    seed: int = 0,
    batch: int = 2,
    classes: int = 3,
    dtype: torch.dtype = torch.float64,
    scale: float = 3.0,
) -> Problem:
    """Random logits, blocky random labels (neighbours agree often, not always) and a mask that hides about a third."""
    rng = np.random.default_rng([seed, len(shape), batch, classes])
    logits = torch.from_numpy(scale * rng.standard_normal((batch, classes, *shape))).to(dtype)
    channels = classes if form == "regions" else 1
    coarse = rng.integers(0, 2 if form == "regions" else classes, (batch, channels, *(-(-size // 2) for size in shape)))
    for axis, size in enumerate(shape, start=2):
        coarse = np.take(np.repeat(coarse, 2, axis=axis), range(size), axis=axis)
    target = torch.from_numpy(coarse)
    valid = torch.from_numpy(rng.random((batch, 1, *shape)) > 0.35) if masked else None
    return Problem(form, logits, target.bool() if form == "regions" else target, valid)
