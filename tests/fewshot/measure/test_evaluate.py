"""Evaluation: the same maps as fit and apply give, every pair once, both protocols in one table."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_calib.cli.main import main
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.apply.folder import apply_folder
from nnunet_calib.fewshot.measure.cache import FeatureCache
from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
from nnunet_calib.fewshot.measure.pairs import read_pairs
from nnunet_calib.fewshot.measure.trials import grid
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.network.predictor import FeaturePredictor
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.task.adapter_training import AdapterSettings
from nnunet_calib.fewshot.volume.files import read_volume

from ..conftest import STRUCTURE, Supports, write_case
from ..hosts import phantom

ALL = 1_000_000  # voxels: the samples hold every voxel, whatever their seed


@pytest.fixture(scope="module")
def evaluated(supports, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    trials = grid(["linear", "prototype"], [2], ["aligned"], [1, 2], entropies=[None, 0.1])
    return output, run(supports, output, trials)


def run(supports, output, trials, **options):
    given = {"name": "ball", "value": STRUCTURE, "trials": trials, "voxels": ALL, "progress": False} | options
    return evaluate_folder(supports.model, supports.root / "images", supports.root / "labels", output, **given)


def timeless(rows) -> str:
    """All of the rows that is the same when it is computed again."""
    return repr([{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows])


def test_features_from_disk_are_the_predictors(supports, tmp_path):
    model = BaseModel(supports.model)
    volume = read_volume(model, "case_0", [supports.root / "images" / "case_0_0000.nii.gz"])
    predictor = FeaturePredictor(model)
    cached = FeatureCache(tmp_path, model, lambda: predictor).predict("case_0", volume.image)
    weights = [torch.randn(3, predictor.features.size, generator=torch.Generator().manual_seed(0))] * predictor.folds
    direct = predictor.predict(torch.from_numpy(volume.image), weights)
    torch.testing.assert_close(cached.base, direct.base.float(), rtol=0, atol=0)
    half = 2e-3 * float(weights[0].abs().sum(dim=1).max())
    for ours, theirs in zip(cached.projected(weights), direct.projected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=half)
    index = np.arange(0, volume.image[0].size, 7)
    for ours, maps in zip(cached.sampled(index), cached.projected([torch.eye(predictor.features.size)]), strict=True):
        torch.testing.assert_close(ours, maps.flatten(1).T[index])


def test_a_pair_scores_what_fit_and_apply_make(supports, evaluated, tmp_path):
    output, _ = evaluated
    (record,) = [
        record
        for record in read_pairs(output / "pairs.jsonl")
        if (record["protocol"], record["head"], record["k"], record["query"], record["entropy"])
        == ("P2", "linear", 2, "case_2", None)
    ]
    for folder in ("images", "labels", "query"):
        (tmp_path / folder).mkdir()
    for case in record["supports"]:
        for name in (f"images/{case}_0000.nii.gz", f"labels/{case}.nii.gz"):
            (tmp_path / name).symlink_to(supports.root / name)
    (tmp_path / "query" / "case_2_0000.nii.gz").symlink_to(supports.root / "images" / "case_2_0000.nii.gz")
    twin = type(supports).__new__(type(supports))
    twin.root, twin.model = tmp_path, supports.model
    twin.fit(tmp_path / "ball.fewshot", settings=Settings(chunks=2), voxels=ALL)
    (report,) = apply_folder(
        supports.model, [tmp_path / "ball.fewshot"], tmp_path / "query", tmp_path / "out", merge=False, progress=False
    )
    told = report["structures"]["ball"]
    assert told["expected_volume_mm3"] == pytest.approx(record["expected_mm3"])
    assert told["presence_score"] == pytest.approx(record["presence"], abs=0.3)  # features in half precision


def test_adapters_are_trained_for_each_set_of_supports_as_fit_trains_them(supports, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "nnunet_calib.fewshot.task.adapter_training.AdapterSettings", partial(AdapterSettings, steps=20)
    )
    write_case(tmp_path, "query", 9)
    trials = grid(["adapter"], [2, 12], ["aligned"], [1, 3], most_sets=1)
    assert [(trial.protocol, trial.settings.chunks, trial.k) for trial in trials] == [("P2", 1, 3)]
    folders = {"query_images": tmp_path / "images", "query_labels": tmp_path / "labels"}
    (row,) = run(supports, tmp_path / "evaluated", trials, **folders)
    (record,) = read_pairs(tmp_path / "evaluated" / "pairs.jsonl")
    assert (row["head"], row["k"], record["supports"]) == ("adapter", 3, ["case_0", "case_1", "case_2"])
    task = tmp_path / "ball.fewshot"
    supports.fit(task, settings=Settings("adapter", chunks=1), voxels=ALL)
    (report,) = apply_folder(supports.model, [task], tmp_path / "images", tmp_path / "out", merge=False, progress=False)
    assert report["structures"]["ball"]["expected_volume_mm3"] == pytest.approx(record["expected_mm3"])
    assert report["structures"]["ball"]["presence_score"] == pytest.approx(record["presence"], rel=1e-3)
    with pytest.raises(UsageError, match="k of 3 or more"):
        grid(["adapter"], [1], ["aligned"], [1, 2])


def test_both_protocols_are_in_one_table(evaluated):
    output, rows = evaluated
    content = json.loads((output / "summary.json").read_text())
    assert [row["protocol"] for row in content["rows"]] == [row["protocol"] for row in rows]
    told = {(row["protocol"], row["head"], row["k"], row["entropy"]): row for row in rows}
    assert told.keys() == {
        *(("P1", head, 1, None) for head in ("linear", "prototype")),
        *(("P2", head, k, None) for head in ("linear", "prototype") for k in (1, 2)),
        *(("P2", "linear", k, 0.1) for k in (1, 2)),
    }
    # three cases: each of three supports with two queries; each pair of supports with the third
    assert told["P2", "linear", 1, None]["pairs"] == 6
    assert told["P2", "linear", 2, None]["pairs"] == 3
    assert told["P1", "linear", 1, None]["pairs"] == 3
    assert all(row["Dice_worst_tenth"] <= row["Dice"] for row in rows)


def test_the_oracle_is_named_where_it_is_used_and_only_there(evaluated):
    output, _ = evaluated
    with (output / "pairs.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert {(line["protocol"], line["extent"]) for line in lines} == {("P1", "oracle"), ("P2", "aligned")}


def test_pairs_that_are_there_are_not_computed_again(supports, evaluated, monkeypatch):
    output, rows = evaluated
    monkeypatch.setattr("nnunet_calib.fewshot.measure.pair.fit_structure", None)
    trials = grid(["linear", "prototype"], [2], ["aligned"], [1, 2], entropies=[None, 0.1])
    assert repr(run(supports, output, trials)) == repr(rows)


def test_published_refinements_are_trials_of_their_own(supports, tmp_path):
    trials = grid(["linear", "prototype"], [2], ["aligned"], [2], ["P2"], most_sets=1, refinements=["repri", "tim"])
    rows = run(supports, tmp_path, trials)
    told = {(row["head"], row["refinement"]): row for row in rows}
    assert told.keys() == {("linear", None), ("linear", "repri"), ("linear", "tim"), ("prototype", None)}
    assert told["linear", "repri"]["entropy"] == 0.5  # 1 / k
    assert len({told["linear", name]["NLL_volume"] for name in (None, "repri", "tim")}) == 3


def test_a_line_that_was_cut_off_is_computed_again(supports, evaluated, tmp_path):
    lines = (evaluated[0] / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    trials = grid(["linear", "prototype"], [2], ["aligned"], [1, 2], entropies=[None, 0.1])
    run(supports, tmp_path, trials)
    assert len(read_pairs(tmp_path / "pairs.jsonl")) == len(lines)


def test_p1_scores_nothing_outside_the_structures_own_extent(supports, evaluated):
    # the ball of the phantom fills less than half of the volume: outside, everything is right and easy
    records = [r for r in read_pairs(evaluated[0] / "pairs.jsonl") if r["head"] == "linear" and r["k"] == 1]
    paper = [r["NLL_volume"] for r in records if r["protocol"] == "P1"]
    assert len(paper) == 3
    assert all(np.isfinite(paper))


def test_the_command_writes_and_prints_the_table(supports, tmp_path, capsys):
    words = ["fewshot", "evaluate", str(supports.model), "--images", str(supports.root / "images")]
    words += ["--labels", str(supports.root / "labels"), "--label", str(STRUCTURE), "--name", "ball"]
    words += ["--heads", "prototype", "--chunks", "1", "-k", "1", "--sets", "1", "--voxels", "500"]
    words += ["-device", "cpu", "--disable_tta", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:3]] == ["protocol", "P1", "P2"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "features",
        "pairs.csv",
        "pairs.jsonl",
        "registrations",
        "summary.json",
    }


def test_volumes_without_the_structure_are_queries_only(supports, tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder in (images, labels):
        folder.mkdir()
    for i in range(3):
        (images / f"case_{i}_0000.nii.gz").symlink_to(supports.root / "images" / f"case_{i}_0000.nii.gz")
        (labels / f"case_{i}.nii.gz").symlink_to(supports.root / "labels" / f"case_{i}.nii.gz")
    nothing = np.zeros(phantom(9)[1].shape, dtype=bool)
    write_case(tmp_path, "case_9", 9, structure=nothing, image=phantom(9)[0] * ~phantom(9)[1])
    trials = grid(["linear"], [1], ["aligned"], [2])
    evaluate_folder(
        supports.model, images, labels, tmp_path / "out", name="ball", value=STRUCTURE, trials=trials, voxels=2000,
        progress=False,
    )  # fmt: skip
    records = read_pairs(tmp_path / "out" / "pairs.jsonl")
    assert {name for record in records for name in record["supports"]} == {"case_0", "case_1", "case_2"}
    assert {record["query"] for record in records if record["protocol"] == "P1"} == {"case_0", "case_1", "case_2"}
    assert "case_9" in {record["query"] for record in records if record["protocol"] == "P2"}


def test_cases_in_another_orientation_are_turned_as_fit_and_apply_turn_them(tmp_path):
    straight, turned = Supports(tmp_path / "straight"), tmp_path / "turned"
    for i in range(3):
        write_case(turned, f"case_{i}", i, "PIR" if i == 1 else "LPS")
    trials = grid(["linear"], [2], ["aligned"], [2])
    given = {"name": "ball", "value": STRUCTURE, "trials": trials, "voxels": ALL, "progress": False}
    for root in (straight.root, turned):
        evaluate_folder(straight.model, root / "images", root / "labels", root / "out", **given)
    ours, theirs = (read_pairs(root / "out" / "pairs.jsonl") for root in (turned, straight.root))
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert one["query"] == other["query"]
        assert one["Dice"] == pytest.approx(other["Dice"], abs=1e-6)
        assert one["HD95"] == pytest.approx(other["HD95"], abs=1e-6)


def test_no_support_with_the_structure_is_refused(supports, tmp_path):
    with pytest.raises(InputError, match="no label map holds 77"):
        run(supports, tmp_path, grid(["linear"], [1], ["aligned"], [1]), value=77)


def test_more_volumes_than_there_are_are_refused(supports, tmp_path):
    with pytest.raises(UsageError, match="k = 7 volumes of 3 supports"):
        run(supports, tmp_path, grid(["linear"], [1], ["aligned"], [7], ["P2"]))


def test_a_case_cannot_be_support_and_query(supports, tmp_path):
    with pytest.raises(UsageError, match="case_0 is both a support and a query"):
        run(
            supports,
            tmp_path,
            [],
            query_images=supports.root / "images",
            query_labels=supports.root / "labels",
        )


def test_pairs_made_from_something_else_are_computed_again_and_leave_the_table(supports, evaluated, tmp_path):
    """Another label, other files and other options each: never the old numbers."""
    trials = grid(["prototype"], [2], ["aligned"], [1], ["P2"])
    first = run(supports, tmp_path, trials, voxels=2000)
    (tmp_path / "labels").mkdir()
    for file in (supports.root / "labels").iterdir():
        image = sitk.ReadImage(str(file))
        rolled = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), 4, axis=0))
        rolled.CopyInformation(image)
        sitk.WriteImage(rolled, str(tmp_path / "labels" / file.name))
    given = {"name": "ball", "value": STRUCTURE, "trials": trials, "voxels": 2000, "progress": False}
    rolled = evaluate_folder(supports.model, supports.root / "images", tmp_path / "labels", tmp_path, **given)
    assert [row["pairs"] for row in rolled] == [row["pairs"] for row in first]
    assert rolled[0]["Dice"] != first[0]["Dice"]
    assert timeless(run(supports, tmp_path, trials, voxels=2000)) == timeless(first)
    other = run(supports, tmp_path, grid(["prototype"], [1], ["aligned"], [1], ["P2"]), voxels=2000, mirroring=False)
    assert [row["chunks"] for row in other] == [1], "what was predicted with mirroring is in no table without"
    assert json.loads((tmp_path / "summary.json").read_text())["about"]["pairs_left_out"] == 6


def test_cases_are_read_again_where_memory_has_no_room_for_all(supports, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_calib.fewshot.measure.case.MEMORY", 0)
    trials = grid(["prototype"], [2], ["aligned"], [1], ["P2"])
    (row,) = run(supports, tmp_path, trials)
    (same,) = [r for r in evaluated[1] if (r["head"], r["k"], r["protocol"]) == ("prototype", 1, "P2")]
    assert row["Dice"] == same["Dice"]


def test_what_does_not_count_is_in_no_score_and_options_tell_rows_apart(supports, tmp_path):
    """A value for voxels that do not count, put where the head is wrong, and another margin and axis."""
    trials = grid(["prototype"], [2], ["aligned"], [1], ["P2"], margin=0.9, axis=0)
    plain = run(supports, tmp_path / "a", trials)
    assert [(row["margin"], row["axis"]) for row in plain] == [(0.9, 0)]
    both = run(supports, tmp_path / "a", grid(["prototype"], [2], ["aligned"], [1], ["P2"]))
    assert len({(row["margin"], row["axis"]) for row in both}) == len({row["Dice"] for row in both}) == 2
    (tmp_path / "labels").mkdir()
    for file in (supports.root / "labels").iterdir():
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        array[(array == 0) & (np.indices(array.shape)[0] < 8)] = 9  # a good part of the background
        made = sitk.GetImageFromArray(array)
        made.CopyInformation(image)
        sitk.WriteImage(made, str(tmp_path / "labels" / file.name))
    given = {"name": "ball", "value": STRUCTURE, "trials": trials, "voxels": ALL, "progress": False}
    folders = (supports.model, supports.root / "images", tmp_path / "labels", tmp_path / "b")
    (row,) = evaluate_folder(*folders, ignore=9, inside=[1], **given)
    assert row["Dice"] > plain[0]["Dice"]
    about = json.loads((tmp_path / "b" / "summary.json").read_text())["about"]
    assert (about["ignore"], about["inside"]) == (9, [1])
    with pytest.raises(UsageError, match="--inside 7: the model's labels are 0, 1, 2"):
        evaluate_folder(*folders, inside=[7], **given)
