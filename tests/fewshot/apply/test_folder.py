"""From supports to segmented queries, on networks of random weights; behaviour in the cases that go wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_calib.cli.main import main
from nnunet_calib.data.cases import find_images
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.fewshot.apply.folder import apply_folder, wider_views
from nnunet_calib.fewshot.measure.evaluate import evaluate_folder
from nnunet_calib.fewshot.structure.fitted import Settings
from nnunet_calib.fewshot.structure.objective import Objective
from nnunet_calib.fewshot.structure.prior import SizePrior
from nnunet_calib.fewshot.task.file import read_tasks, write_tasks
from nnunet_calib.fewshot.task.fit import fit_folder

from ..conftest import STRUCTURE, Supports, write_case
from ..hosts import landmarks, phantom, write_image, write_model


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def queries(root: Path, number: int = 1, first: int = 10, **options) -> Path:
    for i in range(first, first + number):
        write_case(root, f"query_{i}", i, **options)
    return root / "images"


def apply(of: Supports, images: Path, output: Path, tasks=None, **options):
    options = {"progress": False, "readers": 0} | options
    return apply_folder(of.model, tasks or [of.task], images, output, **options)


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    return 2 * np.count_nonzero(ours & theirs) / (np.count_nonzero(ours) + np.count_nonzero(theirs))


def found(root: Path, output: Path, case: str = "query_10") -> float:
    """Dice of a structure that was written alone."""
    return dice(read(output / "ball" / f"{case}.nii.gz") > 0, read(root / "labels" / f"{case}.nii.gz") > 0)


def stock(
    model: Path, images: Path, output: Path, folds=(0,), mirroring: bool = True, probabilities=False, **options
) -> Path:
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    output.mkdir()
    predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=probabilities, **options)
    return output


# ------------------------------------------------------------------------------------------------------- fit and apply


def test_a_structure_is_found_where_it_is(supports, tmp_path):
    images = queries(tmp_path, 2)
    reports = apply(supports, images, tmp_path / "out", merge=False)
    assert [report["case"] for report in reports] == ["query_10", "query_11"]
    for case in ("query_10", "query_11"):
        assert found(tmp_path, tmp_path / "out", case) > 0.7
        told = json.loads((tmp_path / "out" / f"{case}.fewshot.json").read_text())["structures"]["ball"]
        assert not told["absent"]
        assert not told["warnings"]
        assert told["landmarks"] > 0
        assert told["volume_mm3"] == np.count_nonzero(read(tmp_path / "out" / "ball" / f"{case}.nii.gz"))
        assert told["volume_mm3"] == pytest.approx(270, rel=0.5)


@pytest.mark.parametrize("head", ["linear", "prototype", "local_prototypes"])
@pytest.mark.parametrize("extent", ["aligned", "volume"])
def test_every_head_and_extent_goes_the_whole_road(supports, tmp_path, head, extent):
    for mode, axis in (("hard", 0), ("interpolated", 2)):
        settings = Settings(head=head, chunks=3, mode=mode, extent=extent, axis=axis)
        supports.fit(tmp_path, settings=settings)
        apply(supports, queries(tmp_path), tmp_path / mode, [tmp_path / "ball.fewshot"], merge=False)
        assert found(tmp_path, tmp_path / mode) > 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"axes": 2},
        {"kind": "residual"},
        {"labels": "regions"},
        {"labels": "labels_ignore"},
        {"folds": ("0", "1")},
        {"transpose": (2, 0, 1)},
        {"spacing": 1.5},
        {"reader": "NibabelIOWithReorient"},
    ],
    ids=str,
)
def test_every_kind_of_model_goes_the_whole_road(tmp_path, options):
    of = Supports(tmp_path / "supports", cases=2, **options)
    images = queries(tmp_path)
    for merge in (True, False):
        apply(of, images, tmp_path / str(merge), merge=merge, probabilities=True)
    assert found(tmp_path, tmp_path / "False") > 0.4
    with (
        np.load(tmp_path / "False" / "ball" / "query_10.npz") as alone,
        np.load(tmp_path / "True" / "query_10.npz") as all_,
    ):
        p, merged = alone["probabilities"], all_["probabilities"]
    assert p.shape == (2, 20, 26, 24)
    np.testing.assert_allclose(p.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(merged[-1], p[1], atol=1e-6)
    if options.get("labels") != "regions":
        np.testing.assert_allclose(merged.sum(axis=0), 1, atol=1e-5)
    value = max(np.unique(read(tmp_path / "True" / "query_10.nii.gz")).tolist() + [0])
    assert value <= 3


# ----------------------------------------------------------------------------------------------------- base classes


@pytest.mark.parametrize(
    ("options", "mirroring"),
    [({"folds": ("0", "1")}, True), ({"axes": 2}, False), ({"labels": "regions"}, True), ({"kind": "residual"}, False)],
    ids=str,
)
def test_without_merge_base_classes_are_nnunets_to_the_byte(tmp_path, options, mirroring):
    of = Supports(tmp_path / "supports", cases=1, **options)
    images = queries(tmp_path, 1)
    folds = tuple(int(fold) for fold in options.get("folds", ("0",)))
    expected = stock(of.model, images, tmp_path / "stock", folds, mirroring, probabilities=True)
    apply(of, images, tmp_path / "out", merge=False, mirroring=mirroring, probabilities=True)
    ours, theirs = tmp_path / "out" / "query_10.nii.gz", expected / "query_10.nii.gz"
    assert ours.read_bytes() == theirs.read_bytes()
    assert len(np.unique(read(ours))) > 1
    with np.load(ours.with_suffix("").with_suffix(".npz")) as a, np.load(expected / "query_10.npz") as b:
        assert np.array_equal(a["probabilities"], b["probabilities"])
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == json.loads(
        (expected / "dataset.json").read_text()
    )


def test_the_second_stage_of_a_cascade_goes_the_whole_road(tmp_path):
    model, previous, images = write_model(tmp_path / "model", cascade=True), tmp_path / "previous", queries(tmp_path)
    for i in range(2):
        write_case(tmp_path / "supports", f"case_{i}", i)
        write_image(previous / f"case_{i}.nii.gz", landmarks(i))
    write_image(previous / "query_10.nii.gz", landmarks(10))
    task, given = tmp_path / "ball.fewshot", {"progress": False, "previous": previous}
    folders = [tmp_path / "supports" / name for name in ("images", "labels")]
    fit_folder(model, *folders, task, structures={"ball": STRUCTURE}, **given)
    apply_folder(model, [task], images, tmp_path / "out", merge=False, readers=0, **given)
    assert found(tmp_path, tmp_path / "out") > 0.5
    expected = stock(model, images, tmp_path / "stock", folder_with_segs_from_prev_stage=str(previous))
    ours, theirs = tmp_path / "out" / "query_10.nii.gz", expected / "query_10.nii.gz"
    assert ours.read_bytes() == theirs.read_bytes()
    assert len(np.unique(read(ours))) > 1
    # without the first stage nothing is begun
    with pytest.raises(UsageError, match="continues first; name the folder of its segmentations with -prev_stage_pre"):
        fit_folder(model, *folders, tmp_path / "other.fewshot", structures={"ball": STRUCTURE}, progress=False)
    with pytest.raises(UsageError, match="or use a model that is no cascade"):
        apply_folder(model, [task], images, tmp_path / "nothing", progress=False)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(UsageError, match="evaluate a model that is no cascade"):
        evaluate_folder(model, *folders, tmp_path / "nothing", name="ball", value=STRUCTURE, trials=[])


def test_merged_labels_are_base_labels_where_no_structure_is(supports, tmp_path):
    images = queries(tmp_path)
    apply(supports, images, tmp_path / "merged")
    apply(supports, images, tmp_path / "alone", merge=False)
    merged, base = (read(tmp_path / name / "query_10.nii.gz") for name in ("merged", "alone"))
    structure = read(tmp_path / "alone" / "ball" / "query_10.nii.gz") > 0
    assert np.array_equal(merged[merged != 3], base[merged != 3])
    assert not (merged == 3)[~structure].any()
    labels = json.loads((tmp_path / "merged" / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "a": 1, "b": 2, "ball": 3}


def test_several_tasks_take_one_pass_and_agree_with_one(supports, tmp_path, monkeypatch):
    images = queries(tmp_path)
    supports.fit(tmp_path / "two.fewshot", structures={"two": STRUCTURE}, settings=Settings(head="prototype", chunks=2))
    passes = []
    forward = nnUNetPredictor.predict_sliding_window_return_logits
    monkeypatch.setattr(
        nnUNetPredictor,
        "predict_sliding_window_return_logits",
        lambda self, image: passes.append(1) or forward(self, image),
    )
    apply(supports, images, tmp_path / "both", [supports.task, tmp_path / "two.fewshot"], merge=False)
    assert len(passes) == 1
    apply(supports, images, tmp_path / "first", merge=False)
    apply(supports, images, tmp_path / "second", [tmp_path / "two.fewshot"], merge=False)
    for name, folder in (("ball", "first"), ("two", "second")):
        ours, theirs = (read(tmp_path / f / name / "query_10.nii.gz") for f in ("both", folder))
        assert np.array_equal(ours, theirs)
    apply(supports, images, tmp_path / "merged", [supports.task, tmp_path / "two.fewshot"])
    labels = json.loads((tmp_path / "merged" / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "a": 1, "b": 2, "ball": 3, "two": 4}


def test_reading_ahead_and_continuing_change_nothing(supports, tmp_path):
    images = queries(tmp_path, 3)
    first = apply(supports, images, tmp_path / "one")
    second = apply(supports, images, tmp_path / "two", readers=2)
    for a, b in zip(first, second, strict=True):
        assert a["case"] == b["case"]
        assert a["structures"] == b["structures"]
    (tmp_path / "one" / "query_11.fewshot.json").unlink()
    again = apply(supports, images, tmp_path / "one", overwrite=False)
    assert [report["case"] for report in again] == ["query_11"]


def test_a_refined_head_goes_the_whole_road(supports, tmp_path):
    supports.fit(tmp_path, settings=Settings(objective=Objective()))
    apply(supports, queries(tmp_path), tmp_path / "out", [tmp_path / "ball.fewshot"], merge=False)
    assert found(tmp_path, tmp_path / "out") > 0.6


# --------------------------------------------------------------------------------------------- the cases that go wrong


def test_labels_of_queries_have_no_place_in_apply(supports, tmp_path, monkeypatch):
    """Whatever lies beside the images, nothing but the images is opened, and the results are the same."""
    raw = tmp_path / "Dataset777_Toy"
    images = queries(raw)
    images.rename(raw / "imagesTs")
    (raw / "labels").rename(raw / "labelsTs")
    opened = []
    for name in ("ReadImage",):
        original = getattr(sitk, name)
        monkeypatch.setattr(
            sitk, name, lambda path, *a, original=original: opened.append(str(path)) or original(path, *a)
        )
    import nnunet_calib.fewshot.volume.files as volumes

    def refuse(*args, **kwargs):
        raise AssertionError("apply reads a label map")

    monkeypatch.setattr(volumes, "read_labels", refuse)
    monkeypatch.setattr(volumes, "find_supports", refuse)
    first = apply(supports, raw / "imagesTs", tmp_path / "with")
    shutil.rmtree(raw / "labelsTs")
    second = apply(supports, raw / "imagesTs", tmp_path / "without")
    assert first[0]["structures"] == second[0]["structures"]
    assert set(opened) == {str(raw / "imagesTs" / "query_10_0000.nii.gz")}


def test_no_parameter_of_apply_can_take_labels_or_an_oracle():
    import inspect

    from nnunet_calib.fewshot.apply import files, folder, query, refine

    for function in (folder.apply_folder, query.find_structures, refine.refine_on_query):
        names = set(inspect.signature(function).parameters)
        assert not {name for name in names if "label" in name or "reference" in name or "oracle" in name}
    for module in (folder, query, refine, files):
        source = inspect.getsource(module)
        for forbidden in ("read_labels", "find_supports", "expected_mm3=", "parts=", "counted=", "label=", "scores"):
            assert forbidden not in source.replace("expected_volume_mm3", "")


def test_an_empty_support_is_left_out_and_told(tmp_path):
    of = Supports(tmp_path / "supports")
    nothing = np.zeros((20, 26, 24), bool)
    few = nothing.copy()
    few[10, 10, :9] = True
    write_case(of.root, "case_3", 3, structure=nothing)
    write_case(of.root, "case_4", 4, structure=few)
    task = of.fit(tmp_path)
    assert [row["case"] for row in task.report["supports"]] == ["case_0", "case_1", "case_2"]
    notes = [note for note in task.report["notes"] if note.startswith("support left out")]
    assert "case_3: 0 voxels of the structure" in notes[0]
    assert "does not hold that value" in notes[0]
    assert "case_4: 9 voxels of the structure at the model's spacing, 10 are needed" in notes[1]


def test_without_any_usable_support_nothing_is_written(tmp_path):
    model = write_model(tmp_path / "model")
    write_case(tmp_path, "case_0", 0, structure=np.zeros((20, 26, 24), bool))
    with pytest.raises(InputError, match="no support can be used; case_0: 0 voxels"):
        fit_folder(
            model, tmp_path / "images", tmp_path / "labels", tmp_path, structures={"ball": STRUCTURE}, progress=False
        )
    assert not list(tmp_path.glob("*.fewshot"))


def test_a_structure_cut_by_the_field_of_view_says_nothing_of_its_size(supports, tmp_path):
    of = Supports(tmp_path / "supports")
    image, structure = phantom(2)
    write_case(of.root, "case_2", 2, image=image[:, :, 6:], structure=structure[:, :, 6:])
    task = of.fit(tmp_path)
    assert [row["cut"] for row in task.report["supports"]] == [False, False, True]
    assert any("case_2: the structure reaches the border of the image" in note for note in task.report["notes"])
    assert task.structure.prior.supports == 2
    assert task.structure.prior.volume == pytest.approx(supports.fitted.structure.prior.volume, rel=0.1)


def test_a_cut_support_is_expected_to_show_its_share_when_it_is_left_out(tmp_path, monkeypatch):
    """As a query with that field of view is: else the calibration is chosen on a support blown up to the whole."""
    asked, expected = [], SizePrior.expected

    def noted(self, body, share_in_view=1.0):
        asked.append(share_in_view)
        return expected(self, body, share_in_view)

    monkeypatch.setattr(SizePrior, "expected", noted)
    of = Supports(tmp_path / "supports")
    asked.clear()
    image, structure = phantom(2)
    write_case(of.root, "case_2", 2, image=image[:, :, 6:], structure=structure[:, :, 6:])
    of.fit(tmp_path)
    assert asked[:2] == [1.0, 1.0]
    assert 0.05 < asked[2] < 0.95
    inside = structure[:, :, 6:].sum() / structure.sum()
    assert asked[2] == pytest.approx(inside, abs=0.25)


def test_a_structure_cut_in_every_support_leaves_no_prior(tmp_path):
    of = Supports(tmp_path / "supports")
    for i in range(3):
        image, structure = phantom(i)
        write_case(of.root, f"case_{i}", i, image=image[:, :, 6:], structure=structure[:, :, 6:])
    task = of.fit(of.task)
    assert task.structure.prior is None
    (report,) = apply(of, queries(tmp_path), tmp_path / "out", merge=False)
    told = report["structures"]["ball"]
    assert told["expected_volume_mm3"] is None
    assert any("nothing is known of the structure's size" in warning for warning in told["warnings"])


def test_a_query_without_the_structure_is_called_absent(supports, tmp_path):
    image, _ = phantom(10)
    image[2:13, 6:18, 1:14] = 1.0 + np.random.default_rng(0).normal(0, 0.2, (11, 12, 13))  # all around the ball
    write_case(tmp_path, "query_10", 10, image=image)
    write_case(tmp_path, "query_11", 11)
    absent, present = apply(supports, tmp_path / "images", tmp_path / "out", merge=False)
    told = absent["structures"]["ball"]
    assert told["absent"]
    assert told["presence_score"] < told["presence_limit"]
    assert any(warning.startswith("absent: presence score") for warning in told["warnings"])
    assert not read(tmp_path / "out" / "ball" / "query_10.nii.gz").any()
    assert told["volume_mm3"] == 0
    assert told["shift_by_volume_prior"] <= 0, "the volume prior forces nothing"
    assert not present["structures"]["ball"]["absent"]
    apply(supports, tmp_path / "images", tmp_path / "merged")
    assert not (read(tmp_path / "merged" / "query_10.nii.gz") == 3).any()


def test_a_smaller_field_of_view_lowers_the_volume_expected(supports, tmp_path):
    image, structure = phantom(10)
    write_case(tmp_path, "query_10", 10, image=image[:, 13:], structure=structure[:, 13:])
    (report,) = apply(supports, tmp_path / "images", tmp_path / "out", merge=False)
    told = report["structures"]["ball"]
    assert told["share_in_view"] < 0.9
    assert told["expected_volume_mm3"] < 0.95 * supports.fitted.structure.prior.volume
    assert any("the field of view can hold" in warning for warning in told["warnings"])


def test_queries_that_show_more_than_the_supports_are_told_in_one_line(supports, tmp_path):
    for seed in (0, 1):
        image, ball = phantom(seed)
        write_case(tmp_path / "half", f"case_{seed}", seed, image=image[..., :13], structure=ball[..., :13])
        write_case(tmp_path / "whole", f"query_{seed}", seed + 10)
    task = tmp_path / "half.fewshot"
    fit_folder(
        supports.model,
        tmp_path / "half" / "images",
        tmp_path / "half" / "labels",
        task,
        structures={"ball": STRUCTURE},
        progress=False,
    )
    reports = apply_folder(supports.model, [task], tmp_path / "whole" / "images", tmp_path / "out", progress=False)
    assert [0.4 < r["structures"]["ball"]["shown_by_supports"]["left to right"] < 0.7 for r in reports] == [True, True]
    line = wider_views(reports)
    assert line is not None
    assert line.startswith("cases show much more of the body than the supports: 2 of 2 left to right (of query_")
    assert "inferior" not in line
    own = apply_folder(supports.model, [task], tmp_path / "half" / "images", tmp_path / "own", progress=False)
    assert wider_views(own) is None


@pytest.mark.parametrize("orientation", ["RAS", "PIR"])
def test_a_case_in_another_orientation_is_turned_and_turned_back(supports, tmp_path, orientation):
    straight, turned = tmp_path / "straight", tmp_path / "turned"
    apply(supports, queries(straight), straight / "out", merge=False)
    (report,) = apply(supports, queries(turned, orientation=orientation), turned / "out", merge=False)
    assert report["orientation"] == {"stored": orientation, "predicted": "LPS"}
    assert any(f"stored {orientation}, turned into LPS" in w for w in report["structures"]["ball"]["warnings"])
    assert found(turned, turned / "out") == pytest.approx(found(straight, straight / "out"))
    for place in ("query_10.nii.gz", "ball/query_10.nii.gz"):
        ours = sitk.DICOMOrient(sitk.ReadImage(str(turned / "out" / place)), "LPS")
        assert np.array_equal(sitk.GetArrayFromImage(ours), read(straight / "out" / place))


def test_supports_in_several_orientations_are_turned_into_the_first(tmp_path):
    of = Supports(tmp_path / "supports")
    write_case(of.root, "case_2", 2, "RAS")
    task = of.fit(tmp_path)
    assert task.orientation == "LPS"
    assert any("case_2: stored RAS, turned into LPS as the first support" in note for note in task.report["notes"])
    assert min(task.structure.left_out) > 0.6


def test_coarse_supports_are_told(tmp_path):
    of = Supports(tmp_path / "supports", spacing=1.0)
    image, structure = phantom(2)
    write_case(of.root, "case_2", 2, image=image[::4], structure=structure[::4], spacing=(4.0, 1.0, 1.0))
    notes = of.fit(tmp_path).report["notes"]
    assert any("case_2: its voxels are 4.0 times as thick as the model's" in note for note in notes)


def test_another_contrast_is_told(supports, tmp_path):
    image, structure = phantom(10)
    write_case(tmp_path, "query_10", 10, image=(10 * np.sin(3 * image) - image**2).astype(np.float32))
    (report,) = apply(supports, tmp_path / "images", tmp_path / "out", merge=False)
    told = report["structures"]["ball"]
    assert told["feature_distance"] > told["feature_distance_limit"]
    assert any("another modality or contrast?" in warning for warning in told["warnings"])


def test_more_chunks_than_slices_are_reduced_and_told(supports, tmp_path):
    task = supports.fit(tmp_path, settings=Settings(chunks=50))
    assert task.structure.settings.chunks == 20
    assert "50 chunks for 20 slices: reduced to 20" in task.report["notes"]


def test_chunks_without_the_structure_are_no_hard_zero(supports, tmp_path):
    """The ball moves up in the query, to chunks where no support has it."""
    image, structure = phantom(10)
    write_case(tmp_path, "query_10", 10, image=np.roll(image, 4, axis=0), structure=np.roll(structure, 4, axis=0))
    supports.fit(tmp_path, settings=Settings(chunks=8, extent="volume", mode="hard"))
    apply(supports, tmp_path / "images", tmp_path / "out", [tmp_path / "ball.fewshot"], merge=False)
    assert found(tmp_path, tmp_path / "out") > 0.3


def test_a_support_that_disagrees_is_named(tmp_path):
    of = Supports(tmp_path / "supports")
    _, structure = phantom(3)
    write_case(of.root, "case_3", 3, structure=np.roll(structure, (4, 8, 9), axis=(0, 1, 2)))
    notes = of.fit(tmp_path).report["notes"]
    assert any(note.startswith("case_3: the other supports predict it with Dice") for note in notes)


def test_a_structure_that_is_a_base_class_is_told(tmp_path):
    of = Supports(tmp_path / "supports")
    apply(of, of.root / "images", tmp_path / "out", merge=False)
    for i in range(3):
        write_case(of.root, f"case_{i}", i, structure=read(tmp_path / "out" / f"case_{i}.nii.gz") == 1)
    notes = of.fit(tmp_path).report["notes"]
    assert any("the base model predicts the structure as a (1), Dice 1.00" in note for note in notes)


def test_a_structure_inside_a_base_class_is_told_and_overrides_it(tmp_path):
    of = Supports(tmp_path / "supports")
    apply(of, of.root / "images", tmp_path / "out", merge=False)
    for i in range(3):
        base = read(tmp_path / "out" / f"case_{i}.nii.gz") == 1
        half = base & (np.cumsum(base.ravel()).reshape(base.shape) < 0.3 * base.sum())
        write_case(of.root, f"case_{i}", i, structure=half)
    task = of.fit(of.task)
    assert task.inside == (1,)
    assert any("100% of the structure lies in a (1) and will override it" in note for note in task.report["notes"])
    assert of.fit(tmp_path / "no.fewshot", inside=[]).inside == ()
    images = queries(tmp_path)
    apply(of, images, tmp_path / "yes")
    apply(of, images, tmp_path / "no", [tmp_path / "no.fewshot"])
    apply(of, images, tmp_path / "alone", merge=False)
    yes, no = (read(tmp_path / name / "query_10.nii.gz") == 3 for name in ("yes", "no"))
    assert no.sum() < yes.sum()
    alone = read(tmp_path / "alone" / "ball" / "query_10.nii.gz") > 0
    free = read(tmp_path / "alone" / "query_10.nii.gz") != 2
    assert np.array_equal(yes[free], alone[free])


def test_one_support_is_enough_and_its_limits_are_told(tmp_path):
    of = Supports(tmp_path / "supports")
    for i in (1, 2):
        (of.root / "labels" / f"case_{i}.nii.gz").unlink()
    task = of.fit(of.task)
    assert any(note.startswith("one support: there is no other volume") for note in task.report["notes"])
    assert (task.structure.calibration.slope, task.structure.calibration.bias) == (1.0, 0.0)
    apply(of, queries(tmp_path), tmp_path / "out", merge=False)
    assert found(tmp_path, tmp_path / "out") > 0.5


def test_ensembles_average_the_probabilities_of_their_folds(tmp_path):
    of = Supports(tmp_path / "supports", folds=("0", "1"))
    task = read_tasks(of.task)[0]
    assert task.folds == ("0", "1")
    assert len(task.structure.heads) == 2
    images = queries(tmp_path)
    for name, folds in (("both", None), ("first", [0]), ("second", [1])):
        apply(of, images, tmp_path / name, folds=folds, merge=False)
    # each fold has its own head: exchanged they find nothing
    swapped = replace(task, structure=replace(task.structure, heads=task.structure.heads[::-1]))
    write_tasks(tmp_path / "swapped.fewshot", [swapped])
    apply(of, images, tmp_path / "swapped", [tmp_path / "swapped.fewshot"], merge=False)
    assert found(tmp_path, tmp_path / "both") > 0.6
    assert found(tmp_path, tmp_path / "swapped") < found(tmp_path, tmp_path / "both") - 0.1


def test_ignored_voxels_do_not_count(tmp_path):
    of = Supports(tmp_path / "supports")
    for i in range(3):
        labels = phantom(i)[1].astype(np.uint8) * STRUCTURE
        labels[:, :, 12:] = 9  # half of the image is not annotated
        write_image(of.root / "labels" / f"case_{i}.nii.gz", labels)
    task = of.fit(tmp_path, ignore=9)
    assert all(row["voxels"] < 20 * 26 * 24 * 0.6 for row in task.report["supports"])


def test_a_support_of_nothing_but_the_structure_is_left_out_and_told(tmp_path):
    of = Supports(tmp_path / "supports")
    labels = np.where(phantom(1)[1], STRUCTURE, 9).astype(np.uint8)
    write_image(of.root / "labels" / "case_1.nii.gz", labels)
    task = of.fit(tmp_path, ignore=9)
    assert [row["case"] for row in task.report["supports"]] == ["case_0", "case_2"]
    assert any("case_1: 0 voxels that are annotated as something else" in note for note in task.report["notes"])


def test_requests_without_meaning_are_refused(supports, tmp_path):
    images = queries(tmp_path)
    with pytest.raises(UsageError, match="holds the images"):
        apply(supports, images, images)
    with pytest.raises(UsageError, match="two tasks for 'ball'"):
        apply(supports, images, tmp_path / "out", [supports.task, supports.task])
    with pytest.raises(InputError, match=r"nothing\.fewshot: no such task file"):
        apply(supports, images, tmp_path / "out", [tmp_path / "nothing.fewshot"])
    with pytest.raises(UsageError, match="the model has a class 'a' already"):
        supports.fit(tmp_path, structures={"a": STRUCTURE})
    with pytest.raises(UsageError, match=r"--inside 7: the model's labels are 1 \(a\), 2 \(b\)"):
        supports.fit(tmp_path, inside=[7])
    other = read_tasks(supports.task)[0]
    write_tasks(tmp_path / "other.fewshot", [replace(other, name="other", orientation="RAS")])
    with pytest.raises(UsageError, match="apply these tasks one after the other"):
        apply(supports, images, tmp_path / "out", [supports.task, tmp_path / "other.fewshot"])


# ------------------------------------------------------------------------------------- what a result was made from


def test_an_unreadable_image_is_reported_and_the_others_are_done(supports, tmp_path):
    images = queries(tmp_path, 2)
    apply(supports, images, tmp_path / "out", probabilities=True)  # before it was damaged
    file = images / "query_10_0000.nii.gz"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 6 // 10])
    broken, done = apply(supports, images, tmp_path / "out", readers=2)
    assert broken["case"] == "query_10"
    assert "query_10_0000.nii.gz: truncated or damaged" in broken["error"]
    assert done["structures"]["ball"]["volume_mm3"] > 0
    assert {file.name for file in (tmp_path / "out").glob("query*")} == {"query_11.nii.gz", "query_11.fewshot.json"}
    assert main(["fewshot", "apply", str(supports.model), str(supports.task), "-i", str(images), "-o",
                 str(tmp_path / "again"), "-device", "cpu"]) == 1  # fmt: skip


def test_nothing_of_an_earlier_run_lies_beside_the_new_label_maps(supports, tmp_path):
    images, out = queries(tmp_path), tmp_path / "out"
    apply(supports, images, out, merge=False, probabilities=True)
    assert (out / "ball" / "query_10.npz").is_file()
    apply(supports, images, out)
    left = {str(file.relative_to(out)) for file in out.rglob("query*")}
    assert left == {"query_10.nii.gz", "query_10.fewshot.json"}


def test_hidden_files_are_no_cases(supports, tmp_path):
    images = queries(tmp_path)
    (images / "._query_10_0000.nii.gz").write_bytes(b"macOS")
    assert find_images(images, ".nii.gz").keys() == {"query_10"}


def test_a_folder_is_continued_with_the_same_tasks_and_options_only(supports, tmp_path):
    images, out, two = queries(tmp_path, 2), tmp_path / "out", tmp_path / "two.fewshot"
    supports.fit(two, structures={"two": STRUCTURE}, settings=Settings(head="prototype", chunks=2))
    apply(supports, images, out, [supports.task, two])
    before = (out / "dataset.json").read_bytes()
    others = [([two, supports.task], {}), ([supports.task], {}), ([supports.task, two], {"merge": False})]
    for tasks, options in others:
        with pytest.raises(UsageError, match="made with other .*name another folder"):
            apply(supports, images, out, tasks, overwrite=False, **options)
    (images / "query_11_0000.nii.gz").unlink()
    with pytest.raises(UsageError, match="holds query_11, made with other tasks"):
        apply(supports, images, out, [two])  # query_11 would keep labels that mean something else
    assert (out / "dataset.json").read_bytes() == before
    assert apply(supports, images, out, [supports.task, two], overwrite=False) == []
    write_case(tmp_path, "query_10", 12)  # another image of the same name
    assert [report["case"] for report in apply(supports, images, out, [supports.task, two], overwrite=False)] == [
        "query_10"
    ]


def test_a_structure_out_of_view_is_absent(supports, tmp_path):
    """Only the landmarks are in view, and something that looks like the structure."""
    image, _ = phantom(10)
    write_case(tmp_path, "query_10", 10, image=image[:, :, :11])
    task = read_tasks(supports.task)[0]
    far = replace(task.structure, places=replace(task.structure.places, points=task.structure.places.points + 5))
    write_tasks(tmp_path / "far.fewshot", [replace(task, structure=far)])
    (report,) = apply(supports, tmp_path / "images", tmp_path / "out", [tmp_path / "far.fewshot"], merge=False)
    told = report["structures"]["ball"]
    assert (told["share_in_view"], told["absent"], told["volume_mm3"], told["expected_volume_mm3"]) == (0, True, 0, 0)
    assert any("lies in the field of view" in warning for warning in told["warnings"])


def pair(root: Path, name: str, seed: int, labelled: bool = True) -> np.ndarray:
    """A case with two balls of one brightness, the patient's left (5) and right (6): their labels (z, y, x)."""
    rng = np.random.default_rng(seed)
    image, _ = phantom(seed)
    grid = np.indices(image.shape)
    labels = np.zeros(image.shape, np.uint8)
    for value, x in ((5, 19), (6, 5)):
        centre = np.array([8, 6, x]) + rng.uniform(-1, 1, 3)
        inside = ((grid - centre[:, None, None, None]) ** 2).sum(axis=0) < 3.2**2
        labels[inside], image[inside] = value, 9.0 + rng.normal(0, 0.3, np.count_nonzero(inside))
    write_image(root / "images" / f"{name}_0000.nii.gz", image)
    if labelled:
        write_image(root / "labels" / f"{name}.nii.gz", labels)
    return labels


