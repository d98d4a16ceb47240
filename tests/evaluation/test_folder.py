"""A folder from files to summary: nnU-Net's numbers in it, the record's promises around them."""

import csv
import json
import math
import os

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, compute_metrics_on_folder, load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from skimage import io

from nnunet_calib import metrics
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.probabilities import write_compact_slabs
from nnunet_calib.evaluation import Protocol, evaluate_folder, read_reliability

from ..folders import Folders, ambiguous, assert_same, write_labels

LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}


def evaluate(folders: Folders, **options) -> dict:
    options = {"processes": 1} | options
    return evaluate_folder(folders.reference, folders.prediction, folders.output, **options)


def of_nnunet(folders: Folders, structures: list, ignore_label: int | None = None) -> dict:
    """nnU-Net's metrics of the case named case."""
    files = [str(folder / "case.nii.gz") for folder in (folders.reference, folders.prediction)]
    return compute_metrics(*files, SimpleITKIO(), structures, ignore_label)["metrics"]


def region_probabilities(seed: int, shape=(6, 14, 12)) -> tuple[np.ndarray, np.ndarray]:
    """Nested sigmoid regions whole and core, and the segmentation nnU-Net makes of them."""
    rng = np.random.default_rng(seed)
    whole = ndimage.gaussian_filter(rng.normal(0, 12, shape), 1.5)
    logits = np.stack([whole, whole - 1])
    p = (1 / (1 + np.exp(-logits))).astype(np.float32)
    segmentation = np.zeros(shape, dtype=np.uint8)
    segmentation[p[0] > 0.5] = 1
    segmentation[p[1] > 0.5] = 2
    return p, segmentation


@pytest.fixture
def folders(tmp_path):
    """Three cases of labels 1 and 2, anisotropic, with probabilities."""
    made = Folders(tmp_path, LABELS)
    for seed in range(3):
        made.add_ambiguous(f"case_{seed}", seed, spacing=(2.5, 1.0, 0.8))
    return made


def test_dice_and_counts_are_nnunets(folders):
    ours = evaluate(folders)
    theirs = compute_metrics_on_folder(
        str(folders.reference), str(folders.prediction), None, SimpleITKIO(), ".nii.gz", [1, 2], num_processes=1
    )
    for our_case, their_case in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert our_case["prediction_file"] == their_case["prediction_file"]
        for label, numbers in their_case["metrics"].items():
            assert {name: our_case["metrics"][str(label)][name] for name in numbers} == pytest.approx(
                numbers, abs=1e-12
            )
    for label, numbers in theirs["mean"].items():
        assert {name: ours["mean"][str(label)][name] for name in numbers} == pytest.approx(numbers, abs=1e-12)
    foreground = theirs["foreground_mean"]
    assert {name: ours["foreground_mean"][name] for name in foreground} == pytest.approx(foreground, abs=1e-12)


def test_nnunet_reads_the_summary(folders):
    summary = evaluate(folders)
    read = load_summary_json(str(folders.output / "summary.json"))
    assert read["mean"][1]["Dice"] == summary["mean"]["1"]["Dice"]
    assert read["metric_per_case"][0]["metrics"][2]["TP"] == summary["metric_per_case"][0]["metrics"]["2"]["TP"]
    assert read["foreground_mean"]["Dice"] == summary["foreground_mean"]["Dice"]


def test_the_record_has_every_promised_part(folders):
    evaluate(folders, protocol=Protocol(boundary=True))
    summary = folders.summary()
    assert set(summary) == {
        "metric_per_case", "mean", "foreground_mean", "structures", "calibration_mean", "calibration_pooled",
        "intervals", "failed", "protocol", "software", "median", "mean_in_both",
    }  # fmt: skip
    case = summary["metric_per_case"][0]
    assert case["case"] == "case_0"
    assert case["probabilities_file"].endswith("predicted/case_0.npz")
    assert set(case["metrics"]["1"]) >= {
        "Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref", "HD", "HD95", "ASSD", "NSD",
    }  # fmt: skip
    assert list(case["calibration"]) == ["volume", "reference_foreground", "foreground", "boundary"]
    assert set(case["calibration"]["volume"]) >= {"ECE", "CECE", "ACE", "MCE", "Brier", "NLL", "n", "classes"}
    assert set(case["calibration"]["volume"]["classes"]) == {"0", "1", "2"}
    assert case["notes"] == []
    assert summary["protocol"]["bins"] == 15
    assert summary["software"]["nnunetv2"].startswith("2.")


