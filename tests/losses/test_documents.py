"""The code of docs/pytorch.md runs, from the first block to the last."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"


def test_the_page_for_plain_pytorch_runs():
    pytest.importorskip("monai")
    torch.manual_seed(0)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
        assert names["value"].isfinite()
    assert names["network"].weight.grad.isfinite().all()
