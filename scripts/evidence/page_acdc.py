"""``docs/results/acdc.md``: on ACDC in 2D, does a trainer beat stock, and stock with a calibrator?"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from pages import Page
from protocol import Protocol
from scores import called
from tables import RESULTS, STOCK, Effect, Rows

from nnunet_calib.posthoc.folders.crossfit import NONE
from nnunet_calib.report.diagram import COLOURS, STYLE, save

ROWS = Rows(Protocol.read(Path(__file__).parent / "protocols" / "acdc2d.json"))
AGAIN = "again"  # stock once more from the checkpoint of its pair
COLUMNS = ("DSC", "NLL volume", "NLL foreground", "ECE foreground", "ECE reference_foreground", "ECE volume")
NAMES = {
    AGAIN: "stock, a second time",
    "balanced": "NACL with balanced means",
    "dca-foreground": "DCA over the foreground",
    "meep-dca": "MEEP and DCA, Dice weight 1",
    "crac": "CRaC",
    "mbls": "MbLS",
    "meepkl": "MEEP, KL",
    "softace": "soft ACE",
    "meep-dice1": "MEEP, Dice weight 1",
}


def written(label: str) -> str:
    return NAMES.get(label, label.upper())


def digits(measure: str) -> int:
    return 4 if measure.endswith(" volume") else 3


def with_interval(effect: Effect, measure: str, sign: str = "+") -> str:
    form = f"{sign}.{digits(measure)}f"
    return f"{effect.mean:{form}} ({effect.low:{form}} to {effect.high:{form}})"


def head(*first: str) -> list[str]:
    names = [*first, *(column.replace("reference_foreground", "reference's foreground") for column in COLUMNS)]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def free_step(rows: Rows = ROWS) -> list[str]:
    """Stock raw and with every calibrator."""
    lines = head("stock with", "runs", "voxels with another label")
    for method in (NONE, *rows.protocol.content["methods"]):
        name = called(STOCK, method)
        changed = [rows.changed(f"{STOCK}_{number}", method) for number in rows.numbers_of(STOCK)]
        cells = [with_interval(rows.mean(name, column), column, "") for column in COLUMNS]
        lines.append(f"| {method} | {len(changed)} | {', '.join(map(str, changed))} | {' | '.join(cells)} |")
    return lines


def ours(rows: Rows = ROWS) -> list[str]:
    """Labels that were trained in pairs with stock."""
    return [label for label in rows.labels if label != STOCK]


def alone(method: str = NONE, base: str | None = None) -> list[str]:
    """Every trainer with a calibrator minus stock with ``base``, or the same: mean, interval, every training."""
    lines = head("minus stock", "pairs")
    base = method if base is None else base
    for label in ours():
        name, cells = called(label, method), []
        for column in COLUMNS:
            effect = ROWS.effect(name, called(STOCK, base), column)
            each = ", ".join(f"{value:+.{digits(column)}f}" for value in effect.each)
            cells.append(with_interval(effect, column) + (f"; each {each}" if len(effect.each) > 1 else ""))
        lines.append(f"| {written(label)} | {len(ROWS.numbers_of(label))} | {' | '.join(cells)} |")
    return lines


def by_isotonic() -> list[str]:
    return alone("isotonic")


def against_temperature() -> list[str]:
    return alone(NONE, "temperature")


def by_temperature() -> list[str]:
    return alone("temperature")


def chance() -> list[str]:
    """How far stock is from itself: two trainings from scratch."""
    lines = head("stock", "trainings")
    means = [ROWS.mean(STOCK, column) for column in COLUMNS]
    cells = [", ".join(f"{v:.{digits(c)}f}" for v in mean.each) for c, mean in zip(COLUMNS, means, strict=True)]
    return [*lines, f"| each of them | {len(means[0].each)} | {' | '.join(cells)} |"]


def figure() -> None:
    """Differences from stock of the same run: calibrators of stock, and trainers."""
    shown = ("DSC", "ECE foreground", "NLL foreground", "NLL volume")
    free = [called(STOCK, method) for method in ROWS.protocol.content["methods"]]
    names = [*free, *ours()]
    drawn = Figure(figsize=(9, 0.6 + 0.27 * len(names)), layout="constrained")
    for panel, measure in zip(drawn.subplots(1, len(shown)), shown, strict=True):
        panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
        for y, name in enumerate(names):
            effect = ROWS.effect(name, STOCK, measure)
            colour = "0.35" if name in free or name == AGAIN else COLOURS[0]
            panel.plot([effect.low, effect.high], [y, y], color=colour, linewidth=1.2)
            panel.plot(effect.each, [y] * len(effect.each), "o", color="0.6", markersize=4, markerfacecolor="white")
            panel.plot(effect.mean, y, "D", color=colour, markersize=4.5)
        labels = [name if name in free else written(name) for name in names]
        panel.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.5, -0.5))
        panel.set_title(f"{measure}, minus stock", fontsize=9)
        panel.tick_params(labelsize=8)
        if measure != shown[0]:
            panel.tick_params(labelleft=False)
    save(drawn, RESULTS.parent / "images" / "results_acdc.svg")


def styled_figure() -> None:
    with rc_context(STYLE):
        figure()


PAGE = Page(
    RESULTS / "acdc.md",
    {
        "free step": free_step,
        "chance": chance,
        "alone": alone,
        "against temperature": against_temperature,
        "isotonic": by_isotonic,
        "temperature": by_temperature,
    },
    ROWS.number,
    settings=frozenset({"0.6", "1.5625", "2.5", "0.0392", "0.0411"}),
    rows=(ROWS,),
    figure=styled_figure,
)
