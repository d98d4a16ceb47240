"""`scripts/estimate_gpu.py` counts a step and keeps its table, marked as an estimate."""

import csv

import estimate_gpu


def test_the_table_is_kept_and_says_that_it_is_an_estimate(tmp_path, capsys):
    assert estimate_gpu.main(["--shape", "2x3x8x8x8", "--only", "ce", "--keep", str(tmp_path)]) == 0
    with (tmp_path / "estimate_gpu_kernels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["loss"], int(row["kernels"])) for row in rows] == [("torch cross_entropy", 11), ("ce", 29)]
    assert all(row["measured"].startswith("ESTIMATE, ") for row in rows)
    assert "ESTIMATE" in capsys.readouterr().out
