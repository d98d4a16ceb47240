"""Folders of trained models: what is read of them, and what is refused."""

import json
import os

import pytest
import torch

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.network.base_model import BaseModel

from ..hosts import write_model


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_folds_are_found_named_and_chosen(tmp_path):
    folder = write_model(tmp_path, folds=("0", "1", "all"))
    assert BaseModel(folder).folds == ("0", "1")
    assert BaseModel(folder, [1]).folds == ("1",)
    assert BaseModel(folder, ["all"]).folds == ("all",)
    assert BaseModel(write_model(tmp_path / "other", folds=("all",))).folds == ("all",)
    with pytest.raises(UsageError, match=r"no checkpoint_final\.pth in fold 3; there are 0, 1, all"):
        BaseModel(folder, [3])
    with pytest.raises(UsageError, match=r"no fold with checkpoint_best\.pth"):
        BaseModel(folder, checkpoint="checkpoint_best.pth")


def test_a_fingerprint_tells_models_apart(tmp_path):
    first, second = (write_model(tmp_path / name, folds=("0", "1")) for name in "ab")
    assert BaseModel(first).fingerprint() == BaseModel(second).fingerprint()
    assert BaseModel(first, [0]).fingerprint() != BaseModel(first, [1]).fingerprint()
    found = BaseModel(first).fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["classes"] == ["0", "1", "2"]
    assert found["configuration"] == "base"
    plans = json.loads((second / "plans.json").read_text())
    plans["configurations"]["base"]["spacing"] = [2.0] * 3
    (second / "plans.json").write_text(json.dumps(plans))
    assert BaseModel(second).fingerprint()["plans"] != found["plans"]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is not the folder of a trained model: no plans\.json"):
        BaseModel(tmp_path)


def test_a_checkpoint_that_would_run_code_is_not_run(tmp_path):
    folder = write_model(tmp_path)
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"logging": Malicious(tmp_path / "ran")}, file)
    with pytest.raises(InputError, match="more than weights and numbers, and is not loaded"):
        BaseModel(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    folder = write_model(tmp_path, folds=("0", "1"))
    file = folder / "fold_1" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["network_weights"].pop("decoder.seg_layers.0.bias")
    torch.save(content, file)
    with pytest.raises(InputError, match=r"fold_1.*does not fit the network of nnUNetTrainer"):
        BaseModel(folder)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    folder = write_model(tmp_path)
    torch.save({"network_weights": {}}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError, match="is not a checkpoint of a training with nnU-Net v2"):
        BaseModel(folder)
