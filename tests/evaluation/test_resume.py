"""A folder again: what is unchanged is not scored twice, and no engine, death or damage changes a number."""

import dataclasses
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunet_calib.cli.main import main
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.evaluation import Protocol, evaluate_folder
from nnunet_calib.evaluation.records import setting

from ..folders import Folders, ambiguous, write_labels

RESULTS = ("summary.json", "cases.csv", "reliability.json")

# Scores as evaluate_case does, but the process that gets the case named deadly dies the first TIMES times.
DEADLY = """
import os
from pathlib import Path
from nnunet_calib.evaluation.case import evaluate_case
def score(files, folder, times, **options):
    if files.name == "case_1":
        tried = len(list(Path(folder).iterdir()))
        if tried < times:
            Path(folder, str(tried)).touch()
            os._exit(9)
    return evaluate_case(files, **options)
"""


def evaluate(folders: Folders, **options) -> dict:
    options = {"processes": 1} | options
    return evaluate_folder(folders.reference, folders.prediction, folders.output, **options)


def results(folders: Folders) -> list[bytes]:
    return [(folders.output / name).read_bytes() for name in RESULTS]


def written(folders: Folders) -> dict[str, int]:
    """When each record was written."""
    return {path.stem: path.stat().st_mtime_ns for path in (folders.output / "cases").iterdir()}


def rewritten(folders: Folders, before: dict[str, int]) -> set[str]:
    after = written(folders)
    return {case for case in after if after[case] != before.get(case)}


@pytest.fixture
def folders(tmp_path):
    """Five cases, one without probabilities, one with a missed structure (whose distances are infinite)."""
    made = Folders(tmp_path)
    for seed in range(4):
        made.add_ambiguous(f"case_{seed}", seed)
    (made.prediction / "case_2.npz").unlink()
    reference, prediction = np.zeros((2, 4, 8, 8), dtype=np.uint8)
    reference[1:3, 2:5, 2:5] = 1
    made.add("missed", reference, prediction)
    return made


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """Make the process of case_1 die; call with how often."""

    def arm(times: int) -> None:
        (tmp_path / "deadly.py").write_text(DEADLY)
        (tmp_path / "tries").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        score = functools.partial(importlib.import_module("deadly").score, folder=str(tmp_path / "tries"), times=times)
        monkeypatch.setattr("nnunet_calib.evaluation.folder.evaluate_case", score)

    yield arm
    sys.modules.pop("deadly", None)


def test_nothing_changed_nothing_scored_same_results(folders):
    evaluate(folders)
    before, first = written(folders), results(folders)
    assert set(before) == {"case_0", "case_1", "case_2", "case_3", "missed"}
    evaluate(folders)
    assert written(folders) == before
    assert results(folders) == first


def test_fresh_scores_all_again(folders):
    evaluate(folders)
    before, first = written(folders), results(folders)
    evaluate(folders, fresh=True)
    assert rewritten(folders, before) == set(before)
    assert results(folders) == first


def new_prediction(folders):
    write_labels(folders.prediction / "case_1.nii.gz", ambiguous(9, (6, 14, 12))[0])


def new_reference(folders):
    write_labels(folders.reference / "case_1.nii.gz", ambiguous(9, (6, 14, 12))[0])


def new_probabilities(folders):
    np.savez_compressed(folders.prediction / "case_1.npz", probabilities=ambiguous(9, (6, 14, 12))[1])


def no_probabilities(folders):
    (folders.prediction / "case_1.npz").unlink()


def touched(folders):
    os.utime(folders.prediction / "case_1.nii.gz", ns=(0, 0))


@pytest.mark.parametrize("change", [new_prediction, new_reference, new_probabilities, no_probabilities, touched])
def test_only_the_case_that_changed_is_scored(folders, change):
    evaluate(folders)
    before = written(folders)
    change(folders)
    again = evaluate(folders)
    assert rewritten(folders, before) == {"case_1"}
    after = results(folders)
    assert evaluate(folders, fresh=True)["failed"] == again["failed"]
    assert results(folders) == after


def another_dataset(folders):
    content = json.loads(folders.dataset_json.read_text())
    folders.dataset_json.write_text(json.dumps(content | {"labels": {"background": 0, "b": 1, "a": 2}}))


@pytest.mark.parametrize(
    ("options", "change"), [({"protocol": Protocol(bins=7)}, lambda _: None), ({}, another_dataset)]
)
def test_another_protocol_or_dataset_scores_all_again(folders, options, change):
    evaluate(folders)
    before = written(folders)
    change(folders)
    evaluate(folders, **options)
    assert rewritten(folders, before) == set(before)


