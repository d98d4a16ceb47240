"""``nnunet-calib predict`` against nnU-Net's own prediction and against ``evaluate`` of its files."""

import argparse
import contextlib
import inspect
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import (
    nnUNetPredictor,
    predict_entry_point,
    predict_entry_point_modelfolder,
)

from nnunet_calib.cli.main import main
from nnunet_calib.cli.predict import add_arguments
from nnunet_calib.data.probabilities import ProbabilityFile
from nnunet_calib.evaluation import evaluate_folder
from nnunet_calib.pipeline.predictor import Predictor, one_thread_each
from nnunet_calib.prediction.model import TrainedModel

from ..fewshot.hosts import landmarks, phantom, write_image, write_model

SPACING = (1.3, 0.7, 0.9)


def write_images(folder, count=2, border=0):
    for case in range(count):
        image = phantom(case, (15, 30, 26))[0]
        if border:
            image = np.pad(image, border)  # zeros, which nnU-Net crops
        write_image(folder / f"case_{case}_0000.nii.gz", image, spacing=SPACING)
    return folder


def stock(model, images, output, folds, previous=None, probabilities=True):
    output.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), folds)
        predictor.predict_from_files_sequential(
            str(images), str(output), probabilities, folder_with_segs_from_prev_stage=previous and str(previous)
        )
    return output


def predict(model, images, output, *words):
    return main(["predict", "-i", str(images), "-o", str(output), "-m", str(model), "-device", "cpu", *map(str, words)])


