"""``nnunet-calib report``: one HTML file with everything a reader asks."""

import argparse
import sys
from pathlib import Path

from nnunet_calib.cli import checks
from nnunet_calib.cli.compare import add_selection, compare_selected

HELP = "one HTML page: which method and how sure, reliability diagrams, ranks, the worst cases"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Write one HTML file that needs no network: the answer with its interval, protocol and checksums, paired\n"
        "differences, reliability diagrams, risk-coverage curves, ranks, a table of cases, and a methods paragraph.\n"
        "RUN as in `compare`."
    )
    parser.epilog = (
        "example:\n  nnunet-calib report stock=scores_stock MEEP=scores_meep -o report.html --images imagesTs"
    )
    add_selection(parser)
    parser.add_argument("-o", dest="output", metavar="FILE", type=Path, required=True, help="the file.html")
    parser.add_argument("--images", metavar="DIR", type=Path, help="images of the cases: slices of the worst are shown")
    parser.add_argument(
        "-djfile", type=Path, help="with --images: dataset.json; else the one in or near the predictions"
    )
    parser.add_argument("--pictured", metavar="N", type=int, default=8, help="cases shown with slices (default: 8)")
    parser.add_argument("--title", default="Segmentation and calibration", help="of the page")


def run(args: argparse.Namespace) -> int:
    """Compare and write the page."""
    from nnunet_calib.data.cases import find_images
    from nnunet_calib.data.dataset import read_dataset, require_dataset_json
    from nnunet_calib.data.errors import UsageError

    if args.output.suffix not in (".html", ".htm"):
        raise UsageError(f"{args.output}: the file must end in .html")
    if not args.output.absolute().parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.absolute().parent}")
    checks.folders(args.images)
    checks.at_least(0, pictured=args.pictured)
    comparison = compare_selected(args)
    dataset = None
    if args.images is not None:
        run_ = next(iter(comparison.methods.values()))[0]
        record = run_.records[comparison.cases[0]]
        places = [Path(record[key]).parent for key in ("prediction_file", "reference_file")]
        dataset = read_dataset(args.djfile or require_dataset_json(*places))
        if not set(comparison.cases).intersection(find_images(args.images, dataset.file_ending)):
            raise UsageError(f"--images {args.images}: no image of these cases, such as {comparison.cases[0]}")
    from nnunet_calib.report.page import write_report  # with matplotlib, which takes a second
    from nnunet_calib.report.tables import answer

    problems = write_report(
        comparison, args.output, title=args.title, images=args.images, dataset=dataset, pictured=args.pictured
    )
    for problem in problems:
        print(f"nnunet-calib report: {problem}", file=sys.stderr)
    if args.images is None:
        print("no slices of cases: name the images' folder with --images", file=sys.stderr)
    print(answer(comparison))
    print(f"\nwritten to {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")
    return 0
