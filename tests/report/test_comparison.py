import json

import numpy as np
import pytest
from scipy import stats

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.report.comparison import compare
from nnunet_calib.report.groups import read_groups
from nnunet_calib.report.runs import parse_runs
from nnunet_calib.report.tables import FILES, answer, as_json, csv_rows, latex, markdown, short_table, write_tables

from .runs import simulated, write_run


@pytest.fixture
def two(tmp_path):
    """The words for a stock run and a better calibrated one of 60 cases."""
    write_run(tmp_path / "stock", *simulated(1, 60))
    write_run(tmp_path / "ours", *simulated(2, 60, ece_share=0.7))
    return [f"stock={tmp_path / 'stock'}", f"ours={tmp_path / 'ours'}"]


def compared(words, **options):
    return compare(parse_runs(words), **options)


def test_means_and_paired_differences_are_those_of_the_records(two):
    dice, ece = simulated(1, 60)
    other_dice, other_ece = simulated(2, 60, ece_share=0.7)
    found = compared(two)
    overlap, calibration = found.endpoint("Dice", "foreground"), found.endpoint("ECE", "foreground")
    assert overlap.methods["stock"].spread.mean == pytest.approx(dice.mean(), rel=1e-12)
    difference = overlap.differences[0].paired
    assert difference.mean == pytest.approx((other_dice - dice).mean(), rel=1e-9)
    expected = stats.ttest_rel(other_ece, ece)
    assert calibration.differences[0].paired.t_p == pytest.approx(expected.pvalue, rel=1e-6)
    assert calibration.best() == ["ours", "stock"]


def test_the_answer_names_the_method_its_interval_and_dice(two):
    said = answer(compared(two))
    assert said.startswith("ours has a lower ECE (foreground) than stock: -0.")
    assert "95 % interval" in said
    assert "Its DSC differs by" in said
    assert said.endswith("60 cases.")


def test_a_gain_in_one_metric_does_not_hide_a_loss_in_another(tmp_path):
    dice, ece = simulated(1, 60)
    write_run(tmp_path / "stock", dice, ece)
    write_run(tmp_path / "ours", dice - 0.02, ece - 0.01)
    said = answer(compared([str(tmp_path / "stock"), str(tmp_path / "ours")]))
    assert said.startswith("ours has a lower ECE")
    assert "Shown to be worse than stock: ours (DSC -0.02" in said


