"""Cases on a Dask cluster: one made for the occasion on this machine, or a hospital's on Slurm, LSF or Kubernetes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.evaluation.engine import ONE_THREAD, RETRIES, Finished, Work, killed

_AHEAD = 4  # cases submitted per thread of the cluster: none waits for work, and the scheduler holds few
_PATIENCE = "30s"
_LOOK_AGAIN = 100  # cases after which a cluster's size is asked for again; clusters grow


class DaskEngine:
    """Tasks of a Dask cluster, one per case.

    A task whose worker dies is given to another, up to ``RETRIES`` times on a cluster of our own (the scheduler's
    setting ``allowed-failures`` on others); an unexpected error, such as that of a file system, is tried again once.

    Args:
        workers: processes of one thread, listening on localhost alone, if the cluster is our own.
        scheduler: ``tcp://host:port``, ``tls://...`` or a scheduler file of a running cluster instead. Its workers must
            see all files under the same absolute paths.

    Raises:
        UsageError: ``distributed`` is not installed.
    """

    def __init__(self, workers: int, scheduler: str | None = None):
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise UsageError("the Dask engine needs distributed: pip install 'nnunet-calib[dask]'") from error
        self.workers, self.scheduler = workers, scheduler

    def map(self, work: Work, cases: Sequence[CaseFiles]) -> Iterator[Finished]:
        """See ``engine.Engine``.

        Raises:
            UsageError: the scheduler does not answer.
            InputError: the connection to it is lost.
        """
        from distributed import CancelledError, KilledWorker, as_completed

        if not cases:
            return
        left = list(reversed(cases))
        running: dict[Any, CaseFiles] = {}
        with self._client() as client:
            window, tasks = self._window(client), as_completed()

            def submit() -> None:
                while left and len(running) < window:
                    case = left.pop()
                    task = client.submit(_unless_bad, work, case, pure=False, retries=1)
                    running[task] = case
                    tasks.add(task)

            submit()
            for finished, task in enumerate(tasks, start=1):
                case = running.pop(task)
                try:
                    error = task.exception() or task.result()
                except CancelledError as lost:
                    raise InputError(
                        "the connection to the Dask scheduler was lost; the same command goes on from here"
                    ) from lost
                yield case, killed(1 + RETRIES) if isinstance(error, KilledWorker) else error
                if finished % _LOOK_AGAIN == 0:
                    window = self._window(client)
                submit()

    def _window(self, client: Any) -> int:
        threads = self.workers if self.scheduler is None else sum(client.nthreads().values())
        return _AHEAD * max(1, threads)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        import dask
        from distributed import Client, LocalCluster

        if self.scheduler is not None:
            with _connected(self.scheduler) as client:
                yield client
            return
        settings = {
            "distributed.scheduler.allowed-failures": RETRIES,
            # a worker holds the one task it works on, so that no other is blamed for its death
            "distributed.scheduler.worker-saturation": 1.0,
        }
        with ExitStack() as stack:
            stack.enter_context(dask.config.set(settings))
            cluster = LocalCluster(
                n_workers=self.workers,
                threads_per_worker=1,
                host="127.0.0.1",
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                security=True,  # others on this machine could otherwise have the workers run what they like
                memory_limit=0,  # the system's own limit, as with processes
                silence_logs=logging.CRITICAL,
                env=ONE_THREAD,
            )
            stack.enter_context(cluster)
            yield stack.enter_context(Client(cluster))


@contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    """A client of a running cluster."""
    from distributed import Client

    if "://" in scheduler:
        where = {"address": scheduler}
    elif Path(scheduler).is_file():
        where = {"scheduler_file": scheduler}
    else:
        raise UsageError(f"{scheduler} is neither a Dask scheduler's address (tcp://host:port) nor its scheduler file")
    try:
        client = Client(**where, timeout=_PATIENCE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"no Dask scheduler answers at {scheduler} ({' '.join(str(error).split())})") from error
    with client:
        yield client


def _unless_bad(work: Work, case: CaseFiles) -> InputError | None:
    """An ``InputError`` is a result, for it would only come again; what is raised is tried again."""
    try:
        work(case)
    except InputError as error:
        return error
    return None
