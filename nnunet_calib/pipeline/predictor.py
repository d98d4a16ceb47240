"""nnU-Net's predictor, which also keeps what each fold says where that is asked for."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor
from tqdm import tqdm

from nnunet_calib.prediction.model import TrainedModel
from nnunet_calib.prediction.predictor import ModelPredictor


class Predictor(ModelPredictor):
    """A model's predictor, which also keeps what each fold says where that is asked for.

    Args:
        model: all its folds are used.
        device: ``cpu``, ``cuda`` or ``mps``.
        keep_members: keep the logits of each fold.
        options: of ``ModelPredictor``.

    Attributes:
        members: logits of each fold for the case predicted last, where they are kept.
    """

    device: torch.device

    def __init__(self, model: TrainedModel, device: torch.device | str, *, keep_members: bool = False, **options: Any):
        super().__init__(model, device, **options)
        self._keep = keep_members
        self.members: list[Tensor] = []

    def predict(self, data: Tensor) -> Tensor:
        """Logits (C, *S) on the CPU, averaged over folds, of a preprocessed image (channels, *S).

        A case for which the device has too little memory is predicted on the CPU, which a line on stderr says.
        """
        self.members = []
        threads, device = torch.get_num_threads(), self.device
        try:
            return self.predict_logits_from_preprocessed_data(data).cpu()
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
        # Outside of the handler: its traceback would keep what is on the device.
        tqdm.write(f"nnunet-calib: out of memory on {device}; this case is predicted on the CPU", file=sys.stderr)
        empty_cache(device)
        self.members = []
        self.device = torch.device("cpu")  # nnU-Net moves the network there
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            return self.predict_logits_from_preprocessed_data(data)
        finally:
            self.device = device
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """One fold's logits."""
        logits = super().predict_sliding_window_return_logits(input_image)
        if self._keep:  # a copy: nnU-Net adds the other folds to the first one's
            self.members.append(logits.to("cpu", copy=True))
        return logits


def one_thread_each(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread; the calling thread keeps its number.

    torch's softmax differs in the last bit with the number of threads, and so would files of the same command.
    """
    torch.get_num_threads()  # the caller's own is settled: else it would take what the workers set
    return ThreadPoolExecutor(workers, name, _use_one_thread)


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread takes the number set last by any other when it is first asked, so ask before
    torch.set_num_threads(1)