def test_what_is_not_shown_is_not_claimed(tmp_path):
    dice, ece = simulated(1, 60)
    write_run(tmp_path / "a", dice, ece)
    write_run(tmp_path / "b", dice, ece + np.random.default_rng(3).normal(-0.0005, 0.01, 60))
    said = answer(compared([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert "not enough to claim it" in said or said.startswith("No method has a better")


def test_the_declared_family_is_corrected_by_itself(two):
    found = compared(two, metrics=["DSC", "ECE"])
    assert [(e.metric, e.place) for e in found.primary] == [("Dice", "foreground"), ("ECE", "foreground")]
    raw = sorted(e.differences[0].paired.wilcoxon_p for e in found.primary)
    adjusted = sorted(e.differences[0].wilcoxon_holm for e in found.primary)
    assert adjusted == pytest.approx([min(1, 2 * raw[0]), max(2 * raw[0], raw[1])])
    assert {e.place for e in found.endpoints if not e.primary} == {"1", "2", "volume"}


def test_a_missed_structure_makes_the_mean_infinite_and_is_said(tmp_path):
    dice, ece = simulated(1, 60)
    hd95 = np.full((60, 2), 2.0)
    write_run(tmp_path / "stock", dice, ece, hd95)
    worse = hd95.copy()
    worse[:3, 1] = np.inf
    n_pred = [[100, 0] if i < 3 else [100, 100] for i in range(60)]
    write_run(tmp_path / "ours", dice, ece, worse, n_pred=n_pred)
    found = compared([f"stock={tmp_path / 'stock'}", f"ours={tmp_path / 'ours'}"])
    endpoint = found.endpoint("HD95", "2")
    assert endpoint.methods["ours"].spread.mean == np.inf
    assert endpoint.methods["ours"].missed == 3
    assert endpoint.differences[0].paired.infinite == 3
    assert any("3 of 60 cases have an infinite HD95 (node)" in warning for warning in found.warnings)
    assert found.endpoint("HD95", "foreground").ranks.of_means == [1, 2]
    assert "inf (finite: 2.00)" in markdown(found)


def test_structures_in_neither_are_absent_not_perfect(tmp_path):
    dice, ece = simulated(1, 60)
    absent = dice.copy()
    absent[0, 1] = np.nan  # in neither; the other run predicts it where it is not
    dice[0, 1] = 0
    write_run(tmp_path / "stock", dice, ece)
    write_run(tmp_path / "ours", absent, ece)
    found = compared([f"stock={tmp_path / 'stock'}", f"ours={tmp_path / 'ours'}"])
    endpoint = found.endpoint("Dice", "2")
    assert endpoint.methods["ours"].absent == 1
    assert endpoint.differences[0].unpaired == 1
    assert any("DSC (node): up to 1 cases have a value in one run only" in warning for warning in found.warnings)


def test_other_cases_are_refused_unless_the_common_ones_are_asked_for(tmp_path):
    dice, ece = simulated(1, 60)
    write_run(tmp_path / "all", dice, ece)
    write_run(tmp_path / "some", dice[:58], ece[:58], failed=["case_058"])
    words = [str(tmp_path / "all"), str(tmp_path / "some")]
    with pytest.raises(
        UsageError, match=r"2 of 60 cases are not in every run, first case_058 in some .*truncated.*--common"
    ):
        compared(words)
    found = compared(words, common=True)
    assert (len(found.cases), found.left_out) == (58, ["case_058", "case_059"])
    assert any("2 cases are left out" in warning for warning in found.warnings)
    assert any("case_058 failed" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"structures": ("organ", "node", "cyst")}, "labels differ"),
        ({"protocol": {"bins": 20}}, "the protocol differs: bins is 15 in .* and 20 in"),
        ({"n_ref": 99}, "case case_000 has other references: 99 voxels of organ"),
    ],
)
def test_other_yardsticks_are_refused(tmp_path, changes, complaint):
    dice, ece = simulated(1, 60)
    write_run(tmp_path / "a", dice, ece)
    three = np.concatenate([dice, dice[:, :1]], axis=1)
    write_run(tmp_path / "b", three, ece, **changes)
    with pytest.raises(UsageError, match=complaint):
        compared([str(tmp_path / "a"), str(tmp_path / "b")])


def test_scores_made_in_memory_are_compared_with_those_of_files(tmp_path):
    dice, ece = simulated(1, 3)
    write_run(tmp_path / "a", dice, ece, protocol={"bins": 15, "probabilities": "in memory"})
    write_run(tmp_path / "b", dice, ece)
    assert len(compared([str(tmp_path / "a"), str(tmp_path / "b")]).cases) == 3


def test_references_of_other_content_are_refused(tmp_path):
    dice, ece = simulated(1, 3)
    for name in ("a", "b"):
        folder = write_run(tmp_path / name, dice, ece)
        reference = folder / "reference.nii.gz"
        reference.write_text(name)
        summary = json.loads((folder / "summary.json").read_text())
        summary["metric_per_case"][1]["reference_file"] = str(reference)
        (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UsageError, match="case_001 has other references: .* are not the same"):
        compared([str(tmp_path / "a"), str(tmp_path / "b")])


def test_trainings_of_one_method_are_averaged_and_their_spread_stands_beside(tmp_path):
    words = []
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s{seed}", *simulated(seed, 60))
        write_run(tmp_path / f"o{seed}", *simulated(seed + 10, 60, ece_share=0.7))
        words += [f"stock={tmp_path / f's{seed}'}", f"ours={tmp_path / f'o{seed}'}"]
    found = compared(words)
    result = found.endpoint("ECE", "foreground").methods["stock"]
    means = [simulated(seed, 60)[1].mean() for seed in (1, 2, 3)]
    assert result.trainings == pytest.approx(means)
    assert result.trainings_sd == pytest.approx(np.std(means, ddof=1))
    assert result.spread.mean == pytest.approx(np.mean(means))
    assert not any(warning.startswith("One training") for warning in found.warnings)


def test_folds_share_the_cases_between_them(tmp_path):
    dice, ece = simulated(1, 60)
    names = [f"case_{i:03d}" for i in range(60)]
    write_run(tmp_path / "f0", dice[:30], ece[:30], cases=names[:30])
    write_run(tmp_path / "f1", dice[30:], ece[30:], cases=names[30:])
    write_run(tmp_path / "other", dice, ece)
    found = compared([f"cv={tmp_path / 'f0'}", f"cv={tmp_path / 'f1'}", f"other={tmp_path / 'other'}"])
    assert found.endpoint("ECE", "foreground").methods["cv"].spread.mean == pytest.approx(ece.mean())


