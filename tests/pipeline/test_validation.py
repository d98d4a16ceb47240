"""The validation of a trained model, and the seam in nnU-Net's own at the end of a training."""

import functools
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import export_prediction_from_logits, resample_and_save
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_calib.cli.main import main
from nnunet_calib.data.cases import pair_cases
from nnunet_calib.evaluation import evaluate_folder
from nnunet_calib.pipeline import validation
from nnunet_calib.pipeline.scored_export import scored_export
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
    assert len(list(made.glob("*.nncp"))) == len(CASES)  # of the same network
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
    words = [str(reference), str(tmp_path / "predicted"), "--calibrator", str(tmp_path / "calibrator"), "-np", "1"]
    assert main(["evaluate", *words, "-o", str(tmp_path / "twice")]) == 2  # it is calibrated already
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


def test_other_probabilities_beside_the_same_labels_count_more_than_the_sample(trained, tmp_path):
    folder, _ = trained()
    assert main(["validate", str(folder), "-device", "cpu", "--probabilities", "npz"]) == 0
    made, temperatures = folder / "fold_0" / "validation", []
    for sharper in (1, 3):
        for file in made.glob("*.npz"):
            p = np.load(file)["probabilities"].astype(np.float32) ** sharper
            np.savez_compressed(file, probabilities=p / p.sum(axis=0))
        words = ["calibrate", "fit", str(folder), "--method", "temperature", "-o", str(tmp_path / str(sharper))]
        assert main(words) == 0
        temperatures.append(json.loads((tmp_path / str(sharper) / FILE_NAME).read_text())["temperature"])
    assert temperatures[1] == pytest.approx(3 * temperatures[0], rel=0.05)


def test_older_probabilities_of_another_network_are_named(trained, tmp_path, capsys):
    """As those that an earlier training left with ``--npz`` beside the label map of a later one without."""
    folder, _ = trained()
    assert main(["validate", str(folder), "-device", "cpu", "--probabilities", "npz"]) == 0
    made = folder / "fold_0" / "validation"
    file = made / f"{CASES[0]}.npz"
    p = np.load(file)["probabilities"].astype(np.float32) ** 3
    np.savez_compressed(file, probabilities=p / p.sum(axis=0))
    os.utime(file, (0, 0))
    words = ["calibrate", "fit", str(folder), "--method", "temperature", "-o", str(tmp_path / "calibrator")]
    assert main(words) == 1
    assert f"{file}: of another network" in capsys.readouterr().err
    assert main(["validate", str(folder), "-device", "cpu"]) == 0
    assert sorted(path.name for path in made.glob("*.npz")) == [f"{name}.npz" for name in sorted(CASES)[1:]]
    assert main(words) == 0


def test_a_record_of_an_earlier_network_is_no_score_of_this_one(trained):
    folder, _ = trained()
    assert main(["validate", str(folder), "-device", "cpu"]) == 0
    made = folder / "fold_0" / "validation"
    shutil.copy(made / f"{CASES[1]}.nii.gz", made / f"{CASES[0]}.nii.gz")  # exported anew, and not scored
    said: list[str] = []
    plans_manager = TrainedModel(folder).plans_manager
    found = validation.summarise_validation(folder / "fold_0", CASES, plans_manager, said.append)
    assert [record["case"] for record in found["metric_per_case"]] == [CASES[1]]
    assert [f"case {CASES[0]}" in line for line in said] == [True]
    assert len(found["failed"]) == 1


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
    """Fails with an nnU-Net that hands its logits on in another way; ``scored_export`` is to be adapted then."""
    source = " ".join(inspect.getsource(nnUNetTrainer.perform_actual_validation).split())
    handed = "export_prediction_from_logits, ( (prediction, properties, self.configuration_manager, self.plans_manager,"
    assert handed in source, f"nnunetv2 {version('nnunetv2')} hands something else to its export"


def handed_to_the_pool(model):
    """Managers of a trainer that validates, as a process of its export pool gets them: configuration, plans."""
    trainer = SimpleNamespace(plans_manager=model.plans_manager, configuration_manager=model.configuration_manager)
    with scored_export(trainer, validation.score_exported):
        handed = pickle.dumps((trainer.configuration_manager, trainer.plans_manager))
    assert trainer.plans_manager is model.plans_manager
    assert trainer.configuration_manager is model.configuration_manager
    return lambda: pickle.loads(handed)


