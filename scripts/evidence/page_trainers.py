"""``docs/results/trainers.md``: which trainer, with ``-tr`` alone, beats stock and stock with a calibrator?"""

from collections.abc import Callable, Iterator, Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure
from page_acdc import PAIRS as ACDC
from pages import Page
from pairs import AGAIN, COLUMNS, SHOWN, Pairs, head, rows_of, with_interval, written
from scores import called
from tables import RESULTS, STOCK, Rows

from nnunet_calib.report.diagram import COLOURS, MARKERS, STYLE, save

TUNED = "ft-"  # fine-tuned from stock's finished network, with 0.3 of nnU-Net's Dice
TUNED_NAMES = {"meep": "MEEP", "nacl": "NACL, balanced=false, weight 0.1", "mbls": "MbLS, weight 0.1"}
SETS: Mapping[str, Pairs] = {
    "ACDC": ACDC,
    "Hippocampus": Pairs(rows_of("hippocampus3d"), left_out=(TUNED,)),
    "Brain": Pairs(rows_of("brain3d")),
}
FREE = called(STOCK, "temperature")
AIMS: tuple[tuple[str, str, str, Callable[[float], bool]], ...] = (
    ("DSC", "DSC of {} minus stock", "+.3f", lambda value: value >= -0.005),
    ("ECE foreground", "ECE foreground of {} relative to stock", "+.0%", lambda value: value <= -0.4),
    ("ECE foreground, stock + temperature", f"ECE foreground of {{}} minus {FREE}", "+.3f", lambda value: value < 0),
    ("NLL foreground, stock + temperature", f"NLL foreground of {{}} minus {FREE}", "+.3f", lambda value: value < 0),
    ("NLL volume, stock + temperature", f"NLL volume of {{}} minus {FREE}", "+.4f", lambda value: value <= 0),
)
"""What a recommended trainer was to reach: what it is minus, the mark of its number, its form, and the aim."""


def measured(sets: Mapping[str, Pairs] = SETS) -> dict[str, Pairs]:
    """Data sets with rows."""
    return {name: pairs for name, pairs in sets.items() if pairs.rows.trainings}


def everywhere(sets: Mapping[str, Pairs]) -> list[str]:
    """Trainers with rows on at least two data sets, stock's second time last."""
    labels = [label for pairs in sets.values() for label in pairs.trainers]
    return [*(label for label in dict.fromkeys(labels) if labels.count(label) > 1), AGAIN]


def aims(sets: Mapping[str, Pairs]) -> list[str]:
    """Every finalist on every data set against the aim; what falls short is told by its mean."""
    lines = [f"| minus stock | on | pairs | {' | '.join(name for name, *_ in AIMS)} | short in |"]
    lines.append("|---" * (len(AIMS) + 4) + "|")
    for label in everywhere(sets):
        for name, pairs in sets.items():
            if label not in pairs.ours:
                continue
            values = [pairs.rows.number(what.format(label)) for _, what, *_ in AIMS]
            cells = [f"{value:{form}}" for value, (_, _, form, _) in zip(values, AIMS, strict=True)]
            short = sum(not reached(value) for value, (*_, reached) in zip(values, AIMS, strict=True))
            number = len(pairs.rows.numbers_of(label))
            lines.append(f"| {written(label)} | {name} | {number} | {' | '.join(cells)} | {short} of {len(AIMS)} |")
    return lines


def tuned_name(label: str) -> str:
    """Of a label with ``TUNED``."""
    plain = label.removeprefix(TUNED)
    return TUNED_NAMES.get(plain, written(plain))


def tuned() -> list[str]:
    """Fine-tuned trainers minus stock that was trained on as long."""
    rows = SETS["Hippocampus"].rows
    lines = head("fine-tuned, minus stock fine-tuned")
    for label in (label for label in rows.labels if label.startswith(TUNED) and label != TUNED + STOCK):
        effects = [rows.effect(label, TUNED + STOCK, column) for column in COLUMNS]
        cells = [with_interval(effect, column) for effect, column in zip(effects, COLUMNS, strict=True)]
        lines.append(f"| {tuned_name(label)} | {' | '.join(cells)} |")
    return lines


def tables() -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Of the page; ACDC's stand on its own."""
    yield "aims", lambda: aims(measured())
    if any(label.startswith(TUNED) for label in SETS["Hippocampus"].rows.labels):
        yield "fine-tuned", tuned
    for name in [name for name in measured() if name != "ACDC"]:
        for table, made in SETS[name].tables().items():
            yield f"{name} {table}", made


def figure(sets: Mapping[str, Pairs], name: str) -> None:
    """Finalists minus stock of the same pair, and calibrators of stock, on each data set."""
    free = [called(STOCK, method) for method in ACDC.rows.protocol.content["methods"]]
    names = [*free, *everywhere(sets)]
    with rc_context(STYLE):
        drawn = Figure(figsize=(9, 0.9 + 0.36 * len(names)), layout="constrained")
        panels = drawn.subplots(1, len(SHOWN))
        for panel, measure in zip(panels, SHOWN, strict=True):
            panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
            for place, (data, pairs) in enumerate(sets.items()):
                how = {"color": ("0.35", *COLOURS)[place], "marker": MARKERS[place], "linestyle": "none"}
                ys = {label: y for y, label in enumerate(names) if label in free or label in pairs.ours}
                effects = {y + 0.22 * (place - 1): pairs.rows.effect(t, STOCK, measure) for t, y in ys.items()}
                for y, effect in effects.items():
                    panel.plot([effect.low, effect.high], [y, y], color=how["color"], linewidth=1.2)
                panel.plot([effect.mean for effect in effects.values()], list(effects), markersize=4, label=data, **how)
            labels = [label if label in free else written(label) for label in names]
            panel.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.5, -0.5))
            panel.set_title(f"{measure}, minus stock", fontsize=9)
            panel.tick_params(labelsize=8, labelleft=measure == SHOWN[0])
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        save(drawn, RESULTS.parent / "images" / f"results_{name}.svg")


def number(what: str) -> float:
    """Marks may begin with the data set's name; ACDC without."""
    data, _, rest = what.partition(" ")
    return SETS[data].rows.number(rest) if data in SETS else ACDC.rows.number(what)


def rows() -> tuple[Rows, ...]:
    return tuple(pairs.rows for name, pairs in measured().items() if name != "ACDC")


PAGE = Page(
    RESULTS / "trainers.md",
    dict(tables()),
    number,
    settings=frozenset({"0.6", "0.3", "2.5", "0.1"}),
    rows=rows(),
    figure=lambda: figure(measured(), "trainers"),
)
