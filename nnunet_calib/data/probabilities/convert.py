"""Probability files from one format to another."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from nnunet_calib.data import nifti
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_hidden, is_named, unreadable
from nnunet_calib.data.probabilities.compact import write_compact
from nnunet_calib.data.probabilities.file import ENDINGS, ProbabilityFile
from nnunet_calib.data.probabilities.npz import write_npz

FORMATS = {"compact": (".nncp", write_compact), "npz": (".npz", write_npz)}


@dataclass(frozen=True)
class Conversion:
    """One file to convert.

    Attributes:
        source: the file there is.
        target: the file to be.
        to: ``compact`` or ``npz``.
        half: store float16.
    """

    source: Path
    target: Path
    to: str
    half: bool


def plan_conversions(sources: Iterable[Path], output: Path, to: str, *, half: bool = False) -> list[Conversion]:
    """What is to be converted.

    Args:
        sources: probability files, or folders, of which every file of another format is taken.
        output: the folder of the converted files.
        to: a key of ``FORMATS``.
        half: store float16 instead of float32.

    Returns:
        The conversions in the order of the sources, those within a folder by name.

    Raises:
        UsageError: a source does not exist, is no probability file or is its own target; or two have the same target.
    """
    ending, _ = FORMATS[to]
    conversions: dict[Path, Conversion] = {}
    for source in _files(sources, ending):
        case = next((source.name.removesuffix(e) for e in ENDINGS if source.name.endswith(e)), None)
        if case is None:
            raise UsageError(f"{source}: not a probability file; those end with {', '.join(ENDINGS)}")
        target = output / (case + ending)
        if target.exists() and source.exists() and target.samefile(source):
            raise UsageError(f"{source} would be overwritten; choose another folder with -o")
        if target in conversions:
            raise UsageError(f"{source} and {conversions[target].source} would both become {target}")
        conversions[target] = Conversion(source, target, to, half)
    return list(conversions.values())


def convert(conversion: Conversion) -> bool:
    """Convert one file, one channel at a time; the target is written whole or not at all.

    Values beyond [0, 1] by rounding are clipped; float64 becomes float32.

    Returns:
        False if the target was made from the source as it is now and fits it, so that nothing was done. What was made
        from a source has its time: a file of the same name from elsewhere has another.

    Raises:
        InputError: the source cannot be used, or the target not be written.
    """
    try:
        made = os.stat(conversion.source)  # before it is read: a change meanwhile is a change since
    except OSError as error:
        raise unreadable(conversion.source, error) from error
    stored = ProbabilityFile(conversion.source)
    dtype = np.dtype("float16" if conversion.half or stored.dtype == np.float16 else "float32")
    if _is_done(conversion, stored.shape, dtype):
        return False
    _, write = FORMATS[conversion.to]
    try:
        write(conversion.target, stored.channels(), stored.shape, dtype)
        os.utime(conversion.target, ns=(made.st_atime_ns, made.st_mtime_ns))
    except (OSError, ValueError) as error:
        raise InputError(f"{conversion.target}: cannot be written ({error})") from error
    return True


def convert_all(
    conversions: list[Conversion], processes: int, on_failure: Callable[[str], None]
) -> Iterator[tuple[Conversion, bool | None]]:
    """Convert files, several at a time; one that cannot be converted does not stop the rest.

    Args:
        conversions: from ``plan_conversions``.
        processes: how many at the same time; with more than one, the caller's script needs the usual
            ``if __name__ == "__main__"``.
        on_failure: called with one line for each that failed.

    Yields:
        Each conversion as it ends, with what ``convert`` returned; None if it failed.
    """
    for conversion, result in _ended(conversions, processes):
        try:
            yield conversion, result()
        except InputError as error:
            on_failure(str(error))
            yield conversion, None
        except BrokenProcessPool:
            on_failure(f"{conversion.source}: its process was killed, out of memory perhaps; try -np 1")
            yield conversion, None


def _ended(conversions: list[Conversion], processes: int) -> Iterator[tuple[Conversion, Callable[[], bool]]]:
    if processes == 1 or len(conversions) < 2:
        yield from ((conversion, partial(convert, conversion)) for conversion in conversions)
        return
    pool = ProcessPoolExecutor(
        min(processes, len(conversions)),
        mp_context=get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C is for this process to hear
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        futures = {pool.submit(convert, conversion): conversion for conversion in conversions}
        yield from ((futures[future], future.result) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)  # interrupted: those begun are finished, the others left


def _files(sources: Iterable[Path], target_ending: str) -> Iterator[Path]:
    for source in sources:
        if source.is_dir():
            endings = tuple(ending for ending in ENDINGS if ending != target_ending)
            found = sorted(
                path
                for path in source.iterdir()
                if path.name.endswith(endings) and not is_hidden(path) and is_named(path) and not _is_label_map(path)
            )
            if not found:
                raise UsageError(f"{source}: no file ends with {', '.join(endings)}")
            yield from found
        elif is_named(source):
            yield source
        else:
            raise UsageError(f"{source} does not exist")


def _is_label_map(path: Path) -> bool:
    """Whether it is a NIfTI file of one volume of integers: the label map of a case called ``x_probabilities``."""
    try:
        header = nifti.read_header(path) if path.name.endswith(nifti.ENDINGS) else None
    except InputError:  # it says so where it is read
        return False
    dtype = None if header is None else nifti.type_of(header)
    return dtype is not None and dtype.kind in "iu" and not nifti.has_channels(path)


def _is_done(conversion: Conversion, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    try:
        if os.stat(conversion.target).st_mtime_ns != os.stat(conversion.source).st_mtime_ns:
            return False
        there = ProbabilityFile(conversion.target)
    except (OSError, InputError):
        return False
    return (there.shape, there.dtype) == (shape, dtype)
