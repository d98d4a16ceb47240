"""Fit a calibrator to a folder: sample, cross-fit, choose, fit to all, write."""

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import Dataset
from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.software import installed_versions
from nnunet_calib.posthoc.folders.apply import probabilities_at
from nnunet_calib.posthoc.folders.crossfit import FOLDS, NONE, choose, cross_fit, fit_samples
from nnunet_calib.posthoc.folders.samples import is_older, is_sample_of, read_sample, sample_path
from nnunet_calib.posthoc.folders.sampling import CONFIDENCE_BINS, REGIONS, VOXELS, CaseSample, sample_case
from nnunet_calib.posthoc.folders.source import find_cases
from nnunet_calib.posthoc.maps import CALIBRATORS
from nnunet_calib.posthoc.maps.calibrator import FILE_NAME, Calibrator

AUTO, ANY = "auto", "any"


def auto_methods(region: str, *, keep_labels: bool = True) -> tuple[str, ...]:
    """What ``auto`` compares: all that changes no label and is fitted in seconds; ``any`` lets labels change.

    A network must be asked for by name. In the foreground only methods that do not tell classes apart are compared
    (``Calibrator.tells_classes_apart``).
    """
    return tuple(
        name
        for name, method in CALIBRATORS.items()
        if not method.margin
        and (method.keeps_labels or not keep_labels)
        and not (region == "foreground" and method.tells_classes_apart)
    )


_PATCHES = 8  # of each case
_PACKAGES = ("nnunet-calib", "nnunetv2", "numpy", "scipy", "scikit-learn", "torch")


