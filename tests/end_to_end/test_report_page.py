"""The report in a real browser: no error, no request, the numbers of the records, sorting, slider, print, axe-core."""

import base64
import json
import shutil
import subprocess
import tarfile

import pytest

from nnunet_calib.cli.main import main

from ..report.phantoms import write_phantoms
from .browser import CHROMIUM, DRIVER, Browser

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page and the folders of its runs."""
    root = tmp_path_factory.mktemp("report")
    runs = write_phantoms(root, 8, {"stock": 3.0, "calibrated": 1.2})
    groups = root / "groups.csv"
    groups.write_text("case,site\n" + "".join(f"case_{i:03d},{'A' if i % 2 else 'B'}\n" for i in range(8)))
    words = [f"{name}={folder}" for name, folder in runs.items()]
    more = [
        "-o",
        str(root / "report.html"),
        "--images",
        str(root / "images"),
        "--group",
        str(groups),
        "--pictured",
        "2",
    ]
    assert main(["report", *words, *more]) == 0
    return root / "report.html", runs


@pytest.fixture(scope="module")
def browser(made, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(made[0].as_uri())
        yield opened


def test_it_opens_without_an_error_or_a_request(browser, made):
    assert browser.console() == []
    own = ("data:", "chrome:", "chrome-untrusted:")  # what is in the page, and the browser's own first tab
    assert {url for url in browser.requests() if not url.startswith(own)} == {made[0].as_uri()}


def test_the_numbers_are_those_of_the_records(browser, made):
    shown = browser.run("return JSON.parse(document.getElementById('case-data').textContent)")
    heads = browser.run("return [...document.querySelectorAll('#case-table thead button')].map(b => b.textContent)")
    ece, nll = heads.index("ECE") - 2, heads.index("NLL") - 2
    for name, folder in made[1].items():
        records = json.loads((folder / "summary.json").read_text())["metric_per_case"]
        for record in records:
            (line,) = [of for of in shown if (of["case"], of["method"]) == (record["case"], name)]
            of_region = record["calibration"]["foreground"]
            assert line["values"][ece] == pytest.approx(of_region["ECE"], rel=1e-5)
            assert line["values"][nll] == pytest.approx(of_region["NLL"], rel=1e-5)
    text = browser.run("return document.querySelector('table.means').innerText")
    summary = json.loads((made[1]["stock"] / "summary.json").read_text())
    assert f"{summary['calibration_mean']['foreground']['ECE']:.3f}" in text


def test_labels_in_the_figures_are_not_cut(browser):
    # hundredths of a point are cut in the drawings' paths, never in what is read
    ticks = browser.run("return [...document.querySelectorAll('svg text')].map(t => t.textContent)")
    errors = [tick for tick in ticks if "ECE" in tick and "." in tick]
    assert errors
    assert all(len(tick.rsplit(".", 1)[1]) == 3 for tick in errors)


def test_the_table_sorts_and_filters(browser):
    column = "return [...document.querySelectorAll('#case-table tbody tr')].map(r => r.cells[%d].innerText)"
    head = "[...document.querySelectorAll('#case-table thead button')].find(b => b.textContent === 'ECE')"
    index = browser.run(f"return {head}.closest('th').cellIndex")
    browser.run(f"{head}.click()")
    rising = [float(value) for value in browser.run(column % index)]
    assert rising == sorted(rising)
    assert browser.run(f"return {head}.closest('th').getAttribute('aria-sort')") == "ascending"
    browser.run(f"{head}.click()")
    assert [float(value) for value in browser.run(column % index)] == sorted(rising, reverse=True)
    browser.run("filter.value = '_003'; filter.dispatchEvent(new Event('input'))")
    assert set(browser.run(column % 0)) == {"case_003"}
    browser.run("filter.value = ''; method.value = 'stock'; method.dispatchEvent(new Event('change'))")
    assert set(browser.run(column % 1)) == {"stock"}
    browser.run("method.value = ''; method.dispatchEvent(new Event('change'))")


def test_the_slider_changes_the_slice(browser):
    shown = "return [...document.querySelector('.case-picture').querySelectorAll('img')].map(i => !i.hidden)"
    assert browser.run(shown) == [True, False, False]
    browser.run(
        "const s = document.querySelector('.case-picture input'); s.value = 2; s.dispatchEvent(new Event('input'))"
    )
    assert browser.run(shown) == [False, False, True]
    slices = browser.run("return document.querySelector('.case-picture input').dataset.slices").split(",")
    assert browser.run("return document.querySelector('.case-picture output').textContent") == slices[2]


def test_one_diagram_is_shown_and_another_can_be_chosen(browser):
    shown = "return [...document.querySelectorAll('.diagram')].map(d => getComputedStyle(d).display !== 'none')"
    first = browser.run(shown)
    assert first[0]
    assert sum(first) == 1
    browser.run("which.value = '2'; which.dispatchEvent(new Event('change'))")
    assert browser.run(shown).index(True) == 2
    browser.run("which.value = '0'; which.dispatchEvent(new Event('change'))")


def test_it_prints(browser):
    assert base64.b64decode(browser.pdf()).startswith(b"%PDF")


def test_nothing_is_wider_than_a_small_window(made, tmp_path):
    with Browser(tmp_path / "profile", width=800) as narrow:
        narrow.open(made[0].as_uri())
        assert narrow.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_axe_core_finds_no_barrier(browser, axe):
    browser.run(axe)
    found = browser.run_async("const done = arguments[arguments.length - 1]; axe.run().then(r => done(r.violations))")
    assert [(of["id"], of["nodes"][0]["html"][:200]) for of in found] == []


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """axe-core from npm, a test dependency."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("no npm here to get axe-core with")
    done = subprocess.run(
        ["npm", "pack", "axe-core@4", "--silent"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        pytest.skip(f"npm cannot get axe-core: {done.stderr.strip().splitlines()[-1:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        stream = archive.extractfile("package/axe.min.js")
        assert stream is not None
        return stream.read().decode()
