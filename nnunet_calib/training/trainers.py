"""The trainers: one small class a loss, used as ``nnUNetv2_train DATASET CONFIGURATION FOLD -tr NAME``."""

from nnunet_calib.training.base import CalibrationTrainer


class StockTrainer(CalibrationTrainer):
    """nnU-Net's own loss; only the schedule comes from the settings, for baselines of the same length."""


class CETrainer(CalibrationTrainer):
    """Cross-entropy."""

    LOSS = "ce"


class FLTrainer(CalibrationTrainer):
    """Focal loss (Lin et al., ICCV 2017)."""

    LOSS = "focal"


class FLSDTrainer(CalibrationTrainer):
    """Focal loss with a sample-dependent gamma (Mukhoti et al., NeurIPS 2020)."""

    LOSS = "flsd"


class ECPTrainer(CalibrationTrainer):
    """Explicit confidence penalty (Pereyra et al., ICLR workshops 2017)."""

    LOSS = "ecp"


class LSTrainer(CalibrationTrainer):
    """Label smoothing (Szegedy et al., CVPR 2016)."""

    LOSS = "ls"


class SVLSTrainer(CalibrationTrainer):
    """Spatially varying label smoothing (Islam and Glocker, IPMI 2021)."""

    LOSS = "svls"


class MbLSTrainer(CalibrationTrainer):
    """Margin-based label smoothing (Liu et al., CVPR 2022; Murugesan et al., MedIA 2023)."""

    LOSS = "mbls"


class NACLTrainer(CalibrationTrainer):
    """Neighbour-aware calibration (Murugesan et al., MICCAI 2023, MedIA 2025)."""

    LOSS = "nacl"


class MEEPTrainer(CalibrationTrainer):
    """Maximum entropy on erroneous predictions (Larrazabal et al., MICCAI 2023)."""

    LOSS = "meep"
    FIXED = {"variant": "entropy"}


class MEEPKLTrainer(CalibrationTrainer):
    """MEEP by the divergence from the uniform distribution (Larrazabal et al., MICCAI 2023)."""

    LOSS = "meep"
    FIXED = {"variant": "kl"}


class CPCTrainer(CalibrationTrainer):
    """Pairwise constraints (Cheng and Vasconcelos, CVPR 2022)."""

    LOSS = "cpc"


class CRaCTrainer(CalibrationTrainer):
    """Class- and region-adaptive constraints (Murugesan et al., MICCAI 2024)."""

    LOSS = "crac"


class ACETrainer(CalibrationTrainer):
    """Average calibration error as a loss, hard bins (Barfoot et al., MICCAI 2024)."""

    LOSS = "ace"
    FIXED = {"soft": False}


class SoftACETrainer(CalibrationTrainer):
    """Average calibration error as a loss, soft bins (Barfoot et al., 2025)."""

    LOSS = "ace"
    FIXED = {"soft": True}


class DCATrainer(CalibrationTrainer):
    """Difference between confidence and accuracy (Liang et al., BMVC 2020)."""

    LOSS = "dca"


TRAINERS: dict[str, type[CalibrationTrainer]] = {
    trainer.__name__: trainer
    for trainer in (
        StockTrainer,
        CETrainer,
        FLTrainer,
        FLSDTrainer,
        ECPTrainer,
        LSTrainer,
        SVLSTrainer,
        MbLSTrainer,
        NACLTrainer,
        MEEPTrainer,
        MEEPKLTrainer,
        CPCTrainer,
        CRaCTrainer,
        ACETrainer,
        SoftACETrainer,
        DCATrainer,
    )
}
"""Every trainer by the name that ``-tr`` takes."""
