"""Tables and figure of a protocol whose trainers were trained in pairs with stock: what every such page has."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from pages import Page
from protocol import Protocol
from scores import called
from tables import RESULTS, STOCK, Effect, Rows

from nnunet_calib.posthoc.folders.crossfit import NONE
from nnunet_calib.report.diagram import COLOURS, STYLE, save

AGAIN = "again"  # stock once more from the checkpoint of its pair
COLUMNS = ("DSC", "NLL volume", "NLL foreground", "ECE foreground", "ECE reference_foreground", "ECE volume")
NAMES = {
    AGAIN: "stock, a second time",
    "balanced": "NACL (default: balanced means)",
    "nacl": "NACL, balanced=false, Dice weight 0.6",
    "nacl-dice1": "NACL, balanced=false",
    "meep": "MEEP, Dice weight 0.6",
    "dca-foreground": "DCA over the foreground",
    "meep-dca": "MEEP and DCA",
    "crac": "CRaC",
    "mbls": "MbLS",
    "meepkl": "MEEP, KL, Dice weight 0.6",
    "softace": "soft ACE",
    "meep-dice1": "MEEP (default)",
    "meep-late": "MEEP from 90 % of the epochs on, Dice weight 0.6",
    "meep-late-dice1": "MEEP from 90 % of the epochs on",
}
SHOWN = ("DSC", "ECE foreground", "NLL foreground", "NLL volume")  # in figures


def rows_of(protocol: str) -> Rows:
    return Rows(Protocol.read(Path(__file__).parent / "protocols" / f"{protocol}.json"))


def written(label: str) -> str:
    return NAMES.get(label, label.upper())


def digits(measure: str) -> int:
    return 4 if measure.endswith(" volume") else 3


def with_interval(effect: Effect, measure: str, sign: str = "+") -> str:
    form = f"{sign}.{digits(measure)}f"
    return f"{effect.mean:{form}} ({effect.low:{form}} to {effect.high:{form}})"


def with_each(effect: Effect, measure: str, sign: str = "+") -> str:
    """With its interval and, where there are several trainings, what each of them has."""
    values = ", ".join(f"{value:{sign}.{digits(measure)}f}" for value in effect.each)
    return with_interval(effect, measure, sign) + (f"; each {values}" if len(effect.each) > 1 else "")


def head(*first: str) -> list[str]:
    names = [*first, *(column.replace("reference_foreground", "reference's foreground") for column in COLUMNS)]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


@dataclass(frozen=True)
class Pairs:
    """Trainers beside stock of the same pair.

    Attributes:
        rows: scored rows of the protocol.
        left_out: beginnings of labels that are another question's.
    """

    rows: Rows
    left_out: tuple[str, ...] = ()

    @property
    def ours(self) -> list[str]:
        """Labels that were trained in pairs with stock."""
        return [label for label in self.rows.labels if label != STOCK and not label.startswith(self.left_out)]

    @property
    def trainers(self) -> list[str]:
        """The same without stock's second time."""
        return [label for label in self.ours if label != AGAIN]

    def free_step(self) -> list[str]:
        """Stock raw and with every calibrator."""
        lines = head("stock with", "runs", "voxels with another label")
        for method in (NONE, *self.rows.protocol.content["methods"]):
            name = called(STOCK, method)
            changed = [self.rows.changed(f"{STOCK}_{number}", method) for number in self.rows.numbers_of(STOCK)]
            cells = [with_interval(self.rows.mean(name, column), column, "") for column in COLUMNS]
            lines.append(f"| {method} | {len(changed)} | {', '.join(map(str, changed))} | {' | '.join(cells)} |")
        return lines

    def differences(self, method: str = NONE, base: str | None = None) -> list[str]:
        """Every trainer with a calibrator minus stock with ``base``, or the same: mean, interval, every training."""
        lines = head("minus stock", "pairs")
        base = method if base is None else base
        for label in self.ours:
            name, cells = called(label, method), []
            for column in COLUMNS:
                cells.append(with_each(self.rows.effect(name, called(STOCK, base), column), column))
            lines.append(f"| {written(label)} | {len(self.rows.numbers_of(label))} | {' | '.join(cells)} |")
        return lines

    def chance(self) -> list[str]:
        """How far stock is from itself: trainings from scratch."""
        lines = head("stock", "trainings")
        means = [self.rows.mean(STOCK, column) for column in COLUMNS]
        cells = [", ".join(f"{v:.{digits(c)}f}" for v in mean.each) for c, mean in zip(COLUMNS, means, strict=True)]
        return [*lines, f"| each of them | {len(means[0].each)} | {' | '.join(cells)} |"]

    def tables(self) -> Mapping[str, Callable[[], list[str]]]:
        return {
            "free step": self.free_step,
            "chance": self.chance,
            "alone": self.differences,
            "against temperature": lambda: self.differences(NONE, "temperature"),
            "isotonic": lambda: self.differences("isotonic"),
            "temperature": lambda: self.differences("temperature"),
        }

    def figure(self, name: str, shown: Iterable[str] = SHOWN) -> None:
        """Differences from stock of the same run: calibrators of stock, and trainers."""
        free = [called(STOCK, method) for method in self.rows.protocol.content["methods"]]
        names, shown = [*free, *self.ours], tuple(shown)
        with rc_context(STYLE):
            drawn = Figure(figsize=(9, 0.6 + 0.27 * len(names)), layout="constrained")
            for panel, measure in zip(drawn.subplots(1, len(shown)), shown, strict=True):
                panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
                for y, label in enumerate(names):
                    effect = self.rows.effect(label, STOCK, measure)
                    colour = "0.35" if label in free or label == AGAIN else COLOURS[0]
                    panel.plot([effect.low, effect.high], [y, y], color=colour, linewidth=1.2)
                    panel.plot(
                        effect.each, [y] * len(effect.each), "o", color="0.6", markersize=4, markerfacecolor="white"
                    )
                    panel.plot(effect.mean, y, "D", color=colour, markersize=4.5)
                labels = [label if label in free else written(label) for label in names]
                panel.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.5, -0.5))
                panel.set_title(f"{measure}, minus stock", fontsize=9)
                panel.tick_params(labelsize=8)
                if measure != shown[0]:
                    panel.tick_params(labelleft=False)
            save(drawn, RESULTS.parent / "images" / f"results_{name}.svg")

    def page(self, name: str) -> Page:
        """``docs/results/<name>.md``, of this protocol alone."""
        return Page(
            RESULTS / f"{name}.md",
            self.tables(),
            self.rows.number,
            settings=frozenset({"0.6", "1.5625", "2.5"}),
            rows=(self.rows,),
            figure=lambda: self.figure(name),
        )
