"""``nnunet-calib demo``: the whole workflow, from data to the table, on data that it makes."""

import argparse
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from nnunet_calib.cli import checks
from nnunet_calib.data.errors import InputError, UsageError

HELP = "try it in five minutes: data, training, prediction, calibration, evaluation and report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.description = (
        "Make a small 3D data set with ambiguous borders and run nnU-Net's own commands on it: plan, preprocess,\n"
        "train, predict. Then calibrate the stock network, fine-tune it with MEEP, evaluate, compare, and write\n"
        "report.html. Takes about five minutes on two processor cores. Everything stays in one folder; the same\n"
        "command goes on where it was stopped."
    )
    parser.epilog = "example:\n  nnunet-calib demo -o /tmp/demo"
    parser.add_argument(
        "-o",
        dest="output",
        metavar="DIR",
        type=Path,
        default=Path("nnunet_calib_demo"),
        help="folder for everything (default: ./nnunet_calib_demo)",
    )
    parser.add_argument(
        "-device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument(
        "--fewshot", action="store_true", help="also segment a structure that the network never saw, from three volumes"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the data, 0 or larger (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run every step, print a line a step and the table."""
    checks.at_least(0, seed=args.seed)
    from tqdm import tqdm

    from nnunet_calib.demo.workflow import Workflow, check_folder

    check_folder(args.output.resolve(), args.seed)
    workflow = Workflow(args.output, _device(args.device), args.seed, args.fewshot)
    steps = workflow.steps()
    print(f"demo in {workflow.folder} on {workflow.device}, {len(steps)} steps")
    start = time.monotonic()
    try:
        with _ended_like_ctrl_c():
            for number, step in enumerate(steps, 1):
                title = f"[{number:2d}/{len(steps)}] {step.title}"
                if step.done():
                    print(f"{title:<36}  done before", flush=True)
                    continue
                began = time.monotonic()
                with tqdm(total=step.ticks, desc=title, leave=False, disable=None, bar_format=_BAR) as bar:
                    step.run(partial(_show, bar))
                print(f"{title:<36} {time.monotonic() - began:5.0f} s", flush=True)
    except KeyboardInterrupt:
        raise InputError(f"interrupted; the same command goes on from here (folder {workflow.folder})") from None
    print(f"{'':<36} {time.monotonic() - start:5.0f} s in all\n")
    _report(workflow)
    return 0


_BAR = "{desc:<36} {bar:20} {n_fmt}/{total_fmt} {elapsed}"


def _show(bar, reached: int) -> None:
    bar.n = reached
    bar.refresh()


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """A closed terminal or a batch system's end must end the running command too, as Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("-device cuda: torch sees no GPU here; use -device cpu")
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked


def _report(workflow) -> None:
    from nnunet_calib.demo import phantom
    from nnunet_calib.demo.workflow import NAMES, READERS, REGION

    print(
        f"mean over {phantom.TEST_CASES} test cases; ECE, CECE and NLL in the region '{REGION}': voxels that reference"
    )
    print("or prediction call foreground\n")
    print(f"{'':<30}{'DSC':>8}{'HD95 mm':>10}{'ECE':>8}{'CECE':>8}{'NLL':>8}")
    for row in workflow.rows():
        print(f"{row.name:<30}{row.dice:>8.3f}{row.hd95:>10.2f}{row.ece:>8.3f}{row.cece:>8.3f}{row.nll:>8.3f}")
    print(f"\n'{NAMES[READERS]}' take as probability of a class the share of the {phantom.READERS} readers who drew")
    print("it. The reference is the drawing of one of them, so a calibrated network can do as well as that. One short")
    print("training shows how things work, not which loss is better; docs/results.md has the experiments that do.\n")
    if workflow.fewshot:
        print(f"few-shot: the cyst, which the stock network never saw, from {phantom.SUPPORTS} annotated volumes:")
        print(f"DSC {workflow.new.dice():.3f} in {phantom.QUERIES} others\n")
    print(f"open {workflow.report}\n")
    for what, where in (
        ("data set", workflow.raw),
        ("readers", workflow.readers),
        ("predictions", workflow.predictions),
        ("calibrators", workflow.calibrators),
        ("scores", workflow.evaluation / "*" / "summary.json"),
        ("comparison", workflow.comparison),
        *((("few-shot", workflow.new.folder),) if workflow.fewshot else ()),
        ("commands", workflow.script()),
    ):
        print(f"{what:<12} {where}")
    print("\nthe commands, with nnU-Net's three folder variables as in the script:")
    for command in workflow.commands():
        print(f"  {shlex.join(command)}")
