"""Entry point of ``nnunet-calib VERB``: finds the verb's module, turns errors into one line and an exit code."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import nnunet_calib
from nnunet_calib.data.errors import InputError, UsageError, did_you_mean

VERBS = (
    "demo",
    "trainers",
    "trainers-path",
    "doctor",
    "configure",
    "validate",
    "predict",
    "evaluate",
    "convert",
    "calibrate",
    "fewshot",
    "compare",
    "report",
    "diagram",
    "export",
)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, as every error is told, and the nearest choice; the usage is in --help."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), action.choices or ())
            raise

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _module(verb: str):
    return importlib.import_module(f"nnunet_calib.cli.{verb.replace('-', '_')}")


def _parser(verb: str | None) -> _Parser:
    """Parser with every verb listed, arguments only for the one asked for (so ``--help`` imports no torch)."""
    parser = _Parser(prog="nnunet-calib", description="Calibrated segmentation for nnU-Net.")
    parser.add_argument("--version", action="version", version=f"nnunet-calib {nnunet_calib.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = _module(name)
        sub = verbs.add_parser(name, help=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == verb:
            module.add_arguments(sub)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Arguments of a command line; an option that no verb has is told with the nearest that this one has."""
    parser = _parser(next((word for word in words if not word.startswith("-")), None))
    args, unknown = parser.parse_known_args(words)
    if unknown:
        of_verb, options = _chosen(parser, words)
        near = did_you_mean(unknown[0].partition("=")[0], options) if unknown[0].startswith("-") else ""
        of_verb.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    return args


def _chosen(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the verb, or of its step, that the words name, and its options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            named = next((word for word in words if word in action.choices), None)
            if named is not None:
                return _chosen(action.choices[named], words[list(words).index(named) + 1 :])
    return parser, [option for action in parser._actions for option in action.option_strings]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the words after ``nnunet-calib``; taken from the command line if None.

    Returns:
        0 on success, 1 when the work failed, 2 for bad usage.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    # What torch announces to those who write for it, as its parts are imported, says nothing to who runs a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    try:
        return _module(args.verb).run(args)
    except (InputError, UsageError) as error:
        if args.debug:
            raise
        print(f"nnunet-calib {args.verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # whoever reads, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.debug:
            raise
        print(f"nnunet-calib {args.verb}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"nnunet-calib {args.verb}: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