def test_a_trainer_whose_validation_fails_has_its_managers_back(trained):
    folder, _ = trained()
    model = TrainedModel(folder)
    plans, configuration = model.plans_manager, model.configuration_manager
    one, other = (SimpleNamespace(plans_manager=plans, configuration_manager=configuration) for _ in range(2))

    def fail() -> None:
        with scored_export(one, validation.score_exported):
            assert one.plans_manager is not plans
            assert one.plans_manager.dataset_name == plans.dataset_name
            assert other.plans_manager is plans
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert one.plans_manager is plans
    assert one.configuration_manager is configuration


@pytest.mark.parametrize("probabilities", [False, True])
def test_what_the_trainers_pool_is_handed_is_written_and_scored(trained, tmp_path, probabilities):
    folder, reference = trained()
    model = TrainedModel(folder)
    managers = (model.configuration_manager, model.plans_manager, model.dataset.content)
    scoring, data = handed_to_the_pool(model), reference.parent / "toy"
    made, stock = folder / "fold_0" / "validation", tmp_path / "stock"
    made.mkdir()
    stock.mkdir()
    for case in CASES:
        image, _, _, properties = nnUNetDatasetBlosc2(str(data), list(CASES)).load_case(case)
        rng = np.random.default_rng(0)
        logits = torch.from_numpy((rng.normal(size=(3, *image.shape[1:])) * 3).astype(np.float16))
        ours = (*scoring(), model.dataset.content, str(made / case), probabilities)
        export_prediction_from_logits(logits, properties, *ours)
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
    scoring = handed_to_the_pool(model)
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
        export_prediction_from_logits(logits, properties, *scoring(), model.dataset.content, str(made / case))
        export_prediction_from_logits(logits, properties, *managers, str(stock / case))
        assert (made / f"{case}.nii.gz").read_bytes() == (stock / f"{case}.nii.gz").read_bytes()
    assert f"{bad}.nii.gz is written and not scored" in capsys.readouterr().err
    said: list[str] = []
    found = validation.summarise_validation(folder / "fold_0", CASES, model.plans_manager, said.append)
    assert [failed["case"] for failed in found["failed"]] == [bad]
    assert len(said) == 1
    assert len(found["metric_per_case"]) == len(CASES) - 1


def test_logits_that_nobody_can_use_are_exported_by_nnunet(trained, tmp_path, capsys):
    """What ``predict`` refuses, the validation of a training writes as nnU-Net does."""
    folder, reference = trained()
    model = TrainedModel(folder)
    managers = (model.configuration_manager, model.plans_manager, model.dataset.content)
    made, stock = folder / "fold_0" / "validation", tmp_path / "stock"
    made.mkdir()
    stock.mkdir()
    image, _, _, properties = nnUNetDatasetBlosc2(str(reference.parent / "toy"), list(CASES)).load_case(CASES[0])
    logits = torch.zeros((3, *image.shape[1:]), dtype=torch.float16)
    logits[2, 3] = float("nan")
    ours = handed_to_the_pool(model)()
    export_prediction_from_logits(logits, properties, *ours, model.dataset.content, str(made / CASES[0]))
    export_prediction_from_logits(logits, properties, *managers, str(stock / CASES[0]))
    assert (made / f"{CASES[0]}.nii.gz").read_bytes() == (stock / f"{CASES[0]}.nii.gz").read_bytes()
    assert "not scored" in capsys.readouterr().err


def test_the_next_stage_of_a_cascade_gets_the_labels_of_nnunet(trained, tmp_path):
    folder, _ = trained((1, 2, 0))
    model = TrainedModel(folder)
    configuration, plans = handed_to_the_pool(model)()
    logits = torch.from_numpy((np.random.default_rng(0).normal(size=(3, 9, 11, 8)) * 3).astype(np.float16))
    about = {"spacing": list(SPACING), "shape_after_cropping_and_before_resampling": (12, 14, 13)}
    for name, managers in (("ours", (plans, configuration)), ("stock", (model.plans_manager, configuration._inner))):
        resample_and_save(logits, [17, 20, 13], str(tmp_path / name), *managers, about, model.dataset.content)
    ours, stock = (blosc2.open(str(tmp_path / f"{name}.b2nd"))[:] for name in ("ours", "stock"))
    assert ours.dtype == stock.dtype
    assert np.array_equal(ours, stock)
    assert len(np.unique(ours)) == 3


def test_the_processes_that_export_do_not_wait_for_torchs_compiler():
    """Each of them imports the module of the scores first; torch's compiler, which only predictors need, takes 2 s."""
    code = "import sys, nnunet_calib.pipeline.validation; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
