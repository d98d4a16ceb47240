"""nnU-Net's predictor of a trained model."""

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_calib.data.quiet import quiet
from nnunet_calib.prediction.model import TrainedModel


class ModelPredictor(nnUNetPredictor):
    """nnU-Net's predictor, ready to predict.

    Args:
        model: all its folds are used.
        device: ``cpu``, ``cuda`` or ``mps``.
        step_size: of the sliding window, in patches.
        mirroring: nnU-Net's test-time augmentation.
        progress: show nnU-Net's progress bars.
        verbose: show nnU-Net's lines about windows and devices.
        everything_on_device: keep results on the device while there is room.
    """

    def __init__(
        self,
        model: TrainedModel,
        device: torch.device | str = "cpu",
        *,
        step_size: float = 0.5,
        mirroring: bool = True,
        progress: bool = False,
        verbose: bool = False,
        everything_on_device: bool = True,
    ):
        with quiet():  # nnU-Net tells on the CPU that this is not CUDA
            super().__init__(
                tile_step_size=step_size,
                use_mirroring=mirroring,
                perform_everything_on_device=everything_on_device,
                device=torch.device(device),
                verbose=verbose,
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
