"""Pages of evidence: their tables and the numbers of their prose are written from the kept rows, and held against them.

    python scripts/evidence/pages.py write
    python scripts/evidence/pages.py verify

In a page a table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, and a number of the prose before a mark
that says what it is: ``-0.051<!-- = ECE foreground of meep minus stock -->``. A decimal number without a mark is
refused, unless the page's tables have it (perhaps with more digits), or the page lists it as a setting. A page is a
module with ``PAGE``.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tables import RESULTS, Rows

from nnunet_calib.data.files import write_whole

_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"([-+]?)(\d+(?:\.(\d+))?)( ?%)?<!-- = ([^>]+?) -->")
_DECIMAL = re.compile(r"(?<![\w.])[-+]?(\d+\.\d+)(?![\w.])")
_NO_PROSE = re.compile(r"<!-- table: .+?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)


def no_number(what: str) -> float:
    """Of a page without marks."""
    raise KeyError(what)


@dataclass(frozen=True)
class Page:
    """A page of docs/results.

    Attributes:
        file: the page.
        tables: by the name of their mark, what makes the lines of one.
        number: the value of what a mark says.
        settings: decimal numbers that are no results.
        all_marked: whether decimal numbers without a mark are refused; pages of reference have others.
        rows: whose tables in docs/results are recomputed too.
        figure: draws the page's figure.
    """

    file: Path
    tables: Mapping[str, Callable[[], list[str]]]
    number: Callable[[str], float] = no_number
    settings: frozenset[str] = frozenset()
    all_marked: bool = True
    rows: tuple[Rows, ...] = ()
    figure: Callable[[], None] = field(default=lambda: None)

    def written(self, text: str) -> str:
        """The page with its tables and numbers written anew.

        Raises:
            ValueError: a table has no mark.
            KeyError: a mark asks for what the rows do not have.
        """
        if missing := set(self.tables) - {found[1] for found in _TABLE.findall(text)}:
            raise ValueError(f"{self.file}: no mark for the table {min(missing)}")

        def table(found: re.Match) -> str:
            lines = "\n".join(self.tables[found[2]]())
            return f"{found[1]}\n{lines}\n\n{found[3]}"

        def number(found: re.Match) -> str:
            sign, _, decimals, percent, what = found.groups()
            value = self.number(what) * (100 if percent else 1)
            told = f"{value if sign else abs(value):{'+' if sign else ''}.{len(decimals or '')}f}"
            return f"{told}{percent or ''}<!-- = {what} -->"

        return _NUMBER.sub(number, _TABLE.sub(table, text))

    def differences(self, text: str) -> Iterator[str]:
        """What the page says and its rows do not give; tables of the rows included."""
        said, given = text.splitlines(), self.written(text).splitlines()
        for line, computed in zip(said, given, strict=False):
            if line != computed:
                yield f"{self.file.name} says {line!r}, the rows give {computed!r}"
        if len(said) != len(given):
            yield f"{self.file.name}: {len(said)} lines, the rows give {len(given)}"
        if self.all_marked:
            yield from self.without_rows(text)
        for rows in self.rows:
            yield from rows.wrong()

    def without_rows(self, text: str) -> Iterator[str]:
        """Decimal numbers of the prose that have no mark and stand in no table."""
        known = [float(number) for found in _TABLE.finditer(text) for number in _DECIMAL.findall(found.group())]
        for line in _NO_PROSE.sub("", _NUMBER.sub("", text)).splitlines():
            for number in _DECIMAL.findall(line):
                rounded = {f"{value:.{len(number.partition('.')[2])}f}" for value in known}
                if number not in rounded | self.settings:
                    yield f"{self.file.name}: no row gives the {number} of {line.strip()[:80]!r}"


def all_pages() -> list[Page]:
    """Every page that is written from rows."""
    import page_acdc
    import page_background
    import page_calibration
    import page_free_step
    import page_papers
    import page_shift
    import page_sparse
    import page_tests
    import page_trainers

    losses = Page(RESULTS.parent / "losses.md", {}, page_trainers.number, all_marked=False)
    readme = Page(RESULTS.parents[1] / "README.md", {}, page_tests.number, all_marked=False)
    rejected = Page(RESULTS / "rejected.md", {}, page_trainers.number, all_marked=False)
    choose = Page(RESULTS.parent / "choose.md", {}, page_trainers.number, all_marked=False)
    trained = (page_free_step, page_acdc, page_trainers, page_tests, page_sparse, page_papers, page_background)
    own = [page.PAGE for page in (*trained, page_shift, page_calibration)]
    return [*own, page_calibration.REFERENCE, losses, rejected, choose, readme]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "verify"))
    args = parser.parse_args()
    failed = 0
    for page in all_pages():
        text = page.file.read_text()
        if args.verb == "write":
            write_whole(page.file, page.written(text))
            page.figure()
            continue
        found = list(page.differences(text))
        failed += bool(found)
        print("\n".join(found) or f"{page.file.name}: every number is what the rows give")
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
