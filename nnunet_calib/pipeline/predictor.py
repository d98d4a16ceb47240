"""nnU-Net's predictor, which also keeps what each fold says where that is asked for."""

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_calib.prediction.model import TrainedModel


class Predictor(nnUNetPredictor):
    """nnU-Net's predictor of a trained model.

    Args:
        model: all its folds are used.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window, in patches.
        mirroring: nnU-Net's test-time augmentation.
        progress: show nnU-Net's progress bars.
        everything_on_device: keep results on the device while there is room.
        keep_members: keep the logits of each fold.

    Attributes:
        members: logits of each fold for the case predicted last, where they are kept.
    """

    def __init__(
        self,
        model: TrainedModel,
        device: torch.device,
        *,
        step_size: float = 0.5,
        mirroring: bool = True,
        progress: bool = False,
        everything_on_device: bool = True,
        keep_members: bool = False,
    ):
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net tells on the CPU that this is not CUDA
            super().__init__(
                tile_step_size=step_size,
                use_mirroring=mirroring,
                perform_everything_on_device=everything_on_device,
                device=device,
                allow_tqdm=progress,
            )
        self.manual_initialization(
            model.network,
            model.plans_manager,
            model.configuration_manager,
            model.weights,
            model.dataset.content,
            model.trainer_name,
            model.mirroring_axes,
        )
        self._keep = keep_members
        self.members: list[Tensor] = []

    def predict(self, data: Tensor) -> Tensor:
        """Logits (C, *S) on the CPU, averaged over folds, of a preprocessed image (channels, *S)."""
        self.members = []
        return self.predict_logits_from_preprocessed_data(data).cpu()

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """One fold's logits."""
        logits = super().predict_sliding_window_return_logits(input_image)
        if self._keep:  # a copy: nnU-Net adds the other folds to the first one's
            self.members.append(logits.to("cpu", copy=True))
        return logits


def one_thread_each(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread.

    A new thread else takes the number that is set at that moment, which nnU-Net changes while it predicts; torch's
    softmax differs in the last bit with it, and so would files of the same command.
    """
    return ThreadPoolExecutor(workers, name, torch.set_num_threads, (1,))
