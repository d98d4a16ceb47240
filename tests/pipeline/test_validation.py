"""The validation of a trained model, and the seam in nnU-Net's own at the end of a training."""

import inspect
import json
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_calib.cli.main import main
from nnunet_calib.evaluation import evaluate_folder
from nnunet_calib.pipeline import validation
from nnunet_calib.prediction.model import TrainedModel

from ..fewshot.hosts import landmarks, phantom, write_image, write_model
from .test_predict import SPACING, same

CASES = ("case_0", "case_1")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A trained model, its data preprocessed as nnU-Net does."""
    folder = write_model(tmp_path / "results", spacing=0.8)
    model = TrainedModel(folder)
    root = tmp_path / "preprocessed"
    monkeypatch.setenv("nnUNet_preprocessed", str(root))
    data = root / model.plans_manager.dataset_name
    (data / "toy").mkdir(parents=True)
    (data / "splits_final.json").write_text(json.dumps([{"train": [], "val": list(CASES)}]))
    configuration = model.configuration_manager
    for number, case in enumerate(CASES):
        write_image(tmp_path / "raw" / f"{case}_0000.nii.gz", phantom(number, (15, 30, 26))[0], spacing=SPACING)
        label = data / "gt_segmentations" / f"{case}.nii.gz"
        write_image(label, landmarks(number, (15, 30, 26)), spacing=SPACING)
        image, seg, properties = configuration.preprocessor_class(verbose=False).run_case(
            [str(tmp_path / "raw" / f"{case}_0000.nii.gz")],
            str(label),
            model.plans_manager,
            configuration,
            model.dataset.content,
        )
        nnUNetDatasetBlosc2.save_case(image, seg, properties, str(data / "toy" / case))
    return folder, data / "gt_segmentations"


def test_validate_scores_as_evaluate_and_calibrate_fit_goes_on(trained, tmp_path, capsys):
    folder, reference = trained
    assert main(["validate", str(folder), "-device", "cpu"]) == 0
    assert "foreground" in capsys.readouterr().out
    made = folder / "fold_0" / "validation"
    expected = evaluate_folder(reference, made, tmp_path / "evaluated", processes=1)
    found = json.loads((made / "summary.json").read_text())
    for name in ("foreground_mean", "mean", "calibration_mean", "calibration_pooled"):
        same(found[name], expected[name])
    words = ["calibrate", "fit", str(folder), "-o", str(tmp_path / "calibrator"), "--method", "temperature"]
    assert main(words) == 0
    words = ["-i", str(tmp_path / "raw"), "-o", str(tmp_path / "predicted"), "-m", str(folder), "-device", "cpu"]
    words += ["--calibrator", str(tmp_path / "calibrator"), "--reference", str(reference)]
    assert main(["predict", *words]) == 0
    summary = json.loads((tmp_path / "predicted" / "summary.json").read_text())
    assert summary["protocol"]["calibrator"]["method"] == "temperature"
    assert summary["calibration_mean"]["volume"]["NLL"] < found["calibration_mean"]["volume"]["NLL"]
    same(summary["foreground_mean"], found["foreground_mean"])


def test_the_seam_of_nnunets_validation_is_there():
    """Fails with an nnU-Net that hands its logits on in another way; ``scored_validation`` is to be adapted then."""
    module = sys.modules[nnUNetTrainer.__module__]
    assert module.export_prediction_from_logits is export_prediction_from_logits
    source = inspect.getsource(nnUNetTrainer.perform_actual_validation)
    assert "export_prediction_from_logits, (" in source
    with validation.scored_validation():
        assert module.export_prediction_from_logits is validation.export_and_score
    assert module.export_prediction_from_logits is export_prediction_from_logits
    ours, theirs = (
        list(inspect.signature(function).parameters)
        for function in (validation.export_and_score, export_prediction_from_logits)
    )
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("probabilities", [False, True])
def test_what_the_trainers_pool_is_handed_is_written_and_scored(trained, tmp_path, probabilities):
    folder, reference = trained
    model = TrainedModel(folder)
    managers = (model.configuration_manager, model.plans_manager, model.dataset.content)
    data = reference.parent / "toy"
    made, stock = folder / "fold_0" / "validation", tmp_path / "stock"
    made.mkdir()
    stock.mkdir()
    for case in CASES:
        image, _, _, properties = nnUNetDatasetBlosc2(str(data), list(CASES)).load_case(case)
        rng = np.random.default_rng(0)
        logits = torch.from_numpy((rng.normal(size=(3, *image.shape[1:])) * 3).astype(np.float16))
        validation.export_and_score(logits, properties, *managers, str(made / case), probabilities)
        export_prediction_from_logits(logits, properties, *managers, str(stock / case), True)
        assert (made / f"{case}.nii.gz").read_bytes() == (stock / f"{case}.nii.gz").read_bytes()
        assert (made / f"{case}.npz").exists() == probabilities
    shutil.copy(folder / "dataset.json", stock)
    said: list[str] = []
    found = validation.summarise_validation(folder / "fold_0", CASES, model.plans_manager, said.append)
    expected = evaluate_folder(reference, stock, tmp_path / "evaluated", processes=1)
    for name in ("foreground_mean", "mean", "calibration_mean", "calibration_pooled"):
        same(found[name], expected[name])
    assert not said
    assert validation.validation_means(found)["volume/ECE"] == pytest.approx(
        expected["calibration_mean"]["volume"]["ECE"]
    )


def test_a_case_that_cannot_be_scored_is_exported_by_nnunet_and_named(trained, tmp_path, capsys):
    """A training of days must not fail at its end for a label map that ``evaluate`` would refuse."""
    folder, reference = trained
    model = TrainedModel(folder)
    managers = (model.configuration_manager, model.plans_manager, model.dataset.content)
    made, stock = folder / "fold_0" / "validation", tmp_path / "stock"
    made.mkdir()
    stock.mkdir()
    bad = CASES[0]
    path = reference / f"{bad}.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetSpacing((9.0, 9.0, 9.0))
    sitk.WriteImage(image, str(path))
    for case in CASES:
        image, _, _, properties = nnUNetDatasetBlosc2(str(reference.parent / "toy"), list(CASES)).load_case(case)
        logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, *image.shape[1:])).astype(np.float16))
        validation.export_and_score(logits, properties, *managers, str(made / case))
        export_prediction_from_logits(logits, properties, *managers, str(stock / case))
        assert (made / f"{case}.nii.gz").read_bytes() == (stock / f"{case}.nii.gz").read_bytes()
    assert f"case {bad} is exported by nnU-Net and not scored" in capsys.readouterr().err
    said: list[str] = []
    found = validation.summarise_validation(folder / "fold_0", CASES, model.plans_manager, said.append)
    assert [failed["case"] for failed in found["failed"]] == [bad]
    assert len(said) == 1
    assert len(found["metric_per_case"]) == len(CASES) - 1


def test_another_nnunet_validates_as_it_does(monkeypatch, capsys):
    module = sys.modules[nnUNetTrainer.__module__]
    monkeypatch.delattr(module, "export_prediction_from_logits")
    with validation.scored_validation():
        assert not hasattr(module, "export_prediction_from_logits")
    assert "cannot be scored" in capsys.readouterr().err
