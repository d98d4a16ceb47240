"""``docs/results/tests.md``: on test cases, opened once, does the recommended trainer reach what it was to reach?"""

from collections.abc import Callable, Iterator

from page_trainers import SETS, aims, figure, measured
from pages import Page
from pairs import Pairs
from tables import RESULTS, Rows

TESTS = measured({name: Pairs(Rows(pairs.rows.protocol.tested()), pairs.left_out) for name, pairs in SETS.items()})


def tables() -> Iterator[tuple[str, Callable[[], list[str]]]]:
    yield "aims", lambda: aims(TESTS)
    for name, pairs in TESTS.items():
        for table, made in pairs.tables().items():
            if table != "chance":
                yield f"{name} {table}", made


def number(what: str) -> float:
    """Marks begin with the data set's name: ``Brain DSC of stock``."""
    data, _, rest = what.partition(" ")
    return TESTS[data].rows.number(rest)


PAGE = Page(
    RESULTS / "tests.md",
    dict(tables()),
    number,
    rows=tuple(pairs.rows for pairs in TESTS.values()),
    figure=lambda: figure(TESTS, "tests"),
)
