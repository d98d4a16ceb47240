"""Predict a folder: preprocessing, network and export of several cases at the same time, in bounded memory.

The network runs in the calling thread; images are read and preprocessed in threads before it, logits become files in
threads behind it (what takes long there releases Python's lock). A case in each of them is what is in memory. Every
finished case leaves ``made_from/<case>.json`` in the output folder: what its files were made from and which they are.
The same command, after a crash too, predicts only cases for which that does not hold any more.
"""

import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from tqdm import tqdm

from nnunet_calib.data.cases import MADE_FROM, CaseFiles, files_written, find_images
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import is_named, read_json, write_whole
from nnunet_calib.data.images import remedy
from nnunet_calib.data.model import CALIBRATED_FROM
from nnunet_calib.data.whole import check_whole
from nnunet_calib.evaluation.folder import RECORDS, summarise_records
from nnunet_calib.evaluation.protocol import Protocol
from nnunet_calib.evaluation.records import Records, setting, software
from nnunet_calib.evaluation.write import LEFTOVERS
from nnunet_calib.pipeline.case import Prediction, Wanted, check_members
from nnunet_calib.pipeline.files import FORMATS
from nnunet_calib.pipeline.predictor import Predictor, one_thread_each
from nnunet_calib.prediction.model import TrainedModel

"""The folder of the records of what each case was made from, in that of the predictions."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How the network is run; names and defaults as ``nnUNetv2_predict``."""

    device: str = "cuda"
    step_size: float = 0.5
    mirroring: bool = True
    everything_on_device: bool = True
    preprocessing: int = 1
    export: int = 1
    progress: bool = False
    verbose: bool = False

    @property
    def export_device(self) -> str:
        """Where probabilities are made: beside the network on CUDA, which has float64, as long as that is allowed."""
        return self.device if self.device == "cuda" and self.everything_on_device else "cpu"


@dataclass
class _Image:
    """A case to predict."""

    name: str
    files: list[str]
    previous: str | None
    identity: dict[str, Any] = field(default_factory=dict)


def predict_folder(
    model: TrainedModel,
    images: str | Path,
    output: str | Path,
    wanted: Wanted,
    options: Options,
    *,
    reference: str | Path | None = None,
    previous: str | Path | None = None,
    calibrator: dict[str, str] | None = None,
    parts: tuple[int, int] = (1, 0),
    fresh: bool = False,
    protocol: Protocol | None = None,
    on_failure: Callable[[str], None] = _log.warning,
) -> dict[str, Any]:
    """Predict every image of a folder.

    Args:
        model: the network.
        images: ``<case>_0000<ending>``, one file a channel.
        output: folder for the label maps and what else is wanted; made if needed.
        wanted: of every case besides its label map.
        options: how the network is run.
        reference: label maps; where there are some, cases are scored, and ``summary.json``, ``cases.csv`` and
            ``reliability.json`` are those of ``evaluate``. A case without reference is predicted all the same.
        previous: label maps of a cascade's previous stage.
        calibrator: what tells the calibrator of ``wanted`` from others.
        parts: into how many the cases are divided, and which of these to predict.
        fresh: predict cases again that are there already.
        protocol: of the scores.
        on_failure: called with one line for every case that could not be predicted or scored.

    Returns:
        ``predicted``, ``kept`` (names), ``failed`` (by name, the reason) and ``summary`` (None without reference).

    Raises:
        UsageError: folders or options that make no sense.
        InputError: files that stop everything.
    """
    if wanted.probabilities not in FORMATS:
        raise UsageError(f"probabilities are one of {', '.join(FORMATS)}, not {wanted.probabilities!r}")
    if wanted.members:
        check_members(model)
    images, output = Path(images), Path(output)
    for folder in (images, *(Path(path) for path in (reference, previous) if path)):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
    model.check_previous_stage(Path(previous) if previous else None)
    references = Path(reference) if reference else None
    work = _Work(model, output, wanted, options, references, calibrator, protocol or Protocol())
    cases = work.find(images, Path(previous) if previous else None)
    for line in work.check_references(cases):
        on_failure(line)
    cases = cases[parts[1] :: parts[0]]
    work.prepare_folder(cases)
    kept = [] if fresh else [case.name for case in cases if work.holds(case)]
    failed: dict[str, str] = {}
    to_do = [case for case in cases if case.name not in kept]
    predictor = Predictor(
        model,
        torch.device(options.device),
        step_size=options.step_size,
        mirroring=options.mirroring,
        progress=options.progress,
        verbose=options.verbose,
        everything_on_device=options.everything_on_device,
        keep_members=wanted.members,
    )

    def fail(name: str, error: BaseException) -> None:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        failed[name] = f"case {name}: {kind}{' '.join(str(error).split())[:500]}"
        on_failure(failed[name])

    with (
        one_thread_each(max(1, options.export), "export") as export,
        tqdm(total=len(cases), initial=len(kept), desc="predict", unit="case", disable=len(cases) < 2) as bar,
    ):
        behind: deque[tuple[str, Future]] = deque()

        def collect(most: int) -> None:
            while len(behind) > most:
                name, future = behind.popleft()
                if (error := future.exception()) is not None:
                    fail(name, error)
                bar.update()

        for case, ready in _ahead(work.preprocess, to_do, max(1, options.preprocessing)):
            try:
                data, properties = ready.result()
                logits = predictor.predict(data)
            except Exception as error:  # one bad image must not end the others
                fail(case.name, error)
                bar.update()
                continue
            finally:
                del ready
            del data
            collect(options.export - 1 if options.export else 0)
            prediction = Prediction(case.name, logits, predictor.members, properties, model, options.export_device)
            behind.append((case.name, export.submit(work.finish, case, prediction)))
            del logits, prediction
            predictor.members = []
        collect(0)
    done = [case for case in cases if case.name not in failed]
    summary = work.summarise(done, failed, on_failure) if reference else None
    return {
        "predicted": [case.name for case in to_do if case.name not in failed],
        "kept": kept,
        "failed": failed,
        "summary": summary,
    }