def test_calibration_is_that_of_the_arrays_in_every_region(folders):
    summary = evaluate(folders)
    reference, p = ambiguous(0, (6, 14, 12))
    prediction = p.argmax(axis=0)
    masks = {
        "volume": np.ones(reference.shape, dtype=bool),
        "reference_foreground": reference > 0,
        "foreground": (reference > 0) | (prediction > 0),
    }
    for region, mask in masks.items():
        statistics, _ = metrics.calibration_statistics(p[:, mask], reference[mask], range(3), {"it": mask[mask]})
        expected = metrics.scores(statistics["it"], "012")
        ours = summary["metric_per_case"][0]["calibration"][region]
        for name in ("ECE", "CECE", "ACE", "MCE", "Brier", "NLL", "n"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-12)


def test_pooled_calibration_is_that_of_all_voxels_together(folders):
    pooled = evaluate(folders)["calibration_pooled"]["volume"]
    cases = [ambiguous(seed, (6, 14, 12)) for seed in range(3)]
    labels = np.concatenate([reference.ravel() for reference, _ in cases])
    p = np.concatenate([p.reshape(3, -1) for _, p in cases], axis=1)
    whole, _ = metrics.calibration_statistics(p, labels, range(3), {"it": np.ones(labels.shape, dtype=bool)})
    assert pooled["ECE"] == pytest.approx(metrics.scores(whole["it"], "012")["ECE"], rel=1e-12)
    assert pooled["NLL"] == pytest.approx(metrics.scores(whole["it"], "012")["NLL"], rel=1e-12)


def test_any_number_can_be_computed_again_from_reliability_json(folders):
    summary = evaluate(folders)
    statistics = read_reliability(folders.output / "reliability.json")
    for case in summary["metric_per_case"]:
        for region, expected in case["calibration"].items():
            assert_same(metrics.scores(statistics[case["case"]][region], "012"), expected)
    first, second, third = (statistics[f"case_{i}"]["foreground"] for i in range(3))
    pooled = metrics.scores(first + second + third, "012") | {"cases": 3}
    assert_same(pooled, summary["calibration_pooled"]["foreground"])


def test_another_json_is_no_reliability_json(folders):
    evaluate(folders)
    with pytest.raises(InputError, match="not a reliability.json"):
        read_reliability(folders.output / "summary.json")


def test_cases_csv_has_a_row_per_case_and_label(folders):
    summary = evaluate(folders)
    with open(folders.output / "cases.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["label"], row["name"]) for row in rows[:2]] == [
        ("case_0", "1", "a"),
        ("case_0", "2", "b"),
    ]
    assert len(rows) == 6
    first = summary["metric_per_case"][0]
    assert float(rows[1]["HD95"]) == first["metrics"]["2"]["HD95"]
    assert float(rows[1]["foreground_CECE"]) == first["calibration"]["foreground"]["CECE"]
    assert float(rows[1]["foreground_class_ECE"]) == first["calibration"]["foreground"]["classes"]["2"]["ECE"]


def test_processes_change_nothing(folders):
    alone = evaluate(folders)
    records = (folders.output / "reliability.json").read_bytes(), (folders.output / "cases.csv").read_bytes()
    assert_same(evaluate(folders, processes=2), alone, rel=0)
    assert records == ((folders.output / "reliability.json").read_bytes(), (folders.output / "cases.csv").read_bytes())


