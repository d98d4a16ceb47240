"""``docs/results/background.md``: why do NACL and MbLS make the background unsure, and what helps?"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure
from page_papers import ROWS as PAPERS
from page_papers import written as papers_name
from page_trainers import SETS, TUNED, number, tuned_name
from pages import Page
from pairs import AGAIN, COLUMNS, head, with_interval, written
from tables import RESULTS, STOCK, Effect, Rows

from nnunet_calib.report.diagram import COLOURS, STYLE, save

OF_PAPERS = "papers "
FEW = {"nacl", "mbls", "crac", "nacl-dice1", "balanced", AGAIN, "ls"}


@dataclass(frozen=True)
class Setting:
    """Losses of one experiment minus its base.

    Attributes:
        about: which experiment, and what is beside the penalty.
        rows: its rows.
        base: label of what is subtracted.
        names: of the labels shown, in order.
    """

    about: str
    rows: Rows
    base: str
    names: Sequence[tuple[str, str]]

    def effects(self, measure: str) -> list[Effect]:
        return [self.rows.effect(label, self.base, measure) for label, _ in self.names]


def settings() -> list[Setting]:
    """The papers' own, nnU-Net's on two data sets, and fine-tuned."""
    ours = [label for label in PAPERS.labels if label in FEW or label.startswith("nacl")]
    found = [Setting("ACDC, no Dice, from scratch; minus CE", PAPERS, "ce", [(k, papers_name(k)) for k in ours])]
    for data in ("ACDC", "Hippocampus"):
        labels = [label for label in SETS[data].ours if label in FEW]
        rows = SETS[data].rows
        found.append(Setting(f"{data}, beside Dice; minus stock", rows, STOCK, [(k, written(k)) for k in labels]))
    rows = SETS["Hippocampus"].rows
    labels = [TUNED + label for label in ("nacl", "mbls")]
    about = "Hippocampus, fine-tuned, 0.3 Dice; minus stock fine-tuned"
    return [*found, Setting(about, rows, TUNED + STOCK, [(k, tuned_name(k)) for k in labels])]


def table() -> list[str]:
    lines = head("", "loss", "trainings")
    for setting in settings():
        for label, name in setting.names:
            effects = [setting.rows.effect(label, setting.base, column) for column in COLUMNS]
            cells = [with_interval(effect, column) for effect, column in zip(effects, COLUMNS, strict=True)]
            lines.append(f"| {setting.about} | {name} | {len(effects[0].each)} | {' | '.join(cells)} |")
    return lines


def mark(what: str) -> float:
    """As of the trainers' page; of the papers' setting with ``papers`` before."""
    return PAPERS.number(what.removeprefix(OF_PAPERS)) if what.startswith(OF_PAPERS) else number(what)


def figure() -> None:
    """ECE of the volume and of the foreground, minus the base, in every setting."""
    shown, found = ("ECE volume", "ECE foreground"), settings()
    names = [(setting, k, name) for setting in found for k, (_, name) in enumerate(setting.names)]
    with rc_context(STYLE):
        drawn = Figure(figsize=(9, 0.9 + 0.24 * len(names)), layout="constrained")
        for panel, measure in zip(drawn.subplots(1, 2), shown, strict=True):
            panel.axvline(0, color="0.55", linewidth=0.8, linestyle="--")
            for y, (setting, k, _) in enumerate(names):
                effect = setting.effects(measure)[k]
                colour = ("0.35", *COLOURS)[found.index(setting)]
                panel.plot([effect.low, effect.high], [y, y], color=colour, linewidth=1.2)
                about = setting.about if k == 0 else None
                panel.plot(effect.mean, y, "D", color=colour, markersize=4.5, label=about)
            panel.set(yticks=range(len(names)), yticklabels=[name for *_, name in names], ylim=(len(names) - 0.5, -0.5))
            panel.set_title(f"{measure}, minus the base", fontsize=9)
            panel.tick_params(labelsize=8, labelleft=measure == shown[0])
        drawn.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        save(drawn, RESULTS.parent / "images" / "results_background.svg")


PAGE = Page(
    RESULTS / "background.md",
    {"settings": table},
    mark,
    settings=frozenset({"0.3", "0.03", "0.1", "0.025", "0.020", "0.075", "0.0075", "0.6"}),
    figure=figure,
)
