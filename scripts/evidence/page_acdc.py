"""``docs/results/acdc.md``: on ACDC in 2D, does a trainer beat stock, and stock with a calibrator?"""

from pages import Page
from pairs import Pairs, rows_of
from tables import RESULTS

PAIRS = Pairs(rows_of("acdc2d"))

PAGE = Page(
    RESULTS / "acdc.md",
    PAIRS.tables(),
    PAIRS.rows.number,
    settings=frozenset({"0.6", "1.5625", "2.5"}),
    rows=(PAIRS.rows,),
    figure=lambda: PAIRS.figure("acdc"),
)
