"""``nnunet-calib compare``: is one method better than another on the same cases, and how sure is that?"""

import argparse
import sys
from pathlib import Path

HELP = "compare methods on the same cases: means, intervals, paired tests, ranks; tables for a paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Compare evaluations of the same cases, paired by case. Every RUN is a folder of `evaluate`, of\n"
        "`predict --reference`, or a `validation` folder; NAME=RUN names it. Several RUNs under one NAME are\n"
        "trainings of one method (seeds, folds). The first method is the baseline."
    )
    parser.epilog = (
        "example:\n"
        "  nnunet-calib compare stock=scores_stock MEEP=scores_meep -o compared\n"
        "  nnunet-calib compare stock=s0 stock=s1 MEEP=m0 MEEP=m1 --group patients.csv -o compared"
    )
    add_selection(parser)
    parser.add_argument(
        "-o", dest="output", metavar="DIR", type=Path, help="folder for comparison.md, .tex, .csv, .json"
    )
    parser.add_argument(
        "--all-pairs", action="store_true", help="compare every two methods, not only with the baseline"
    )
    parser.add_argument("--dataset", metavar="NAME", default="", help="name of the data set in the LaTeX table")
    parser.add_argument(
        "--beside",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="comparison.json of other data sets, to stand beside this one in the LaTeX table",
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """What is compared; the same for ``report``."""
    parser.add_argument("runs", metavar="[NAME=]RUN", nargs="+", help="an evaluation; the first is the baseline")
    parser.add_argument(
        "--metrics", metavar="M", nargs="+", help="the declared family (default: Dice NSD HD95 ECE CECE NLL)"
    )
    parser.add_argument(
        "--region", default="foreground", help="of the declared calibration metrics (default: foreground)"
    )
    parser.add_argument("--baseline", metavar="NAME", help="method that others are compared with (default: the first)")
    parser.add_argument(
        "--common", action="store_true", help="compare the cases that all runs have, leaving out others"
    )
    parser.add_argument(
        "--group",
        metavar="FILE.csv",
        type=Path,
        help="columns case, patient (scans of a patient are averaged, patients are tested), others: subgroups",
    )


def run(args: argparse.Namespace) -> int:
    """Print the answer and the table; write the files."""
    comparison = compare_selected(args, all_pairs=args.all_pairs)
    from nnunet_calib.report.tables import answer, short_table, write_tables

    print(answer(comparison) + "\n")
    print("\n".join(short_table(comparison)))
    for note in (*comparison.warnings, *comparison.notes):
        print(f"note: {note}", file=sys.stderr)
    if args.output is not None:
        write_tables(comparison, args.output, args.dataset or "data set", args.beside)
        print(f"\nwritten to {args.output}: comparison.md, comparison.tex, comparison.csv, comparison.json")
    return 0


def compare_selected(args: argparse.Namespace, all_pairs: bool = False):
    """The comparison that ``add_selection``'s arguments ask for."""
    from nnunet_calib.report.groups import read_groups
    from nnunet_calib.report.runs import common_cases, methods_of, parse_runs

    runs = parse_runs(args.runs)
    from nnunet_calib.report.comparison import compare  # with scipy.stats, which takes a second

    groups = None
    if args.group is not None:
        groups = read_groups(args.group, common_cases(methods_of(runs), args.common)[0])
    return compare(
        runs,
        metrics=args.metrics,
        region=args.region,
        baseline=args.baseline,
        all_pairs=all_pairs,
        common=args.common,
        groups=groups,
    )
