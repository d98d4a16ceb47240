"""Every option of an evaluation changes the number it names, to what its peer says."""

import numpy as np
import pytest
import surface_distance as deepmind
import torch
from medpy.metric import binary as medpy
from monai.metrics import compute_hausdorff_distance

from nnunet_calib.data.errors import UsageError
from nnunet_calib.evaluation import Protocol, evaluate_folder

from ..folders import Folders, ambiguous, write_labels

SPACING = (2.5, 1.0, 0.8)
SHAPE = (6, 14, 12)


@pytest.fixture
def folders(tmp_path):
    """One case of labels 1 and 2 with probabilities."""
    made = Folders(tmp_path, {"background": 0, "a": 1, "b": 2})
    made.add_ambiguous("case", 0, SHAPE, SPACING)
    return made


@pytest.fixture
def masks():
    """Label 1 of the case, reference and prediction."""
    reference, probabilities = ambiguous(0, SHAPE)
    return reference == 1, probabilities.argmax(axis=0) == 1


def metrics_of(folders, structure="1", **options):
    protocol = Protocol(**options)
    summary = evaluate_folder(
        folders.reference, folders.prediction, folders.output, processes=1, protocol=protocol, stop_at_failure=True
    )
    return summary["metric_per_case"][0]["metrics"][structure]


def test_pooled_percentiles_are_medpys(folders, masks):
    scored = metrics_of(folders, percentile_rule="pooled", further_percentiles=(99.0,))
    assert scored["HD95"] == pytest.approx(medpy.hd95(*masks, SPACING), abs=1e-5)
    assert set(scored) >= {"HD99", "MASD"}
    assert scored["HD95"] <= scored["HD99"] <= scored["HD"]


def test_further_percentiles_are_monais(folders, masks):
    scored = metrics_of(folders, further_percentiles=(50.0, 99.5))
    theirs, ours = (torch.from_numpy(mask)[None, None] for mask in masks)
    for percentile in (50.0, 99.5):
        expected = compute_hausdorff_distance(
            ours, theirs, include_background=True, percentile=percentile, spacing=SPACING
        )
        assert scored[f"HD{percentile:g}"] == pytest.approx(expected.item(), abs=1e-5)


def test_numbers_close_to_each_other_do_not_share_a_name(folders):
    scored = metrics_of(folders, further_percentiles=(99.99999, 100.0), further_tolerances=(2.0, 2.0000001))
    assert scored.keys() >= {"HD99.99999", "HD100", "NSD@2mm", "NSD@2.0000001mm"}


def test_surfaces_by_area_are_deepminds(folders, masks):
    scored = metrics_of(folders, surface="area", nsd_tolerance=1.5)
    d = deepmind.compute_surface_distances(*masks, SPACING)
    assert scored["HD"] == pytest.approx(deepmind.compute_robust_hausdorff(d, 100), abs=1e-5)
    assert scored["HD95"] == pytest.approx(deepmind.compute_robust_hausdorff(d, 95), abs=1e-5)
    assert scored["NSD"] == pytest.approx(deepmind.compute_surface_dice_at_tolerance(d, 1.5), abs=1e-5)
    directed = deepmind.compute_average_surface_distance(d)
    assert scored["MASD"] == pytest.approx(np.mean(directed), abs=1e-5)


def test_tolerances_of_structures_and_further_ones(folders):
    plain = {mm: metrics_of(folders, "2", nsd_tolerance=mm)["NSD"] for mm in (0.5, 1.0, 3.0)}
    scored = metrics_of(folders, "2", structure_tolerances={"2": 3.0}, further_tolerances=(0.5,))
    assert scored["NSD"] == plain[3.0]
    assert scored["NSD@0.5mm"] == plain[0.5]
    assert metrics_of(folders, "1", structure_tolerances={"2": 3.0})["NSD"] == metrics_of(folders, "1")["NSD"]
    assert plain[0.5] < plain[1.0] < plain[3.0]


def test_volumes_are_voxels_times_the_spacing(folders, masks):
    scored = metrics_of(folders)
    reference, prediction = (np.count_nonzero(mask) for mask in masks)
    assert scored["volume_ref_mm3"] == pytest.approx(reference * 2.5 * 0.8)
    assert scored["volume_pred_mm3"] == pytest.approx(prediction * 2.5 * 0.8)
    assert scored["RVE"] == pytest.approx((prediction - reference) / reference)


