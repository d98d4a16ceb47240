import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from nnunet_calib.cli.main import main

from .phantoms import write_phantoms
from .runs import simulated, write_run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs of four cases."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 4, {"stock": 3.0, "ours": 1.2})
    return folder


def words(root, *more) -> list[str]:
    return ["report", f"stock={root}/scores/stock", f"ours={root}/scores/ours", *map(str, more)]


def test_the_page_holds_everything_and_asks_for_nothing(root, tmp_path):
    page = tmp_path / "report.html"
    assert main(words(root, "-o", page, "--images", root / "images")) == 0
    text = page.read_text()
    HTMLParser().feed(text)
    assert not re.search(r'(src|href)="(?!data:|#)', re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert "default-src 'none'" in text
    for section in ("answer", "differences", "reliability", "risk", "ranks", "cases", "provenance", "methods"):
        assert f'<section id="{section}"' in text
    assert text.count("data:image/png;base64,") == 4 * 2 * 3
    slices: dict[str, set[str]] = {}
    for case, shown in re.findall(r'<h4>([^,]+), \w+</h4>.*?data-slices="([^"]+)"', text, re.S):
        slices.setdefault(case, set()).add(shown)
    assert [len(shown) for shown in slices.values()] == [1] * 4  # both methods in the same ones
    assert len(set(re.findall(r'\bid="([^"]+)"', text))) == len(re.findall(r'\bid="([^"]+)"', text))


def test_the_same_runs_give_the_same_page(root, tmp_path):
    for name in ("a", "b"):
        main(words(root, "-o", tmp_path / f"{name}.html"))
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_names_from_files_are_text_not_markup(tmp_path):
    dice, ece = simulated(1, 5)
    evil = "</script><img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / "a", dice, ece, cases=[evil, *"bcde"], structures=(evil, "node"))
    assert main(["report", f"<b>x</b>={folder}", "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "<img src=x" not in text
    assert "<b>x</b>" not in text


def test_missed_structures_and_no_probabilities_are_shown(tmp_path):
    dice = simulated(1, 12)[0]
    hd95 = np.full((12, 2), 2.0)
    hd95[0, 1] = np.inf
    n_pred = [[100, 0 if i == 0 else 100] for i in range(12)]
    write_run(tmp_path / "a", dice, None, hd95, n_pred=n_pred)
    write_run(tmp_path / "b", dice)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "1 structures missed" in text
    assert '"inf"' in text
    assert "Where is it overconfident" not in text


def test_slices_that_cannot_be_drawn_are_reported_and_the_rest_is_written(root, tmp_path, capsys):
    one = sorted((root / "images").glob("*_0000.nii.gz"))[0]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / one.name).write_bytes(b"damaged")
    assert main(words(root, "-o", tmp_path / "r.html", "--images", tmp_path / "images")) == 0
    error = capsys.readouterr().err
    assert f"no slices of {one.name.removesuffix('_0000.nii.gz')}" in error
    assert "_0000.nii.gz: not there" in error
    assert "Slices of the worst cases" not in (tmp_path / "r.html").read_text()


def test_a_folder_without_an_image_of_the_cases_is_one_line_and_no_report(root, tmp_path, capsys):
    (tmp_path / "other_0000.nii.gz").touch()
    assert main(words(root, "-o", tmp_path / "r.html", "--images", tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["-o", "report.pdf"], "must end in .html"),
        (["-o", "/nowhere/report.html"], "there is no folder"),
        (["-o", "r.html", "--images", "/nowhere"], "is not a folder"),
    ],
)
def test_bad_usage_of_report_is_one_line(root, capsys, more, complaint):
    assert main(words(root, *more)) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_the_diagram_is_a_whole_file(root, tmp_path, ending):
    file = tmp_path / f"d.{ending}"
    runs = [f"stock={root}/scores/stock", f"ours={root}/scores/ours"]
    assert main(["diagram", *runs, "-o", str(file), "--of", "top", "1"]) == 0
    head = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}[ending]
    assert file.read_bytes().startswith(head)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["-o", "d.gif"], "must end in .svg, .pdf, .png"),
        (["-o", "d.svg", "--of", "7"], "no class '7'; there are top, classes, 0, 1, 2"),
        (["-o", "d.svg", "--region", "border"], "no region 'border'; there are volume"),
    ],
)
def test_bad_usage_of_diagram_is_one_line(root, capsys, more, complaint):
    assert main(["diagram", f"{root}/scores/stock", *more]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def pictured(root, tmp_path, protocol: dict, **record) -> list[str]:
    """Pictures of the page of the first run, with other words in its summary."""
    folder = tmp_path / "changed"
    shutil.copytree(root / "scores" / "stock", folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["protocol"] |= protocol
    for of in summary["metric_per_case"]:
        of |= record
    (folder / "summary.json").write_text(json.dumps(summary))
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(page), "--images", str(root / "images")]) == 0
    return re.findall(r"data:image/png;base64,[^\"']+", page.read_text())


def test_what_was_scored_in_memory_is_pictured_from_the_files_that_were_written(root, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    usual = pictured(root, tmp_path / "a", {})
    changed = {"probabilities": "in memory"}
    record = root / "predictions" / "stock" / "made_from"
    record.mkdir()
    for i in range(4):
        (record / f"case_{i:03d}.json").write_text(json.dumps({"files": {f"case_{i:03d}.npz": [0, 0]}}))
    assert pictured(root, tmp_path / "b", changed, probabilities_file=None) == usual
    shutil.rmtree(record)  # files of another run, or of no run that is known
    assert pictured(root, tmp_path / "c", changed, probabilities_file=None) != usual


def test_confidence_is_not_that_of_a_file_that_was_calibrated_while_it_was_scored(root, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    none = pictured(root, tmp_path / "a", {}, probabilities_file=None)
    assert pictured(root, tmp_path / "b", {"calibrator": {"method": "temperature", "sha256": "0"}}) == none
    assert pictured(root, tmp_path / "c", {}) != none


def test_without_images_it_says_how_to_get_slices(root, tmp_path, capsys):
    assert main(words(root, "-o", tmp_path / "page.html")) == 0
    assert "no slices of cases: name the images' folder with --images" in capsys.readouterr().err
    assert main(words(root, "-o", tmp_path / "page.html", "--images", root / "images")) == 0
    assert "no slices" not in capsys.readouterr().err


def test_pictures_of_a_case_have_the_same_panels(root, tmp_path):
    """One method's probabilities were calibrated while they were scored, and are in no file."""
    folder = tmp_path / "scores"
    shutil.copytree(root / "scores" / "ours", folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["protocol"]["calibrator"] = {"method": "temperature", "sha256": "0"}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = tmp_path / "page.html"
    words_ = ["report", f"stock={root}/scores/stock", f"ours={folder}", "-o", str(page), "--images", f"{root}/images"]
    assert main(words_) == 0
    found = re.findall(r"data:image/png;base64,([^\"']+)", page.read_text())
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in found]
    per_case = [set(sizes[i : i + 6]) for i in range(0, len(sizes), 6)]  # three slices of two methods
    assert [len(of) for of in per_case] == [1] * 4
