"""Trainers of users, combined with nnU-Net's variants and trained through its command: docs/own-trainer.md."""

import ast
import re
from pathlib import Path

import pytest
import torch

from nnunet_calib.data.plans import add_configuration

from .host import ROOT, SHAPE, Host, call, last_words, write_dataset

pytestmark = pytest.mark.slow

DATASET = "Dataset904_Own"
VARIANTS = "from nnunetv2.training.nnUNetTrainer.variants."
COMBINED = (
    "from nnunet_calib.training import FLTrainer, MbLSTrainer, MEEPTrainer\n"
    f"{VARIANTS}data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5\n"
    f"{VARIANTS}optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam3en4, nnUNetTrainerVanillaAdam1en3\n"
    f"{VARIANTS}training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_1epoch\n"
    "class MbLSDA5Trainer(MbLSTrainer, nnUNetTrainerDA5): pass\n"
    "class MEEPAdamTrainer(MEEPTrainer, nnUNetTrainerAdam3en4): pass\n"
    "class FLVanillaAdamTrainer(nnUNetTrainerVanillaAdam1en3, FLTrainer): pass\n"
    "class MbLSOneEpochTrainer(MbLSTrainer, nnUNetTrainer_1epoch): pass\n"
)
TRAINED = {
    "NACLNoMirroringTrainer": ("small", 0.01),
    "MbLSDA5Trainer": ("small", 0.01),
    "MEEPAdamTrainer": ("small", 3e-4),
    "FLVanillaAdamTrainer": ("small", 1e-3),
    "MbLSOneEpochTrainer": ("unlimited", 0.01),
    "MbLSTrainer": ("resenc", 0.01),
}
# nnU-Net's command for one training after the other: one start of the interpreter for all.
COMMAND = """
import sys
from nnunetv2.run.run_training import run_training_entry
if __name__ == "__main__":
    for configuration, trainer in (words.split(",") for words in sys.argv[2:]):
        sys.argv[1:] = [sys.argv[1], configuration, "0", "-tr", trainer, "-device", "cpu"]
        run_training_entry()
"""


@pytest.fixture(scope="module")
def host(from_wheel, tmp_path_factory) -> Host:
    host = Host(from_wheel, tmp_path_factory.mktemp("own"))
    write_dataset(host.raw / DATASET, "labels")
    number = DATASET[7:10]
    host.command("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-npfp", "1", "-np", "1")
    schedule = {"num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "calibrate_from": 0}
    host.add_small(DATASET, "small", "2d", schedule | {"num_epochs": 1})
    host.add_small(DATASET, "unlimited", "2d", schedule)
    plans = host.plans(DATASET)
    text = plans.read_text()
    plans.write_text(re.sub(r'("unlimited": \{.*?)"num_epochs": 2,\s*', r"\1", text, flags=re.DOTALL))
    axes = 2
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 16],
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3] * axes] * 3,
            "strides": [[1] * axes, [2] * axes, [2] * axes],
            "n_blocks_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    overrides = {"architecture": network, "patch_size": list(SHAPE)[-2:], "batch_size": 2}
    add_configuration(plans, "resenc", "2d", schedule | {"num_epochs": 1}, overrides)
    return host


def three_lines() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-trainer.md").read_text(), re.DOTALL)
    return block


def test_combined_trainers_train_validate_and_record_what_they_had(host):
    folder = host.root / "my_trainers"
    folder.mkdir()
    assert len(ast.parse(three_lines()).body) == 3
    (folder / "documented_trainers.py").write_text(three_lines())
    (folder / "combined_trainers.py").write_text(COMBINED)
    script = host.root / "train.py"
    script.write_text(COMMAND)
    words = [f"{configuration},{name}" for name, (configuration, _) in TRAINED.items()]
    environment = host.installed.environment | host.folders | {"nnUNet_extTrainer": str(folder)}
    done = call([str(host.installed.python), str(script), DATASET[7:10], *words], environment, timeout=3000)
    assert done.returncode == 0, last_words(done)
    for name, (configuration, rate) in TRAINED.items():
        fold = host.model(DATASET, configuration, name) / "fold_0"
        checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
        recorded = checkpoint["init_args"]["plans"]["nnunet_calib_resolved"]
        assert (recorded["trainer"], recorded["num_epochs"], recorded["initial_lr"]) == (name, 1, rate)
        assert checkpoint["logging"]["lrs"] == [rate]
        assert (fold / "validation" / "summary.json").is_file()
        log = "".join(Path(file).read_text() for file in fold.glob("training_log_*.txt"))
        assert "Objective: " in log
    mirrored = torch.load(
        host.model(DATASET, "small", "NACLNoMirroringTrainer") / "fold_0" / "checkpoint_final.pth", weights_only=False
    )["inference_allowed_mirroring_axes"]
    assert mirrored is None
