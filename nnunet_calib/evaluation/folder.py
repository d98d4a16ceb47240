"""Score a folder of predictions: cases to records, by an engine; records to a summary, one at a time."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_calib.data.cases import CaseFiles, pair_cases
from nnunet_calib.data.dataset import Dataset, find_model_file, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_hidden
from nnunet_calib.data.images import choose_reader
from nnunet_calib.data.model import calibrated_from
from nnunet_calib.data.probabilities import ENDINGS
from nnunet_calib.evaluation.case import Calibration, evaluate_case
from nnunet_calib.evaluation.engine import Engine, ProcessEngine
from nnunet_calib.evaluation.engine_dask import DaskEngine
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.evaluation.records import Records, setting
from nnunet_calib.evaluation.summary import summarise
from nnunet_calib.evaluation.write import LEFTOVERS, RESULTS, write_results
from nnunet_calib.metrics import CalibrationStatistics

ENGINES = ("processes", "dask")
RECORDS = "cases"
"""The folder of the cases' records, in that of the results."""

_log = logging.getLogger(__name__)


def evaluate_folder(
    reference_folder: str | Path,
    prediction_folder: str | Path,
    output_folder: str | Path,
    dataset_json: str | Path | None = None,
    plans: str | Path | None = None,
    *,
    processes: int | None = None,
    engine: str = "processes",
    scheduler: str | None = None,
    fresh: bool = False,
    chill: bool = False,
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
    on_failure: Callable[[str], None] = _log.warning,
    stop_at_failure: bool = False,
    insist: bool = False,
) -> dict[str, Any]:
    """Score every prediction of a folder and write ``summary.json``, ``cases.csv`` and ``reliability.json``.

    A case whose files cannot be used is reported and left out; the rest goes on. Every case leaves a record in
    ``cases`` beside the results as it is finished, so that another run, after a crash too, scores only the cases whose
    files, protocol, dataset.json or software have changed since. Records of cases that are no longer in the folders
    stay there, unused. With more than one process the caller's script needs the usual ``if __name__ == "__main__"``,
    since processes are spawned.

    Args:
        reference_folder: label maps.
        prediction_folder: label maps of the same names and, where ``--save_probabilities`` was used, ``<case>.npz``.
        output_folder: made if needed; the files are written whole or not at all.
        dataset_json: found in or near the prediction folder if None.
        plans: as ``dataset_json``; may be absent altogether.
        processes: cases scored at the same time, each in one thread. None: one per processor, at most eight.
        engine: "processes", or "dask" for a Dask cluster of as many processes on this machine.
        scheduler: with "dask", the address (``tcp://host:port``) or scheduler file of a running cluster to use instead.
        fresh: score every case, whatever records there are.
        chill: leave out references without prediction instead of refusing.
        protocol: bins, tolerance, regions; None for the defaults.
        calibration: of probabilities before they are scored, as ``posthoc.apply.open_calibration`` reads it; nothing is
            written, and the segmentation is scored as it is. A file's probabilities are in memory as a whole then.
        on_failure: called with one line for every case that could not be scored.
        stop_at_failure: raise the error of such a case instead.
        insist: the references may look like predictions, and the predictions like references.

    Returns:
        The summary, as written, but with numbers where the file has "inf" and "nan". ``failed`` lists the cases left
        out.

    Raises:
        UsageError: folders or options that make no sense, an engine that is not installed, a scheduler that does not
            answer.
        InputError: files that stop the whole evaluation: dataset.json, references and predictions that do not pair, or
            results that cannot be written.
    """
    reference_folder, prediction_folder, output = map(Path, (reference_folder, prediction_folder, output_folder))
    protocol = protocol or Protocol()
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    workers = workers if processes is None else processes
    if workers < 1:
        raise UsageError(f"the number of processes must be 1 or more, not {workers}")
    chosen = _engine(engine, workers, scheduler)
    for folder in (reference_folder, prediction_folder):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
    if not insist:
        _refuse_swapped(reference_folder, prediction_folder)
    dataset_path = Path(dataset_json) if dataset_json else require_dataset_json(prediction_folder, reference_folder)
    plans_path = Path(plans) if plans else find_model_file("plans.json", prediction_folder)
    dataset = read_dataset(dataset_path, plans_path)
    protocol.check_fits(dataset)
    cases = pair_cases(reference_folder, prediction_folder, dataset.file_ending, chill=chill)
    reader, made_from = choose_reader(dataset), calibrated_from(prediction_folder)
    _make_folder(output)

    if scheduler is not None:  # its workers have working folders of their own
        output = output.absolute()
    calibrator = None if calibration is None else calibration.describe()
    records = Records(
        output / RECORDS,
        partial(evaluate_case, dataset=dataset, reader=reader, protocol=protocol, calibration=calibration),
        setting(protocol, dataset_path, plans_path, reader.__name__, calibrator),
    )
    records.remove_leftovers()
    records.refuse_others({case.name for case in cases}, reference_folder, fresh=fresh)
    kept = set() if fresh else {case.name for case in cases if records.hold(case)}
    failed: dict[str, str] = {}
    to_do = [case if scheduler is None else _absolute(case) for case in cases if case.name not in kept]
    progress = tqdm(
        chosen.map(records, to_do),
        desc=f"evaluate ({len(kept)} unchanged)" if kept else "evaluate",
        initial=len(kept),
        total=len(cases),
        unit="case",
    )

    def fail(case: CaseFiles, error: Exception) -> None:
        if stop_at_failure:
            raise error
        failed[case.name] = _one_line(case, error)
        on_failure(failed[case.name])

    for case, error in progress:
        if error is not None:
            fail(case, error)
    about: dict[str, Any] = {"dataset_json": str(dataset_path), "plans": plans_path and str(plans_path)}
    about |= {"reader": reader.__name__, "calibrator": calibrator, "calibrated_from": made_from}
    return summarise_records(output, records, cases, failed, dataset, protocol, about, fail)