OTHER_VALUES = {
    "bins": 7,
    "threshold": 0.01,
    "nsd_tolerance": 2.0,
    "structure_tolerances": {"1": 2.0},
    "further_tolerances": (2.0,),
    "surface": "area",
    "percentile_rule": "pooled",
    "further_percentiles": (99.0,),
    "boundary": True,
    "dilate": 1.0,
    "nacl": True,
    "device": "cuda",
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Protocol)])
def test_records_know_every_choice_of_the_protocol(folders, name, monkeypatch):
    monkeypatch.setattr("nnunet_calib.evaluation.protocol._check_device", lambda device: None)
    usual, other = (
        setting(protocol, folders.dataset_json, None, "SimpleITKIO")
        for protocol in (Protocol(), Protocol(**{name: OTHER_VALUES[name]}))
    )
    assert usual != other
    assert usual == json.loads(json.dumps(usual))


def test_another_release_scores_all_again(folders, monkeypatch):
    evaluate(folders)
    before = written(folders)
    version = importlib.metadata.version
    records = importlib.import_module("nnunet_calib.evaluation.records")
    monkeypatch.setattr("nnunet_calib.data.software.version", lambda name: "9.9" if name == "scipy" else version(name))
    records.software.cache_clear()
    try:
        assert evaluate(folders)["software"]["scipy"] == "9.9"
    finally:
        records.software.cache_clear()
    assert rewritten(folders, before) == set(before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b'"Dice": 0', b'"Dice": 1', 1),
        lambda content: b'{"record": {}}',
        lambda content: b"[" * 100_000,
        lambda content: bytes(range(256)),
    ],
)
def test_a_damaged_record_is_made_again(folders, damage):
    evaluate(folders)
    before, first = written(folders), results(folders)
    record = folders.output / "cases" / "case_3.json"
    record.write_bytes(damage(record.read_bytes()))
    os.utime(record, ns=(0, 0))
    before["case_3"] = 0
    evaluate(folders)
    assert rewritten(folders, before) == {"case_3"}
    assert results(folders) == first


def test_records_are_valid_json(folders):
    evaluate(folders)
    record = json.loads((folders.output / "cases" / "missed.json").read_text())
    assert list(record) == ["sha256", "made_from", "record", "statistics"]
    assert record["record"]["metrics"]["1"]["HD"] == "inf"


def test_the_record_of_a_case_that_is_gone_stays_unused(folders):
    evaluate(folders)
    for folder in (folders.reference, folders.prediction):
        (folder / "case_0.nii.gz").rename(folder / "case_0.away")
    summary = evaluate(folders)
    assert [record["case"] for record in summary["metric_per_case"]] == ["case_1", "case_2", "case_3", "missed"]
    assert "case_0" in written(folders)


def test_a_failed_case_is_tried_again_and_its_old_record_not_used(folders):
    evaluate(folders)
    good = (folders.prediction / "case_0.npz").read_bytes()
    (folders.prediction / "case_0.npz").write_bytes(b"not a zip")
    for _ in range(2):
        summary = evaluate(folders)
        assert [failure["case"] for failure in summary["failed"]] == ["case_0"]
        assert len(summary["metric_per_case"]) == 4
    (folders.prediction / "case_0.npz").write_bytes(good)
    assert not evaluate(folders)["failed"]


def test_folders_named_in_another_way_are_the_same_folders(folders, monkeypatch):
    evaluate(folders)
    before = written(folders)
    monkeypatch.chdir(folders.output.parent)
    summary = evaluate_folder("labelsTs", "predicted", "scores", processes=1)
    assert written(folders) == before
    assert summary["metric_per_case"][0]["prediction_file"] == "predicted/case_0.nii.gz"


def test_what_a_killed_run_left_half_written_is_removed(folders):
    (folders.output / "cases").mkdir(parents=True)
    (folders.output / "cases" / ".case_0.json.abcd").write_text('{"sha')
    (folders.output / ".results.abcd").mkdir()
    evaluate(folders)
    assert not list(folders.output.rglob(".*"))