def test_patients_are_the_units_where_scans_share_them(tmp_path):
    # twenty patients with three nearly equal scans each: as if sixty cases, the interval would be far too short
    rng = np.random.default_rng(5)
    patient = rng.normal(0, 0.05, 20).repeat(3)
    ece = 0.2 + np.zeros(60)
    write_run(tmp_path / "a", simulated(1, 60)[0], ece)
    write_run(tmp_path / "b", simulated(1, 60)[0], ece + patient)
    table = tmp_path / "patients.csv"
    lines = [f"case_{i:03d},p{i // 3},{'left' if i % 2 else 'right'}" for i in range(60)]
    table.write_text("\n".join(["case,patient,side", *lines]) + "\n")
    words = [str(tmp_path / "a"), str(tmp_path / "b")]
    runs = parse_runs(words)
    groups = read_groups(table, sorted(runs[0].records))
    by_patient, by_scan = compare(runs, groups=groups), compare(runs)
    narrow, wide = (
        np.diff(of.endpoint("ECE", "foreground").differences[0].paired.t_interval)[0] for of in (by_scan, by_patient)
    )
    assert wide / narrow == pytest.approx(np.sqrt(3), rel=0.1)
    assert len(by_patient.units) == 20
    assert by_patient.groups.subgroups["side"]["case_001"] == "left"
    assert any(warning.startswith("20 patients: below 50") for warning in by_patient.warnings)


def test_patients_with_several_scans_are_covered(tmp_path):
    # means over patients of patients that differ: coverage of the t interval over 400 simulated studies
    from nnunet_calib.report.groups import by_unit
    from nnunet_calib.report.statistics import t_interval

    rng = np.random.default_rng(0)
    covered = {"patients": 0, "scans": 0}
    for _ in range(400):
        units = [f"p{i}" for i in range(30) for _ in range(rng.integers(1, 6))]
        effect = {unit: rng.gamma(2, 0.5) - 1 for unit in dict.fromkeys(units)}
        scans = np.array([effect[unit] for unit in units]) + rng.normal(0, 0.1, len(units))
        for name, values in (("patients", by_unit(scans, units)), ("scans", scans)):
            low, high = t_interval(values)
            covered[name] += low <= 0 <= high
    assert covered["patients"] / 400 == pytest.approx(0.94, abs=0.03)
    assert covered["scans"] / 400 < 0.85  # what treating scans as independent would give


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("patient\np1\n", "must name a column 'case'"),
        ("case,patient\nx,p1\n", "has no line for 60 of the cases"),
        ("case,patient\n" + "".join(f"case_{i:03d},\n" for i in range(60)), "column patient is empty"),
    ],
)
def test_a_group_file_that_cannot_be_used_is_one_line(tmp_path, text, complaint):
    file = tmp_path / "g.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_groups(file, [f"case_{i:03d}" for i in range(60)])


