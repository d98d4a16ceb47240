import pytest

from nnunet_calib.cli.main import main

from ..report.runs import simulated, write_run


@pytest.fixture
def words(tmp_path):
    write_run(tmp_path / "stock", *simulated(1, 60))
    write_run(tmp_path / "ours", *simulated(2, 60, ece_share=0.7))
    return [f"stock={tmp_path / 'stock'}", f"ours={tmp_path / 'ours'}"]


def test_the_answer_the_table_and_the_files(words, tmp_path, capsys):
    assert main(["compare", *words, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("ours has a lower ECE (foreground) than stock")
    assert "ours - stock" in printed.out
    assert "note: One training a method" in printed.err
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_patients_and_all_pairs(words, tmp_path, capsys):
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\n" + "".join(f"case_{i:03d},p{i // 2}\n" for i in range(60)))
    write_run(tmp_path / "third", *simulated(3, 60))
    assert main(["compare", *words, str(tmp_path / "third"), "--group", str(table), "--all-pairs"]) == 0
    printed = capsys.readouterr().out
    assert "mean over patients" in printed
    assert "third - ours" in printed


@pytest.mark.parametrize(
    ("more", "complaint", "code"),
    [
        (["--metrics", "Dise"], "no metric 'Dise'; did you mean Dice? There are ACE", 2),
        (["--region", "border"], "no region 'border'; there are volume, foreground", 2),
        (["--baseline", "sota"], "no run 'sota'; there are stock, ours", 2),
        (["{tmp}/empty"], "no summary.json in", 2),
        (["{tmp}/nowhere"], "is not a folder", 2),
        (["{tmp}/stock"], "is given twice", 2),
        (["{tmp}/broken"], "not a summary.json", 1),
        (["--group", "{tmp}/none.csv"], "none.csv: cannot be read", 1),
    ],
)
def test_what_cannot_be_compared_is_one_line(words, tmp_path, capsys, more, complaint, code):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text('{"metric_per_case": [{"case": "a", "metrics": 3}]}')
    assert main(["compare", *words, *(word.format(tmp=tmp_path) for word in more)]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
