"""nnU-Net's own commands from first to last, with our trainers installed from the wheel.

Three data sets: labels (a cascade), labels with ignore (3D, aborted and continued), regions with ignore (2D).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from .host import CASES, SHAPE, Host, last_words, write_dataset

pytestmark = pytest.mark.slow

LABELS, IGNORING, REGIONS = "Dataset901_Labels", "Dataset902_Ignore", "Dataset903_Regions"
PLANNED = {LABELS: "labels", IGNORING: "labels_ignore", REGIONS: "regions_ignore"}


@pytest.fixture(scope="module")
def host(from_wheel, tmp_path_factory) -> Host:
    """Data planned and preprocessed by nnU-Net, with small configurations that hold our settings."""
    host = Host(from_wheel, tmp_path_factory.mktemp("host"))
    for dataset, kind in PLANNED.items():
        write_dataset(host.raw / dataset, kind)
    numbers = [dataset[7:10] for dataset in PLANNED]
    host.command("nnUNetv2_plan_and_preprocess", "-d", *numbers, "--no_pp", "-npfp", "1")
    host.add_low_resolution(LABELS)
    host.command("nnUNetv2_preprocess", "-d", *numbers[:2], "-c", "3d_fullres", "3d_lowres", "-np", "1", "1")
    host.command("nnUNetv2_preprocess", "-d", numbers[2], "-c", "2d", "-np", "1")
    host.add_small(LABELS, "low", "3d_lowres", {"calibrate_from": 0})
    host.add_small(LABELS, "full", "3d_cascade_fullres", {"calibrate_from": 0}, previous_stage="low")
    # Long enough an epoch to be killed in.
    host.add_small(IGNORING, "small", "3d_fullres", {"calibrate_from": 0.5, "num_iterations_per_epoch": 20})
    host.add_small(REGIONS, "small", "2d", {"margin": 2, "dice_weight": 0.5})
    host.add_small(REGIONS, "wrong", "2d", {"marign": 2})
    return host


def refused(done) -> str:
    """The one line of a command that was refused."""
    assert done.returncode == 1, last_words(done)
    assert "Traceback" not in done.stderr, last_words(done)
    lines = [line for line in done.stderr.splitlines() if line.startswith("nnunet-calib: ")]
    assert lines == done.stderr.splitlines()[-1:], last_words(done)
    return lines[0]


def log(fold: Path) -> str:
    return "".join(file.read_text() for file in sorted(fold.glob("training_log_*.txt")))


def assert_trained_and_validated(fold: Path, cases: int) -> None:
    assert (fold / "checkpoint_final.pth").is_file()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(list((fold / "validation").glob("*.nii.gz"))) == cases
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


def assert_predicted(folder: Path, channels: int, sums_to_one: bool) -> None:
    """A label map and nnU-Net's probabilities on the image's own grid."""
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "test.nii.gz")))
    probabilities = np.load(folder / "test.npz", allow_pickle=False)["probabilities"]
    assert labels.shape == SHAPE
    assert probabilities.shape == (channels, *SHAPE)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    if sums_to_one:
        np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-3)
        assert (probabilities.argmax(axis=0) == labels).mean() > 0.99


def test_the_package_under_test_is_the_installed_one(host):
    done = host.installed.run("-c", "import nnunet_calib; print(nnunet_calib.__file__)")
    assert Path(done.stdout.strip()) == host.installed.site / "nnunet_calib" / "__init__.py"


def test_an_unknown_setting_is_refused_in_one_line_and_leaves_no_folder(host):
    line = refused(host.train(REGIONS, "wrong", "0", "MbLSTrainer", succeeds=False))
    assert line.startswith("nnunet-calib: unknown setting 'marign'; did you mean margin? allowed: calibrate_from, ")
    assert not host.model(REGIONS, "wrong", "MbLSTrainer").exists()


def test_regions_with_ignore_2d_train_validate_again_with_probabilities_predict(host):
    host.train(REGIONS, "small", "0", "MbLSTrainer")
    model = host.model(REGIONS, "small", "MbLSTrainer")
    fold = model / "fold_0"
    assert_trained_and_validated(fold, cases=2)
    resolved = json.loads((model / "plans.json").read_text())["nnunet_calib_resolved"]
    assert (resolved["trainer"], resolved["margin"], resolved["dice_weight"]) == ("MbLSTrainer", 2, 0.5)
    assert str(resolved) in log(fold)
    host.train(REGIONS, "small", "0", "MbLSTrainer", "--val", "--npz")
    probabilities = [np.load(file)["probabilities"] for file in (fold / "validation").glob("*.npz")]
    assert [each.shape for each in probabilities] == [(2, *SHAPE)] * 2
    assert_predicted(host.predict(REGIONS, "small", "0", "MbLSTrainer"), channels=2, sums_to_one=False)


def test_labels_with_ignore_3d_killed_continued_and_predicted_but_not_with_other_settings(host):
    host.train_until("Epoch 1", IGNORING, "small", "0", "NACLTrainer")
    fold = host.model(IGNORING, "small", "NACLTrainer") / "fold_0"
    assert (fold / "checkpoint_latest.pth").is_file()
    assert not (fold / "checkpoint_final.pth").exists()

    plans = host.plans(IGNORING).read_text()
    changed = json.loads(plans)
    changed["configurations"]["small"]["nnunet_calib"]["weight"] = 0.7
    host.plans(IGNORING).write_text(json.dumps(changed))
    line = refused(host.train(IGNORING, "small", "0", "NACLTrainer", "--c", succeeds=False))
    assert "weight was 0.03, now 0.7" in line

    host.plans(IGNORING).write_text(plans)
    done = host.train(IGNORING, "small", "0", "NACLTrainer", "--c")
    assert "Epoch 0" not in done.stdout
    assert "Epoch 1" in done.stdout
    assert "Objective: nacl" in done.stdout
    assert "Objective: nnU-Net (until calibrate_from)" in log(fold)
    assert_trained_and_validated(fold, cases=2)
    assert_predicted(host.predict(IGNORING, "small", "0", "NACLTrainer"), channels=3, sums_to_one=True)


def test_labels_in_a_cascade_trained_and_predicted_stage_after_stage(host):
    host.train(LABELS, "low", "all", "MEEPTrainer")
    low = host.model(LABELS, "low", "MEEPTrainer")
    assert_trained_and_validated(low / "fold_all", CASES)
    assert len(list((low / "predicted_next_stage" / "full").iterdir())) == CASES
    first = host.predict(LABELS, "low", "all", "MEEPTrainer")
    assert_predicted(first, channels=3, sums_to_one=True)

    host.train(LABELS, "full", "all", "MEEPTrainer")
    assert_trained_and_validated(host.model(LABELS, "full", "MEEPTrainer") / "fold_all", CASES)
    second = host.predict(LABELS, "full", "all", "MEEPTrainer", "-prev_stage_predictions", str(first))
    assert_predicted(second, channels=3, sums_to_one=True)
