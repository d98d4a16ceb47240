"""``docs/results/sparse.md``: trained on scribbles with the ignore label, are the probabilities worth more or less?"""

from pages import Page
from pairs import Pairs, rows_of
from tables import RESULTS

PAIRS = Pairs(rows_of("scribbles2d"))

PAGE = Page(
    RESULTS / "sparse.md",
    PAIRS.tables(),
    PAIRS.rows.number,
    settings=frozenset({"0.6", "1.5625", "2.5"}),
    rows=(PAIRS.rows,),
    figure=lambda: PAIRS.figure("sparse"),
)
