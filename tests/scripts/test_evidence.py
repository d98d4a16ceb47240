"""The evidence harness: patients stay together, trainings come after what they start from, pages say what rows give."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_calib.evaluation import evaluate_folder

from ..posthoc.predictions import predictions

EVIDENCE = Path(__file__).resolve().parents[2] / "scripts" / "evidence"
CASES = [f"patient{p:03d}_frame{f:02d}" for p in range(20) for f in (1, 12)]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    loaded = []

    def load(name: str):
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture
def acdc(module):
    return module("protocol").Protocol.read(EVIDENCE / "protocols" / "acdc2d.json")


def test_the_volumes_of_a_patient_stay_together_in_split_and_folds(acdc):
    train, validation = acdc.split(CASES)
    assert sorted(train + validation) == CASES
    assert len(validation) == 12
    assert not {acdc.group(case) for case in train} & {acdc.group(case) for case in validation}
    folds = acdc.folds(validation)
    assert sorted(sum(folds, [])) == validation
    groups = [{acdc.group(case) for case in fold} for fold in folds]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6


def test_pairs_start_from_stock_of_the_same_run(acdc):
    nacl = acdc.training("nacl_2")
    assert (nacl.shares, nacl.start_name) == (True, "stock_2")


@pytest.mark.usefixtures("module")
def test_test_cases_that_are_closed_stay_so(monkeypatch, tmp_path, capsys):
    words = ["evidence", "test", str(EVIDENCE / "protocols" / "scribbles2d.json"), "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EVIDENCE / "__main__.py"), run_name="__main__")
    assert "the test cases are closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        ([{"label": "meep", "trainer": "MEEPTrainer", "start": "shared stock"}], "not before it"),
        ([{"label": "a", "trainer": "T"}, {"label": "a", "trainer": "T"}], "twice"),
        ([{"label": "a", "trainer": "T", "seed": 1}], "unknown keys"),
    ],
)
def test_protocols_without_meaning_are_refused(module, tmp_path, queue, message):
    file = tmp_path / "protocol.json"
    file.write_text(json.dumps({"name": "x", "queue": queue}))
    with pytest.raises(ValueError, match=message):
        module("protocol").Protocol.read(file)


def test_every_page_says_what_its_rows_give(module):
    for page in module("pages").all_pages():
        assert list(page.differences(page.file.read_text())) == []


def test_a_changed_number_of_a_table_is_found(module):
    page = module("page_calibration").PAGE
    text = page.file.read_text()
    changed = text.replace("| isotonic | 0.0394 | 0.0028 |", "| isotonic | 0.0394 | 0.0029 |")
    assert changed != text
    assert len(list(page.differences(changed))) == 1


def test_a_number_of_the_prose_is_that_of_its_mark_and_none_is_without_source(module, tmp_path):
    page = module("pages").Page(tmp_path / "page.md", {}, {"DSC of stock": 0.79285, "change": -0.05123}.__getitem__)
    text = "DSC 0.793<!-- = DSC of stock -->, 79 %<!-- = DSC of stock -->; -0.051<!-- = change -->."
    assert list(page.differences(text)) == []
    assert list(page.differences(text.replace("0.793", "0.794"))) != []
    assert list(page.differences(text.replace("-0.051<", "+0.051<"))) != []
    assert list(page.differences(text + " So 0.2 is gained.")) == [
        "page.md: no row gives the 0.2 of 'DSC , ; . So 0.2 is gained.'"
    ]


def test_the_tables_are_means_and_differences_by_patient_of_the_row_files(module, acdc, tmp_path):
    """A patient's value is the mean of its volumes; a difference is paired; both against a computation by hand."""
    scores, tables = module("scores"), module("tables")
    rng = np.random.default_rng(0)
    values = {}
    for name in ("stock_1", "stock_2", "meep_1", "meep_2"):
        lines = []
        for method in ("none", *acdc.content["methods"]):
            drawn = rng.uniform(0.1, 0.9, 12)
            values[name, method] = drawn
            for case, value in zip(CASES[:12], drawn, strict=True):
                overlap = {
                    f"{m} {s}": v for s in "12" for m, v in (("Dice", value), ("HD95", 1), ("n_ref", 9), ("n_pred", 9))
                }
                calibration = {f"{m} {r}": float(value) for r in scores.REGIONS for m in scores.CALIBRATION}
                lines.append({"method": method, "case": case, "changed": 3, **overlap, **calibration})
        scores.write_lines(tmp_path / "acdc2d" / f"{name}.csv", lines)
    rows = tables.Rows(acdc, tmp_path)
    sources = {name: dict.fromkeys(tables.SOURCES, "x") for name in rows.trainings}
    rows.write(sources)
    assert list(tables.Rows(acdc, tmp_path).wrong()) == []

    def change(method, base):
        return sum(values[f"meep_{r}", method] - values[f"stock_{r}", base] for r in (1, 2)) / 2

    effect = rows.effect("meep+isotonic", "stock", "ECE foreground")
    assert effect.patients == 6
    assert effect.mean == pytest.approx(change("isotonic", "none").mean(), abs=1e-5)
    assert effect.low < effect.mean < effect.high
    both = rows.effect("meep+isotonic", "stock+isotonic", "DSC")
    assert both.mean == pytest.approx(change("isotonic", "isotonic").mean(), abs=1e-5)
    assert both.each == pytest.approx(
        [(values[f"meep_{r}", "isotonic"] - values[f"stock_{r}", "isotonic"]).mean() for r in (1, 2)], abs=1e-5
    )
    assert rows.number("ECE volume of stock") == pytest.approx(
        np.mean([values["stock_1", "none"], values["stock_2", "none"]]), abs=1e-5
    )
    index = (tmp_path / "acdc2d.csv").read_text()
    (tmp_path / "acdc2d.csv").write_text(index.replace(",12,36,", ",12,37,", 1))
    assert len(list(tables.Rows(acdc, tmp_path).wrong())) == 1


