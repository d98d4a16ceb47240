"""``docs/results/free_step.md``: does a trainer beat a calibrator that is fitted afterwards?"""

from collections.abc import Callable

from page_trainers import SETS, measured, number
from pages import Page
from pairs import COLUMNS, Pairs, head
from scores import called
from tables import RESULTS, STOCK

from nnunet_calib.posthoc.folders.crossfit import NONE


def counts(pairs: Pairs) -> list[str]:
    """How many trainers differ from stock plus isotonic in an interval that excludes no difference."""
    lines = head("better, worse")
    for method in (NONE, "temperature", "isotonic"):
        cells = []
        for measure in COLUMNS:
            base = called(STOCK, "isotonic")
            effects = [pairs.rows.effect(called(t, method), base, measure) for t in pairs.trainers]
            signs = [(effect.low > 0) - (effect.high < 0) for effect in effects]
            good = 1 if measure == "DSC" else -1
            cells.append(f"{signs.count(good)}, {signs.count(-good)}")
        name = "`-tr` alone" if method == NONE else f"`-tr` and {method}"
        lines.append(f"| {name}, of {len(pairs.trainers)} | {' | '.join(cells)} |")
    return lines


def of_set(name: str) -> Callable[[], list[str]]:
    return lambda: counts(SETS[name])


PAGE = Page(RESULTS / "free_step.md", {f"{name} counts": of_set(name) for name in measured()}, number)
