"""Samples of voxels on disk: what a fit needs of a validation, a few hundred kilobytes a case instead of gigabytes.

``<predictions>/samples/<case>.npz`` holds the arrays of a ``CaseSample`` and, in ``made_from``, what they were made
from: the label maps (SHA-256), the classes, the number of voxels and the seed.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_calib.data.cases import CaseFiles
from nnunet_calib.data.dataset import Dataset, key
from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import whole_file
from nnunet_calib.data.images import read_labels
from nnunet_calib.posthoc.folders.sampling import CONFIDENCE_BINS, REGIONS, VOXELS, CaseSample, open_probabilities

_FOLDER = "samples"
_ARRAYS = ("index", "probabilities", "target", "weights", "regions", "confidences")
_SUM = 1e-2  # of exclusive probabilities, from 1
_APART = 1e-3  # on average: what float16 makes of a probability is a third of that


def sample_path(files: CaseFiles) -> Path:
    """Where the sample of a case is, beside its prediction."""
    return files.prediction.parent / _FOLDER / f"{files.name}.npz"


def write_sample(sample: CaseSample, dataset: Dataset, *, voxels: int = VOXELS, seed: int = 0) -> Path:
    """Leave a sample, without patches, beside its prediction, which is there already; returns its file."""
    path = sample_path(sample.files)
    path.parent.mkdir(exist_ok=True)
    arrays = {name: getattr(sample, name) for name in _ARRAYS}
    arrays["regions"] = np.stack([sample.regions[name] for name in REGIONS])
    with whole_file(path) as stream:
        np.savez(stream, made_from=np.array(_made_from(sample.files, dataset, voxels, seed)), **arrays)
    return path


def read_sample(files: CaseFiles, dataset: Dataset, *, voxels: int, seed: int) -> CaseSample | None:
    """The sample of a case; None if there is none of these label maps, voxels and seed.

    Raises:
        InputError: a file that is no sample, or a damaged one.
    """
    path = sample_path(files)
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed")  # what is read is at most as large as the file
        with np.load(path, allow_pickle=False) as stored:
            made_from = str(stored["made_from"])
            arrays = {name: stored[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no sample of voxels, or a damaged one; delete it and validate again") from error
    if made_from != _made_from(files, dataset, voxels, seed):
        return None
    if not _is_sample(arrays, dataset):
        raise InputError(f"{path}: its numbers are no sample of voxels; delete it and validate again")
    regions = dict(zip(REGIONS, arrays.pop("regions"), strict=True))
    return CaseSample(files, regions=regions, **arrays)


def is_sample_of(sample: CaseSample, files: CaseFiles, dataset: Dataset, reader: type[BaseReaderWriter]) -> bool:
    """Whether a sample has the probabilities that lie beside the prediction now, by those of the first channel.

    Raises:
        InputError: files that cannot be used.
    """
    prediction = read_labels(files.prediction, reader, dataset.labels)
    first = next(open_probabilities(files, dataset, prediction).channels()).reshape(-1)
    apart = first[sample.index].astype(np.float64) - sample.probabilities[0]
    return bool(np.abs(apart).mean() <= _APART)


def is_older(files: CaseFiles) -> bool:
    """Whether the probabilities of a case were written before its sample."""
    assert files.probabilities is not None
    return files.probabilities.stat().st_mtime < sample_path(files).stat().st_mtime


def _made_from(files: CaseFiles, dataset: Dataset, voxels: int, seed: int) -> str:
    labels = {name: _sha256(getattr(files, name)) for name in ("reference", "prediction")}
    classes = [key(channel) for channel in dataset.channels]
    return json.dumps({"format": 1, "case": files.name, **labels, "classes": classes, "voxels": voxels, "seed": seed})


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _is_sample(arrays: dict[str, np.ndarray], dataset: Dataset) -> bool:
    """Whether all numbers are what a fit may take them for."""
    p, target, weights, index = (arrays[name] for name in ("probabilities", "target", "weights", "index"))
    channels, n = len(dataset.channels), index.size
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "index": (np.integer, (n,)),
        "probabilities": (np.floating, (channels, n)),
        "target": (np.bool_, (channels, n)) if dataset.has_regions else (np.integer, (n,)),
        "weights": (np.floating, (n,)),
        "regions": (np.bool_, (len(REGIONS), n)),
        "confidences": (np.floating, (CONFIDENCE_BINS,)),
    }
    for name, (kind, shape) in shapes.items():
        if not (np.issubdtype(arrays[name].dtype, kind) and arrays[name].shape == shape):
            return False
    if not n or not (np.isfinite(weights) & (weights > 0)).all() or not ((p >= 0) & (p <= 1)).all():
        return False
    if dataset.has_regions:
        return True
    return bool((np.abs(p.sum(axis=0) - 1) < _SUM).all() and (target >= 0).all() and (target < channels).all())
