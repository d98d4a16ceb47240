"""Fine-tuning with new classes: the data set that is made, and the training on it."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_calib.cli.main import main
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.task.added_class import overlaid, prepare_dataset
from nnunet_calib.prediction.model import TrainedModel
from nnunet_calib.prediction.predictor import ModelPredictor

from ..conftest import STRUCTURE, write_case
from ..hosts import phantom, write_model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    return tmp_path


def supports(root, cases=5, **options):
    for i in range(cases):
        write_case(root, f"case_{i}", i, **options)
    return root / "images", root / "labels"


def prepare(root, model, cases=2, **options):
    given = {
        "number": 901,
        "structures": {"ball": STRUCTURE},
        "settings": {},
        "progress": False,
        "trainer": "StockTrainer",
    } | options
    return prepare_dataset(model, *supports(root, cases), **given)


def words(root, model, *more):
    given = ["--images", str(root / "images"), "--labels", str(root / "labels"), "--label", str(STRUCTURE)]
    return ["fewshot", "finetune", str(model), *given, "--name", "ball", "-d", "901", "-device", "cpu", *more]


def test_what_is_annotated_lies_over_what_is_predicted():
    predicted, annotated = np.array([0, 1, 2, 2, 0]), np.array([0, 9, 9, 7, 7])
    assert overlaid(predicted, annotated, {9: 3, 7: 4}).tolist() == [0, 3, 3, 4, 4]
    assert overlaid(predicted, annotated, {9: 300}).dtype == np.uint16


def predicted(folder, image) -> np.ndarray:
    predictor = ModelPredictor(TrainedModel(folder))
    return predictor.predict_single_npy_array(image[None], {"spacing": [1.0, 1.0, 1.0]})


@pytest.mark.parametrize("labels", ["labels", "labels_ignore"])
def test_the_data_set_has_the_models_classes_where_it_predicts_them_and_the_new_ones(folders, labels):
    model = write_model(folders / "model", labels=labels, folds=("0", "1"))
    made = prepare(folders, model, cases=1, ignore=None if labels == "labels" else 7)
    extended = {"background": 0, "a": 1, "b": 2, "ball": 3} | ({"ignore": 4} if labels == "labels_ignore" else {})
    raw, preprocessed = folders / "nnUNet_raw" / made.name, folders / "nnUNet_preprocessed" / made.name
    assert made.name == "Dataset901_ball"
    for folder in (raw, preprocessed):
        content = json.loads((folder / "dataset.json").read_text())
        assert (content["labels"], content["numTraining"]) == (extended, 1)
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    base = json.loads((model / "plans.json").read_text())
    assert plans["configurations"]["base"].pop("nnunet_calib") == {}
    assert plans == base | {"dataset_name": made.name}
    assert len(list((preprocessed / "toy").glob("*.pkl"))) == 1
    image, ball = phantom(0)
    map_of_case = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / "case_0.nii.gz")))
    assert np.array_equal(map_of_case, np.where(ball, 3, predicted(model, image)))
    assert set(np.unique(map_of_case)) == {0, 1, 2, 3}


def test_what_cannot_be_finished_leaves_nothing(folders):
    model = write_model(folders / "model")
    with pytest.raises(InputError, match=r"labels: no voxel of ball, value 6; check --label"):
        prepare(folders, model, structures={"ball": 6})
    assert not list((folders / "nnUNet_raw").iterdir())
    assert not list((folders / "nnUNet_preprocessed").iterdir())


def test_a_number_that_is_taken_is_refused(folders):
    (folders / "nnUNet_results" / "Dataset901_Other").mkdir()
    with pytest.raises(UsageError, match="-d 901: there is Dataset901_Other already"):
        prepare(folders, write_model(folders / "model"))


def test_a_network_that_only_its_own_trainer_builds_is_refused(folders):
    model = write_model(folders / "model")
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    torch.save(content | {"trainer_name": "nnUNetTrainerBN"}, checkpoint)
    with pytest.raises(UsageError, match="nnUNetTrainerBN builds a network of its own, which StockTrainer does not"):
        prepare(folders, model)
    assert not list((folders / "nnUNet_raw").iterdir())


@pytest.mark.parametrize(
    ("model", "more", "told"),
    [
        ({"labels": "regions"}, [], "the model has regions, to which no class can be added by fine-tuning"),
        ({"cascade": True}, [], "a cascade cannot be fine-tuned"),
        ({}, ["--set", "num_epoch=3"], "unknown setting 'num_epoch'; did you mean num_epochs"),
        ({}, ["--set", "finetune_from=nnUNetTrainer"], "finetune_from: it is MODEL; leave it out"),
        ({}, ["-tr", "NoTrainer"], "no trainer 'NoTrainer'"),
        ({}, ["--fold", "0"], "nnU-Net makes 5 folds, of 2 volumes; use --fold all"),
        ({}, ["--fold", "6"], "it is all, or 0 to 4"),
        ({}, ["--ignore", "5"], "--ignore 5 is the structure"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(folders, capsys, model, more, told):
    supports(folders, 2)
    assert main(words(folders, write_model(folders / "model", **model), *more)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list((folders / "nnUNet_raw").iterdir())


def test_prepare_stops_before_the_training_and_says_its_command(folders, capsys):
    supports(folders, 2)
    assert main(words(folders, write_model(folders / "model"), "--disable_tta", "--prepare", "-tr", "NACLTrainer")) == 0
    said = capsys.readouterr()
    assert "train: nnUNetv2_train 901 base all -tr NACLTrainer -p nnUNetPlans -device cpu\n" in said.out
    assert "2 volumes are few to train a network on; from 5 on" in said.err
    assert not list((folders / "nnUNet_results").iterdir())


@pytest.mark.slow
def test_the_new_class_is_learned(folders, capfd):
    # The known classes say nothing here: the model has random features, and hardly finds them itself.
    supports(folders)
    model = write_model(folders / "model", mirroring=None)
    np.random.seed(0)  # noqa: NPY002 - nnU-Net draws from it
    torch.manual_seed(0)
    schedule = ["num_epochs=4", "num_iterations_per_epoch=50", "num_val_iterations_per_epoch=1", "initial_lr=0.01"]
    assert main(words(folders, model, "--set", *schedule)) == 0
    assert (
        "segment: nnUNetv2_predict -i imagesTs -o segmented -d 901 -c base -tr StockTrainer" in capfd.readouterr().out
    )
    tuned = folders / "nnUNet_results" / "Dataset901_ball" / "StockTrainer__nnUNetPlans__base"

    def dice(folder) -> float:
        overlap = []
        for seed in (50, 51):
            image, ball = phantom(seed)
            mine = predicted(folder, image) == 3
            overlap.append(2 * (mine & ball).sum() / (mine.sum() + ball.sum()))
        return float(np.mean(overlap))

    assert dice(tuned) > 0.5
    assert TrainedModel(tuned).mirroring_axes is None  # as of the model it started from
