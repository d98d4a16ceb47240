"""The whole objective on a GPU that is not there: five scales of deep supervision, in float16 under autocast."""

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, gradients
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunet_calib.training.trainers import TRAINERS

from .toy import BATCH, PATCH, build, prepare_folders, target

SCALES = [PATCH >> scale for scale in range(5)]
OBJECTIVES = [name for name in TRAINERS if name != "StockTrainer"]


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)


def scales_of(trainer, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits in float16 and nnU-Net's targets at five scales."""
    heads = trainer.label_manager.num_segmentation_heads
    shapes = [(side,) * 3 for side in SCALES]
    outputs = [torch.zeros(BATCH, heads, *shape, dtype=torch.float16) for shape in shapes]
    return outputs, [target(kind, shape) for shape in shapes]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in OBJECTIVES for kind in ("labels", "regions_ignore")),
        ("MEEPTrainer", "labels_ignore"),
        ("NACLTrainer", "labels_ignore"),
        ("NACLTrainer", "regions"),
    ],
)
def test_a_training_step_and_a_validation_step(name, kind):
    trainer = build(name, {"calibrate_from": 0}, kind=kind)
    objective = trainer.loss.loss
    # nnU-Net's own loss asks the GPU whether a voxel counts, where there is an ignore label.
    objective.share = 1.0 if kind.endswith("ignore") else 0.5
    supervised = DeepSupervisionWrapper(objective, [1 / 2**scale for scale in range(5)])
    outputs, reference = scales_of(trainer, kind)
    with fake_cuda() as mode, torch.autocast("cuda"):
        on_gpu = [mode.from_tensor(tensor).to(CUDA) for tensor in outputs]
        theirs = [mode.from_tensor(tensor).to(CUDA) for tensor in reference]
        for output in on_gpu:
            output.requires_grad_()
        objective.calibration.train()
        loss = supervised(on_gpu, theirs)
        assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())
        for output, gradient in zip(on_gpu, gradients(loss * 2.0**12, on_gpu), strict=True):
            assert (gradient.device, gradient.dtype, gradient.shape) == (CUDA, torch.float16, output.shape)
        objective.calibration.eval()
        with torch.no_grad():
            assert supervised(on_gpu, theirs).device == CUDA
        objective.calibration.update()
        assert {total.device for total in (objective.counts._sums, *objective.counts._terms.values())} == {CUDA}
