"""``docs/results/sparse.md``: trained on scribbles with the ignore label, are the probabilities worth more or less?"""

from pairs import Pairs, rows_of

PAGE = Pairs(rows_of("scribbles2d")).page("sparse")
