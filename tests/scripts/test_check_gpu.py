"""`scripts/check_gpu.py` runs where there is no GPU, says what it did not measure, goes on, and can fail."""

import json
import math

import check_gpu
import gpu_host
import pytest
from gpu_host import Host

QUICK = [
    "--device",
    "cpu",
    "--small",
    "--only",
    "loss ce *",
    "loss step ce",
    "distances",
    "calibration",
    "* 2 GPUs DCA*",
]


def test_runs_without_a_gpu_goes_on_and_fails_where_numbers_differ(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    assert check_gpu.main(["-o", str(file), *QUICK]) == 0
    results = json.loads(file.read_text())
    assert "not measured" in results["made_on"]["device"]
    assert len(results["checks"]) == 6
    assert results["checks"]["loss step ce"]["seconds"] == "not measured"
    assert "not measured" in results["checks"]["train on 2 GPUs DCATrainer"]["result"]

    capsys.readouterr()
    assert check_gpu.main(["-o", str(file), *QUICK]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # nothing was left to do

    del results["checks"]["distances"], results["checks"]["loss ce labels float32"]
    file.write_text(json.dumps(results))
    monkeypatch.setattr(check_gpu, "apart", lambda ours, theirs: 0.1)
    assert check_gpu.main(["-o", str(file), *QUICK]) == 1
    checks = json.loads(file.read_text())["checks"]
    assert {name for name, result in checks.items() if not result["passed"]} == {"loss ce labels float32", "distances"}


def test_all_that_only_a_gpu_shows_is_in_the_list(tmp_path):
    names = check_gpu.checks(Host(tmp_path, "cuda", None, small=False), 128)
    for loss in check_gpu.LOSSES:
        for kind in ("labels float32", "labels float16", "regions float32", "regions float16"):
            assert f"loss {loss} {kind}" in names
    for trainer in check_gpu.TRAINERS:
        assert {f"train {trainer}", f"step {trainer}"} <= {*names}
    assert {"distances", "calibration", "predict", "evaluate"} <= {*names}
    assert list(names).index(f"train {check_gpu.PREDICTS}") < list(names).index("predict")


def test_a_check_that_ends_the_process_fails_and_the_next_ones_run(tmp_path, monkeypatch):
    def ended(self, name):
        raise SystemExit("nnunet-calib: no")

    monkeypatch.setattr(Host, "train", ended)
    file = tmp_path / "gpu.json"
    words = ["-o", str(file), "--device", "cpu", "--small", "--only", "train CETrainer", "evaluate", "loss ce labels*"]
    monkeypatch.setattr(Host, "evaluate", lambda self: {"passed": True})
    assert check_gpu.main(words) == 1
    checks = json.loads(file.read_text())["checks"]
    assert checks["train CETrainer"]["error"] == "SystemExit: nnunet-calib: no"
    assert [name for name, result in checks.items() if result["passed"]] == ["loss ce labels float32", "evaluate"]


def test_a_trainers_step_is_held_against_the_stock_loss(tmp_path):
    results = {"step StockTrainer": {"seconds": 2.0, "mib": 10.0}, "step CETrainer": {"seconds": 3.0, "mib": 10.0}}
    results["step ACETrainer"] = {"seconds": "not measured", "mib": "not measured"}
    check_gpu.over_stock(results)
    assert results["step CETrainer"]["seconds_over_stock"] == 1.5
    assert "seconds_over_stock" not in results["step ACETrainer"]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": [1.0, "nan"], "b": 2}, {"a": [1.0, "nan"], "b": 2}, (2, 0.0)),
        ({"a": 100.0}, {"a": 101.0}, (1, 1 / 101)),
        ({"a": 1.0}, {"b": 1.0}, (0, math.inf)),
        ([1.0, 2.0], [1.0], (0, math.inf)),
        ("inf", 3.0, (0, math.inf)),
    ],
)
def test_records_are_compared_number_by_number(ours, theirs, expected):
    assert gpu_host._apart(ours, theirs) == pytest.approx(expected)