def test_torch_counts_the_same(folders, monkeypatch):
    """What a GPU would compute, here on the processor's own torch."""
    expected = evaluate_folder(folders.reference, folders.prediction, folders.output, processes=1)
    monkeypatch.setattr("nnunet_calib.evaluation.case._backend", lambda protocol: "torch")
    found = evaluate_folder(folders.reference, folders.prediction, folders.output, processes=1, fresh=True)
    for region, scores in expected["calibration_mean"].items():
        assert found["calibration_mean"][region]["ECE"] == pytest.approx(scores["ECE"], abs=1e-9)
        assert found["calibration_mean"][region]["AURC"] == pytest.approx(scores["AURC"], abs=1e-9)
    for structure, scores in expected["mean"].items():
        for name, value in scores.items():
            assert found["mean"][structure][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"surface": "mesh"}, "surface"),
        ({"percentile_rule": "mean"}, "percentile rule"),
        ({"further_percentiles": (101.0,)}, "percentile"),
        ({"further_tolerances": (-1.0,)}, "NSD"),
        ({"threshold": 1.0}, "TCECE"),
        ({"device": "nonsense"}, "nonsense"),
        ({"device": "meta"}, "cpu, cuda or cuda:<number>"),
    ],
)
def test_values_without_meaning_are_refused(options, named):
    with pytest.raises(UsageError, match=named):
        Protocol(**options)


def test_a_tolerance_for_an_unknown_structure_is_refused(folders):
    with pytest.raises(UsageError, match="NSD tolerance for '7'"):
        metrics_of(folders, structure_tolerances={"7": 1.0})


def authors_ece(p, labels):
    """ECELoss of the MarginLoss code on the foreground voxels: torch, float32, bins (lo, hi]."""
    confidence, predicted = torch.from_numpy(p).max(dim=1)
    correct = predicted.eq(torch.from_numpy(labels))
    edges = torch.linspace(0, 1, 16)
    error = torch.zeros(1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = confidence.gt(low) & confidence.le(high)
        if inside.any():
            error += (confidence[inside].mean() - correct[inside].float().mean()).abs() * inside.float().mean()
    return error.item()


def test_the_nacl_protocol_is_the_authors(folders, masks):
    protocol = Protocol(nacl=True)
    summary = evaluate_folder(folders.reference, folders.prediction, folders.output, processes=1, protocol=protocol)
    reference, p = ambiguous(0, SHAPE)
    counts = reference != 0
    found = summary["nacl"]
    expected = authors_ece(p[:, counts].T, reference[counts].astype(np.int64))
    assert found["ECE"] == pytest.approx(expected, abs=6e-5)  # they round to 4 digits
    assert found["structures"]["1"]["DSC"] == round(medpy.dc(*masks), 4)
    assert found["structures"]["1"]["HD"] == pytest.approx(medpy.hd95(*masks), abs=1e-5)  # no spacing
    assert found["DSC"] == pytest.approx(np.mean([found["structures"][c]["DSC"] for c in "12"]))


def test_the_nacl_protocol_keeps_its_empty_cases(folders):
    """A missed structure scores 0 voxels, a made up one a Dice of 1; our own numbers beside it do neither."""
    reference, _ = ambiguous(0, SHAPE)
    write_labels(folders.reference / "case.nii.gz", np.where(reference == 1, 0, reference), SPACING)
    write_labels(folders.prediction / "case.nii.gz", np.where(reference == 2, 0, reference), SPACING)
    for file in folders.prediction.glob("*.npz"):
        file.unlink()
    protocol = Protocol(nacl=True)
    summary = evaluate_folder(folders.reference, folders.prediction, folders.output, processes=1, protocol=protocol)
    assert summary["nacl"]["structures"] == {"1": {"DSC": 1.0, "HD": 0.0}, "2": {"DSC": 0.0, "HD": 0.0}}
    assert summary["mean"]["1"]["Dice"] == 0
    assert summary["mean"]["2"]["HD95"] == np.inf


def test_the_nacl_protocol_does_not_need_consecutive_labels(tmp_path):
    reference, p = ambiguous(0, SHAPE)
    found = []
    for values in ((0, 1, 2), (0, 2, 300)):
        names = dict(zip(("background", "a", "b"), values, strict=True))
        made, of = Folders(tmp_path / str(values[2]), names), np.array(values, dtype=np.uint16)
        made.add("case", of[reference], of[p.argmax(axis=0)], p)
        summary = evaluate_folder(
            made.reference, made.prediction, made.output, processes=1, protocol=Protocol(nacl=True)
        )
        assert not summary["failed"]
        found.append([summary["nacl"][name] for name in ("DSC", "HD", "ECE", "CECE")])
    assert found[0] == found[1]


def test_the_nacl_protocol_is_for_labels(tmp_path):
    made = Folders(tmp_path, {"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    made.add_ambiguous("case", 0, SHAPE, SPACING)
    with pytest.raises(UsageError, match="not for regions"):
        evaluate_folder(made.reference, made.prediction, made.output, processes=1, protocol=Protocol(nacl=True))
