"""``nnunet-calib calibrate``: its three steps, exit codes, one line for every error."""

import json

import numpy as np
import pytest

from nnunet_calib.cli import calibrate
from nnunet_calib.cli.main import main
from nnunet_calib.posthoc import CALIBRATORS
from nnunet_calib.posthoc.folders.sampling import REGIONS, VOXELS

from ..folders import Folders, ambiguous

SHAPE = (8, 20, 18)


@pytest.fixture
def folders(tmp_path):
    made = Folders(tmp_path)
    for seed in range(3):
        reference, p = ambiguous(seed, SHAPE)
        made.add(f"case_{seed}", reference, p.argmax(axis=0), p)
    return made


def fit(made: Folders, *more: str) -> list[str]:
    return ["calibrate", "fit", str(made.prediction), "--reference", str(made.reference), "-o", str(made.output), *more]


def error_lines(capsys) -> list[str]:
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if line.startswith("nnunet-calib")]


def test_fit_apply_check_evaluate(folders, capsys, tmp_path):
    assert main(fit(folders, "--method", "temperature", "vector")) == 0
    printed = capsys.readouterr().out
    for word in ("none", "temperature", "vector", "foreground", "NLL [95 %]", "smallest NLL", "calibrator.json"):
        assert word in printed
    calibrated = tmp_path / "calibrated"
    words = ["-i", str(folders.prediction)]
    assert main(["calibrate", "apply", str(folders.output), *words, "-o", str(calibrated)]) == 0
    assert "3 cases calibrated" in capsys.readouterr().out
    assert main(["calibrate", "check", str(folders.output), *words]) == 0
    assert "these cases look like those of the fit" in capsys.readouterr().out
    nll = []
    for prediction in (folders.prediction, calibrated):
        scores = tmp_path / f"scores_{prediction.name}"
        assert main(["evaluate", str(folders.reference), str(prediction), "-o", str(scores), "-np", "1"]) == 0
        summary = json.loads((scores / "summary.json").read_text())
        nll.append(summary["calibration_mean"]["volume"]["NLL"])
    assert nll[1] <= nll[0]
    assert summary["protocol"]["calibrated_from"]["method"] in ("temperature", "vector", "none")
    assert "probabilities calibrated before: " in capsys.readouterr().out


def test_the_estimated_scores_are_those_of_the_evaluation(folders, capsys, tmp_path):
    """Small volumes are sampled whole, so the table's first row is the evaluation's."""
    assert main(fit(folders, "--method", "temperature")) == 0
    ours = json.loads((folders.output / "calibrator.json").read_text())["cross_fit"]["none"]
    words = [str(folders.reference), str(folders.prediction), "-o", str(tmp_path / "scores"), "-np", "1", "--boundary"]
    assert main(["evaluate", *words]) == 0
    theirs = json.loads((tmp_path / "scores" / "summary.json").read_text())["calibration_mean"]
    for region in REGIONS:
        for score in ("NLL", "Brier", "ECE", "CECE"):
            assert ours[region][score]["mean"] == pytest.approx(theirs[region][score], rel=1e-4)


def test_the_temperature_is_printed_and_labels_stay(folders, capsys, tmp_path):
    assert main(fit(folders, "--method", "temperature", "--region", "boundary", "--seed", "3")) == 0
    content = json.loads((folders.output / "calibrator.json").read_text())
    assert (content["region"], content["seed"]) == ("boundary", 3)
    assert f"temperature {content['temperature']:.4g}" in capsys.readouterr().out
    words = ["-i", str(folders.prediction), "-o", str(tmp_path / "calibrated")]
    assert main(["calibrate", "apply", str(folders.output / "calibrator.json"), *words]) == 0
    assert "segmentations unchanged" in capsys.readouterr().out