def test_kill_9_in_the_middle_then_the_same_command(tmp_path):
    folders = Folders(tmp_path)
    for seed in range(12):
        folders.add_ambiguous(f"case_{seed:02}", seed % 5, shape=(24, 40, 40))
    command = [sys.executable, "-m", "nnunet_calib.cli.main", *folders.words, "-np", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(folders.output.glob("cases/case_*.json"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before, earlier = written(folders), None
    while before != earlier:  # its processes notice, at once or on a busy machine a little later
        time.sleep(1)
        before, earlier = written(folders), before
    assert 2 <= len(before) < 12
    assert not (folders.output / "summary.json").exists()
    assert main(folders.words) == 0  # one process this time, which changes nothing and starts sooner
    assert not rewritten(folders, before) & before.keys()
    interrupted = results(folders)
    evaluate(folders, fresh=True)
    assert results(folders) == interrupted


def test_processes_survive_a_death_and_change_nothing(folders, deadly):
    evaluate(folders)
    expected = results(folders)
    deadly(1)
    assert not evaluate(folders, processes=2, fresh=True)["failed"]
    assert results(folders) == expected


def test_a_case_that_always_kills_its_process_fails_alone(folders, deadly):
    deadly(100)
    failures = []
    summary = evaluate(folders, processes=2, on_failure=failures.append)
    assert [record["case"] for record in summary["metric_per_case"]] == ["case_0", "case_2", "case_3", "missed"]
    assert failures == ["case case_1: its process was killed 3 times, out of memory perhaps"]


def test_dask_survives_a_death_and_changes_nothing(folders, deadly):
    pytest.importorskip("distributed")
    evaluate(folders)
    expected = results(folders)
    deadly(1)
    assert not evaluate(folders, processes=2, engine="dask", fresh=True)["failed"]
    assert results(folders) == expected


def test_dask_reports_bad_and_deadly_cases_and_goes_on(folders, deadly):
    pytest.importorskip("distributed")
    (folders.prediction / "case_3.npz").write_bytes(b"not a zip")
    deadly(100)
    failures = []
    summary = evaluate(folders, processes=2, engine="dask", on_failure=failures.append)
    assert [record["case"] for record in summary["metric_per_case"]] == ["case_0", "case_2", "missed"]
    assert sorted(failures)[0] == "case case_1: its process was killed 3 times, out of memory perhaps"
    assert "case_3.npz" in sorted(failures)[1]


def test_a_running_cluster_by_its_scheduler_file(folders, monkeypatch):
    """Started elsewhere, so with another working folder: relative paths must still be found."""
    distributed = pytest.importorskip("distributed")
    evaluate(folders)
    expected = [(folders.output / name).read_bytes() for name in ("cases.csv", "reliability.json")]
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0
    )
    with cluster:
        file = folders.output.parent / "scheduler.json"
        file.write_text(json.dumps(cluster.scheduler.identity()))
        monkeypatch.chdir(folders.output.parent)
        options = {"engine": "dask", "fresh": True}
        evaluate_folder("labelsTs", "predicted", "scores", scheduler="scheduler.json", **options)
        assert [Path("scores", name).read_bytes() for name in ("cases.csv", "reliability.json")] == expected
        evaluate_folder("labelsTs", "predicted", "by_address", scheduler=cluster.scheduler_address, **options)
        assert [Path("by_address", name).read_bytes() for name in ("cases.csv", "reliability.json")] == expected


def test_a_scheduler_that_does_not_answer_is_one_line(folders, capsys, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("nnunet_calib.evaluation.engine_dask._PATIENCE", "1s")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert main([*folders.words, "--engine", "dask", "--scheduler", address]) == 2
    assert f"nnunet-calib evaluate: no Dask scheduler answers at {address}" in capsys.readouterr().err


def test_engines_are_asked_for_properly(folders, monkeypatch):
    for options, message in (
        ({"engine": "threads"}, "one of processes, dask"),
        ({"scheduler": "tcp://localhost:1"}, "--engine dask"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(folders, **options)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"nnunet-calib\[dask\]"):
        evaluate(folders, engine="dask")


def test_a_record_that_was_written_elsewhere_is_that_cases_failure(folders, monkeypatch):
    """As by a worker on another machine to a folder of the same name."""
    import nnunet_calib.evaluation.folder as folder

    def elsewhere(self, work, cases):
        for case in cases:
            work(case)
            if case.name == "case_2":
                (folders.output / "cases" / "case_2.json").unlink()
            yield case, None

    monkeypatch.setattr(folder.ProcessEngine, "map", elsewhere)
    (failure,) = evaluate(folders)["failed"]
    assert "case case_2: " in failure["error"]
    assert "case_2.json: not there; the workers must write to the folder this process reads" in failure["error"]


def test_a_worker_of_another_release_is_refused(folders):
    records = importlib.import_module("nnunet_calib.evaluation.records")
    other = records.software() | {"numpy": "1.0"}
    work = records.Records(folders.output, None, {"software": other})
    with pytest.raises(InputError, match=r"another numpy .* than the process that collects the results \(1.0\)"):
        work(None)