class _Work:
    """What is done to every case, but for the network."""

    def __init__(
        self,
        model: TrainedModel,
        output: Path,
        wanted: Wanted,
        options: Options,
        reference: Path | None,
        calibrator: dict[str, str] | None,
        protocol: Protocol,
    ):
        self.model, self.output, self.wanted, self.reference = model, output, wanted, reference
        self._verbose = options.verbose
        self.dataset: Dataset = model.dataset
        self.reader: type[BaseReaderWriter] = model.plans_manager.image_reader_writer_class
        self.protocol, self.calibrator = protocol, calibrator
        about = {"probabilities": wanted.probabilities, "confidence": wanted.confidence, "entropy": wanted.entropy}
        self.made_by: dict[str, Any] = {
            "model": model.fingerprint(),
            "wanted": about | {"members": wanted.members},
            "windows": {"step_size": options.step_size, "mirroring": options.mirroring},
            "calibrator": calibrator,
            "software": software(),
        }
        plans = model.folder / "plans.json"
        self.setting = setting(protocol, model.folder / "dataset.json", plans, self.reader.__name__, calibrator)

    def find(self, images: Path, previous: Path | None) -> list[_Image]:
        """The cases of a folder."""
        ending = self.dataset.file_ending
        found = []
        for name, files in find_images(images, ending).items():
            stage = None if previous is None else str(previous / f"{name}{ending}")
            found.append(_Image(name, list(map(str, files)), stage))
        return found

    def check_references(self, cases: Sequence[_Image]) -> Iterator[str]:
        """A line where some cases have no reference.

        Raises:
            UsageError: none has: the wrong folder was named.
        """
        missing = [] if self.reference is None else [case.name for case in cases if self._pair(case) is None]
        if missing and len(missing) == len(cases):
            raise UsageError(f"--reference {self.reference}: no reference of these cases, such as {missing[0]}")
        if missing:
            yield (
                f"--reference {self.reference}: no reference of {len(missing)} of {len(cases)} cases, such as "
                f"{missing[0]}; they are predicted and not scored"
            )

    def prepare_folder(self, cases: Sequence[_Image]) -> None:
        """Make the folder; remove what a killed run did not finish."""
        try:
            (self.output / MADE_FROM).mkdir(parents=True, exist_ok=True)
            if self.reference:
                (self.output / RECORDS).mkdir(exist_ok=True)
            # no other hidden file: the folder may be one that holds a user's own
            names = "|".join(re.escape(name) for name in ["dataset.json", "plans.json", *(f"{c.name}." for c in cases)])
            ours = re.compile(rf"\.(?:{names}).*\.[a-z0-9_]{{8}}|{re.escape(LEFTOVERS)}.*")
            for leftover in [path for path in self.output.rglob(".*.*") if ours.fullmatch(path.name)]:
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.exists():
                    leftover.unlink()
            for name in ("dataset.json", "plans.json"):  # for evaluate, calibrate and nnU-Net's own tools
                write_whole(self.output / name, (self.model.folder / name).read_text(encoding="utf-8"))
            if self.calibrator is not None:
                write_whole(self.output / CALIBRATED_FROM, json.dumps(self.calibrator, indent=1) + "\n")
            else:
                (self.output / CALIBRATED_FROM).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"{self.output} cannot be made a folder for predictions ({error.strerror})") from error

    def holds(self, case: _Image) -> bool:
        """Whether the case is there, made from what is there now."""
        try:
            record = read_json(self._record(case))
            whole = all(_identity(self.output / name) == seen for name, seen in record["files"].items())
            return whole and record["made_from"] == json.loads(json.dumps(self._made_from(case)))
        except (InputError, OSError, KeyError, TypeError, AttributeError):
            return False

    def preprocess(self, case: _Image) -> tuple[torch.Tensor, dict[str, Any]]:
        """Image (channels, *S) float32 as the network takes it, and nnU-Net's properties."""
        self._check(case)
        for file in (*case.files, *([case.previous] if case.previous else [])):
            check_whole(Path(file))  # SimpleITK fills up what is missing with zeros
        case.identity = self._made_from(case)  # before the files are read: a change meanwhile is a change since
        configuration, manager = self.model.configuration_manager, self.model.label_manager
        preprocessor = configuration.preprocessor_class(verbose=self._verbose)
        try:
            data, labels, properties = preprocessor.run_case(
                case.files, case.previous, self.model.plans_manager, configuration, self.dataset.content
            )
        except (
            Exception
        ) as error:  # of nnU-Net's reader, that of the training: another could change what the network sees
            for file in case.files:
                if advice := remedy(Path(file), str(error)):
                    raise InputError(f"{file}: {self.reader.__name__} of the model does not take it{advice}") from error
            raise
        if case.previous is not None:
            data = np.vstack((data, convert_labelmap_to_one_hot(labels[0], manager.foreground_labels, data.dtype)))
        return torch.from_numpy(data).to(dtype=torch.float32, memory_format=torch.contiguous_format), properties

    def finish(self, case: _Image, prediction: Prediction) -> None:
        """Write a case's files, score it, and last record what they were made from."""
        before = files_written(self.output, case.name)
        self._record(case).unlink(missing_ok=True)
        labels, files = prediction.write(self.output, self.dataset, self.reader, self.wanted)
        for file in set(before) - set(files):  # of another setting: they would be taken for this prediction's
            file.unlink(missing_ok=True)
        if (pair := self._pair(case)) is not None:

            def score(pair: CaseFiles):
                scored = (self.dataset, self.reader, self.protocol, self.wanted.calibrator)
                return prediction.score(pair, labels, *scored)

            Records(self.output / RECORDS, score, self.setting)(pair)
        seen = {str(file.relative_to(self.output)): _identity(file) for file in files}
        record = {"case": case.name, "made_from": case.identity, "files": seen}
        write_whole(self._record(case), json.dumps(record, indent=1) + "\n")

    def summarise(
        self, cases: Sequence[_Image], failed: dict[str, str], on_failure: Callable[[str], None]
    ) -> dict[str, Any]:
        """``summary.json``, ``cases.csv`` and ``reliability.json`` of the cases with reference."""
        pairs = [pair for case in cases if (pair := self._pair(case)) is not None]

        def fail(pair: CaseFiles, error: Exception) -> None:
            failed[pair.name] = f"case {pair.name}: {error}"
            on_failure(failed[pair.name])

        records = Records(self.output / RECORDS, _never, self.setting)
        about: dict[str, Any] = {
            "dataset_json": str(self.model.folder / "dataset.json"),
            "plans": str(self.model.folder / "plans.json"),
        }
        about |= {"reader": self.reader.__name__, "calibrator": self.calibrator, "probabilities": "in memory"}
        return summarise_records(self.output, records, pairs, failed, self.dataset, self.protocol, about, fail)

    def _pair(self, case: _Image) -> CaseFiles | None:
        if self.reference is None:
            return None
        path = self.reference / f"{case.name}{self.dataset.file_ending}"
        return CaseFiles(case.name, path, self.output / path.name, None) if is_named(path) else None

    def _check(self, case: _Image) -> None:
        channels = len(self.dataset.content.get("channel_names", self.dataset.content.get("modality", {})))
        if len(case.files) != channels:
            raise InputError(f"{case.files[0]}: {len(case.files)} channels; the model takes {channels}")
        if case.previous is not None and not os.path.isfile(case.previous):
            raise InputError(f"{case.previous}: not there; predict the previous stage of this case first")

    def _made_from(self, case: _Image) -> dict[str, Any]:
        pair = self._pair(case)
        files = [*case.files, *([case.previous] if case.previous else []), *([str(pair.reference)] if pair else [])]
        return (
            self.made_by
            | {"files": [[os.path.abspath(file), *_identity(Path(file))] for file in files]}
            | ({"protocol": self.setting["protocol"]} if pair else {})
        )

    def _record(self, case: _Image) -> Path:
        return self.output / MADE_FROM / f"{case.name}.json"


def _ahead(prepare: Callable[[_Image], Any], cases: Sequence[_Image], workers: int) -> Iterator[tuple[_Image, Future]]:
    """Cases in order, while those that follow are prepared: as many as there are workers."""
    with one_thread_each(workers, "preprocess") as pool:
        waiting: deque[tuple[_Image, Future]] = deque()
        for case in cases:
            waiting.append((case, pool.submit(prepare, case)))
            if len(waiting) > workers:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _identity(path: Path) -> list[int]:
    state = path.stat() if path.exists() else path.lstat()  # of a link to nothing: whatever reads it reports it
    return [state.st_size, state.st_mtime_ns]


def _never(_: CaseFiles) -> Any:
    raise AssertionError("records are there")
