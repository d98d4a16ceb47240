"""``nnunet-calib convert``: probability files between nnU-Net's ``.npz`` and the compact format."""

import argparse
import sys
from pathlib import Path

HELP = "convert probability files between .npz and the compact format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Convert probabilities: from <case>.npz (nnU-Net), <case>.nncp (compact) or\n"
        "<case>_probabilities.nii.gz to <case>.nncp or <case>.npz. Compact files are read many times\n"
        "faster; nnU-Net's own tools read .npz. What is converted already is left alone."
    )
    parser.epilog = (
        "example:\n"
        "  nnunet-calib convert predictions -o predictions --to compact\n\n"
        "float32 stays as it is. --float16 takes half the place: values below 6e-8 become 0 and the classes of a\n"
        "voxel no longer add up to exactly 1, which is enough for everything but the log-likelihood of rare voxels."
    )
    parser.add_argument("source", metavar="IN", nargs="+", type=Path, help="probability files, or folders of them")
    parser.add_argument("-o", dest="output", metavar="OUT_DIR", type=Path, required=True, help="folder of the results")
    parser.add_argument("--to", choices=("compact", "npz"), required=True, help="format to write")
    parser.add_argument("--float16", action="store_true", help="store 16 bits a value instead of 32")
    parser.add_argument("-np", type=int, help="files at the same time; default: one per processor, at most 8")


def run(args: argparse.Namespace) -> int:
    """Convert; 1 if a file could not be."""
    import os

    from tqdm import tqdm

    from nnunet_calib.data.errors import UsageError
    from nnunet_calib.data.probabilities.convert import convert_all, plan_conversions

    processes = min(8, os.cpu_count() or 1) if args.np is None else args.np
    if processes < 1:
        raise UsageError(f"the number of processes must be 1 or more, not {processes}")
    conversions = plan_conversions(args.source, args.output, args.to, half=args.float16)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{args.output} cannot be made a folder for the results ({error.strerror})") from error
    ended = convert_all(
        conversions, processes, lambda line: tqdm.write(f"nnunet-calib convert: {line}", file=sys.stderr)
    )
    results = [result for _, result in tqdm(ended, total=len(conversions), desc="convert", unit="file")]
    counts = {"converted": results.count(True), "up to date": results.count(False), "failed": results.count(None)}
    print(", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "converted"))
    return 1 if counts["failed"] else 0
