"""``docs/results/acdc.md``: on ACDC in 2D, does a trainer beat stock, and stock with a calibrator?"""

from pairs import Pairs, rows_of

PAIRS = Pairs(rows_of("acdc2d"))
PAGE = PAIRS.page("acdc")
