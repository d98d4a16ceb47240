"""`scripts/check_gpu.py` runs where there is no GPU, says what it did not measure, goes on, and can fail."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield importlib.import_module("check_gpu")
    sys.modules.pop("check_gpu", None)


def test_runs_without_a_gpu_goes_on_and_fails_where_numbers_differ(script, tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    assert script.main(["-o", str(file), "--side", "6"]) == 0
    results = json.loads(file.read_text())
    assert "not measured" in results["made_on"]["device"]
    assert {f"step {key}" for key in script.LOSSES} <= results["checks"].keys()
    assert results["checks"]["step ce"]["seconds"] == "not measured"

    capsys.readouterr()
    assert script.main(["-o", str(file), "--side", "6"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # nothing was left to do

    del results["checks"]["distances"], results["checks"]["loss ce labels float32"]
    file.write_text(json.dumps(results))
    monkeypatch.setattr(script, "apart", lambda ours, theirs: 0.1)
    assert script.main(["-o", str(file), "--side", "6"]) == 1
    checks = json.loads(file.read_text())["checks"]
    assert [name for name, result in checks.items() if not result["passed"]] == ["loss ce labels float32", "distances"]
