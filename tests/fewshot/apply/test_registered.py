"""Registration as part of the method, from supports to segmented queries."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nnunet_calib.cli.main import main
from nnunet_calib.data.errors import InputError
from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
from nnunet_calib.fewshot.measure.trials import grid
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.structure.in_query import _leave_far
from nnunet_calib.fewshot.structure.platt import PlattScaling
from nnunet_calib.fewshot.task.file import read_tasks
from nnunet_calib.fewshot.volume.atlas import Carried
from nnunet_calib.fewshot.volume.registration import Registration, Warp

from ..conftest import STRUCTURE, write_case
from .test_folder import apply, found, queries

REGISTERED = Settings(chunks=2, registration=Registration("affine"))


@pytest.fixture(scope="module")
def task(supports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("registered")
    return supports.fit(folder, settings=REGISTERED, registrations=folder / "kept"), folder


def test_a_query_is_segmented_with_what_registration_carries(supports, task, tmp_path):
    fitted, folder = task
    images = queries(tmp_path)
    (report,) = apply(supports, images, tmp_path / "out", [folder / "ball.fewshot"], merge=False)
    told = report["structures"]["ball"]["registration"]
    assert told["failed"] == told["limit_reached"] == 0
    assert told["seconds"] > 0
    assert found(tmp_path, tmp_path / "out") > 0.7
    assert len(fitted.structure.left_out) == 3
    assert len(list((folder / "kept").iterdir())) == 6  # every pair of three supports


def test_a_task_with_volumes_comes_back_as_it_was(task):
    fitted, folder = task
    read = read_tasks(folder / "ball.fewshot")[0].structure
    assert read.settings == fitted.structure.settings
    assert read.atlas.trust == fitted.structure.atlas.trust
    for ours, theirs in zip(read.atlas.supports, fitted.structure.atlas.supports, strict=True):
        assert ours.anatomy.digest == theirs.anatomy.digest  # kept registrations are found again
        assert (ours.distance == theirs.distance).all()


def test_with_one_support_the_query_tells_how_far_to_trust(supports, task, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    write_case(tmp_path, "case_0", 0)
    alone = type(supports).__new__(type(supports))
    alone.root, alone.model = tmp_path, supports.model
    fitted = alone.fit(tmp_path / "ball.fewshot", settings=REGISTERED)
    assert fitted.structure.atlas.trust is None
    assert not fitted.structure.calibrated
    assert read_tasks(tmp_path / "ball.fewshot")[0].structure.atlas.trust is None
    (report,) = apply(alone, queries(tmp_path / "new"), tmp_path / "out", [tmp_path / "ball.fewshot"], merge=False)
    told = report["structures"]["ball"]["registration"]
    assert 0.1 <= told["agreement"] <= 4
    assert found(tmp_path / "new", tmp_path / "out") > 0.5


def parts_of(file):
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def broken(name, change):
    def on(tensors):
        tensors[name] = change(tensors[name])

    return on


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: [t.pop(name) for name in [n for n in t if n.startswith("volume.")]], "volumes of the supports"),
        (broken("volume.0.image", lambda t: torch.full_like(t, torch.nan)), "not finite"),
        (broken("volume.0.image", lambda t: t[:-1]), "different sizes"),
        (broken("0.atlas.0.distance", lambda t: t.float()), "other types"),
        (broken("0.atlas.0.distance", lambda t: t * 100), "distances"),
        (broken("volume.0.base", lambda t: t.float()), "labels of a support"),
        (broken("volume.0.spacing", lambda t: t * 0), "spacing"),
        (broken("volume.0.image", lambda t: torch.zeros(90, 90, 90, dtype=torch.half)), r"a volume of \(90, 90, 90\)"),
        (broken("volume.1.image", lambda t: t[0]), "a volume of"),
    ],
    ids=["absent", "nan", "sizes", "types", "far", "labels", "spacing", "large", "flat"],
)
def test_volumes_of_supports_that_make_no_sense_are_refused(task, tmp_path, change, says):
    tensors, metadata = parts_of(task[1] / "ball.fewshot")
    change(tensors)
    save_file({name: part.contiguous() for name, part in tensors.items()}, tmp_path / "x.fewshot", metadata)
    with pytest.raises(InputError, match=rf"x\.fewshot: not a task file as fewshot fit writes it .*{says}"):
        read_tasks(tmp_path / "x.fewshot")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["structures"][0]["trust"].update(head=-1.0),
        lambda content: content["structures"][0]["trust"].update(vote=float("inf")),
        lambda content: content["structures"][0].update(trust=None),
        lambda content: content["structures"][0]["settings"]["registration"].update(kind="other"),
        lambda content: content["structures"][0]["settings"]["registration"].update(limit_s=-1.0),
        lambda content: content["structures"][0]["settings"]["registration"].update(kind="none"),
    ],
)
def test_trust_and_settings_that_make_no_sense_are_refused(task, tmp_path, change):
    data = (task[1] / "ball.fewshot").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"]["nnunet_calib_fewshot"])
    change(content)
    header["__metadata__"]["nnunet_calib_fewshot"] = json.dumps(content)
    text = json.dumps(header).encode()
    (tmp_path / "x.fewshot").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(InputError, match="not a task file as fewshot fit writes it"):
        read_tasks(tmp_path / "x.fewshot")[0]


def carried(nearest, **warp) -> Carried:
    return Carried(nearest, nearest, nearest, (Warp(np.eye(3), np.zeros(3), **warp),))


def test_far_components_are_left_out_and_both_of_a_pair_are_kept():
    logit, nearest = np.full((6, 8, 40), -5.0, np.float32), np.full((6, 8, 40), -30.0, np.float32)
    for first in (2, 16, 34):
        logit[2:4, 2:6, first : first + 4] = 3.0
    nearest[:, :, :24] = -4.0  # the supports have a pair of organs at the first two
    before = logit.copy()
    assert _leave_far(logit, PlattScaling(0.5, 0.2), 0.4, carried(nearest)) == 2 * 4 * 4
    above = PlattScaling(0.5, 0.2).probability(torch.from_numpy(logit)).numpy() > 0.4
    assert above[:, :, :24].sum() == 2 * 2 * 4 * 4
    assert not above[:, :, 24:].any()
    assert (logit[:, :, :24] == before[:, :, :24]).all()


def test_nothing_is_left_out_where_no_component_is_near():
    logit = np.full((6, 8, 20), -5.0, np.float32)
    logit[2:4, 2:6, 2:6] = logit[2:4, 2:6, 12:16] = 3.0
    assert _leave_far(logit, PlattScaling(), 0.5, carried(np.full(logit.shape, -30.0, np.float32))) == 0


def test_evaluate_has_registration_alone_beside_the_method(supports, tmp_path):
    hows = [Registration("none"), Registration("affine")]
    trials = grid(["linear", "registration"], [2], ["aligned"], [1, 2], ["P2"], registrations=hows)
    rows = evaluate_folder(
        supports.model,
        supports.root / "images",
        supports.root / "labels",
        tmp_path,
        name="ball",
        value=STRUCTURE,
        trials=trials,
        voxels=4000,
        progress=False,
    )
    told = {(row["head"], row["registration"], row["k"]): row for row in rows}
    assert set(told) == {
        (head, kind, k)
        for head, kind in (("linear", "none"), ("linear", "affine"), ("registration", "affine"))
        for k in (1, 2)
    }
    for row in told.values():
        assert 0.3 < row["Dice"] <= 1
        assert row["pairs"] == (6 if row["k"] == 1 else 3)
        assert (row["seconds_registration"] > 0) == (row["registration"] == "affine")
    assert len(list((tmp_path / "registrations").iterdir())) == 6
    # the method loses to neither by much
    for k in (1, 2):
        both = told["linear", "affine", k]["Dice"]
        assert both > max(told["linear", "none", k]["Dice"], told["registration", "affine", k]["Dice"]) - 0.1


def test_the_limit_is_refused_below_zero(supports, tmp_path, capsys):
    words = ["fewshot", "fit", str(supports.model), "--images", str(supports.root / "images"), "--labels"]
    words += [str(supports.root / "labels"), "--label", "5", "--name", "x", "-o", str(tmp_path)]
    assert main([*words, "--registration", "affine", "--registration_limit", "0"]) == 2
    assert "--registration_limit 0: it must be above 0 seconds" in capsys.readouterr().err