def test_missed_made_up_and_absent_structures(tmp_path):
    """Label 2: missed in one case, made up in another, in neither in the third, found in the fourth."""
    folders = Folders(tmp_path, LABELS)
    nothing = np.zeros((4, 8, 8), dtype=np.uint8)
    nothing[1:3, 1:4, 1:4] = 1
    something = nothing.copy()
    something[1:3, 5:7, 5:7] = 2
    folders.add("absent", nothing, nothing)
    folders.add("found", something, something)
    folders.add("made_up", nothing, something)
    folders.add("missed", something, nothing)
    summary = evaluate(folders)
    by_case = {record["case"]: record["metrics"]["2"] for record in summary["metric_per_case"]}
    for name in ("missed", "made_up"):
        assert by_case[name]["HD"] == by_case[name]["HD95"] == by_case[name]["ASSD"] == math.inf
        assert by_case[name]["NSD"] == by_case[name]["Dice"] == 0
    assert all(math.isnan(by_case["absent"][number]) for number in ("Dice", "IoU", "HD", "HD95", "ASSD", "NSD"))
    counts = {"cases": 4, "in_both": 1, "missed": 1, "only_predicted": 1, "in_neither": 1}
    assert summary["structures"]["2"] == {"name": "b", **counts}
    assert summary["mean"]["2"]["HD95"] == math.inf
    assert summary["mean"]["2"]["NSD"] == summary["mean"]["2"]["Dice"] == pytest.approx(1 / 3)
    written = folders.summary()
    assert written["metric_per_case"][0]["metrics"]["2"]["HD"] == "nan"
    assert written["metric_per_case"][3]["metrics"]["2"]["HD"] == "inf"
    assert written["mean"]["2"]["HD95"] == "inf"
    assert load_summary_json(str(folders.output / "summary.json"))["mean"][2]["Dice"] == pytest.approx(1 / 3)


def test_without_probabilities_there_is_no_calibration_but_the_rest(folders):
    (folders.prediction / "case_1.npz").unlink()
    summary = evaluate(folders)
    assert summary["metric_per_case"][1]["probabilities_file"] is None
    assert summary["metric_per_case"][1]["calibration"] == {}
    assert summary["metric_per_case"][1]["metrics"]["1"]["Dice"] > 0
    others = [summary["metric_per_case"][i]["calibration"]["volume"]["ECE"] for i in (0, 2)]
    assert summary["calibration_mean"]["volume"]["ECE"] == pytest.approx(np.mean(others))
    assert list(json.loads((folders.output / "reliability.json").read_text())["cases"]) == ["case_0", "case_2"]


def test_how_many_cases_a_calibration_has_is_told(folders):
    """One case has no probabilities, another no foreground in its reference."""
    (folders.prediction / "case_1.npz").unlink()
    write_labels(folders.reference / "case_2.nii.gz", np.zeros((6, 14, 12), dtype=np.uint8), (2.5, 1.0, 0.8))
    summary = evaluate(folders)
    for calibration in (summary["calibration_mean"], summary["calibration_pooled"]):
        cases = {region: scores["cases"] for region, scores in calibration.items()}
        assert cases == {"volume": 2, "reference_foreground": 1, "foreground": 2}


def test_ignored_voxels_count_nowhere(tmp_path):
    """What is predicted, and how surely, where the reference says ignore changes no number."""
    reference, p = ambiguous(4, (6, 14, 12))
    reference[:, :4] = 3
    summaries = []
    for name, fill in (("clean", 0), ("dirty", 2)):
        folders = Folders(tmp_path / name, LABELS | {"ignore": 3})
        other = p.copy()
        if fill:
            other[:, :, :4] = np.eye(3, dtype=np.float32)[fill][:, None, None, None]
        folders.add("case", reference, other.argmax(axis=0), other)
        summaries.append(evaluate(folders, protocol=Protocol(boundary=True, dilate=20.0)))
        theirs = of_nnunet(folders, [1, 2], ignore_label=3)
        ours = summaries[-1]["metric_per_case"][0]["metrics"]
        assert {name: ours["1"][name] for name in theirs[1]} == theirs[1]
        assert summaries[-1]["metric_per_case"][0]["notes"] == []
    clean, dirty = (summary["metric_per_case"][0] for summary in summaries)
    assert clean["metrics"] == dirty["metrics"]
    assert_same(clean["calibration"], dirty["calibration"])
    assert clean["calibration"]["volume"]["n"] == clean["calibration"]["foreground"]["n"] == 6 * 10 * 12


