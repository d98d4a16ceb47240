"""A calibrator is fitted to cases that the network was not trained on, and folders of results are not mixed."""

import json
import shutil

import pytest

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.posthoc.folders.apply import apply_folder
from nnunet_calib.posthoc.folders.fit import fit_folder

from ..predictions import model, predictions


def fit(folder, output, reference):
    return fit_folder(folder, output, reference, methods=["temperature"], voxels=500)


def test_fold_all_is_refused_however_it_is_named(tmp_path):
    trained, references = model(tmp_path)
    for fold in ("fold_0", "fold_1"):
        shutil.copytree(trained / fold, tmp_path / "kept" / fold)
    (trained / "fold_0").rename(trained / "fold_all")
    assert len(fit(trained, tmp_path / "out", references)["cases"]) == 2  # those of fold_1 alone
    with pytest.raises(InputError, match="fold_all was trained on all cases"):
        fit(trained / "fold_all" / "validation", tmp_path / "out", references)
    with pytest.raises(InputError, match="fold_all was trained on all cases"):
        fit(trained / "fold_all", tmp_path / "out", references)
    shutil.rmtree(trained / "fold_1")
    for named in (references, None):
        with pytest.raises(InputError, match="only fold_all is there"):
            fit(trained, tmp_path / "out", named)


def test_training_cases_of_a_fold_are_refused(tmp_path, monkeypatch):
    trained, references = model(tmp_path)
    preprocessed = tmp_path / "preprocessed" / "Dataset999_Toy"
    preprocessed.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed.parent))
    names = [f"case_{seed:02d}" for seed in range(4)]
    splits = [{"train": names[2:], "val": names[:2]}, {"train": names[:2], "val": names[2:]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    assert len(fit(trained, tmp_path / "out", references)["cases"]) == 4
    assert len(fit(trained / "fold_0" / "validation", tmp_path / "out", references)["cases"]) == 2
    (preprocessed / "splits_final.json").write_text(json.dumps(splits[::-1]))
    for folder in (trained, trained / "fold_0" / "validation"):
        with pytest.raises(InputError, match="case_00 and 1 more are training cases of this fold"):
            fit(folder, tmp_path / "out", references)
    for wrong in ({}, [{"train": 1, "val": []}], [3]):
        (preprocessed / "splits_final.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"splits_final\.json: not the splits of nnU-Net"):
            fit(trained, tmp_path / "out", references)


def test_cases_without_probabilities_are_in_the_record(tmp_path):
    made = predictions(tmp_path, 3)
    (made.prediction / "case_01.npz").unlink()
    assert fit(made.prediction, tmp_path / "out", made.reference)["without_probabilities"] == ["case_01"]


def test_calibrated_folders_are_not_mixed(tmp_path):
    made, other = predictions(tmp_path / "a", 2), predictions(tmp_path / "b", 2, first=2)
    fit(made.prediction, tmp_path / "out", made.reference)
    done = tmp_path / "calibrated"
    for _ in range(2):
        apply_folder(tmp_path / "out", made.prediction, done)
    with pytest.raises(UsageError, match="holds other cases"):
        apply_folder(tmp_path / "out", other.prediction, done)
    fit_folder(made.prediction, tmp_path / "vector", made.reference, methods=["vector"], voxels=500)
    with pytest.raises(UsageError, match="of another calibrator or of other predictions"):
        apply_folder(tmp_path / "vector", made.prediction, done)
