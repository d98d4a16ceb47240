"""A calibrator file is checked wholly before it is used: whatever it holds, it is read or refused in one line."""

import json
import random
import time

import numpy as np
import pytest

from nnunet_calib.data.errors import InputError
from nnunet_calib.posthoc import CALIBRATORS, load_calibrator

from ..simulated import drawn, logits

rng = np.random.default_rng(0)
WRONG = [
    *(None, True, -1, 0, 3.5, 1e9, 10**9, 10**30, 1e999, float("nan"), "3", [], {}, [[]], [1], [1e300] * 3, "x" * 1000),
    {"0.weight": [1]},
]


def fitted(method, multilabel):
    if CALIBRATORS[method].margin:
        z = rng.normal(0, 2, (3, 6, 6, 6))
        calibrator = CALIBRATORS[method](multilabel=multilabel, steps=1)
        return calibrator.fit(z, z > 0 if multilabel else z.argmax(axis=0))
    z = logits(400, 3)
    y = drawn(np.exp(z), rng)
    return CALIBRATORS[method](multilabel=multilabel).fit(z, np.arange(3)[:, None] == y if multilabel else y)


def assert_read_or_refused(path, content):
    """None if refused; else the calibrator has been used on its channels."""
    path.write_text(json.dumps(content))
    start = time.perf_counter()
    refusal, calibrator = "", None
    try:
        calibrator = load_calibrator(path)
    except InputError as error:
        refusal = str(error)
    if calibrator is None:
        assert str(path) in refusal
        assert "\n" not in refusal
    else:
        shape = (calibrator.channels, *((4, 4, 4) if calibrator.margin else (5,)))
        p = calibrator.apply(np.zeros(shape))
        assert p.shape == shape
        assert np.isfinite(p).all()
        assert p.min() >= 0
        assert p.max() <= 1 + 1e-6
    assert time.perf_counter() - start < 5
    return calibrator


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("method", CALIBRATORS)
def test_every_entry_replaced(tmp_path, method, multilabel):
    content = fitted(method, multilabel).state()
    assert assert_read_or_refused(tmp_path / "c.json", content) is not None
    for name in content:
        assert (
            name == "notes"
            or assert_read_or_refused(tmp_path / "c.json", {k: v for k, v in content.items() if k != name}) is None
        )
        for wrong in WRONG:
            assert_read_or_refused(tmp_path / "c.json", content | {name: wrong})


@pytest.mark.parametrize("method", CALIBRATORS)
def test_more_channels_than_parameters_or_than_there_can_be(tmp_path, method):
    """``channels: 1e9`` once got the process killed: memory was set aside for it."""
    content = fitted(method, False).state()
    for channels in (1e9, 10**9, 2**16 + 1, 0, -3, True):
        assert assert_read_or_refused(tmp_path / "c.json", content | {"channels": channels}) is None
    if method != "temperature":  # theirs fit any number of classes
        assert assert_read_or_refused(tmp_path / "c.json", content | {"channels": 4}) is None


def mutated(value, chooser):
    """One place of a JSON value changed."""
    if isinstance(value, dict) and value and chooser.random() < 0.9:
        name = chooser.choice(sorted(value))
        return value | {name: mutated(value[name], chooser)}
    if isinstance(value, list) and value and chooser.random() < 0.8:
        place = chooser.randrange(len(value))
        return [*value[:place], mutated(value[place], chooser), *value[place + 1 :]]
    if isinstance(value, list) and chooser.random() < 0.5:
        return value + value if chooser.random() < 0.5 else value[:-1]
    return chooser.choice(WRONG)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_mutated_files_are_read_or_refused(tmp_path, method):
    seed = 7
    print(f"seed {seed}")
    chooser = random.Random(seed)
    for multilabel in (False, True):
        content = fitted(method, multilabel).state()
        for _ in range(40):
            assert_read_or_refused(tmp_path / "c.json", mutated(content, chooser))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"method": ["temperature"]}', '{"method": {}}', "[" * 100_000, '{"a":' * 100_000]
)
def test_what_is_no_calibrator_at_all(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json"):
        load_calibrator(tmp_path / "c.json")