def test_no_difference_can_be_shown_with_five_cases(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_run(tmp_path / name, *simulated(seed, 5))
    found = compared([str(tmp_path / "a"), str(tmp_path / "b")])
    assert any("no difference can be shown at 0.05" in warning for warning in found.warnings)


def test_the_latex_table_has_the_papers_layout(two):
    content = as_json(compared(two, metrics=["DSC", "HD95", "ECE", "CECE"]), "FLARE & co")
    text = latex([content, content | {"dataset": "ACDC"}])
    assert text.count("\\multicolumn{4}{c}") == 2
    assert "FLARE \\& co ($n=60$)" in text
    assert text.count("DSC $\\uparrow$ & HD95 $\\downarrow$ & ECE $\\downarrow$ & CECE $\\downarrow$") == 2
    assert "\\cmidrule(lr){2-5} \\cmidrule(lr){6-9}" in text
    assert text.splitlines()[-3].startswith("ours & ")
    assert "\\textbf{" in text.splitlines()[-3]


def test_the_files_are_written_and_hold_no_nan_token(two, tmp_path):
    comparison = compared(two)
    write_tables(comparison, tmp_path / "out", "demo")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(FILES)
    content = json.loads(
        (tmp_path / "out" / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    ours = content["endpoints"][0]["methods"]["ours"]["spread"]["mean"]
    assert ours == comparison.endpoints[0].methods["ours"].spread.mean
    rows = csv_rows(comparison).splitlines()
    assert len(rows) == 1 + 2 * len(comparison.endpoints)
    write_tables(comparison, tmp_path / "out", "demo", [tmp_path / "out" / "comparison.json"])
    assert (tmp_path / "out" / "comparison.tex").read_text().count("multicolumn") == 2


def test_summaries_of_nnunets_own_can_be_compared(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "validation"
        write_run(folder, simulated(1, 10)[0])
        summary = json.loads((folder / "summary.json").read_text())
        for record in summary["metric_per_case"]:
            del record["case"], record["calibration"], record["notes"], record["probabilities_file"]
            for scores in record["metrics"].values():
                del scores["HD95"], scores["NSD"]
        kept = {"metric_per_case": summary["metric_per_case"]}
        (folder / "summary.json").write_text(json.dumps(kept))
    found = compared([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [e.metric for e in found.primary] == ["Dice"]
    assert list(found.methods) == ["a", "b"]
    assert found.cases[0] == "case_000"
    assert "nnU-Net's own" in found.notes[0]


def test_a_calibrator_that_keeps_the_labels_has_the_same_dice(tmp_path):
    dice, ece = simulated(1, 60)
    write_run(tmp_path / "stock", dice, ece)
    write_run(tmp_path / "calibrated", dice, ece * 0.5)
    found = compared([str(tmp_path / "stock"), str(tmp_path / "calibrated")])
    assert found.endpoint("Dice", "foreground").differences[0].same
    assert not found.endpoint("ECE", "foreground").differences[0].same
    assert "Its DSC is the same in every case." in answer(found)
    line = next(line for line in short_table(found) if line.startswith("DSC  ") and "calibrated - stock" in line)
    assert line.split()[-5:] == ["the", "same", "in", "every", "case"]
    row = next(line for line in markdown(found).splitlines() if "| DSC |" in line and "calibrated - stock" in line)
    assert row.count("| the same in every case | - |") == 1


def test_the_answer_has_a_clause_for_every_method(tmp_path):
    dice, ece = simulated(1, 60)
    for name, share in (("stock", 1.0), ("b", 0.8), ("best", 0.5), ("same", 1.0)):
        write_run(tmp_path / name, dice, ece * share)
    found = compared([str(tmp_path / name) for name in ("stock", "b", "best", "same")])
    said = answer(found)
    assert said.startswith("best has a lower ECE (foreground) than stock: -0.")
    others = said[said.index("ECE against stock: ") :]
    b = next(d for d in found.endpoint("ECE", "foreground").differences if d.method == "b")
    assert others.startswith(f"ECE against stock: b -{-b.paired.mean:.3f} (95 % interval -0.")
    assert others.endswith("; same the same in every case. Others are not compared in pairs (compare --all-pairs).")


def test_the_winner_is_found_among_the_cases_that_both_have(tmp_path):
    """The hard case has probabilities in one run only: its mean is worse, and it is better in every pair."""
    dice, ece = simulated(1, 12)
    hard, other = ece.copy(), ece + 0.02 + 0.001 * np.arange(12)
    hard[-1], other[-1] = 0.99, np.nan
    write_run(tmp_path / "stock", dice, hard)
    write_run(tmp_path / "ours", dice, other)
    found = compared([str(tmp_path / "stock"), str(tmp_path / "ours")], metrics=["ECE"])
    assert found.primary[0].best() == ["stock", "ours"]
    assert answer(found).startswith("No method has a better ECE")


def test_a_better_mean_by_a_missed_structure_alone_is_told_with_what_the_pairs_say(tmp_path):
    dice, ece = simulated(1, 12)
    near = 1 + 0.01 * np.arange(24.0).reshape(12, 2)
    missed = near.copy()
    missed[0] = np.inf
    write_run(tmp_path / "stock", dice, ece, missed)
    write_run(tmp_path / "ours", dice, ece, near * 1.5)
    said = answer(compared([str(tmp_path / "stock"), str(tmp_path / "ours")], metrics=["HD95"]))
    assert said.startswith("ours has the better mean HD95 (mean of structures) than stock, which misses more")
    assert "the other way round: +0.5" in said


@pytest.mark.parametrize("metric", ["n_pred", "n_ref"])
def test_a_number_that_has_no_better_is_not_compared(two, metric):
    with pytest.raises(UsageError, match=f"{metric} is neither better .* compare Dice, HD95, IoU, NSD"):
        compared(two, metrics=[metric])