def labels_of(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


KINDS = {
    "labels, two folds": {"folds": ("0", "1")},
    "regions": {"labels": "regions"},
    "transposed": {"transpose": (1, 2, 0)},
    "2d": {"axes": 2},
    "ignore label": {"labels": "labels_ignore"},
    "cascade": {"cascade": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_probabilities_are_those_of_nnunet(kind, tmp_path):
    options = KINDS[kind]
    model = write_model(tmp_path, spacing=0.8, **options)
    images = write_images(tmp_path / "images", border=0 if kind in ("cascade", "2d") else 2)
    previous, words = None, ["--probabilities", "npz"]
    if kind == "cascade":
        previous = tmp_path / "previous"
        for case in range(2):
            write_image(previous / f"case_{case}.nii.gz", landmarks(case, (15, 30, 26)), spacing=SPACING)
        words += ["-prev_stage_predictions", previous]
    theirs = stock(model, images, tmp_path / "stock", options.get("folds", ("0",)), previous)
    assert predict(model, images, tmp_path / "ours", *words) == 0
    for case in ("case_0", "case_1"):
        expected = labels_of(theirs / f"{case}.nii.gz")
        assert kind in ("2d", "cascade") or len(np.unique(expected)) > 1  # these two networks see background alone
        assert np.array_equal(labels_of(tmp_path / "ours" / f"{case}.nii.gz"), expected)
        ours, stored = (np.load(folder / f"{case}.npz")["probabilities"] for folder in (tmp_path / "ours", theirs))
        assert stored.std(axis=(1, 2, 3)).max() > 1e-3  # the network sees something
        np.testing.assert_allclose(ours, stored, rtol=0, atol=1e-6)


@pytest.mark.parametrize("labels", ["labels", "regions", "labels_ignore"])
def test_scores_are_those_of_evaluate_on_the_files(labels, tmp_path):
    model = write_model(tmp_path, spacing=0.8, labels=labels, transpose=(1, 2, 0))
    images = write_images(tmp_path / "images", border=2)
    reference = tmp_path / "reference"
    for case in range(2):
        known = np.pad(landmarks(case, (15, 30, 26)), 2)
        if labels.endswith("ignore"):
            known[:5] = 3
        write_image(reference / f"case_{case}.nii.gz", known, spacing=SPACING)
    assert predict(model, images, tmp_path / "ours", "--probabilities", "npz", "--reference", reference) == 0
    expected = evaluate_folder(reference, tmp_path / "ours", tmp_path / "evaluated", processes=1)
    found = json.loads((tmp_path / "ours" / "summary.json").read_text())
    assert expected["calibration_mean"]["foreground"]["ECE"] > 0
    for name in ("foreground_mean", "mean", "calibration_mean", "calibration_pooled"):
        same(found[name], expected[name])


def same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            same(found[name], expected[name])
    else:
        assert float(found) == pytest.approx(float(expected), abs=1e-6, rel=1e-6, nan_ok=True)


def test_compact_files_maps_and_members(tmp_path):
    model = write_model(tmp_path, spacing=0.8, folds=("0", "1"))
    images = write_images(tmp_path / "images", count=1, border=2)
    ours = tmp_path / "ours"
    wanted = ["--probabilities", "compact", "--confidence", "--entropy", "--members"]
    assert predict(model, images, ours, *wanted) == 0
    whole = ProbabilityFile(ours / "case_0.nncp").whole()
    place = sitk.ReadImage(str(ours / "case_0.nii.gz"))
    expected = {"confidence": whole.max(axis=0), "entropy": -(whole * np.log(np.maximum(whole, 1e-38))).sum(axis=0)}
    members = [ProbabilityFile(ours / "members" / f"fold_{f}" / "case_0.nncp").whole() for f in (0, 1)]
    mean = ProbabilityFile(ours / "members" / "mean" / "case_0.nncp").whole()
    np.testing.assert_allclose(mean, np.mean(members, axis=0), atol=1e-6)
    entropies = [-(p * np.log(np.maximum(p, 1e-38))).sum(axis=0) for p in (mean, *members)]
    expected["mutual_information"] = entropies[0] - (entropies[1] + entropies[2]) / 2
    expected["disagreement"] = 0.5 * (members[0].argmax(axis=0) != members[1].argmax(axis=0))
    assert expected["disagreement"].any()
    for kind, values in expected.items():
        image = sitk.ReadImage(str(ours / kind / "case_0.nii.gz"))
        np.testing.assert_allclose(sitk.GetArrayFromImage(image), values, atol=1e-5)
        np.testing.assert_allclose(image.GetOrigin(), place.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(image.GetSpacing(), place.GetSpacing(), atol=1e-4)
        np.testing.assert_allclose(image.GetDirection(), place.GetDirection(), atol=1e-4)
        found = nibabel.load(ours / kind / "case_0.nii.gz")
        np.testing.assert_allclose(found.affine, nibabel.load(ours / "case_0.nii.gz").affine, atol=1e-4)


def test_nifti_probabilities_lie_where_the_label_map_lies(tmp_path):
    model = write_model(tmp_path, spacing=0.8, transpose=(1, 2, 0))
    images = write_images(tmp_path / "images", count=1)
    ours = tmp_path / "ours"
    assert predict(model, images, ours, "--probabilities", "nifti") == 0
    found = nibabel.load(ours / "probabilities" / "case_0.nii.gz")
    theirs = np.load(stock(model, images, tmp_path / "stock", ("0",)) / "case_0.npz")["probabilities"]
    np.testing.assert_allclose(found.get_fdata(), theirs.T, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(found.affine, nibabel.load(ours / "case_0.nii.gz").affine, atol=1e-4)
    assert sitk.ReadImage(str(ours / "probabilities" / "case_0.nii.gz")).GetSize()[:3] == (26, 30, 15)


def test_one_bad_image_is_reported_and_the_others_are_predicted(tmp_path, capsys):
    model = write_model(tmp_path)
    images = write_images(tmp_path / "images", count=3)
    (images / "case_1_0000.nii.gz").write_bytes(b"no image")
    assert predict(model, images, tmp_path / "ours") == 1
    err = capsys.readouterr().err
    assert "case case_1" in err
    assert "Traceback" not in err
    assert {path.name for path in (tmp_path / "ours").glob("*.nii.gz")} == {"case_0.nii.gz", "case_2.nii.gz"}


def test_an_image_that_the_models_reader_does_not_take_is_told_with_the_remedy(tmp_path, capsys):
    model = write_model(tmp_path)
    images = write_images(tmp_path / "images", count=2)
    good = nibabel.load(images / "case_0_0000.nii.gz")
    sheared = good.affine.copy()
    sheared[0, 1] += 0.3
    image = nibabel.Nifti1Image(np.asarray(good.dataobj), sheared)
    image.set_qform(None, code=0)
    nibabel.save(image, images / "case_1_0000.nii.gz")
    assert predict(model, images, tmp_path / "ours") == 1
    err = capsys.readouterr().err
    assert "case_1_0000.nii.gz: SimpleITKIO of the model does not take it; its axes are not at right angles" in err
    assert {path.name for path in (tmp_path / "ours").glob("*.nii.gz")} == {"case_0.nii.gz"}


def test_the_same_command_keeps_what_holds(tmp_path, capsys):
    model = write_model(tmp_path)
    images, ours = write_images(tmp_path / "images"), tmp_path / "ours"
    assert predict(model, images, ours) == 0
    first = (ours / "case_0.nii.gz").stat().st_mtime_ns
    write_image(images / "case_1_0000.nii.gz", phantom(7, (15, 30, 26))[0], spacing=SPACING)
    assert predict(model, images, ours) == 0
    assert "1 predicted, 1 kept" in capsys.readouterr().out
    assert (ours / "case_0.nii.gz").stat().st_mtime_ns == first
    (ours / "case_0.nii.gz").write_bytes(b"damaged")
    assert predict(model, images, ours) == 0
    assert "1 predicted, 1 kept" in capsys.readouterr().out
    for words in (["--confidence"], ["--confidence", "--disable_tta"], ["--confidence", "-step_size", "0.75"]):
        assert predict(model, images, ours, *words) == 0
        assert "2 predicted;" in capsys.readouterr().out
        assert predict(model, images, ours, *words, "--c", "-npp", "2") == 0
        assert "0 predicted, 2 kept" in capsys.readouterr().out


def test_it_takes_the_flags_of_nnunet():
    """Fails with an nnU-Net that has a flag more: it is to be taken, or refused with the reason."""
    theirs: dict[str, str] = {}
    for entry in (predict_entry_point, predict_entry_point_modelfolder):
        for call in re.findall(r"add_argument\((.*?)\bhelp=", inspect.getsource(entry), re.DOTALL):
            kind = re.search(r"type=(\w+)|store_true", call)
            theirs |= dict.fromkeys(re.findall(r"'(--?\w+)'", call), kind.group(1) or "flag")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    ours = {word: action for action in parser._actions for word in action.option_strings}
    assert len(theirs) > 20
    assert set(theirs) <= set(ours), f"nnunetv2 {version('nnunetv2')}"
    assert {word for word, kind in theirs.items() if (ours[word].nargs == 0) != (kind == "flag")} == set()


def test_threads_have_the_defaults_that_nnunet_takes_from_the_environment(monkeypatch):
    monkeypatch.setenv("nnUNet_npp", "4")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["-i", "images", "-o", "predictions"])
    assert (args.npp, args.nps) == (4, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-f", "3"], "fold 3"),
        (["-step_size", "0"], "-step_size"),
        (["-part_id", "2"], "-part_id"),
        (["--members"], "two folds"),
    ],
)
def test_bad_usage_is_one_line(words, said, tmp_path, capsys):
    model, images = write_model(tmp_path), write_images(tmp_path / "images", count=1)
    assert predict(model, images, tmp_path / "ours", *words) in (1, 2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_threads_of_the_export_have_one_thread_of_torch_and_the_network_all():
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread_each(1, "export") as pool:
            pool.submit(int).result()
            torch.set_num_threads(2)  # as nnU-Net does while it predicts
            assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(own)


def test_a_case_too_large_for_the_device_is_predicted_on_the_cpu(tmp_path, monkeypatch, capsys):
    """Without CUDA: the device's part is a fake that has no memory for the first of two cases."""
    predictor = Predictor(TrainedModel(write_model(tmp_path)), "cpu")
    expected = predictor.predict(image := torch.randn(1, 20, 20, 20))
    on_cpu = nnUNetPredictor.predict_sliding_window_return_logits
    tries = []

    def device_without_memory(self, data):
        tries.append(self.device.type)
        if self.device.type == "cuda" and len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert self.device.type == "cpu" or len(tries) == 3
        device, self.device = self.device, torch.device("cpu")
        try:
            return on_cpu(self, data)
        finally:
            self.device = device

    monkeypatch.setattr(nnUNetPredictor, "predict_sliding_window_return_logits", device_without_memory)
    predictor.device = torch.device("cuda")
    threads = torch.get_num_threads()
    assert torch.equal(predictor.predict(image), expected)
    assert "out of memory on cuda; this case is predicted on the CPU" in capsys.readouterr().err
    assert (predictor.device.type, torch.get_num_threads()) == ("cuda", threads)
    assert torch.equal(predictor.predict(image), expected)
    assert tries == ["cuda", "cpu", "cuda"]


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_finishes(tmp_path):
    model = write_model(tmp_path, spacing=0.8)
    images = write_images(tmp_path / "images", count=6, border=2)
    words = ["--probabilities", "compact", "--confidence"]
    assert predict(model, images, tmp_path / "whole", *words) == 0
    command = [sys.executable, "-m", "nnunet_calib.cli.main", "predict", "-i", images, "-m", model, "-device", "cpu"]
    output, moments = tmp_path / "killed", random.Random(0)
    for _ in range(5):
        before = len(list(output.glob("made_from/*.json"))) if output.exists() else 0
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*command, "-o", output, *words], stdout=log, stderr=log)
        while process.poll() is None and len(list(output.glob("made_from/*.json"))) <= before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert predict(model, images, output, *words) == 0
    ours, theirs = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (output, tmp_path / "whole")
    )
    assert ours == theirs
    for path in theirs:
        if path.parent.name != "made_from":
            assert (output / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_image_is_reported_and_not_predicted(damage, tmp_path, capsys):
    model, images = write_model(tmp_path), write_images(tmp_path / "images")
    broken = images / "case_0_0000.nii.gz"
    content = broken.read_bytes()
    middle = len(content) * 6 // 10
    rest = b"" if damage == "cut" else bytes([content[middle] ^ 16]) + content[middle + 1 :]
    broken.write_bytes(content[:middle] + rest)
    assert predict(model, images, tmp_path / "ours") == 1
    assert "case_0_0000.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "ours" / "case_0.nii.gz").exists()
    assert (tmp_path / "ours" / "case_1.nii.gz").exists()


def test_references_of_other_cases_are_refused_before_anything_is_predicted(tmp_path, capsys):
    model, images = write_model(tmp_path / "model"), write_images(tmp_path / "images")
    references = tmp_path / "references"
    references.mkdir()
    assert predict(model, images, tmp_path / "out", "--reference", references) == 2
    assert f"--reference {references}: no reference of these cases, such as case_0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    write_image(references / "case_1.nii.gz", phantom(1, (15, 30, 26))[1].astype(np.uint8), spacing=SPACING)
    assert predict(model, images, tmp_path / "out", "--reference", references) == 0
    assert "no reference of 1 of 2 cases, such as case_0; they are predicted and not scored" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["metric_per_case"]) == 1


def test_what_another_setting_wrote_goes_when_a_case_is_predicted_anew(tmp_path):
    """Else the first run's probabilities would be taken for the second's."""
    model, images, out = write_model(tmp_path / "model"), write_images(tmp_path / "images", 1), tmp_path / "out"
    assert predict(model, images, out, "--probabilities", "compact", "--confidence") == 0
    assert (out / "case_0.nncp").is_file()
    theirs = out / "case_0.txt"
    theirs.write_text("a user's own")
    assert predict(model, images, out) == 0
    assert sorted(path.name for path in out.rglob("case_0*")) == ["case_0.json", "case_0.nii.gz", "case_0.txt"]
