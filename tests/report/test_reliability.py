import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from nnunet_calib.data.errors import InputError
from nnunet_calib.evaluation import read_reliability
from nnunet_calib.metrics import Bins, area_under_risk_coverage, scores
from nnunet_calib.report.diagram import calibration_error, reliability_curve, reliability_diagram
from nnunet_calib.report.reliability import TOP, case_risk_coverage, read_reliabilities, risk_coverage
from nnunet_calib.report.runs import parse_runs

from .phantoms import write_phantoms


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    (folder,) = write_phantoms(tmp_path_factory.mktemp("phantoms"), 3, {"stock": 3.0}).values()
    return parse_runs([f"stock={folder}"])[0]


@pytest.fixture
def foreground(run):
    return read_reliabilities([run], list(run.records))["foreground"]


def test_the_errors_are_those_of_the_summary(run, foreground):
    summary = json.loads((run.folder / "summary.json").read_text())
    mean, pooled = (calibration_error(foreground.problems[TOP], how) for how in ("mean", "pooled"))
    assert mean == pytest.approx(summary["calibration_mean"]["foreground"]["ECE"], rel=1e-12)
    assert pooled == pytest.approx(summary["calibration_pooled"]["foreground"]["ECE"], rel=1e-12)
    by_class = summary["calibration_mean"]["foreground"]["classes"]
    assert calibration_error(foreground.problems["2"], "mean") == pytest.approx(by_class["2"]["ECE"], rel=1e-12)


def test_trainings_of_a_method_add_up(run, foreground):
    twice = read_reliabilities([run, run], list(run.records))["foreground"]
    assert (twice.problems[TOP].n == 2 * foreground.problems[TOP].n).all()


def test_a_case_that_is_not_compared_does_not_count(run):
    kept = list(run.records)[:2]
    assert read_reliabilities([run], kept)["volume"].cases == sorted(kept)


def test_the_area_under_the_risk_coverage_curve_is_the_aurc(run, foreground):
    coverage, risk = risk_coverage(foreground.ranked)
    # the mean of the curve over all shares kept, cell by cell: the AURC up to the order within a cell
    area = np.sum(np.diff(np.concatenate([[0], coverage])) * risk)
    assert area == pytest.approx(float(area_under_risk_coverage(foreground.ranked)), abs=2e-3)
    every = read_reliability(run.folder / "reliability.json")
    total = sum((of["foreground"] for of in list(every.values())[1:]), next(iter(every.values()))["foreground"])
    assert float(area_under_risk_coverage(foreground.ranked)) == pytest.approx(
        scores(total, list("012"))["AURC"], rel=1e-9
    )


def test_cases_are_set_aside_from_the_least_confident():
    coverage, risk = case_risk_coverage(np.array([0.5, 0.9, np.nan, 0.7]), np.array([0.4, 0.1, 0.9, 0.3]))
    assert coverage == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk == pytest.approx([0.1, 0.2, 0.8 / 3])


def test_the_curve_is_pooled_or_the_mean_over_cases():
    # a large case that is right in half of its voxels, a small one that always is
    bins = Bins(np.array([[90, 0], [10, 0]]), np.array([[72.0, 0], [8.0, 0]]), np.array([[45, 0], [10, 0]]))
    confidence, pooled, *_ = reliability_curve(bins, "pooled")
    _, mean, low, high = reliability_curve(bins, "mean")
    assert (confidence[0], pooled[0], mean[0]) == pytest.approx((0.8, 0.55, 0.75))
    assert (low[0], high[0]) == pytest.approx((0.625, 0.875))


def test_the_figure_names_region_class_and_aggregation(foreground):
    figure = reliability_diagram({"stock": foreground}, [TOP, "1"], {TOP: TOP, "1": "organ"}, "foreground", "pooled")
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == "region foreground, 3 cases, all voxels pooled"
    titles = [axes.get_title() for axes in figure.axes]
    assert any("organ, ECE 0." in title for title in titles)


def test_a_damaged_file_is_one_line(run, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "summary.json").write_bytes((run.folder / "summary.json").read_bytes())
    (folder / "reliability.json").write_text('{"classes": ["0"], "cases": {"case_000": {"volume": {"voxels": 3}}}}')
    with pytest.raises(InputError, match=r"reliability.json: not a reliability.json"):
        read_reliabilities(parse_runs([str(folder)]), ["case_000"])
