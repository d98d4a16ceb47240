"""Task files: what is written comes back, and what is no task is refused."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.network.base_model import BaseModel
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.task.file import read_tasks
from nnunet_calib.fewshot.task.fit import task_file

from ..hosts import write_model


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("head", ["linear", "prototype", "local_prototypes"])
def test_a_task_comes_back_as_it_was(supports, tmp_path, head):
    written = supports.fit(tmp_path, settings=Settings(head=head, chunks=3))
    read = read_tasks(tmp_path / "ball.fewshot")[0]
    for ours, theirs in zip(read.structure.heads, written.structure.heads, strict=True):
        same(ours.state(), theirs.state())
    for name in ("settings", "prior", "calibration", "presence_limit", "left_out"):
        assert getattr(read.structure, name) == getattr(written.structure, name)
    assert (read.name, read.model, read.orientation, read.folds, read.inside, read.report) == (
        written.name,
        written.model,
        written.orientation,
        written.folds,
        written.inside,
        written.report,
    )
    frame, other = read.structure.frame, written.structure.frame
    assert np.array_equal(frame.low, other.low)
    assert np.array_equal(frame.high, other.high)
    assert frame.landmarks.keys() == other.landmarks.keys()
    for c in frame.landmarks:
        assert np.array_equal(frame.landmarks[c], other.landmarks[c], equal_nan=True)


def test_a_refined_task_keeps_a_few_voxels_that_stand_for_all(supports, tmp_path):
    supports.fit(tmp_path, settings=Settings(objective=Objective()))
    assert not read_tasks(supports.task)[0].structure.samples
    ((features, target, weight, _, _, support),) = read_tasks(tmp_path / "ball.fewshot")[0].structure.samples
    assert len(features) == len(target) <= 3 * 2000
    for one in range(3):
        # the volume has 20 x 26 x 24 voxels, about 270 of them the structure
        own = support == one
        assert float(weight[own].sum()) == pytest.approx(20 * 26 * 24)
        assert float(weight[own & target].sum()) == pytest.approx(270, abs=30)


@pytest.mark.parametrize(
    "content",
    [b"", b"no task", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}"],
    ids=["empty", "text", "huge header", "no metadata"],
)
def test_what_is_no_task_is_refused(tmp_path, content):
    file = tmp_path / "ball.fewshot"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"ball\.fewshot: not a task file of fewshot fit, or damaged"):
        read_tasks(file)[0]


def changed(file, target, change) -> None:
    """Write a copy of a task file whose JSON was changed."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"]["nnunet_calib_fewshot"])
    change(content)
    header["__metadata__"]["nnunet_calib_fewshot"] = json.dumps(content)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["structures"][0].pop("frame"),
        lambda content: content["structures"][0]["settings"].update(head="none"),
        lambda content: content["structures"][0]["settings"].update(chunks=0),
        lambda content: content["structures"][0]["settings"].update(surprise=1),
        lambda content: content["structures"][0]["frame"].update(low=[1e9] * 3),
        lambda content: content["structures"][0]["calibration"].update(slope=-1),
        lambda content: content.update(folds=["7"]),
        lambda content: content.update(folds=[]),
        lambda content: content["structures"][0].update(name="../outside"),
        lambda content: content["structures"][0].update(name="/tmp/outside"),
        lambda content: content["structures"][0].update(name=".hidden"),
        lambda content: content["structures"][0].update(name=7),
        lambda content: content.update(orientation="XYZ"),
        lambda content: content.update(orientation="LLS"),
        lambda content: content["structures"][0].update(presence_limit=None),
        lambda content: content["structures"][0].update(presence_limit=1.0),
        lambda content: content["structures"][0].update(background_limit=-1.0),
        lambda content: content["structures"][0].update(inside=[0]),
        lambda content: content["structures"][0].update(inside=["1"]),
        lambda content: content["structures"][0].update(left_out=[2.0]),
        lambda content: content["structures"][0]["settings"].update(chunks=12.5),
        lambda content: content["structures"][0]["settings"].update(chunks=7),
        lambda content: content["structures"][0]["settings"].update(chunks=10**9),
        lambda content: content["structures"][0]["settings"].update(margin=-0.3),
        lambda content: content["structures"][0]["settings"].update(extent="oracle"),
        lambda content: content["structures"][0]["settings"].update(head=["linear"]),
        lambda content: content["structures"][0]["settings"].update(objective={"entropy": -1}),
        lambda content: content["structures"][0]["frame"].update(extent="volume"),
        lambda content: content["structures"][0]["prior"].update(volume=0),
        lambda content: content["structures"][0]["prior"].update(volume="large"),
    ],
)
def test_a_damaged_task_is_refused_in_one_line(supports, tmp_path, change):
    changed(supports.task, tmp_path / "x.fewshot", change)
    with pytest.raises(InputError, match=r"x\.fewshot: not a task file as fewshot fit writes it") as caught:
        read_tasks(tmp_path / "x.fewshot")[0]
    assert "\n" not in str(caught.value)


def test_a_task_of_another_version_is_refused(supports, tmp_path):
    changed(supports.task, tmp_path / "x.fewshot", lambda content: content.update(format=1))
    with pytest.raises(InputError, match="of another version of nnunet-calib"):
        read_tasks(tmp_path / "x.fewshot")[0]


def test_a_name_or_a_label_of_the_model_is_refused(supports, tmp_path):
    model = BaseModel(supports.model)
    changed(supports.task, tmp_path / "x.fewshot", lambda content: content["structures"][0].update(name="a"))
    with pytest.raises(InputError, match="the model has a class 'a' already"):
        read_tasks(tmp_path / "x.fewshot")[0].check(model, tmp_path / "x.fewshot")
    changed(supports.task, tmp_path / "x.fewshot", lambda content: content["structures"][0].update(inside=[999]))
    with pytest.raises(InputError, match="inside label 999; the model's are 0, 1, 2"):
        read_tasks(tmp_path / "x.fewshot")[0].check(model, tmp_path / "x.fewshot")


def test_fit_and_load_check_the_same(supports):
    with pytest.raises(ValueError, match="cannot name a structure"):
        replace(supports.fitted, name="../outside")


def test_a_task_is_refused_for_another_model(supports, tmp_path):
    task = read_tasks(supports.task)[0]
    task.check(BaseModel(supports.model), supports.task)
    other = BaseModel(write_model(tmp_path / "a", spacing=2.0))
    with pytest.raises(InputError, match=r"fitted to another model than .* \(other plans\)"):
        task.check(other, supports.task)
    retrained = write_model(tmp_path / "b", folds=("1", "0"))  # fold 0 has other weights
    with pytest.raises(InputError, match=r"\(other checkpoint of fold 0\)"):
        task.check(BaseModel(retrained, ["0"]), supports.task)
    with pytest.raises(InputError, match=r"\(other fold 1\)"):
        task.check(BaseModel(write_model(tmp_path / "c", folds=("0", "1"))), supports.task)


def test_a_task_is_written_where_it_is_asked_for(tmp_path):
    assert task_file(tmp_path, "ball") == tmp_path / "ball.fewshot"
    assert task_file(tmp_path / "x", "ball") == tmp_path / "x.fewshot"
    assert task_file(tmp_path / "x.fewshot", "ball") == tmp_path / "x.fewshot"
    with pytest.raises(UsageError, match="is not a folder"):
        task_file(tmp_path / "nowhere" / "x", "ball")
    for name in ("", "a/b", "background", ".."):
        with pytest.raises(UsageError, match="cannot name a structure"):
            task_file(tmp_path, name)
