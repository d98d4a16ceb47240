"""Rows of the experiments outlive the folder they were made in, and tables are written from them."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")
CASES = 6


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("experiment_hippocampus")
    for name in ("experiment_hippocampus", "tables_hippocampus", "kept"):
        sys.modules.pop(name, None)


@pytest.fixture
def tables(experiment):
    return sys.modules["tables_hippocampus"]


@pytest.fixture
def finished(experiment, tmp_path):
    """Makes a folder with finished rows, by name the NLL of their cases."""

    def make(folder: str, nll: dict[str, list[float]]):
        bench = experiment.Bench(tmp_path / "Dataset004_Toy", tmp_path / folder, "cpu", 1)
        bench.work.mkdir(exist_ok=True)
        bench.machine.write_text(f"machine of {folder}")
        rows = [row for row in experiment.runs() if row.name in nll]
        for row in rows:
            fold, scores = bench.model(row) / "fold_0", bench.work / "scores" / row.name
            fold.mkdir(parents=True, exist_ok=True)
            scores.mkdir(parents=True, exist_ok=True)
            (fold / "checkpoint_final.pth").write_text(f"{folder} {row.name}")
            resolved = {"nnunet_calib_resolved": {"trainer": row.trainer, "dice_weight": 0.6}}
            (bench.model(row) / "plans.json").write_text(json.dumps(resolved))
            (scores / "summary.json").write_text(json.dumps(summary(nll[row.name])))
        return bench, rows

    return make


def summary(nll: list[float]) -> dict:
    def regions(value):
        measures = {"ECE": 0.1, "CECE": 0.1, "NLL": value, "Brier": 0.2}
        return {region: measures for region in ("volume", "reference_foreground", "foreground")}

    cases = [
        {"case": f"case_{i}", "metrics": {"1": {"Dice": 0.8}, "2": {"Dice": 0.6}}, "calibration": regions(value)}
        for i, value in enumerate(nll)
    ]
    return {
        "foreground_mean": {"Dice": 0.7, "HD95": "inf"},
        "calibration_mean": regions(float(np.mean(nll))),
        "metric_per_case": cases,
    }


def test_rows_of_a_new_folder_are_further_runs(experiment, finished, tmp_path):
    file = tmp_path / "kept.json"
    for folder in ("first", "second", "second"):
        bench, rows = finished(
            folder, {"StockTrainer__full": [0.5] * CASES, "MbLSTrainer__switch_dice1": [0.4] * CASES}
        )
        for row in rows:
            experiment.keep(bench, row, file)
    kept = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in kept] == [
        "StockTrainer__full",
        "MbLSTrainer__switch_dice1",
        "StockTrainer__full_run2",
        "MbLSTrainer__switch_dice1_run2",
    ]
    assert [(row["run"], row["machine"]) for row in kept[::2]] == [(1, "machine of first"), (2, "machine of second")]
    assert kept[0]["means"]["HD95 mm"] == "inf"


def test_a_row_is_compared_case_by_case_with_the_mean_of_all_stock_runs(experiment, tables, finished, tmp_path):
    """By hand: 0.1 less than the mean of 0.5 and 0.7 in every case, so the interval has no width."""
    nll = {
        "StockTrainer__full": [0.5 + i for i in range(CASES)],
        "StockTrainer__full_run2": [0.7 + i for i in range(CASES)],
        "NACLTrainer__switch_dice1": [0.5 + i for i in range(CASES)],
    }
    bench, rows = finished("work", nll)
    for row in rows:
        experiment.keep(bench, row, tmp_path / "kept.json")
    kept = experiment.read_rows(tmp_path / "kept.json")
    found = tables.differences(next(row for row in kept if row["loss"] == "NACL"), kept)
    assert found[0] == "mean of 2"
    assert found[2] == "-0.1000 [-0.1000, -0.1000]"


def test_what_goes_on_from_a_stock_network_is_compared_with_stock_that_goes_on_from_the_same(
    experiment, tables, finished, tmp_path
):
    values = {"StockTrainer__full": 0.9, "StockTrainer__refine": 0.6, "NACLTrainer__refine_dice0p3": 0.5}
    for folder, more in (("first", 0.0), ("second", 1.0)):
        bench, rows = finished(folder, {name: [value + more] * CASES for name, value in values.items()})
        for row in rows:
            experiment.keep(bench, row, tmp_path / "kept.json")
    kept = experiment.read_rows(tmp_path / "kept.json")
    for run in (1, 2):
        row = next(row for row in kept if row["loss"] == "NACL" and row["run"] == run)
        assert tables.differences(row, kept)[:3:2] == [f"run {run}", "-0.1000 [-0.1000, -0.1000]"]


def test_a_pair_is_compared_with_the_stock_network_whose_first_part_it_shares(experiment, tables, finished, tmp_path):
    """By hand: 0.2 less than its own stock network in one pair, 0.4 less in the other."""
    nll = {
        "StockTrainer__pair": 0.9,
        "MEEPTrainer__pair": 0.7,
        "StockTrainer__pair_run2": 0.6,
        "MEEPTrainer__pair_run2": 0.2,
    }
    bench, rows = finished("work", {name: [value] * CASES for name, value in nll.items()})
    for row in rows:
        experiment.keep(bench, row, tmp_path / "kept.json")
    kept = experiment.read_rows(tmp_path / "kept.json")
    found = [tables.differences(row, kept)[:3:2] for row in kept if row["loss"] == "MEEP"]
    assert found == [["run 1", "-0.2000 [-0.2000, -0.2000]"], ["run 2", "-0.4000 [-0.4000, -0.4000]"]]
    assert "| MEEP | **`-tr` alone** | 1, 2 |" in "\n".join(tables.by_pair(kept))
    assert "-0.3000 (-0.200, -0.400)" in "\n".join(tables.by_pair(kept))


def test_all_trainers_of_a_pair_go_on_from_one_checkpoint_of_stock(experiment, tmp_path):
    """The checkpoint that nnU-Net deletes at the end is kept, and says that the other trainer's settings hold."""
    bench = experiment.Bench(tmp_path / "Dataset004_Toy", tmp_path / "work", "cpu", 1)
    rows = {row.name: row for row in experiment.runs()}
    stock, ours = rows["StockTrainer__pair"], rows["MEEPTrainer__pair"]
    fold = bench.model(stock) / "fold_0"
    fold.mkdir(parents=True)
    (bench.work / "logs").mkdir()
    plans = {"nnunet_calib_resolved": {"trainer": "StockTrainer"}}
    writes = (
        "import os, sys, time, torch; latest = sys.argv[1] + '/checkpoint_latest.pth'; "
        f"torch.save({{'current_epoch': 6, 'init_args': {{'plans': {plans}}}}}, latest); "
        "time.sleep(4); os.remove(latest)"
    )
    bench.call("train", [sys.executable, "-c", writes, str(fold)], link_from=fold)
    assert not (fold / "checkpoint_latest.pth").exists()
    bench.take_first_part(ours, bench.model(ours) / "fold_0")
    taken = torch.load(bench.model(ours) / "fold_0" / "checkpoint_latest.pth", weights_only=True)
    settings = {"trainer": "MEEPTrainer", **ours.settings}
    assert taken == {"current_epoch": 6, "init_args": {"plans": {"nnunet_calib_resolved": settings}}}


def test_without_values_by_case_there_is_no_interval(experiment, tables, finished, tmp_path):
    bench, rows = finished("work", {"StockTrainer__full": [0.5] * CASES, "NACLTrainer__switch_dice1": [0.4] * CASES})
    for row in rows:
        experiment.keep(bench, row, tmp_path / "kept.json")
    stock, ours = experiment.read_rows(tmp_path / "kept.json")
    stock["cases"] = None
    assert tables.differences(ours, [stock, ours])[:3] == ["mean of 1, unpaired", "+0.0000", "-0.1000"]


def test_the_committed_rows_make_the_tables(experiment, tables):
    text = tables.tables(experiment.read_rows(experiment.KEPT))
    assert "| Stock | stock Dice+CE | 1 | a | 0.840 | 2.07 | 0.0078 |" in text
    assert "| NACL | from scratch, Dice weight 1 | 1 | run 1 | -0.0066 [-0.0194, +0.0048] |" in text
