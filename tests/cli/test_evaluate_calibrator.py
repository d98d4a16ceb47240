"""``evaluate --calibrator``: what ``calibrate apply`` and then ``evaluate`` say, without writing probabilities."""

import json

import numpy as np
import pytest

from nnunet_calib.cli.main import main
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact
from nnunet_calib.posthoc import VectorScaling
from nnunet_calib.posthoc.folders import apply

from ..folders import assert_same
from ..posthoc.predictions import predictions, region_predictions


def calibrator(made, *, method="temperature", **values):
    """A file with these parameters."""
    multilabel = "regions_class_order" in json.loads(made.dataset_json.read_text())
    channels = 2 if multilabel else 3
    content = {"format": 1, "method": method, "multilabel": multilabel, "channels": channels, "notes": []} | values
    file = made.output.parent / f"{method}.json"
    file.write_text(json.dumps(content))
    return file


def compact(made):
    for file in list(made.prediction.glob("*.npz")):
        stored = ProbabilityFile(file)
        write_compact(file.with_suffix(".nncp"), stored.channels(), stored.shape, np.float16)
        file.unlink()
    return made


MADE = {
    "npz": lambda root: predictions(root, 2),
    "compact": lambda root: compact(predictions(root, 2)),
    "regions": lambda root: region_predictions(root, 2),
}
OWN = {"slope": [0.5, 0.6, 0.7], "offset": [0.4, 0.0, -0.4]}


@pytest.mark.parametrize("kind", MADE)
def test_the_numbers_are_those_of_the_calibrated_files(tmp_path, kind, capsys):
    made = MADE[kind](tmp_path)
    file = calibrator(made, temperature=2.0)
    assert main([*made.words, "--boundary", "--calibrator", str(file)]) == 0
    assert "probabilities calibrated: temperature" in capsys.readouterr().out
    ours, calibrated = made.summary(), tmp_path / "calibrated"
    assert main(["calibrate", "apply", str(file), "-i", str(made.prediction), "-o", str(calibrated)]) == 0
    words = ["evaluate", str(made.reference), str(calibrated), "-o", str(tmp_path / "theirs"), "-np", "1", "--boundary"]
    assert main(words) == 0
    theirs = json.loads((tmp_path / "theirs" / "summary.json").read_text())
    for name in ("mean", "calibration_mean", "calibration_pooled"):
        assert_same(ours[name], theirs[name], rel=1e-6)
    assert ours["protocol"]["calibrator"]["method"] == "temperature"
    assert theirs["protocol"]["calibrator"] is None


def test_the_nacl_protocol_scores_calibrated_probabilities_without_calibrating_twice(tmp_path, monkeypatch):
    made = predictions(tmp_path, 1)
    file = calibrator(made, temperature=2.0)
    assert main(["calibrate", "apply", str(file), "-i", str(made.prediction), "-o", str(tmp_path / "calibrated")]) == 0
    words = ["evaluate", str(made.reference), str(tmp_path / "calibrated"), "-o", str(tmp_path / "theirs")]
    assert main([*words, "-np", "1", "--protocol", "nacl"]) == 0
    theirs = json.loads((tmp_path / "theirs" / "summary.json").read_text())["metric_per_case"][0]
    times = []
    once = apply.calibrate_file
    monkeypatch.setattr(apply, "calibrate_file", lambda *given: times.append(1) or once(*given))
    assert main([*made.words, "-np", "1", "--protocol", "nacl", "--calibrator", str(file)]) == 0
    ours = made.summary()["metric_per_case"][0]
    assert_same(ours["nacl"], theirs["nacl"], rel=1e-6)
    assert len(times) == 1


def test_another_calibrator_scores_every_case_again(tmp_path, capsys):
    made = predictions(tmp_path, 1)
    nll = []
    for temperature in (2.0, 3.0, 2.0):
        assert main([*made.words, "--calibrator", str(calibrator(made, temperature=temperature))]) == 0
        nll.append(made.summary()["calibration_mean"]["volume"]["NLL"])
        assert "unchanged" not in capsys.readouterr().err
    assert nll[0] == nll[2] < nll[1]
    assert main([*made.words, "--calibrator", str(calibrator(made, temperature=2.0))]) == 0
    assert "1 unchanged" in capsys.readouterr().err


def test_the_segmentation_is_scored_as_it_is_and_changes_are_told(tmp_path):
    made = predictions(tmp_path, 1)
    assert main(made.words) == 0
    before = made.summary()
    assert main([*made.words, "--calibrator", str(calibrator(made, method=VectorScaling.key, **OWN))]) == 0
    after = made.summary()
    assert_same(after["mean"], before["mean"])
    p = np.stack(list(ProbabilityFile(made.prediction / "case_00.npz").channels()))
    z = np.log(np.maximum(p, 2.0**-126)).reshape(3, -1).astype(np.float64)
    moved = np.array(OWN["slope"])[:, None] * z + np.array(OWN["offset"])[:, None]
    changed = np.count_nonzero(moved.argmax(axis=0) != z.argmax(axis=0))
    assert changed > 0
    (note,) = after["metric_per_case"][0]["notes"]
    assert note.startswith(f"{changed} voxels of the segmentation")


def test_a_calibrator_of_another_model_is_refused_unless_told(tmp_path, capsys):
    made = predictions(tmp_path, 1)
    file = calibrator(made, temperature=2.0, model={"classes": ["0", "1", "7"]})
    assert main([*made.words, "--calibrator", str(file)]) == 1
    assert "another model" in capsys.readouterr().err
    assert not made.output.exists()
    assert main([*made.words, "--calibrator", str(file), "--any-model"]) == 0


@pytest.mark.parametrize("content", ["{}", "no JSON"])
def test_a_file_that_is_no_calibrator(tmp_path, capsys, content):
    made = predictions(tmp_path, 1)
    file = tmp_path / "calibrator.json"
    file.write_text(content)
    assert main([*made.words, "--calibrator", str(file)]) == 1
    assert str(file) in capsys.readouterr().err
