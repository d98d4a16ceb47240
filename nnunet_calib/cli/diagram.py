"""``nnunet-calib diagram``: the reliability diagram for a paper."""

import argparse
from pathlib import Path

HELP = "reliability diagram of one or several runs, as SVG, PDF or PNG"

_FORMATS = (".svg", ".pdf", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Draw accuracy against confidence from the bin counts of evaluations: a column per method, a row per\n"
        "class. Region and aggregation are named in the figure."
    )
    parser.epilog = "example:\n  nnunet-calib diagram stock=scores_stock MEEP=scores_meep -o reliability.pdf"
    parser.add_argument("runs", metavar="[NAME=]RUN", nargs="+", help="an evaluation with probabilities")
    parser.add_argument("-o", dest="output", metavar="FILE", type=Path, required=True, help="file.svg, .pdf or .png")
    parser.add_argument(
        "--of",
        metavar="KEY",
        nargs="+",
        default=["top"],
        help="top (default): the top label; classes: every class; or labels such as 1 2",
    )
    parser.add_argument(
        "--region", default="foreground", help="foreground (default), reference_foreground, volume, ..."
    )
    parser.add_argument(
        "--aggregation",
        choices=["mean", "pooled"],
        default="mean",
        help="mean (default): over cases, with quartiles; pooled: all voxels together",
    )
    parser.add_argument("--common", action="store_true", help="draw the cases that all runs have, leaving out others")


def run(args: argparse.Namespace) -> int:
    """Draw and write the figure."""
    from nnunet_calib.data.errors import UsageError, unknown
    from nnunet_calib.report.reliability import TOP, read_reliabilities
    from nnunet_calib.report.runs import check_comparable, common_cases, methods_of, parse_runs

    if args.output.suffix not in _FORMATS:
        raise UsageError(f"{args.output}: the file must end in {', '.join(_FORMATS)}")
    if not args.output.absolute().parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.absolute().parent}")
    runs = parse_runs(args.runs)
    methods = methods_of(runs)
    cases, _ = common_cases(methods, args.common)
    check_comparable(runs, cases)
    counted = {}
    for name, trainings in methods.items():
        regions = read_reliabilities(trainings, cases)
        if args.region not in regions:
            there = "no bin counts; predict with --save_probabilities and evaluate again"
            there = unknown("region", args.region, regions) if regions else there
            raise UsageError(f"{trainings[0].folder}: {there}")
        counted[name] = regions[args.region]
    problems = _in_all(counted)
    names = {
        problem: runs[0].structures.get(problem, "background" if problem == "0" else problem) for problem in problems
    }
    chosen: list[str] = []
    for key in args.of:
        wanted = [p for p in problems if p != TOP] if key == "classes" else [TOP if key == "top" else key]
        if key == "top" and TOP not in problems:  # regions have no top label
            wanted = [p for p in problems if p != TOP]
        if strange := [of for of in wanted if of not in problems]:
            raise UsageError(unknown("class", strange[0], ["top", "classes", *(p for p in problems if p != TOP)]))
        chosen += wanted
    from nnunet_calib.report.diagram import reliability_diagram, save  # with matplotlib, which takes a second

    save(reliability_diagram(counted, list(dict.fromkeys(chosen)), names, args.region, args.aggregation), args.output)
    print(f"written to {args.output}")
    return 0


def _in_all(counted) -> list[str]:
    first, *others = counted.values()
    return [problem for problem in first.problems if all(problem in of.problems for of in others)]
