"""Which images to annotate next, and label maps to correct."""

import csv
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.special import logit as log_odds

from nnunet_calib.cli.main import main
from nnunet_calib.fewshot.apply.rank import rank_folder
from nnunet_calib.fewshot.structure.platt import PlattScaling, expected_dice

from ..conftest import STRUCTURE, write_case
from ..hosts import phantom


def test_expected_dice_is_what_the_formula_says():
    p = np.repeat([0.9, 0.6, 0.2], [3, 2, 5])
    # above 0.5: 3 x 0.9 + 2 x 0.6 = 3.9 of 5 voxels; in all 4.9
    assert expected_dice(log_odds(p), PlattScaling(), 0.5) == pytest.approx(2 * 3.9 / (5 + 4.9))
    assert expected_dice(log_odds(p), PlattScaling(), 0.95) == 0


@pytest.fixture(scope="module")
def ranked(supports, tmp_path_factory):
    root = tmp_path_factory.mktemp("ranked")
    write_case(root, "like", 10)
    image, _ = phantom(11)
    noise = np.random.default_rng(0).normal(0, 2.0, image.shape)
    write_case(root, "noisy", 11, image=(image + noise).astype(np.float32))
    found, errors = rank_folder(
        supports.model, [supports.task], root / "images", root / "out", readers=0, progress=False
    )
    assert not errors
    return root, found


def test_a_case_of_poorer_quality_comes_first(ranked):
    root, found = ranked
    assert [one.case for one in found] == ["noisy", "like"]
    assert found[0].need > found[1].need
    assert found[1].need == pytest.approx(1 - found[1].expected_dice["ball"])
    assert any("expected Dice" in why for why in found[1].why)
    rows = list(csv.DictReader((root / "out" / "ranking.csv").open()))
    assert [row["case"] for row in rows] == ["noisy", "like"]
    assert float(rows[1]["expected_dice_ball"]) == pytest.approx(found[1].expected_dice["ball"], abs=1e-4)


def test_another_checkpoint_is_that_of_the_whole_ranking(supports, ranked, tmp_path):
    root, found = ranked
    shutil.copytree(supports.model, tmp_path / "model")
    fold = tmp_path / "model" / "fold_0"
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_best.pth")
    again, errors = rank_folder(
        tmp_path / "model",
        [supports.task],
        root / "images",
        tmp_path / "out",
        checkpoint="checkpoint_best.pth",
        readers=0,
        progress=False,
    )
    assert not errors
    assert [one.case for one in again] == [one.case for one in found]


def test_label_maps_have_the_values_of_the_supports(ranked):
    root, _ = ranked
    made, reference = (sitk.ReadImage(str(root / file)) for file in ("out/prefilled/like.nii.gz", "labels/like.nii.gz"))
    assert made.GetOrigin() == reference.GetOrigin()
    assert made.GetDirection() == reference.GetDirection()
    ours, theirs = (sitk.GetArrayFromImage(one) == STRUCTURE for one in (made, reference))
    assert set(np.unique(sitk.GetArrayFromImage(made))) == {0, STRUCTURE}
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.7


def test_a_corrected_label_map_is_kept(supports, ranked, capsys):
    root, _ = ranked
    shutil.copy(root / "labels" / "like.nii.gz", root / "out" / "prefilled" / "like.nii.gz")
    before = (root / "out" / "prefilled" / "like.nii.gz").read_bytes()
    words = ["fewshot", "rank", str(supports.model), str(supports.task), "-i", str(root / "images")]
    assert main([*words, "-o", str(root / "out"), "-device", "cpu", "-npp", "0"]) == 0
    assert "like" in (told := capsys.readouterr().out)
    assert "its label map was corrected, and is kept" in told
    assert (root / "out" / "prefilled" / "like.nii.gz").read_bytes() == before
