"""`scripts/estimate_gpu.py` counts a step and writes its table, marked as an estimate, between the marks of a file."""

import estimate_gpu
import pytest


def test_the_table_is_written_between_the_marks_and_says_that_it_is_an_estimate(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(estimate_gpu.MARKS) + "\nafter\n")
    assert estimate_gpu.main(["--shape", "2x3x8x8x8", "--only", "ce", "--table", str(page)]) == 0
    first, *lines, tail = page.read_text().split(estimate_gpu.MARKS[0] + "\n")[1].splitlines()[:-1]
    assert first.startswith("ESTIMATE, ")
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["torch cross_entropy", "ce"]
    assert [int(line.split("|")[2]) for line in lines[3:]] == [11, 29]
    assert tail == estimate_gpu.MARKS[1]
    assert "ESTIMATE" in capsys.readouterr().out


def test_a_file_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit):
        estimate_gpu.main(["--shape", "2x3x8x8x8", "--only", "ce", "--table", str(page)])