def test_a_shift_is_warned_of(folders, capsys, tmp_path):
    assert main(fit(folders, "--method", "temperature")) == 0
    other = Folders(tmp_path / "other")
    for seed in range(3):
        reference, p = ambiguous(seed, SHAPE)
        flat = (p**0.2 / (p**0.2).sum(axis=0)).astype(np.float32)
        other.add(f"case_{seed}", reference, flat.argmax(axis=0), flat)
    capsys.readouterr()
    assert main(["calibrate", "check", str(folders.output), "-i", str(other.prediction)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith("these cases do not look like those of the fit")
    assert "mean confidence in the predicted foreground: 0." in printed.out
    assert "nnunet-calib calibrate: warning: the confidences of these cases" in printed.err


def test_cases_without_probabilities_are_told(folders, capsys, tmp_path):
    assert main(fit(folders, "--method", "temperature")) == 0
    (folders.prediction / "case_1.npz").unlink()
    capsys.readouterr()
    for words in (["apply", "-o", str(tmp_path / "calibrated")], ["check"]):
        step, *more = words
        assert main(["calibrate", step, str(folders.output), "-i", str(folders.prediction), *more]) == 0
        assert "1 case without probabilities left out: case_1\n" in capsys.readouterr().out


def test_nothing_to_compare(folders, capsys, tmp_path):
    assert main(fit(folders, "--method", "temperature")) == 0
    empty = Folders(tmp_path / "empty")
    p = np.zeros((len(ambiguous(0, SHAPE)[1]), *SHAPE), dtype=np.float32)
    p[0] = 1
    empty.add("case_0", p.argmax(axis=0), p.argmax(axis=0), p)
    capsys.readouterr()
    assert main(["calibrate", "check", str(folders.output), "-i", str(empty.prediction)]) == 0
    assert "no foreground is predicted in any case" in capsys.readouterr().out


def test_another_model_is_refused_unless_told(folders, capsys, tmp_path):
    plans = folders.prediction / "plans.json"
    plans.write_text(json.dumps({"dataset_name": "Dataset001_Fitted"}))
    assert main(fit(folders, "--method", "temperature")) == 0
    plans.write_text(json.dumps({"dataset_name": "Dataset002_Other"}))
    capsys.readouterr()
    for step, *more in (["apply", "-o", str(tmp_path / "calibrated")], ["check"]):
        words = ["calibrate", step, str(folders.output), "-i", str(folders.prediction), *more]
        assert main(words) == 1
        (line,) = error_lines(capsys)
        assert "other plans" in line
        assert "--any-model" in line
        assert main([*words, "--any-model"]) == 0
        capsys.readouterr()


def test_what_the_command_offers_is_what_there_is():
    assert tuple(CALIBRATORS) == calibrate._METHODS
    assert calibrate._REGIONS == REGIONS
    assert VOXELS == 10_000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fit", "nowhere", "-o", "out"], 2, "not a folder"),
        (["fit", "PRED", "-o", "out"], 2, "--reference"),
        (["fit", "PRED", "--reference", "REF", "-o", "out", "--voxels", "0"], 2, "1 or more"),
        (["fit", "PRED", "--reference", "REF", "-o", "PRED/dataset.json"], 2, "cannot be made a folder"),
        (["apply", "nowhere.json", "-i", "PRED", "-o", "out"], 1, "nowhere.json"),
        (["apply", "PRED/dataset.json", "-i", "PRED", "-o", "out"], 1, "not a calibrator"),
        (["apply", "PRED/dataset.json", "-i", "PRED", "-o", "PRED"], 2, "another folder"),
        (["check", "PRED/dataset.json", "-i", "PRED"], 1, "not a calibrator"),
        (["check", "PRED/dataset.json", "-i", "nowhere"], 2, "not a folder"),
    ],
)
def test_errors_in_one_line(folders, capsys, monkeypatch, words, code, message):
    monkeypatch.chdir(folders.output.parent)
    names = {"PRED": folders.prediction.name, "REF": folders.reference.name}
    words = [word.replace("PRED", names["PRED"]).replace("REF", names["REF"]) for word in words]
    assert main(["calibrate", *words]) == code
    (line,) = error_lines(capsys)
    assert line.startswith("nnunet-calib calibrate: ")
    assert message in line


def test_no_probabilities_at_all(folders, capsys):
    for file in folders.prediction.glob("*.npz"):
        file.unlink()
    assert main(fit(folders)) == 1
    assert "--save_probabilities" in error_lines(capsys)[0]


@pytest.mark.parametrize(
    "words", [["fit"], ["apply", "x"], ["check", "x"], [], ["fit", "x", "-o", "y", "--method", "best"]]
)
def test_bad_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", *words])
    assert caught.value.code == 2