def test_structures_of_one_fit_compete_and_sides_are_told_apart(tmp_path):
    model = write_model(tmp_path / "model")
    for i in range(2):
        pair(tmp_path, f"case_{i}", i)
    folders = (tmp_path / "images", tmp_path / "labels")
    given = {"settings": Settings(chunks=2), "voxels": 4000, "progress": False}
    both = fit_folder(model, *folders, tmp_path, structures={"left": 5, "right": 6}, **given)
    (alone,) = fit_folder(model, *folders, tmp_path / "alone.fewshot", structures={"left": 5}, **given)
    # what is fitted together is what is fitted alone, and comes back from one file
    kept = read_tasks(tmp_path / "left+right.fewshot")
    assert [task.name for task in both] == [task.name for task in kept] == ["left", "right"]
    for task in (both[0], kept[0]):
        assert torch.equal(task.structure.heads[0].projections, alone.structure.heads[0].projections)
        assert task.structure.calibration == alone.structure.calibration
    labels = pair(tmp_path / "new", "query", 9, labelled=False)
    apply_folder(
        model, [tmp_path / "left+right.fewshot"], tmp_path / "new" / "images", tmp_path / "out",
        probabilities=True, progress=False,
    )  # fmt: skip
    segmented = read(tmp_path / "out" / "query.nii.gz")
    for value, merged in ((5, 3), (6, 4)):
        there, ours = labels == value, segmented == merged
        assert dice(ours, there) > 0.6
        assert not (ours & (labels == 11 - value)).any()  # never the other side
    p = np.load(tmp_path / "out" / "query.npz")["probabilities"]
    assert len(p) == 5  # background, two classes of the model, left and right
    assert np.allclose(p.sum(axis=0), 1, atol=1e-5)


def test_names_and_values_that_do_not_pair_are_refused(supports, tmp_path, capsys):
    words = ["fewshot", "fit", str(supports.model), "--images", str(supports.root / "images"), "--labels"]
    words += [str(supports.root / "labels"), "-o", str(tmp_path)]
    assert main([*words, "--label", "5", "6", "--name", "x"]) == 2
    assert "--label has 2 values, --name 1 names" in capsys.readouterr().err
    assert main([*words, "--label", "5", "5", "--name", "x", "y"]) == 2
    assert "--label 5 is there twice" in capsys.readouterr().err
    assert main([*words, "--label", "5", "6", "--name", "x", "x"]) == 2
    assert "--name x is there twice" in capsys.readouterr().err
