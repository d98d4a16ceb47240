"""Where cases are scored: in this process or in several; ``engine_dask`` has the cluster.

An engine calls a function once for every case and yields each case as it is finished, with the error if there was one.
The function writes its result to disk, so that only the word "done" travels.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.errors import InputError, UsageError

Work = Callable[[CaseFiles], None]
Finished = tuple[CaseFiles, Exception | None]

RETRIES = 2
"""How often a case whose process was killed is tried again."""

ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "BLOSC_NTHREADS",
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
    )
}
"""Environment of a worker: cases, not loops, are what runs at the same time."""


class Engine(Protocol):
    """Calls a function for every case."""

    def map(self, work: Work, cases: Sequence[CaseFiles]) -> Iterator[Finished]:
        """Call ``work`` for every case; yield each, in any order, as it is finished.

        Args:
            work: picklable; what it raises is yielded with its case and does not end the others.
            cases: all different.

        Yields:
            The case and what it raised, or None.
        """


class ProcessEngine:
    """Spawned processes of this machine, one thread each; a single one is this process itself.

    A process the system kills, for want of memory perhaps, takes a pool of processes with it. The few cases that were
    in the pool are then tried again one at a time, which also leaves them more memory, and the others go on together.

    Args:
        workers: cases worked on at the same time.
    """

    def __init__(self, workers: int):
        self.workers = workers

    def map(self, work: Work, cases: Sequence[CaseFiles]) -> Iterator[Finished]:
        """See ``Engine``.

        Raises:
            UsageError: processes die as they start.
        """
        if self.workers == 1 or len(cases) <= 1:
            for case in cases:
                yield case, _error_of(work, case)
            return
        left = deque(cases)
        with _environment(ONE_THREAD):
            while left:
                suspects = yield from self._together(work, left)
                for case in suspects:
                    yield case, _alone(work, case)

    def _together(self, work: Work, left: deque[CaseFiles]) -> Generator[Finished, None, list[CaseFiles]]:
        """Work on cases until none is left or a process dies; returns those that were with it then."""
        running: dict[Future[None], CaseFiles] = {}
        broken = False
        with _pool(min(self.workers, len(left))) as pool:
            while (left or running) and not broken:
                try:
                    while left and len(running) < 2 * self.workers:
                        running[pool.submit(work, left[0])] = left[0]
                        left.popleft()
                except BrokenProcessPool:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    if isinstance(error := _raised(future), BrokenProcessPool):
                        broken = True
                    else:
                        yield running.pop(future), error
        suspects = []
        for future, case in running.items():
            if isinstance(error := _raised(future), BrokenProcessPool):
                suspects.append(case)
            else:
                yield case, error
        return suspects


def killed(times: int) -> InputError:
    """The error of a case none of whose processes lived to finish it."""
    return InputError(f"its process was killed {times} times, out of memory perhaps")


def _alone(work: Work, case: CaseFiles) -> Exception | None:
    """Try a case in a process of its own, again if it is killed."""
    for _ in range(RETRIES):
        with _pool(1) as pool:
            if _raised(pool.submit(os.getpid)) is not None:
                raise UsageError(
                    "processes die as they start; a script that calls evaluate_folder needs the usual "
                    'if __name__ == "__main__", or use one process'
                )
            error = _raised(pool.submit(work, case))
            if not isinstance(error, BrokenProcessPool):
                return error
    return killed(1 + RETRIES)


def _error_of(work: Work, case: CaseFiles) -> Exception | None:
    try:
        work(case)
    except Exception as error:
        return error
    return None


def _raised(future: Future) -> Exception | None:
    """What a task raised; waits for it. What is no ``Exception`` in a worker, such as ``SystemExit``, is its end."""
    error = future.exception()
    return error if error is None or isinstance(error, Exception) else InputError(f"its process ended ({error!r})")


@contextmanager
def _pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that drop what they have not begun when the block is left."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """A worker's life: Ctrl-C is for its parent to hear, and its parent's death is its own.

    A killed parent cannot end its processes, and they would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes started in the block: libraries read them as they are loaded."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
