"""``docs/results/calibration.md``, and the numbers of docs/calibrate.md: which calibrator, ours or fiducio's?"""

from matplotlib import rc_context
from matplotlib.figure import Figure
from pages import Page
from scores import read_lines
from tables import RESULTS

from nnunet_calib.report.diagram import COLOURS, STYLE, save

SETS = {"acdc2d": "ACDC, 2d", "hippocampus3d": "Hippocampus, 3d", "brain3d": "Brain, 3d"}
WRITTEN = {"adam": "Adam", "lbfgs": "L-BFGS"}
COLUMNS = ("NLL volume", "ECE volume", "NLL foreground", "ECE foreground")


def measured() -> dict[str, list[dict[str, str]]]:
    """Rows of ``peers.py``, by protocol."""
    found = {name: read_lines(RESULTS / f"calibrators_{name}.csv") for name in SETS}
    return {name: lines for name, lines in found.items() if lines}


def called(line: dict[str, str]) -> str:
    if line["of"].startswith("fiducio"):
        keeps = {"cmsop": "order kept", "cmsap": "arg-max kept"}[line["method"]]
        return f"fiducio, {keeps} ({WRITTEN[line['of'].split()[1]]})"
    return line["method"]


def methods() -> list[str]:
    """Every calibrator on every data set."""
    columns = ["data", "calibrator", *COLUMNS, "voxels with another label", "fit, CPU s"]
    shown = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, lines in measured().items():
        for line in lines:
            cells = [f"{float(line[c]):.{4 if c.endswith('volume') else 3}f}" for c in COLUMNS]
            fit = f"{float(line['fit_cpu_s']):.1f}" if line["method"] != "none" else ""
            shown.append(f"| {SETS[name]} | {called(line)} | {' | '.join(cells)} | {line['labels_changed']} | {fit} |")
    return shown


def figure() -> None:
    """NLL of volume and foreground, relative to that without calibrator."""
    with rc_context(STYLE):
        sets = measured()
        drawn = Figure(figsize=(9, 0.8 + 0.24 * max(map(len, sets.values()))), layout="constrained")
        panels = drawn.subplots(1, len(sets), sharex=True, squeeze=False)[0]
        for panel, (name, lines) in zip(panels, sets.items(), strict=True):
            raw, shown = lines[0], lines[1:]
            for place, (measure, colour) in enumerate((("NLL volume", "0.35"), ("NLL foreground", COLOURS[0]))):
                heights = [y + 0.36 * (place - 0.5) for y in range(len(shown))]
                lower = [float(line[measure]) / float(raw[measure]) - 1 for line in shown]
                panel.barh(heights, lower, height=0.34, color=colour, label=measure)
            panel.set(yticks=range(len(shown)), yticklabels=[called(line) for line in shown])
            panel.set(ylim=(len(shown) - 0.5, -0.5))
            panel.xaxis.set_major_formatter("{x:+.0%}")
            panel.set_title(f"{SETS[name]}: against no calibrator", fontsize=9)
            panel.tick_params(labelsize=8, labelleft=panel is panels[0])
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        save(drawn, RESULTS.parent / "images" / "results_calibration.svg")


def of_calibrators(what: str) -> float:
    """Numbers of the calibrators' rows: on ACDC, and on a simulated volume.

    - ``NLL volume of fiducio adam/cmsop`` or ``... on hippocampus3d`` (without: on ACDC), of ``peers.py``;
    - ``memory_gb of volume fiducio/cmsop``, of ``compare_fiducio.py --slices``;
    - ``NLL volume of temperature by case``, the mean over the networks of ``weights.py``.
    """
    column, _, name = what.partition(" of ")
    name, _, protocol = name.partition(" on ")
    if "/" in name:
        of, method = name.removeprefix("volume ").split("/")
        lines = "calibrators_volume" if name.startswith("volume ") else f"calibrators_{protocol or 'acdc2d'}"
        wanted = {"of": of, "method": method}
    else:
        method, by = name.split(" by ")
        lines, wanted = "calibrators_weights", {"method": method, "by": by}
    found = [float(line[column]) for line in read_lines(RESULTS / f"{lines}.csv") if line.items() >= wanted.items()]
    if not found:
        raise KeyError(what)
    return sum(found) / len(found)


STEPS = {
    "inf, inf, 1000": "one slope a predicted class",
    "inf, inf, 0": "a slope for every gap",
    "inf, 0.0001, 0": "and an offset",
    "0.0001, 0.0001, 0": "the whole matrix",
    "chosen": "**chosen by cross-fitting**",
}


def penalties() -> list[str]:
    """Held-out NLL of class-conditional calibrators, by network: steps of ``choices``, the chosen, and fiducio's."""
    lines = read_lines(RESULTS / "calibrators_penalties.csv")
    networks = list(dict.fromkeys((line["data"], line["training"]) for line in lines))
    heads = [f"{SETS[data]}, {training}" for data, training in networks]
    shown = [f"| NLL of the volume | {' | '.join(heads)} |", "|---" * (len(networks) + 1) + "|"]
    ours = [("", "temperature", "")] + [("", method, step) for method in ("cmsop", "cmsap") for step in STEPS]
    theirs = [(f"fiducio {by}", method, "") for method in ("cmsop", "cmsap") for by in ("adam", "lbfgs")]
    for of, method, step in ours + theirs:
        name = f"`{method}`"
        if of:
            name = f"fiducio, {'order' if method == 'cmsop' else 'arg-max'} kept ({WRITTEN[of.split()[1]]})"
        elif step:
            name += f", {STEPS[step]}"
        values = []
        for data, training in networks:
            wanted = {"data": data, "training": training, "of": of, "method": method, "penalties": step}
            (found,) = (line for line in lines if line.items() >= wanted.items())
            values.append(f"{float(found['NLL volume']):.4f}")
        shown.append(f"| {name} | {' | '.join(values)} |")
    return shown


def weights() -> list[str]:
    """Held-out scores of fits that count every case, or every voxel, the same: means over networks."""
    columns = ("NLL volume", "ECE volume", "NLL foreground", "ECE foreground")
    shown = [
        f"| counted the same: every case, every voxel | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in dict.fromkeys(line["method"] for line in read_lines(RESULTS / "calibrators_weights.csv")):
        both = [[of_calibrators(f"{column} of {method} by {by}") for by in ("case", "voxel")] for column in columns]
        digits = [4 if column.endswith("volume") else 3 for column in columns]
        cells = [f"{case:.{d}f}, {voxel:.{d}f}" for (case, voxel), d in zip(both, digits, strict=True)]
        shown.append(f"| `{method}` | {' | '.join(cells)} |")
    return shown


PAGE = Page(
    RESULTS / "calibration.md",
    {"methods": methods},
    of_calibrators,
    frozenset({"0.0001", "0.0004", "0.0005"}),
    figure=figure,
)
REFERENCE = Page(
    RESULTS.parent / "calibrate.md",
    {"penalties": penalties, "weights": weights},
    of_calibrators,
    all_marked=False,
)
