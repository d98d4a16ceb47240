"""Calibration while training: counts of the validation batches, a line of JSON an epoch, drawn as ``calibration.png``.

The bins are those of ``nnunet_calib.metrics``: 15 of equal width. ECE is that of the top label, CECE the mean over all
classes (regions: over the regions, and there is no top label) of the ECE of each one's probability. Both are of patches
at full resolution, voxels pooled over the batches of the epoch: they show where a training goes and score no case.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from nnunet_calib.data.errors import InputError
from nnunet_calib.data.files import write_whole
from nnunet_calib.metrics import expected_calibration_error
from nnunet_calib.metrics.counting.bins import BINS, Bins
from nnunet_calib.metrics.counting.rules import bin_index

FILE = "calibration_curves.jsonl"
PICTURE = "calibration.png"
_SLAB = 2**22


class ValidationCounts:
    """Sums of an epoch's validation batches, on the device they are on; nothing waits for it until `scores`."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (problems, bins, 3): voxels, confidence, correct
        self._terms: dict[str, Tensor] = {}
        self._batches = 0
        self._multilabel = False

    def add(self, logits: Tensor, target: Tensor, valid: Tensor | None, multilabel: bool) -> None:
        """Count a batch; arguments as of `nnunet_calib.losses.CalibrationLoss.forward`."""
        exact = torch.float32 if logits.device.type == "mps" else torch.float64
        self._multilabel = multilabel
        channels = logits.shape[1]
        if self._sums is None:
            self._sums = torch.zeros(channels + (not multilabel), BINS, 3, dtype=exact, device=logits.device)
        with torch.no_grad():
            for image in range(len(logits)):
                z, y = logits[image].flatten(1), target[image].flatten(1)
                counted = None if valid is None else valid[image].flatten()
                step = max(1, _SLAB // channels)
                for start in range(0, z.shape[1], step):
                    part = slice(start, start + step)
                    self._add(z[:, part].float(), y[:, part], None if counted is None else counted[part])

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Take note of the terms of the loss of a batch; scalars."""
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value.detach() if name in self._terms else value.detach()
        self._batches += 1

    def scores(self, is_ddp: bool) -> dict[str, Any]:
        """ECE (labels only), CECE and the means of the terms over the batches, of all processes; starts anew."""
        sums, terms, batches = self._sums, self._terms, self._batches
        multilabel = self._multilabel
        self.__init__()  # type: ignore[misc]
        if sums is None:
            return {}
        if is_ddp:
            distributed.all_reduce(sums)
        n, confidence, correct = sums.cpu().double().numpy().transpose(2, 0, 1)
        error = expected_calibration_error(Bins(n.astype("int64"), confidence, correct.astype("int64")))
        classes = error if multilabel else error[1:]
        found: dict[str, Any] = {} if multilabel else {"ECE": float(error[0])}
        found["CECE"] = float(classes.mean())
        if terms:
            values = torch.stack([*terms.values()])
            values = (values.cpu() if values.device.type == "mps" else values).double()  # mps has no float64
            values = torch.cat([values, values.new_full((1,), batches)])
            if is_ddp:
                distributed.all_reduce(values)
            *means, number = values.tolist()
            found |= {f"loss/{name}": mean / number for name, mean in zip(terms, means, strict=True)}
        return found

    def _add(self, z: Tensor, y: Tensor, counted: Tensor | None) -> None:
        """A stretch of voxels: (C, n) logits, (1, n) labels or (R, n) regions."""
        assert self._sums is not None
        if self._multilabel:
            p, is_true = z.sigmoid(), y.bool()
        else:
            p = z.softmax(dim=0)
            label = y.long() if counted is None else torch.where(counted, y.long(), 0)
            top, most_likely = p.max(dim=0, keepdim=True)
            is_true = torch.arange(len(p), device=z.device)[:, None] == label
            p, is_true = torch.cat([top, p]), torch.cat([most_likely == label, is_true])
        exact = p.to(self._sums.dtype)
        index = bin_index(exact, xp=torch) if exact.dtype == torch.float64 else (exact * BINS).long().clip(max=BINS - 1)
        index = index.clamp(min=0)  # not a number: the sums are none either
        one = torch.ones_like(exact) if counted is None else counted.to(exact.dtype).expand_as(exact)
        for column, values in enumerate((one, exact * one, is_true * one)):
            self._sums[:, :, column].scatter_add_(1, index, values)


def append(folder: Path, epoch: int, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add the line of an epoch; lines of that epoch and later ones, of a training that was continued, are dropped.

    Returns:
        All lines that the file has now.
    """
    file = folder / FILE
    kept = [line for line in _lines(file) if line["epoch"] < epoch]
    rows = [*kept, {"epoch": epoch, **values}]
    write_whole(file, "".join(f"{json.dumps(_plain(row))}\n" for row in rows))
    return rows


def draw(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Draw all lines: calibration above, terms of the loss and the objective's share below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for name in dict.fromkeys(name for row in rows for name in row if name != "epoch"):
        points = [(row["epoch"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        if points:
            (above if name in ("ECE", "CECE") else below).plot(*zip(*points, strict=True), label=name)
    above.set_ylabel("calibration error")
    below.set_xlabel("epoch")
    for axes in (above, below):
        if axes.lines:
            axes.legend()
    figure.savefig(folder / PICTURE, dpi=80)


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        return [row for row in rows if isinstance(row["epoch"], int)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a file of curves; move it away") from error


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has not as the strings inf, -inf and nan."""
    return {k: v if not isinstance(v, float) or abs(v) < float("inf") else str(v) for k, v in row.items()}
