import math
import re

import pytest

from nnunet_calib.cli.main import main

ROW = re.compile(
    r"^(stock nnU-Net \(Dice\+CE\)|MbLS|NACL|the readers themselves)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)$"
)


@pytest.mark.slow
def test_the_demo_reaches_its_table_and_goes_on_where_it_was(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    rows = [match.groups() for match in map(ROW.match, printed.splitlines()) if match]
    assert len(rows) == 4
    for name, *values in rows:
        dice, hd95, ece, cece = map(float, values)
        assert dice >= 0.7, name
        assert math.isfinite(hd95)
        assert 0 < ece < 1
        assert 0 < cece < 1
    assert main(["demo", "-o", str(folder)]) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 12
    assert again.split("in all")[1] == printed.split("in all")[1]
