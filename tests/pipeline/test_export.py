"""A model of ours that stock nnU-Net runs: nothing of this package is needed, the predictions are the same."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

from nnunet_calib._autoload import trainers_folder
from nnunet_calib.cli.main import main
from nnunet_calib.data.dataset import read_dataset
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.model import check_same_model, identify
from nnunet_calib.pipeline.export import PROVENANCE, stock_trainer
from tests.training.toy import DATASET, PATCH, batch, build, dataset_json, prepare_folders

RESAMPLING = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")} | {
    f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
    for what in ("data", "seg", "probabilities")
}


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    monkeypatch.setenv("nnUNet_extTrainer", trainers_folder())


def trained(name: str, fold: str = "0", **options) -> Path:
    """A model folder with a checkpoint of one step."""
    trainer = build(name, {"calibrate_from": 0}, axes=3, base=RESAMPLING, **options)
    trainer.train_step(batch(trainer, "labels"))
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    model = Path(trainer.output_folder_base)
    (model / f"fold_{fold}").mkdir(exist_ok=True)
    trainer.logger.log("mean_fg_dice", np.float64(0.5), 0)
    trainer.save_checkpoint(str(model / f"fold_{fold}" / "checkpoint_final.pth"))
    (model / "plans.json").write_text(
        json.dumps(trainer.plans_manager.plans | {"foreground_intensity_properties_per_channel": {"0": {}}})
    )
    (model / "dataset.json").write_text(json.dumps(dataset_json("labels")))
    return model


def logits(model: Path) -> torch.Tensor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    image = torch.randn(1, *[PATCH + 4] * 3, generator=torch.Generator().manual_seed(0))
    return predictor.predict_logits_from_preprocessed_data(image)


def test_the_exported_model_predicts_the_same_without_our_trainers(tmp_path, monkeypatch, capsys):
    model = trained("CRaCTrainer")
    expected = logits(model)
    assert main(["export", str(model), "-o", str(tmp_path / "stock")]) == 0
    assert "a model of nnUNetTrainer, fold 0" in capsys.readouterr().out
    monkeypatch.delenv("nnUNet_extTrainer")
    with pytest.raises(RuntimeError, match="CRaCTrainer"):
        logits(model)
    assert torch.equal(logits(tmp_path / "stock"), expected)
    made_from = json.loads((tmp_path / "stock" / PROVENANCE).read_text())
    assert (made_from["trainer"], made_from["stock_trainer"]) == ("CRaCTrainer", "nnUNetTrainer")
    assert (tmp_path / "stock" / "plans.json").read_bytes() == (model / "plans.json").read_bytes()


def test_the_zip_installs_beside_a_stock_model_of_the_same_plans(tmp_path):
    model = trained("MbLSTrainer")
    assert main(["export", str(model), "-o", str(tmp_path / "model.zip")]) == 0
    names = zipfile.ZipFile(tmp_path / "model.zip").namelist()
    folder = f"{DATASET}/nnUNetTrainer__nnUNetPlans_MbLSTrainer__small"
    assert {f"{folder}/plans.json", f"{folder}/dataset.json", f"{folder}/fold_0/checkpoint_final.pth"} <= set(names)
    assert all(name.startswith(f"{folder}/") for name in names)


def test_a_calibrator_goes_with_the_model_and_is_one_of_the_exported_model(tmp_path):
    model = trained("MbLSTrainer")
    identity = identify(model, read_dataset(model / "dataset.json"))
    (model / "calibrator.json").write_text(json.dumps({"model": identity, "temperature": 1.5}))
    stock = tmp_path / "nnUNetTrainer__nnUNetPlans__small"
    assert main(["export", str(model), "-o", str(stock)]) == 0
    content = json.loads((stock / "calibrator.json").read_text())
    assert content["temperature"] == 1.5
    exported = identify(stock, read_dataset(stock / "dataset.json"))
    check_same_model(content["model"], exported, stock / "calibrator.json", stock)
    with pytest.raises(InputError, match="was fitted to another model"):
        check_same_model(identity, exported, model / "calibrator.json", stock)


def test_a_calibrator_of_another_model_is_refused(tmp_path, capsys):
    model = trained("MbLSTrainer")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": {"trainer": "NACLTrainer"}}))
    assert main(["export", str(model), "-o", str(tmp_path / "stock"), "--calibrator", str(other)]) == 1
    assert "was fitted to another model" in capsys.readouterr().err
    assert not (tmp_path / "stock").exists()


@pytest.mark.parametrize("output", ["stock", "model.zip"])
def test_what_is_there_is_not_overwritten(tmp_path, output, capsys):
    model = trained("MbLSTrainer")
    assert main(["export", str(model), "-o", str(tmp_path / output)]) == 0
    assert main(["export", str(model), "-o", str(tmp_path / output)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [(["-f", "3"], "no checkpoint_final.pth in fold 3; there are 0", 2), (["-chk", "x.pth"], "no fold with x.pth", 2)],
)
def test_folds_that_are_not_there_are_named(tmp_path, words, message, code, capsys):
    assert main(["export", str(trained("MbLSTrainer")), "-o", str(tmp_path / "stock"), *words]) == code
    assert message in capsys.readouterr().err


def test_the_stock_class_is_the_one_whose_network_it_is(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (own / "own_networks.py").write_text(
        "from nnunet_calib.training import MbLSTrainer\n"
        f"from {nnUNetTrainerBN.__module__} import nnUNetTrainerBN\n"
        "class BatchNormTrainer(MbLSTrainer, nnUNetTrainerBN): pass\n"
        "class OwnNetworkTrainer(MbLSTrainer):\n"
        "    @staticmethod\n"
        "    def build_network_architecture(plans_manager, *args, **kwargs): return None\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(own))
    assert stock_trainer("BatchNormTrainer") == "nnUNetTrainerBN"
    with pytest.raises(InputError, match="builds a network of its own"):
        stock_trainer("OwnNetworkTrainer")


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "stock")]) == 2
    assert "no plans.json in it" in capsys.readouterr().err


WITHOUT_US = """
import sys
sys.modules["nnunet_calib"] = None
from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
verb = sys.argv.pop(1)
if __name__ == "__main__":
    install_from_zip_entry_point() if verb == "install" else predict_entry_point()