def fit_folder(
    folder: str | Path,
    output: str | Path,
    reference: str | Path | None = None,
    dataset_json: str | Path | None = None,
    *,
    methods: Sequence[str] = (AUTO,),
    region: str = "volume",
    voxels: int = VOXELS,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Fit a calibrator and write ``calibrator.json``.

    With more than one process the caller's script needs the usual ``if __name__ == "__main__"``.

    Args:
        folder: a trained model, or predictions with probabilities.
        output: folder for the file; made if needed.
        reference: label maps; of a trained model nnU-Net's own if None.
        dataset_json: found if None.
        methods: keys of ``CALIBRATORS``, ``auto`` or ``any`` (``auto_methods``); of several one is kept (``choose``).
        region: voxels to fit on: ``volume``, ``foreground`` or ``boundary``.
        voxels: drawn from each case.
        seed: of the sample, the folds and networks.
        processes: cases read at the same time.

    Returns:
        The content of the file.

    Raises:
        UsageError: options or folders that make no sense.
        InputError: files that cannot be used, or a region without a voxel.
    """
    if region not in REGIONS:
        raise UsageError(f"no region {region!r}; there are {', '.join(REGIONS)}")
    names = tuple(dict.fromkeys(methods))
    if AUTO in names or ANY in names:
        names = auto_methods(region, keep_labels=ANY not in names)
    if not names or not set(names) <= CALIBRATORS.keys():
        raise UsageError(f"methods are {AUTO}, {ANY}, {', '.join(CALIBRATORS)}; not {', '.join(names) or 'none'}")
    if voxels < 1 or processes < 1:
        raise UsageError("the numbers of voxels and processes must be 1 or more")
    source = find_cases(Path(folder), *(Path(path) if path else None for path in (reference, dataset_json)))
    file = _output_file(Path(output))
    multilabel = source.dataset.has_regions
    around = any(CALIBRATORS[name].margin for name in names)
    samples = _samples(
        partial(
            _sample,
            dataset=source.dataset,
            reader=source.reader,
            voxels=voxels,
            seed=seed,
            patches=_PATCHES if around else 0,
        ),
        source.cases,
        processes,
    )
    if not any(sample.regions[region].any() for sample in samples):
        raise InputError(f"{folder}: no case has a voxel of the region {region}")
    makers = {name: partial(CALIBRATORS[name], multilabel=multilabel) for name in names}
    table, chosen, reason = _compared(samples, makers, region, multilabel, seed, names)
    calibrator = fit_samples(makers[chosen](), samples, region)
    if region == "foreground" and calibrator.tells_classes_apart:
        calibrator.notes.append(
            f"{chosen} tells classes apart, and in this region every voxel predicted as background is wrong; outside "
            "of it such a calibrator does harm (compare the volume): use the region volume"
        )
    if note := _worse_in_the_foreground(table, chosen):
        calibrator.notes.append(note)
    record = {
        "region": region,
        "choice": reason,
        "classes": source.model["classes"],
        "model": source.model,
        "cross_fit": _plain(table),
        "cases": [case.name for case in source.cases],
        "without_probabilities": source.without_probabilities,
        "voxels_per_case": voxels,
        "seed": seed,
        "confidences": {
            "bins": CONFIDENCE_BINS,
            "of": "predicted foreground",
            "cases": {s.files.name: s.confidences.tolist() for s in samples if not np.isnan(s.confidences).any()},
        },
        "software": installed_versions(_PACKAGES),
    }
    calibrator.save(file, record)
    return calibrator.state() | record


def _worse_in_the_foreground(table: Mapping[str, Any], chosen: str) -> str:
    """What to say of a method that improves the volume, which is mostly background, at the foreground's cost."""
    before, after = (
        [table[name]["foreground"][score]["mean"] for score in ("NLL", "ECE")] if name in table else [np.nan, np.nan]
        for name in (NONE, chosen)
    )
    if not all(b < a for b, a in zip(before, after, strict=True)):
        return ""
    return (
        f"in the foreground {chosen} makes it worse: NLL {before[0]:.4g} to {after[0]:.4g}, ECE {before[1]:.3g} to "
        f"{after[1]:.3g}; --region foreground fits there"
    )


def _compared(
    samples: Sequence[CaseSample],
    makers: Mapping[str, Callable[[], Calibrator]],
    region: str,
    multilabel: bool,
    seed: int,
    names: Sequence[str],
) -> tuple[dict[str, Any], str, str]:
    """The cross-fitted table, the method to keep and why."""
    with_region = sum(bool(sample.regions[region].any()) for sample in samples)
    if with_region < 2:
        chosen = names[0]
        return {}, chosen, f"{chosen}: a single case has voxels of the region, so nothing can be said of other cases"
    # every fold's fit must have a case with the region in it, so cases without it only come in at the end
    used = [sample for sample in samples if sample.regions[region].any()]
    with tqdm(total=len(makers) * min(FOLDS, len(used)), desc="cross-fit", unit="fit") as bar:
        table = cross_fit(
            used,
            makers,
            region,
            multilabel=multilabel,
            apply_around=lambda calibrator, sample: probabilities_at(calibrator, sample.files, sample.index),
            seed=seed,
            progress=bar.update,
        )
    chosen, reason = choose(table, region)
    return table, chosen, reason


def _sample(
    files: CaseFiles, dataset: Dataset, reader: type[BaseReaderWriter], *, voxels: int, seed: int, patches: int
) -> CaseSample:
    """What ``validate`` left of a case, else drawn from its probabilities.

    Raises:
        InputError: the two are of different networks, and which is the newer cannot be told, among others.
    """
    stored = None if patches else read_sample(files, dataset, voxels=voxels, seed=seed)
    if stored is not None and (files.probabilities is None or is_sample_of(stored, files, dataset, reader)):
        return stored
    if stored is not None and is_older(files):
        raise InputError(
            f"{files.probabilities}: of another network than the sample of voxels that the last validation left; "
            f"delete it, or, if it is the right one, {sample_path(files)}"
        )
    if files.probabilities is None:
        why = "a method that looks around a voxel needs whole probabilities"
        if not patches:
            why = f"its sample is not one of these label maps, {voxels} voxels and seed {seed}"
        raise InputError(f"{files.prediction}: {why}; run nnunet-calib validate --probabilities compact")
    return sample_case(files, dataset, reader, voxels=voxels, seed=seed, patches=patches)


def _samples(sample: Callable[[CaseFiles], CaseSample], cases: Sequence[CaseFiles], processes: int) -> list[CaseSample]:
    def every() -> Iterator[CaseSample]:
        if processes == 1 or len(cases) == 1:
            yield from map(sample, cases)
            return
        pool = ProcessPoolExecutor(min(processes, len(cases)), mp_context=multiprocessing.get_context("spawn"))
        try:
            yield from pool.map(sample, cases)
        except BrokenProcessPool as error:
            raise InputError("a process that read a case was killed, out of memory perhaps; try -np 1") from error
        finally:
            pool.shutdown(cancel_futures=True)

    return list(tqdm(every(), total=len(cases), desc="sample", unit="case"))


def _output_file(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder for the calibrator ({error.strerror})") from error
    if (folder / FILE_NAME).is_dir():
        raise InputError(f"{folder / FILE_NAME} is a directory; move it away, the calibrator needs its name")
    return folder / FILE_NAME


def _plain(value: Any) -> Any:
    """Numbers that are none as nnU-Net's and our files have them: "nan"."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return "nan" if isinstance(value, float) and math.isnan(value) else value