def test_slices_that_are_ignored_altogether_are_no_disagreement(tmp_path):
    """Sparse annotation: slices without a voxel that counts are not read for the numbers."""
    folders = Folders(tmp_path, LABELS | {"ignore": 3})
    reference, p = ambiguous(4, (64, 80, 80))
    reference[:20], reference[21:] = 3, 3
    folders.add("case", reference, p.argmax(axis=0), p)
    assert evaluate(folders)["metric_per_case"][0]["notes"] == []


def test_regions_have_nnunets_keys_and_binary_calibration(tmp_path):
    folders = Folders(tmp_path, REGIONS, regions_class_order=[1, 2])
    p, segmentation = region_probabilities(0)
    reference = region_probabilities(1)[1]
    folders.add("case", reference, segmentation, p)
    summary = evaluate(folders)
    structures = LabelManager(REGIONS, [1, 2]).foreground_regions
    theirs = of_nnunet(folders, structures)
    record = summary["metric_per_case"][0]
    assert list(record["metrics"]) == ["(1, 2)", "(2,)"]
    for structure, numbers in theirs.items():
        assert {name: record["metrics"][str(structure)][name] for name in numbers} == pytest.approx(numbers, abs=1e-12)
    statistics, _ = metrics.calibration_statistics(
        p, reference, [(1, 2), (2,)], {"it": np.ones(reference.shape, dtype=bool)}, multilabel=True
    )
    assert_same(record["calibration"]["volume"], metrics.scores(statistics["it"], ["(1, 2)", "(2,)"]))
    assert record["notes"] == []
    assert (
        load_summary_json(str(folders.output / "summary.json"))["mean"][(1, 2)]["Dice"]
        == summary["mean"]["(1, 2)"]["Dice"]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("has_regions", [False, True])
def test_slabs_of_the_compact_format_give_the_numbers_of_the_whole_volume(tmp_path, has_regions, dtype):
    reference, p = ambiguous(5, (7, 14, 12))
    labels = (REGIONS if has_regions else LABELS) | {"ignore": 3}
    options = {"regions_class_order": [1, 2]} if has_regions else {}
    prediction = p.argmax(axis=0)
    if has_regions:
        p, prediction = region_probabilities(2, (7, 14, 12))
    reference[:, :4] = 3
    p = p.astype(dtype)
    records = []
    for name in ("npz", "compact"):
        folders = Folders(tmp_path / name, labels, **options)
        folders.add("case", reference, prediction, p if name == "npz" else None)
        if name == "compact":
            slabs = (p[:, z : z + 3] for z in range(0, 7, 3))
            write_compact_slabs(folders.prediction / "case.nncp", slabs, p.shape, dtype)
        records += evaluate(folders, protocol=Protocol(boundary=True, dilate=2.0))["metric_per_case"]
    whole, in_slabs = records
    assert in_slabs["probabilities_file"].endswith(".nncp")
    assert whole["notes"] == in_slabs["notes"]
    assert_same(in_slabs["calibration"], whole["calibration"])


def test_distances_of_regions_are_those_of_their_masks(tmp_path):
    folders = Folders(tmp_path, REGIONS, regions_class_order=[1, 2])
    reference, prediction = region_probabilities(1)[1], region_probabilities(2)[1]
    folders.add("case", reference, prediction, spacing=(3.0, 1.0, 0.5))
    ours = evaluate(folders)["metric_per_case"][0]["metrics"]
    for structure, members in (("(1, 2)", (1, 2)), ("(2,)", (2,))):
        masks = (np.isin(labels, members) for labels in (reference, prediction))
        distances = metrics.surface_distances(*masks, (3.0, 1.0, 0.5))
        assert ours[structure]["HD95"] == metrics.hausdorff_95(distances)
        assert ours[structure]["ASSD"] == metrics.average_surface_distance(distances)


def squares() -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction in a single slice of a volume."""
    reference, prediction = np.zeros((2, 5, 30, 30), dtype=np.uint8)
    reference[2, 5:20, 5:20] = 1
    prediction[2, 5:20, 8:24] = 1
    return reference, prediction


def test_a_structure_in_one_slice_of_a_volume_is_all_surface(tmp_path):
    """As in MONAI 1.5: the voxels' neighbours in the next slices are outside."""
    folders = Folders(tmp_path, LABELS)
    reference, prediction = squares()
    folders.add("case", reference, prediction)
    ours = evaluate(folders)["metric_per_case"][0]["metrics"]["1"]
    assert (ours["ASSD"], ours["NSD"]) == pytest.approx((0.51613, 0.83871), abs=1e-5)
    whole = metrics.surface_distances(reference == 1, prediction == 1, (1.0, 1.0, 1.0))
    assert ours["ASSD"] == metrics.average_surface_distance(whole)
    y, y_pred = (torch.from_numpy(labels[None, None]) for labels in (reference, prediction))
    options = {"y_pred": y_pred, "y": y, "include_background": True}
    assert ours["ASSD"] == pytest.approx(float(compute_average_surface_distance(**options, symmetric=True)), abs=1e-5)
    assert ours["NSD"] == pytest.approx(float(compute_surface_dice(**options, class_thresholds=[1.0])), abs=1e-5)


def test_a_column_of_a_2d_image_is_all_surface(tmp_path):
    """Eight voxels, the first five found: the others are 1, 2 and 3 away, 13 surface voxels in all."""
    folders = Folders(tmp_path, LABELS)
    reference, prediction = np.zeros((2, 1, 12, 10), dtype=np.uint8)
    reference[0, 2:10, 4] = prediction[0, 2:7, 4] = 1
    folders.add("case", reference, prediction)
    ours = evaluate(folders)["metric_per_case"][0]["metrics"]["1"]
    assert (ours["HD"], ours["ASSD"], ours["NSD"]) == pytest.approx((3, 6 / 13, 11 / 13))


def test_postprocessed_predictions_are_noted(folders):
    _, p = ambiguous(0, (6, 14, 12))
    prediction = p.argmax(axis=0)
    index = tuple(np.argwhere(prediction == 1)[0])
    prediction[index] = 0
    write_labels(folders.prediction / "case_0.nii.gz", prediction, (2.5, 1.0, 0.8))
    records = evaluate(folders)["metric_per_case"]
    assert records[0]["notes"] == [
        "1 voxels of the segmentation differ from its probabilities' decision (post-processing?)"
    ]
    assert records[1]["notes"] == []


@pytest.mark.parametrize("has_regions", [False, True])
def test_probabilities_on_flipped_axes_are_refused(tmp_path, has_regions):
    if has_regions:
        folders = Folders(tmp_path, REGIONS, regions_class_order=[1, 2])
        p, prediction = region_probabilities(0)
    else:
        folders = Folders(tmp_path, LABELS)
        p = ambiguous(0, (6, 14, 12))[1]
        prediction = p.argmax(axis=0)
    folders.add("case", prediction, prediction, p[:, :, ::-1])
    failures = []
    summary = evaluate(folders, on_failure=failures.append)
    assert len(failures) == 1
    assert "case.npz: its axes are flipped or reordered" in failures[0]
    assert summary["failed"] == [{"case": "case", "error": failures[0]}]


def test_2d_images(tmp_path):
    folders = Folders(tmp_path, LABELS, file_ending=".png")
    reference, p = ambiguous(0, (1, 24, 30))
    reference[:, 10:], p[:, :, 10:] = 0, np.float32([1, 0, 0])[:, None, None, None]
    for folder, labels in ((folders.reference, reference), (folders.prediction, p.argmax(axis=0))):
        io.imsave(folder / "case.png", labels[0].astype(np.uint8), check_contrast=False)
    np.savez_compressed(folders.prediction / "case.npz", probabilities=p)
    record = evaluate(folders, protocol=Protocol(boundary=True))["metric_per_case"][0]
    distances = metrics.surface_distances(reference[0] == 1, p.argmax(axis=0)[0] == 1, (1.0, 1.0))
    assert record["metrics"]["1"]["HD"] == metrics.hausdorff(distances)
    assert record["calibration"]["volume"]["n"] == 24 * 30
    assert record["calibration"]["boundary"]["n"] < 24 * 30


def test_intervals_hold_the_mean_and_are_the_same_every_time(folders):
    first, second = evaluate(folders), evaluate(folders)
    assert_same(first["intervals"], second["intervals"], rel=0)
    low, high = first["intervals"]["mean"]["1"]["Dice"]
    assert low <= first["mean"]["1"]["Dice"] <= high
    low, high = first["intervals"]["calibration_mean"]["foreground"]["ECE"]
    assert low <= first["calibration_mean"]["foreground"]["ECE"] <= high


def test_options_change_the_protocol_and_the_numbers(folders):
    default, other = evaluate(folders), evaluate(folders, protocol=Protocol(bins=5, nsd_tolerance=0.0))
    assert other["protocol"]["bins"] == 5
    assert other["protocol"]["NSD_tolerance_mm"] == 0
    assert other["mean"]["1"]["NSD"] < default["mean"]["1"]["NSD"]
    assert other["calibration_mean"]["volume"]["ECE"] != default["calibration_mean"]["volume"]["ECE"]
    with pytest.raises(UsageError, match="bins"):
        Protocol(bins=0)
    with pytest.raises(UsageError, match="NSD"):
        Protocol(nsd_tolerance=math.nan)
    with pytest.raises(UsageError, match="dilation"):
        Protocol(dilate=-1.0)


def test_the_foreground_region_can_be_dilated_in_mm(tmp_path):
    """2 mm around two voxels one beside the other along z, spacing (2, 1, 1).

    13 offsets y^2 + x^2 <= 4 in either slice and the voxel alone one slice further, on both sides: 2 (13 + 1).
    """
    folders = Folders(tmp_path, LABELS)
    reference, prediction = np.zeros((2, 8, 11, 11), dtype=np.uint8)
    reference[3, 5, 5] = prediction[4, 5, 5] = 1
    p = np.moveaxis(np.eye(3, dtype=np.float32)[prediction], -1, 0)
    folders.add("case", reference, prediction, p, spacing=(2.0, 1.0, 1.0))
    for millimetres, n in ((0.0, 2), (0.5, 2), (2.0, 28)):
        summary = evaluate(folders, protocol=Protocol(dilate=millimetres))
        assert summary["protocol"]["dilate_mm"] == millimetres
        calibration = summary["metric_per_case"][0]["calibration"]
        assert [calibration[region]["n"] for region in ("reference_foreground", "foreground")] == [1, n]
    assert "2 mm" in summary["protocol"]["regions"]["foreground"]


def test_one_bad_case_is_reported_and_the_rest_goes_on(folders):
    (folders.prediction / "case_1.npz").write_bytes(b"not a zip")
    failures = []
    summary = evaluate(folders, on_failure=failures.append)
    assert [record["case"] for record in summary["metric_per_case"]] == ["case_0", "case_2"]
    assert len(failures) == 1
    assert "case_1.npz" in failures[0]
    assert folders.summary()["failed"][0]["case"] == "case_1"


def contents(folders: Folders) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folders.output.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["summary.json", "cases.csv", "reliability.json"])
def test_a_target_that_cannot_be_replaced_leaves_the_others_as_they_were(folders, name):
    evaluate(folders)
    (folders.output / name).unlink()
    (folders.output / name).mkdir()
    before = contents(folders)
    with pytest.raises(InputError, match=rf"{name} is a directory"):
        evaluate(folders, protocol=Protocol(bins=5))
    assert contents(folders) == before


@pytest.mark.parametrize("done", [0, 1, 2])
def test_the_results_never_are_of_two_runs(folders, monkeypatch, done):
    """Whichever file the last step fails at."""
    evaluate(folders)
    before, replace, moved = contents(folders), os.replace, []

    def replace_or_fail(source, target):
        if os.path.dirname(target) == str(folders.output):
            if len(moved) == done:
                raise OSError(28, "No space left on device")
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(InputError, match="No space left on device"):
        evaluate(folders, protocol=Protocol(bins=5))
    after = contents(folders)
    assert len(moved) == done
    assert not any(after.get(name) == content for name, content in before.items()) or not moved
    assert {path.name for path in folders.output.iterdir()} == {"cases", *after}
