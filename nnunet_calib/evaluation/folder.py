"""Score a folder of predictions."""

import logging
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import find_model_file, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.images import choose_reader
from nnunet_calib.evaluation.case import CaseResult, evaluate_case
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.evaluation.summary import summarise
from nnunet_calib.evaluation.write import RESULTS, write_results

_log = logging.getLogger(__name__)


def evaluate_folder(
    reference_folder: str | Path,
    prediction_folder: str | Path,
    output_folder: str | Path,
    dataset_json: str | Path | None = None,
    plans: str | Path | None = None,
    *,
    processes: int | None = None,
    chill: bool = False,
    protocol: Protocol | None = None,
    on_failure: Callable[[str], None] = _log.warning,
    stop_at_failure: bool = False,
) -> dict[str, Any]:
    """Score every prediction of a folder and write ``summary.json``, ``cases.csv`` and ``reliability.json``.

    A case whose files cannot be used is reported and left out; the rest goes on. With more than one process the
    caller's script needs the usual ``if __name__ == "__main__"``, since processes are spawned.

    Args:
        reference_folder: label maps.
        prediction_folder: label maps of the same names and, where ``--save_probabilities`` was used, ``<case>.npz``.
        output_folder: made if needed; the files are written whole or not at all.
        dataset_json: found in or near the prediction folder if None.
        plans: as ``dataset_json``; may be absent altogether.
        processes: cases scored at the same time. None: one per processor, at most eight.
        chill: leave out references without prediction instead of refusing.
        protocol: bins, tolerance, regions; None for the defaults.
        on_failure: called with one line for every case that could not be scored.
        stop_at_failure: raise the error of such a case instead.

    Returns:
        The summary, as written, but with numbers where the file has "inf" and "nan". ``failed`` lists the cases left
        out.

    Raises:
        UsageError: folders or options that make no sense.
        InputError: files that stop the whole evaluation: dataset.json, references and predictions that do not pair, or
            results that cannot be written.
    """
    reference_folder, prediction_folder, output = map(Path, (reference_folder, prediction_folder, output_folder))
    protocol = protocol or Protocol()
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    workers = workers if processes is None else processes
    if workers < 1:
        raise UsageError(f"the number of processes must be 1 or more, not {workers}")
    for folder in (reference_folder, prediction_folder):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
    dataset_path = Path(dataset_json) if dataset_json else require_dataset_json(prediction_folder, reference_folder)
    plans_path = Path(plans) if plans else find_model_file("plans.json", prediction_folder)
    dataset = read_dataset(dataset_path, plans_path)
    cases = pair_cases(reference_folder, prediction_folder, dataset.file_ending, chill=chill)
    reader = choose_reader(dataset, [case.reference for case in cases])
    _make_folder(output)

    score = partial(evaluate_case, dataset=dataset, reader=reader, protocol=protocol)
    results: dict[str, CaseResult] = {}
    failed: dict[str, str] = {}
    for case, outcome in tqdm(_scored(score, cases, workers), total=len(cases), desc="evaluate", unit="case"):
        if isinstance(outcome, CaseResult):
            results[case.name] = outcome
        elif stop_at_failure:
            raise outcome
        else:
            failed[case.name] = _one_line(case, outcome)
            on_failure(failed[case.name])
    ordered = [results[case.name] for case in cases if case.name in results]
    summary = summarise(ordered, dataset) | {
        "failed": [{"case": case.name, "error": failed[case.name]} for case in cases if case.name in failed],
        "protocol": protocol.describe(dataset)
        | {"dataset_json": str(dataset_path), "plans": plans_path and str(plans_path), "reader": reader.__name__},
        "software": _software(),
    }
    write_results(output, summary, ordered, dataset, protocol.bins)
    return summary


def _scored(
    score: Callable[[CaseFiles], CaseResult], cases: Sequence[CaseFiles], workers: int
) -> Iterator[tuple[CaseFiles, CaseResult | Exception]]:
    """Score cases, in processes if that helps, and yield each as it is done.

    A process the system kills, for want of memory, takes its pool with it: the cases left are scored one at a time.
    """
    if workers == 1 or len(cases) == 1:
        for case in cases:
            yield case, _outcome(partial(score, case))
        return
    left = list(cases)
    with suppress(BrokenProcessPool), _processes(min(workers, len(cases))) as pool:
        futures = {pool.submit(score, case): case for case in cases}
        for future in as_completed(futures):
            outcome = _outcome(future.result)
            left.remove(futures[future])
            yield futures[future], outcome
    while left:
        with _processes(1) as pool:
            try:
                while left:
                    case = left.pop(0)
                    yield case, _outcome(pool.submit(score, case).result)
            except BrokenProcessPool:
                yield case, InputError("its process was killed, out of memory perhaps")


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that drops what it has not begun when it is left."""
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(result: Callable[[], CaseResult]) -> CaseResult | Exception:
    """A case's result or its error: one bad case does not end the others. A broken pool is no case's error."""
    try:
        return result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        return error


def _one_line(case: CaseFiles, error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"case {case.name}: {kind}{text}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder for the results ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written to")
    for name in RESULTS:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a directory; move it away, the results need its name")


def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("nnunet-calib", "nnunetv2", "numpy", "scipy", "SimpleITK", "nibabel"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions
