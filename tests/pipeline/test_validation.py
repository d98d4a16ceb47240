"""The validation of a trained model, and the seam in nnU-Net's own at the end of a training."""

import functools
import inspect
import json
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_calib.cli.main import main
from nnunet_calib.data.cases import pair_cases
from nnunet_calib.evaluation import evaluate_folder
from nnunet_calib.pipeline import validation
from nnunet_calib.posthoc.folders.samples import read_sample
from nnunet_calib.posthoc.folders.sampling import VOXELS, sample_case
from nnunet_calib.posthoc.maps.calibrator import FILE_NAME
from nnunet_calib.prediction.model import TrainedModel

from ..fewshot.hosts import landmarks, phantom, write_image, write_model
from .test_predict import SPACING, same

CASES = ("case_0", "case_1")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Makes a trained model, its data preprocessed as nnU-Net does; returns its folder and that of the references."""
    return functools.partial(write_trained, tmp_path, monkeypatch)


def write_trained(tmp_path, monkeypatch, transpose=(0, 1, 2)):
    folder = write_model(tmp_path / "results", spacing=0.8, transpose=transpose)
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
    folder, reference = trained()
    assert main(["validate", str(folder), "-device", "cpu", "--probabilities", "compact"]) == 0
    assert "foreground" in capsys.readouterr().out
    made = folder / "fold_0" / "validation"
    expected = evaluate_folder(reference, made, tmp_path / "evaluated", processes=1)
    found = json.loads((made / "summary.json").read_text())
    for name in ("foreground_mean", "mean", "calibration_mean", "calibration_pooled"):
        same(found[name], expected[name])
    fit = ["calibrate", "fit", str(folder), "--method", "temperature", "-o"]
    shutil.move(made / "samples", tmp_path / "samples")
    assert main([*fit, str(tmp_path / "of_probabilities")]) == 0
    shutil.move(tmp_path / "samples", made / "samples")
    assert main(["validate", str(folder), "-device", "cpu"]) == 0
    for file in made.glob("*.nncp"):
        file.unlink()
    assert main([*fit, str(tmp_path / "calibrator")]) == 0
    fitted = [json.loads((tmp_path / name / FILE_NAME).read_text()) for name in ("of_probabilities", "calibrator")]
    assert fitted[0] == fitted[1]
    words = ["-i", str(tmp_path / "raw"), "-o", str(tmp_path / "predicted"), "-m", str(folder), "-device", "cpu"]
    words += ["--calibrator", str(tmp_path / "calibrator"), "--reference", str(reference)]
    assert main(["predict", *words]) == 0
    summary = json.loads((tmp_path / "predicted" / "summary.json").read_text())
    assert summary["protocol"]["calibrator"]["method"] == "temperature"
    assert summary["calibration_mean"]["volume"]["NLL"] < found["calibration_mean"]["volume"]["NLL"]
    same(summary["foreground_mean"], found["foreground_mean"])


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0)])
def test_the_sample_that_is_left_is_that_of_the_probabilities(trained, transpose):
    folder, reference = trained(transpose)
    assert main(["validate", str(folder), "-device", "cpu", "--probabilities", "npz"]) == 0
    dataset = TrainedModel(folder).dataset
    for files in pair_cases(reference, folder / "fold_0" / "validation", ".nii.gz"):
        left = read_sample(files, dataset, voxels=VOXELS, seed=0)
        drawn = sample_case(files, dataset, SimpleITKIO)
        for name in ("index", "probabilities", "target", "weights", "confidences"):
            assert np.array_equal(getattr(left, name), getattr(drawn, name)), name
        for name, inside in drawn.regions.items():
            assert np.array_equal(left.regions[name], inside)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ("none", ["--voxels", "500"], "500 voxels"),
        ("none", ["--method", "local"], "whole probabilities"),
        ("prediction", [], "is not one of these label maps"),
        ("cut", [], "damaged"),
        ("numbers", [], "no sample of voxels"),
    ],
)
def test_a_sample_of_something_else_is_not_used(trained, tmp_path, capsys, change, words, said):
    folder, _ = trained()
    assert main(["validate", str(folder), "-device", "cpu"]) == 0
    made = folder / "fold_0" / "validation"
    sample = made / "samples" / f"{CASES[0]}.npz"
    if change == "prediction":
        shutil.copy(made / f"{CASES[1]}.nii.gz", made / f"{CASES[0]}.nii.gz")
    elif change == "cut":
        sample.write_bytes(sample.read_bytes()[:5000])
    elif change == "numbers":
        with np.load(sample) as stored:
            arrays = dict(stored)
        np.savez(sample, **arrays | {"weights": arrays["weights"] * np.nan})
    capsys.readouterr()
    assert main(["calibrate", "fit", str(folder), "-o", str(tmp_path / "calibrator"), *words]) == 1
    said_by_it = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-calib")]
    assert len(said_by_it) == 1
    assert said in said_by_it[0]


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
    folder, reference = trained()
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
    folder, reference = trained()
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