def summarise_records(
    output: Path,
    records: Records,
    cases: Sequence[CaseFiles],
    failed: dict[str, str],
    dataset: Dataset,
    protocol: Protocol,
    about: dict[str, Any],
    fail: Callable[[CaseFiles, Exception], None],
) -> dict[str, Any]:
    """Write the three files of an evaluation from the records of its cases.

    Args:
        output: folder for the files.
        records: of all cases that did not fail.
        cases: all.
        failed: by name of the case, why; ``fail`` may add to it.
        dataset: labels of the cases.
        protocol: they were scored by.
        about: more of the protocol, for the summary.
        fail: called for a case whose record turns out to be damaged.

    Returns:
        The summary.

    Raises:
        InputError: the files cannot be written.
    """
    by_name = {case.name: case for case in cases}
    summary = _summary(records, [case for case in cases if case.name not in failed], dataset, fail) | {
        "failed": [{"case": name, "error": failed[name]} for name in by_name if name in failed],
        "protocol": protocol.describe(dataset) | about,
        "software": records.setting["software"],
    }
    statistics = (
        (record["case"], records.statistics_text(by_name[record["case"]]))
        for record in summary["metric_per_case"]
        if record["calibration"]
    )
    write_results(output, summary, dataset, protocol.bins, statistics)
    return summary


def _refuse_swapped(reference: Path, prediction: Path) -> None:
    """Refuse references that look like predictions, beside predictions that look like references.

    Raises:
        UsageError: they do.
    """
    found = _signs_of_predictions(reference)
    if found and not _signs_of_predictions(prediction):
        raise UsageError(
            f"{reference} holds {found}, which predictions have, and {prediction} has none: the references come first, "
            "evaluate REF PRED; --force if they do"
        )


def _signs_of_predictions(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if not is_hidden(path))
    left_by_nnunet = ("predict_from_raw_data_args.json", "plans.json")
    return next((name for name in names if name in left_by_nnunet or name.endswith(ENDINGS)), None)


def _summary(
    records: Records, cases: Sequence[CaseFiles], dataset: Dataset, fail: Callable[[CaseFiles, Exception], None]
) -> dict[str, Any]:
    """The summary of cases whose records are there; only their sum is kept of the statistics."""
    listed = []
    pooled: dict[str, CalibrationStatistics] = {}
    for case in cases:
        try:
            result = records.read(case)
        except InputError as error:
            fail(case, error)
            continue
        listed.append(result.record)
        for region, counted in result.statistics.items():
            pooled[region] = pooled[region] + counted if region in pooled else counted
    return summarise(listed, pooled, dataset)


def _engine(name: str, workers: int, scheduler: str | None) -> Engine:
    if name not in ENGINES:
        raise UsageError(f"the engine must be one of {', '.join(ENGINES)}, not {name}")
    if name == "dask":
        return DaskEngine(workers, scheduler)
    if scheduler is not None:
        raise UsageError("a scheduler is for the Dask engine (--engine dask)")
    return ProcessEngine(workers)


def _absolute(case: CaseFiles) -> CaseFiles:
    return replace(
        case,
        reference=case.reference.absolute(),
        prediction=case.prediction.absolute(),
        probabilities=case.probabilities and case.probabilities.absolute(),
    )


def _one_line(case: CaseFiles, error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"case {case.name}: {kind}{text}"


def _make_folder(folder: Path) -> None:
    """The folder of the results and in it that of the records, without what a killed run left half written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            if (folder / name).is_dir():
                raise InputError(f"{folder / name} is a directory; move it away, the results need its name")
        (folder / RECORDS).mkdir(exist_ok=True)
        for leftover in folder.glob(f"{LEFTOVERS}*"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder for the results ({error.strerror})") from error
    for place in (folder, folder / RECORDS):
        if not os.access(place, os.W_OK):
            raise UsageError(f"{place} cannot be written to")