"""


@pytest.mark.slow
def test_nnunets_commands_install_and_predict_byte_for_byte_without_the_package(tmp_path):
    model = trained("NACLTrainer")
    assert main(["export", str(model), "-o", str(tmp_path / "model.zip")]) == 0
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.normal(size=[PATCH + 4] * 3).astype(np.float32))
    sitk.WriteImage(image, str(tmp_path / "in" / "x_0000.nii.gz"))
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_US)
    (tmp_path / "installed").mkdir()
    ours = dict(os.environ)
    stock = {name: value for name, value in ours.items() if name != "nnUNet_extTrainer"}
    stock |= {"NNUNET_CALIB_AUTOLOAD": "0", "nnUNet_results": str(tmp_path / "installed")}

    def run(environment: dict[str, str], *words: str) -> None:
        done = subprocess.run(list(words), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    flags = ["-i", str(tmp_path / "in"), "-d", DATASET, "-c", "small", "-f", "0", "-device", "cpu"]
    flags += ["--save_probabilities", "-npp", "1", "-nps", "1"]
    command = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as p; p()"
    run(ours, sys.executable, "-c", command, *flags, "-tr", "NACLTrainer", "-o", str(tmp_path / "ours"))
    run(stock, sys.executable, str(script), "install", str(tmp_path / "model.zip"))
    more = ["-tr", "nnUNetTrainer", "-p", "nnUNetPlans_NACLTrainer", "-o", str(tmp_path / "stock")]
    run(stock, sys.executable, str(script), "predict", *flags, *more)
    for name in ("x.nii.gz", "x.npz"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