def test_numbers_of_the_papers_are_those_of_evaluate(module, tmp_path):
    made = predictions(tmp_path)
    scores, tables = module("scores"), module("tables")
    content = {"name": "x", "group": "case_[0-9]+", "methods": [], "queue": [], "nacl": True}
    protocol = module("protocol").Protocol(tmp_path / "x.json", content)
    options = scores.Options(nacl=True)
    none = dict.fromkeys((f.name[:-7] for f in made.reference.glob("*.nii.gz")), {})
    lines = scores.score_predictions(made.prediction, made.reference, none, options)
    summary = evaluate_folder(made.reference, made.prediction, tmp_path / "scores", processes=1, protocol=options)
    for record, line in zip(summary["metric_per_case"], lines, strict=True):
        assert [line[f"{name} nacl"] for name in scores.PAPERS] == [record["nacl"][name] for name in scores.PAPERS]
    assert tables.Rows(protocol).measures[-4:] == ("DSC nacl", "HD nacl", "ECE nacl", "CECE nacl")
    assert tables.measures(lines[0], tables.Rows(protocol).measures)[-1] == lines[0]["CECE nacl"]


def test_a_case_is_scored_as_evaluate_does_and_calibrated_by_other_patients_alone(module, tmp_path):
    made = predictions(tmp_path)
    scores = module("scores")
    content = {"name": "x", "group": "case_[0-9]+", "methods": ["temperature", "isotonic"], "queue": []}
    protocol = module("protocol").Protocol(tmp_path / "x.json", content)
    calibrators = scores.cross_fitted(protocol, made.prediction, made.reference)
    lines = scores.score_predictions(made.prediction, made.reference, calibrators)
    assert [line["method"] for line in lines] == ["none", "temperature", "isotonic"] * 6

    summary = evaluate_folder(made.reference, made.prediction, tmp_path / "scores", processes=1)
    for record, line in zip(summary["metric_per_case"], lines[::3], strict=True):
        assert line["case"] == record["case"]
        assert line["NLL foreground"] == record["calibration"]["foreground"]["NLL"]
        assert line["HD95 2"] == record["metrics"]["2"]["HD95"]

    # what calibrates a case stays the same when its own reference is another
    case = lines[0]["case"]
    file = made.reference / f"{case}.nii.gz"
    image = sitk.ReadImage(str(file))
    other = sitk.GetImageFromArray(np.flip(sitk.GetArrayFromImage(image), axis=1).copy())
    other.CopyInformation(image)
    sitk.WriteImage(other, str(file))
    again = scores.cross_fitted(protocol, made.prediction, made.reference)
    assert again[case]["temperature"].state() == calibrators[case]["temperature"].state()
    strangers = [name for name in calibrators if calibrators[name] is not calibrators[case]]
    assert all(again[n]["temperature"].state() != calibrators[n]["temperature"].state() for n in strangers)
