"""Adapters: a branch beside the frozen decoder that learns the new structure (for three volumes or more).

The last two decoder stages are copied; in the copy every convolution W gets a parallel one of a single voxel,

    y = W * x + A x,        A = 0 at the start, W frozen

and A, the scale and shift of the norms and one row of logits for the new structure are trained (``adapter_training``).
At the start the copy gives the base logits z_c exactly. The base network itself is not touched: what it predicts stays
as it is. The novel logit is s - logsumexp_c z_c, the log-odds of the structure against all base classes.

Silva-Rodriguez et al., Towards foundation models and few-shot parameter-efficient fine-tuning for volumetric organ
segmentation, MedAGI 2023 and MedIA 2025 (parallel adapters, norm affine).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import conv2d, conv3d
from torch.nn.modules.conv import _ConvNd

from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.network.features import full_precision


class ParallelAdapter(nn.Module):
    """``y = conv(x) + A x`` with A of one voxel, zero at the start.

    Args:
        conv: of stride 1 whose padding keeps the size; frozen.
    """

    def __init__(self, conv: _ConvNd):
        super().__init__()
        self.conv = conv
        self.weight = nn.Parameter(conv.weight.new_zeros(*conv.weight.shape[:2], *[1] * len(conv.kernel_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C_in, *S) to (B, C_out, *S)."""
        pointwise = conv3d if self.weight.ndim == 5 else conv2d
        return self.conv(x) + pointwise(x, self.weight)


class AdapterBranch(nn.Module):
    """A copy of a decoder's last two stages with adapters, and a row of logits for the new structure.

    Args:
        decoder: nnU-Net's ``UNetDecoder`` of a trained network, with two stages or more; copied, not changed.
        multilabel: the base classes are sigmoid regions; the novel logit then stands alone.

    Raises:
        InputError: a decoder of another build.
    """

    def __init__(self, decoder: nn.Module, multilabel: bool = False):
        super().__init__()
        stages, upsampling, rows = (
            list(getattr(decoder, name, ())) for name in ("stages", "transpconvs", "seg_layers")
        )
        if min(len(stages), len(upsampling), len(rows)) < 2:
            raise InputError("adapters need nnU-Net's decoder with two stages or more; use another head")
        self.multilabel = multilabel
        self.early, self.late = (_adapted(stage) for stage in (stages[-2], stages[-1]))
        self.up, self.base = copy.deepcopy(upsampling[-1]), copy.deepcopy(rows[-1])
        for part in (self.up, self.base):
            part.requires_grad_(False)
        self.novel = type(self.base)(self.base.in_channels, 1, 1)
        nn.init.zeros_(self.novel.weight)
        nn.init.zeros_(self.novel.bias)

    def forward(self, early: torch.Tensor, late: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits from what enters the two stages in the base network.

        Args:
            early: input of the last stage but one (B, C, *S).
            late: input of the last stage (B, C', *S'): the upsampled first half is replaced by the branch's own.

        Returns:
            Base logits z (B, K, *S') and the novel row s (B, 1, *S').
        """
        upsampled = self.up(self.early(early))
        x = self.late(torch.cat([upsampled, late[:, upsampled.shape[1] :]], dim=1))
        return self.base(x), self.novel(x)

    def logit(self, early: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """Log-odds of the new structure (B, 1, *S')."""
        base, novel = self(early, late)
        return against_base(base, novel, self.multilabel)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: adapters, norms and the novel row; all that a task file must hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what ``trained`` gave.

        Raises:
            InputError: it is of another network.
        """
        own = self.trained()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise InputError("the adapters of this task belong to a network of another build")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class BranchFeatures:
    """The log odds of a branch in the place of the features of a decoder.

    Args:
        network: the base, with the weights that the branch was trained beside.
        trained: of the branch.
        multilabel: the base classes are sigmoid regions.

    Attributes:
        size: 1.
    """

    size = 1

    def __init__(self, network: nn.Module, trained: Mapping[str, torch.Tensor], multilabel: bool = False):
        self._decoder: nn.Module = network.decoder  # type: ignore[assignment]
        self._branch = AdapterBranch(self._decoder, multilabel).eval()
        self._branch.load_trained(trained)

    @contextmanager
    def first_forward(self) -> Iterator[list[torch.Tensor]]:
        """As ``DecoderFeatures.first_forward``: what entered the last two stages the first time."""
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(seen) < 2:
                seen.append(inputs[0])

        last_two = list(self._decoder.stages)[-2:]  # type: ignore[arg-type]
        hooks = [stage.register_forward_pre_hook(keep) for stage in last_two]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def project(self, stages: Sequence[torch.Tensor], weight: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """As ``DecoderFeatures.project``, (B, R, *size) with W (R, 1)."""
        with full_precision(stages[0]):
            early, late = (stage.float() for stage in stages)
            logit = self._branch.logit(early, late)
        return logit * weight.to(logit).reshape(1, -1, *[1] * (logit.ndim - 2))

    def at(self, stages: Sequence[torch.Tensor], voxels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """As ``DecoderFeatures.at``, (N, 1)."""
        logit = self.project(stages, torch.ones(1, 1), size)[0, 0]
        return logit[tuple(voxels.unbind(1))][:, None]


def against_base(base: torch.Tensor, novel: torch.Tensor, multilabel: bool = False) -> torch.Tensor:
    """``s - logsumexp_c z_c`` over the class axis, (B, 1, *S); of regions s itself."""
    return novel if multilabel else novel - torch.logsumexp(base, dim=1, keepdim=True)


def _adapted(stage: nn.Module) -> nn.Module:
    """A copy of which only parallel adapters and the norms' scale and shift are trained."""
    stage = copy.deepcopy(stage)
    stage.requires_grad_(False)
    wrapped: dict[nn.Module, ParallelAdapter] = {}
    # nnU-Net's blocks hold every convolution twice, by its name and in a sequence: both must become the same adapter
    for parent in list(stage.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _ConvNd):
                setattr(parent, name, wrapped.setdefault(child, ParallelAdapter(child)))
    for module in stage.modules():
        if (
            isinstance(module, nn.modules.instancenorm._InstanceNorm | nn.modules.batchnorm._BatchNorm)
            and module.affine
        ):
            module.requires_grad_(True)
    return stage
