"""Fit, apply and check on folders, as the commands do."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.probabilities import ProbabilityFile, write_compact_slabs, write_npz
from nnunet_calib.posthoc import CALIBRATORS, LocalTemperature, TemperatureScaling, load_calibrator
from nnunet_calib.posthoc.folders.apply import apply_folder, calibrate_case
from nnunet_calib.posthoc.folders.check import check_folder, check_shift, population_stability
from nnunet_calib.posthoc.folders.crossfit import _log_loss, _summary, choose
from nnunet_calib.posthoc.folders.fit import _worse_in_the_foreground, auto_methods, fit_folder

from ...folders import Folders
from ..predictions import LABELS, SHAPE, model, predictions, region_predictions, too_sure


def labels_of(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_the_temperature_of_a_folder(tmp_path):
    made = predictions(tmp_path)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["temperature"])
    written = json.loads((tmp_path / "out" / "calibrator.json").read_text())
    assert written["temperature"] == content["temperature"] == pytest.approx(2, rel=0.05)
    assert written["region"] == "volume"
    assert written["cases"] == [f"case_{i:02d}" for i in range(6)]
    assert written["model"]["classes"] == ["0", "1", "2"]
    for region, scores in written["cross_fit"]["temperature"].items():
        before = written["cross_fit"]["none"][region]
        assert scores["NLL"]["low"] < scores["NLL"]["mean"] < before["NLL"]["mean"]
        assert scores["cases"] == 6
    assert written["cross_fit"]["temperature"]["volume"]["ECE"]["mean"] < 0.03


@pytest.mark.parametrize("region", ["volume", "foreground", "boundary"])
def test_auto_keeps_the_best_and_says_why(tmp_path, region):
    made = predictions(tmp_path)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference, region=region, voxels=2_000)
    table = content["cross_fit"]
    assert list(table) == ["none", *auto_methods(region)]
    assert content["choice"].startswith(content["method"])
    assert f"smallest NLL ({region})" in content["choice"]
    assert "local" not in table


def nll_table(**gains: list[float]):
    """Cross-fitted NLL of six cases, less by so much than 1 without calibration; a little else differs by case."""
    others = {"none": [0.0] * 6} | gains
    by_name = {name: 1 + 0.1 * np.arange(6) - np.array(gain) for name, gain in others.items()}

    def row(name):
        rest = {other: nll for other, nll in by_name.items() if other != name}
        return _summary(np.tile(by_name[name][:, None], (1, 4)), rest)

    return {name: {"volume": row(name)} for name in by_name}


def test_a_simpler_method_is_kept_unless_chance_does_not_explain_the_gain():
    """Dirichlet gains 0.01 more in the mean: in every case, or by 0.11 in one and -0.01 in the others."""
    surely = nll_table(temperature=[0.2] * 6, dirichlet=[0.21] * 6)
    assert choose(surely, "volume") == (
        "dirichlet",
        "dirichlet has the smallest NLL (volume) on cases it was not fitted on: 1.0400, 1.2500 before; next "
        "temperature, 1.0500",
    )
    chosen, reason = choose(nll_table(temperature=[0.2] * 6, dirichlet=[0.31] + [0.19] * 5), "volume")
    assert chosen == "temperature"
    assert reason.startswith(
        "temperature is simpler than dirichlet, of smallest NLL (volume) on cases it was not fitted on: 1.0500, 1.2500 "
        "before; dirichlet 1.0400, a gain that chance explains (95 % interval -0.0100 to "
    )


def test_the_simplest_of_those_that_chance_does_not_tell_apart():
    table = nll_table(
        temperature=[0.1] * 6, classwise=[0.2] * 6, vector=[0.2] * 6, isotonic=[0.31] + [0.19] * 5, dirichlet=[0.2] * 6
    )
    assert choose(table, "volume")[0] == "classwise"


def test_the_best_of_all_may_be_no_gain():
    assert choose(nll_table(temperature=[0.31] + [-0.05] * 5), "volume")[1].endswith("could be no gain at all")


def test_a_method_that_is_no_better_than_the_network_is_advised_against():
    reason = choose(nll_table(temperature=[-0.01] * 6), "volume")[1]
    assert "1.2600, 1.2500 before" in reason
    assert "do not apply it" in reason


def test_what_helps_the_volume_at_the_foregrounds_cost_is_said():
    def scores(nll: float, ece: float) -> dict:
        return {"foreground": {"NLL": {"mean": nll}, "ECE": {"mean": ece}}}

    table = {"none": scores(1.065, 0.201), "temperature": scores(1.085, 0.210), "isotonic": scores(1.085, 0.150)}
    assert "NLL 1.065 to 1.085, ECE 0.201 to 0.21" in _worse_in_the_foreground(table, "temperature")
    assert _worse_in_the_foreground(table, "isotonic") == ""


def test_in_the_foreground_methods_that_tell_classes_apart_are_warned_of(tmp_path):
    """Measured on Hippocampus: Dirichlet fitted there raises the Brier score of the volume from .024 to .92."""
    made = predictions(tmp_path)
    assert auto_methods("foreground") == ("temperature",)
    content = fit_folder(
        made.prediction, tmp_path / "out", made.reference, methods=["dirichlet"], region="foreground", voxels=2_000
    )
    volume = {name: regions["volume"]["Brier"]["mean"] for name, regions in content["cross_fit"].items()}
    assert volume["dirichlet"] > volume["none"]
    assert "does harm" in content["notes"][-1]


def test_the_same_seed_gives_the_same_file(tmp_path):
    made = predictions(tmp_path, 3)
    for name in "ab":
        fit_folder(made.prediction, tmp_path / name, made.reference, voxels=1_000, seed=7)
    first, second = ((tmp_path / name / "calibrator.json").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.slow  # each process imports nnU-Net
def test_processes_change_nothing(tmp_path):
    made = predictions(tmp_path, 2)
    one, two = (
        fit_folder(made.prediction, tmp_path / str(n), made.reference, methods=["vector"], voxels=500, processes=n)
        for n in (1, 2)
    )
    assert one == two


def test_one_case_only(tmp_path):
    made = predictions(tmp_path, 1)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference)
    assert content["method"] == "temperature"
    assert content["cross_fit"] == {}
    assert "a single case" in content["choice"]
    assert content["temperature"] == pytest.approx(2, rel=0.1)


def test_regions(tmp_path):
    made = region_predictions(tmp_path)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["classwise", "temperature"])
    assert content["multilabel"]
    found = fit_folder(made.prediction, tmp_path / "t", made.reference, methods=["temperature"])
    assert found["temperature"] == pytest.approx(2, rel=0.1)
    done = apply_folder(tmp_path / "out", made.prediction, tmp_path / "calibrated")
    assert sum(case["changed"] for case in done["cases"].values()) == 0
    p = np.stack(list(ProbabilityFile(tmp_path / "calibrated" / "case_00.npz").channels()))
    before = np.stack(list(ProbabilityFile(made.prediction / "case_00.npz").channels()))
    assert np.array_equal(p > 0.5, before > 0.5)
    assert np.abs(p - 0.5).mean() < np.abs(before - 0.5).mean()


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic"])
def test_an_ignore_label(tmp_path, method):
    """What the network says where the reference is ignored does not matter; what is calibrated has no such label."""
    fitted = []
    for name in ("ignored", "other"):
        made = Folders(tmp_path / name, labels=LABELS | {"ignore": 3})
        for seed in range(2):
            reference, p = too_sure(seed)
            prediction = p.argmax(axis=0)
            if name == "other":
                p[:, :, 15:] = p[[2, 0, 1], :, 15:]
            reference[:, 15:] = 3
            made.add(f"case_{seed}", reference, prediction, p)
        content = fit_folder(made.prediction, tmp_path / f"{name}_out", made.reference, methods=[method])
        fitted.append({key: content[key] for key in ("temperature", "slope", "offset", "curves") if key in content})
    assert fitted[0] == fitted[1]
    if method == "temperature":
        assert fitted[0]["temperature"] == pytest.approx(2, rel=0.1)
    done = apply_folder(tmp_path / "ignored_out", tmp_path / "ignored" / "predicted", tmp_path / "calibrated")
    assert done["cases"].keys() == {"case_0", "case_1"}
    assert labels_of(tmp_path / "calibrated" / "case_0.nii.gz").max() == 2


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("method", ["temperature", "classwise", "vector", "isotonic", "dirichlet"])
def test_probabilities_of_exactly_0_and_1(tmp_path, method, kind):
    """A network that is sure everywhere, rightly in most voxels: finite, sums of 1, less sure than before."""
    made = Folders(tmp_path, labels=LABELS)
    for seed in range(2):
        reference, p = too_sure(seed)
        p = (p == p.max(axis=0)).astype(kind)
        made.add(f"case_{seed}", reference, p.argmax(axis=0), p)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference, methods=[method], voxels=2_000)
    table = content["cross_fit"]
    assert table[method]["volume"]["NLL"]["mean"] < table["none"]["volume"]["NLL"]["mean"]
    apply_folder(tmp_path / "out", made.prediction, tmp_path / "calibrated")
    p = ProbabilityFile(tmp_path / "calibrated" / "case_0.npz").whole().astype(np.float64)
    assert np.isfinite(p).all()
    assert np.allclose(p.sum(axis=0), 1, atol=2e-3 if kind == np.float16 else 1e-5)
    assert p.max(axis=0).mean() < 0.98  # log of the smallest float32 by the largest temperature: 87.3 / 20


def test_only_right_predictions(tmp_path):
    made = Folders(tmp_path, labels=LABELS)
    for seed in range(2):
        _, p = too_sure(seed)
        made.add(f"case_{seed}", p.argmax(axis=0), p.argmax(axis=0), p)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["temperature"])
    assert content["temperature"] == 0.05
    assert "every prediction is right" in content["notes"][0]


def test_a_class_absent_from_all_cases(tmp_path):
    made = Folders(tmp_path, labels=LABELS | {"c": 3})
    for seed in range(2):
        reference, p = too_sure(seed, classes=3)
        p = np.concatenate([p * 0.99, np.full((1, *SHAPE), 0.01, dtype=np.float32)])
        made.add(f"case_{seed}", reference, p.argmax(axis=0), p)
    content = fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["vector"])
    assert (content["slope"][3], content["offset"][3]) == (1, 0)
    assert content["notes"] == ["class 3 is absent from the fit set: it keeps its logits"]


@pytest.mark.parametrize("method", list(CALIBRATORS))
def test_applied_to_a_folder(tmp_path, method, monkeypatch):
    monkeypatch.setitem(LocalTemperature.__init__.__kwdefaults__, "steps", 5)
    made = predictions(tmp_path, 2)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=[method], voxels=2_000)
    done = apply_folder(tmp_path / "out" / "calibrator.json", made.prediction, tmp_path / "calibrated")
    written = sorted(path.name for path in (tmp_path / "calibrated").iterdir())
    assert written[-5:] == ["case_00.nii.gz", "case_00.npz", "case_01.nii.gz", "case_01.npz", "dataset.json"]
    assert written[:-5] == ["calibrated_from.json"]
    for name, case in done["cases"].items():
        p = np.stack(list(ProbabilityFile(tmp_path / "calibrated" / f"{name}.npz").channels()))
        assert p.dtype == np.float32
        assert np.allclose(p.sum(axis=0), 1, atol=1e-5)
        ours, theirs = (
            labels_of(tmp_path / "calibrated" / f"{name}.nii.gz"),
            labels_of(made.prediction / f"{name}.nii.gz"),
        )
        assert np.count_nonzero(ours != theirs) == case["changed"]
        assert np.array_equal(ours, p.argmax(axis=0)) or CALIBRATORS[method].keeps_labels
        assert case["changed"] == 0 or not CALIBRATORS[method].keeps_labels
        assert p.max(axis=0).mean() < too_sure(int(name[-2:]))[1].max(axis=0).mean()


@pytest.mark.parametrize("method", ["temperature", "vector", "local"])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_compact_in_compact_out(tmp_path, method, kind, monkeypatch):
    """Numbers and labels as of the whole volume in .npz, though the compact file is calibrated slab by slab."""
    monkeypatch.setitem(LocalTemperature.__init__.__kwdefaults__, "steps", 5)
    made = predictions(tmp_path, 2)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=[method], voxels=2_000)
    done = {}
    for ending in (".npz", ".nncp"):
        for file in sorted(made.prediction.glob("*.npz")):
            p = ProbabilityFile(file).whole()
            if ending == ".npz":
                write_npz(file, p, p.shape, kind)
            else:
                slabs = (p[:, z : z + 5] for z in range(0, p.shape[1], 5))
                write_compact_slabs(file.with_suffix(".nncp"), slabs, p.shape, kind)
        done[ending] = apply_folder(tmp_path / "out", made.prediction, tmp_path / ending)
    assert done[".npz"] == done[".nncp"]
    for case in done[".npz"]["cases"]:
        ours, theirs = (ProbabilityFile(tmp_path / ending / f"{case}{ending}") for ending in done)
        assert ours.dtype == theirs.dtype == kind
        assert np.array_equal(ours.whole(), theirs.whole())
        same = (labels_of(tmp_path / ending / f"{case}.nii.gz") for ending in done)
        assert np.array_equal(*same)


def test_tiles_of_a_case_make_no_difference():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), size=(70, 20, 10)).transpose(3, 0, 1, 2)
    y = rng.integers(0, 3, p.shape[1:])
    for calibrator in (TemperatureScaling(), LocalTemperature(steps=3)):
        calibrator.fit(np.log(p), y)
        assert np.allclose(calibrate_case(calibrator, p), calibrator.apply(np.log(p)), atol=1e-5)


def test_a_trained_model(tmp_path):
    trained, references = model(tmp_path)
    content = fit_folder(trained, tmp_path / "out", references, methods=["temperature"])
    assert content["cases"] == ["case_00", "case_01", "case_02", "case_03"]
    assert content["model"]["trainer"] == "nnUNetTrainer"
    assert content["model"]["configuration"] == "3d_fullres"
    assert sorted(content["model"]["checkpoints"]) == ["0", "1"]
    done = apply_folder(tmp_path / "out", trained / "fold_0" / "validation", tmp_path / "calibrated")
    assert len(done["cases"]) == 2


def test_references_of_a_trained_model_are_nnunets_own(tmp_path, monkeypatch):
    trained, references = model(tmp_path)
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    with pytest.raises(UsageError, match="nnUNet_preprocessed"):
        fit_folder(trained, tmp_path / "out")
    own = tmp_path / "preprocessed" / "Dataset999_Toy"
    own.mkdir(parents=True)
    references.rename(own / "gt_segmentations")
    monkeypatch.setenv("nnUNet_preprocessed", str(own.parent))
    assert len(fit_folder(trained, tmp_path / "out", methods=["temperature"])["cases"]) == 4


def test_what_to_run_where_the_validation_has_no_probabilities(tmp_path):
    trained, references = model(tmp_path)
    next((trained / "fold_1" / "validation").glob("*.npz")).unlink()
    with pytest.raises(InputError) as caught:
        fit_folder(trained, tmp_path / "out", references)
    assert str(caught.value).endswith(
        f"fold_1/validation: 1 cases without probabilities; run nnunet-calib validate {trained} -f 1"
    )


def test_another_model_is_refused_unless_told(tmp_path):
    trained, references = model(tmp_path)
    fit_folder(trained, tmp_path / "out", references, methods=["temperature"])
    validation = trained / "fold_0" / "validation"
    (trained / "fold_0" / "checkpoint_final.pth").write_bytes(b"trained again")
    with pytest.raises(InputError, match=r"another checkpoint of fold 0.*--any-model"):
        apply_folder(tmp_path / "out", validation, tmp_path / "calibrated")
    with pytest.raises(InputError, match="another checkpoint"):
        apply_folder(tmp_path / "out", validation, tmp_path / "calibrated", model=trained)
    assert apply_folder(tmp_path / "out", validation, tmp_path / "calibrated", any_model=True)["cases"]
    (validation / "plans.json").write_text(json.dumps({"dataset_name": "Dataset001_Other"}))
    with pytest.raises(InputError, match="other plans"):
        apply_folder(tmp_path / "out", validation, tmp_path / "calibrated")


def test_a_calibrator_of_other_classes_is_always_refused(tmp_path):
    made, regions = predictions(tmp_path / "a", 1), region_predictions(tmp_path / "b", 1)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["temperature"])
    with pytest.raises(InputError, match="fitted to 3 classes, but .* has 2 regions"):
        apply_folder(tmp_path / "out", regions.prediction, tmp_path / "calibrated", any_model=True)


def test_an_error_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    made = predictions(tmp_path, 1)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["vector"])
    monkeypatch.setattr(
        "nnunet_calib.posthoc.folders.apply.write_npz", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        apply_folder(tmp_path / "out", made.prediction, tmp_path / "calibrated")
    # What the folder is being made from stays, so that the same command goes on.
    assert [path.name for path in (tmp_path / "calibrated").iterdir()] == ["calibrated_from.json"]


def test_the_stability_index():
    """By hand: 0.2 log(0.5 / 0.3) + 0.2 log(0.7 / 0.5)."""
    value = population_stability(np.array([0.5, 0.5]), np.array([0.3, 0.7]))
    assert value == pytest.approx(0.2 * np.log(0.5 / 0.3) + 0.2 * np.log(0.7 / 0.5))
    assert population_stability(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0


def test_new_cases_like_the_old_and_unlike(tmp_path):
    made = predictions(tmp_path / "fit", 8)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["temperature"])
    same = predictions(tmp_path / "same", 3, first=20)
    other = predictions(tmp_path / "other", 3, first=20, temperature=0.5)
    assert not check_folder(tmp_path / "out", same.prediction)["shifted"]
    found = check_folder(tmp_path / "out", other.prediction)
    assert found["shifted"]
    assert found["p"] == 1 / 165  # of the divisions of 11 cases into 3 and 8
    assert {case["p"] for case in found["cases"].values()} == {1 / 9}  # 8 cases of the fit are too few for a verdict
    assert found["fit_cases"] == 8
    assert not any(case["unlike"] for case in found["cases"].values())
    assert found["confidence"] < found["fit_confidence"] - 0.1
    assert sorted(found["cases"]) == ["case_20", "case_21", "case_22"]


def test_cases_without_foreground_are_left_out_of_the_check():
    usual = {f"{i}": np.full(20, 1 / 20) for i in range(5)}
    found = check_shift(usual, {"a": np.full(20, 1 / 20), "empty": np.full(20, np.nan)})
    assert (found["psi"], found["left_out"]) == (0, ["empty"])
    assert check_shift(usual, {"empty": np.full(20, np.nan)})["shifted"]


def test_a_file_without_confidences_cannot_be_checked(tmp_path):
    made = predictions(tmp_path, 1)
    z = np.random.default_rng(0).normal(size=(3, 100))
    file = TemperatureScaling().fit(z, z.argmax(axis=0)).save(tmp_path / "bare.json")
    assert load_calibrator(file).channels == 3
    with pytest.raises(InputError, match="does not hold the confidences"):
        check_folder(file, made.prediction)


def test_a_tie_is_no_other_label_without_numba_either(tmp_path, monkeypatch):
    """Of classes with equal p the first is the label; the others may become less likely than it."""
    made = Folders(tmp_path, labels=LABELS)
    for seed in range(3):
        reference, p = too_sure(seed)
        p[:, 0, 0, :4] = np.array([0.4, 0.4, 0.2])[:, None]
        made.add(f"case_{seed}", reference, p.argmax(axis=0), p)
    written = {}
    for method in ("cmsap", "cmsop"):
        fit_folder(made.prediction, tmp_path / method, made.reference, methods=[method], voxels=2_000)
        for how in ("numba", "numpy"):
            if how == "numpy":
                monkeypatch.setattr("nnunet_calib.posthoc.folders.apply.compiled_loops", lambda: None)
            apply_folder(tmp_path / method, made.prediction, tmp_path / how / method)
            written[how, method] = ProbabilityFile(tmp_path / how / method / "case_0.npz").whole()
        monkeypatch.undo()
        assert np.allclose(written["numba", method], written["numpy", method], atol=1e-6)


def test_what_is_calibrated_is_not_calibrated_again(tmp_path):
    made = predictions(tmp_path, 2)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["temperature"])
    once = tmp_path / "once"
    apply_folder(tmp_path / "out", made.prediction, once)
    with pytest.raises(
        UsageError, match=r"calibrated already with temperature; name those of the network, .*predicted"
    ):
        apply_folder(tmp_path / "out", once, tmp_path / "twice")
    with pytest.raises(UsageError, match="calibrated already"):
        fit_folder(once, tmp_path / "out2", made.reference, methods=["temperature"])
    with pytest.raises(UsageError, match="calibrated already"):
        check_folder(tmp_path / "out", once)
    assert not (tmp_path / "twice").exists()


def test_calibrated_again_from_another_format_the_old_file_is_gone(tmp_path):
    made = predictions(tmp_path, 2)
    for file in sorted(made.prediction.glob("*.npz")):
        p = ProbabilityFile(file).whole()
        write_compact_slabs(file.with_suffix(".nncp"), iter([p]), p.shape, np.float32)
    fit_folder(made.prediction, tmp_path / "out", made.reference, methods=["temperature"])
    apply_folder(tmp_path / "out", made.prediction, tmp_path / "calibrated")
    for file in made.prediction.glob("*.nncp"):
        file.unlink()
    apply_folder(tmp_path / "out", made.prediction, tmp_path / "calibrated")
    assert not list((tmp_path / "calibrated").glob("*.nncp"))
    assert len(list((tmp_path / "calibrated").glob("*.npz"))) == 2


def test_the_held_out_nll_of_a_region_is_finite_as_float32_is():
    """A log odds of 113 on the wrong side: what is stored of it has 1 - p = 2^-24, as ``evaluate`` counts it."""
    p = 1 / (1 + np.exp(-np.array([[113.0]])))
    found = _log_loss(p, np.array([[False]]), np.ones(1), multilabel=True)
    assert found == pytest.approx(24 * np.log(2))
