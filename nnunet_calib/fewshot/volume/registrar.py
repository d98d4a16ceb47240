"""Registrations that were made already, told apart by what the volumes hold: in memory, and in a folder."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_calib.data.files import whole_file
from nnunet_calib.fewshot.volume.anatomy import Anatomy
from nnunet_calib.fewshot.volume.registration import Registration, Warp, register

_VERSION = 3  # of what a registration computes; older files of a cache are not looked at


class Registrar:
    """Registers pairs of volumes, and knows those that it has registered already by what they hold.

    Args:
        folder: where registrations are kept for other runs, made if needed; None: in memory only.
        threads: as of ``register``.
        memory: bytes of registrations that are kept in memory.
    """

    def __init__(self, folder: Path | None = None, threads: int = 1, memory: int = 1 << 29):
        self.folder, self.threads, self._memory = folder, threads, memory
        self._kept: dict[str, Warp] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, fixed: Anatomy, moving: Anatomy, how: Registration) -> Warp:
        """As ``register``."""
        content = repr((_VERSION, sitk.Version_VersionString(), asdict(how), fixed.digest, moving.digest))
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        warp = self._kept.pop(key, None) or self._read(key, fixed)
        if warp is None:
            warp = register(fixed, moving, how, self.threads)
            self._write(key, warp)
        self._kept[key] = warp
        while sum(_bytes(one) for one in self._kept.values()) > self._memory and len(self._kept) > 1:
            self._kept.pop(next(iter(self._kept)))
        return warp

    def _read(self, key: str, fixed: Anatomy) -> Warp | None:
        if self.folder is None or not (file := self.folder / f"{key}.npz").is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as parts:
                matrix, offset, displacement = parts["matrix"], parts["offset"], parts.get("displacement")
                warp = Warp(matrix, offset, displacement, float(parts["seconds"]), failed=bool(parts["failed"]))
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):  # damaged: made anew
            return None
        fits = warp.matrix.shape == (3, 3) and warp.offset.shape == (3,)
        fits = fits and (displacement is None or displacement.shape == (3, *fixed.shape))
        whole = all(np.isfinite(part).all() for part in (warp.matrix, warp.offset, displacement) if part is not None)
        return warp if fits and whole else None

    def _write(self, key: str, warp: Warp) -> None:
        # what a hurried machine left unfinished is not kept for others
        if self.folder is None or warp.limited:
            return
        parts: dict[str, Any] = {
            "matrix": warp.matrix,
            "offset": warp.offset,
            "seconds": warp.seconds,
            "failed": warp.failed,
        }
        if warp.displacement is not None:
            parts["displacement"] = warp.displacement
        with whole_file(self.folder / f"{key}.npz") as stream:
            np.savez(stream, **parts)


def _bytes(warp: Warp) -> int:
    return 200 if warp.displacement is None else warp.displacement.nbytes
