"""nnU-Net's export of a validation case, which also scores it from its logits in memory. Nothing of nnU-Net is patched.

``nnUNetTrainer.perform_actual_validation`` hands every case to ``export_prediction_from_logits`` in a pool of
processes: logits, properties, and the trainer's ``configuration_manager`` and ``plans_manager``. All that the function
does, it asks these two for:

    plans_manager.get_label_manager(dataset_json)                       the label manager
    configuration_manager.resampling_fn_probabilities(logits, ...)      is given the logits
    label_manager.convert_logits_to_segmentation(resampled)             or apply_inference_nonlin with --npz
    plans_manager.image_reader_writer_class().write_seg(labels, path, properties)

So while a trainer validates, its two managers are the ones below, around its own: the logits are kept, resampled only
when somebody asks for their values, and scored once the label map is written. ``resample_and_save``, which writes what
the next stage of a cascade takes, asks in the same way and gets the same answers.

Other seams were looked for in nnU-Net 2.8.1 and see less. The predictor is a local variable of the loop and the pool
too; the network sees patches; ``dataset_class`` sees a case before it is predicted, a reader or writer only its labels;
the function itself is a global name of the trainer's module, which all trainers of a process share.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_calib.prediction import Grid, PredictedCase

Score = Callable[[str, Tensor, Any, dict[str, Any], Any, Any], None]
"""Called with a label map's path, the logits, the label map as written, properties, plans and configuration manager."""


@contextlib.contextmanager
def scored_export(trainer: Any, score: Score) -> Iterator[None]:
    """While open, what the trainer hands to ``export_prediction_from_logits`` is scored, too.

    Args:
        trainer: whose two managers are others meanwhile; no other trainer is touched.
        score: a function of a module, called in the process that exports. What it raises becomes a warning: a training
            of days must not fail at its end.
    """
    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    trainer.plans_manager, trainer.configuration_manager = _Plans(plans, score), _Configuration(configuration)
    try:
        yield
    finally:
        trainer.plans_manager, trainer.configuration_manager = plans, configuration


class _Around:
    """Another object, but for what the class itself defines."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "_inner" or name.startswith("__"):  # while it is unpickled, and what is no attribute of the other
            raise AttributeError(name)
        return getattr(self._inner, name)


class _Configuration(_Around):
    """A configuration manager whose resampling of logits waits until their values are asked for."""

    @property
    def resampling_fn_probabilities(self) -> Callable[..., _Handed]:
        return partial(_Handed, self._inner)


class _Plans(_Around):
    """A plans manager that knows the logits seen last, and scores them once their label map is written."""

    def __init__(self, inner: Any, score: Score):
        super().__init__(inner)
        self.score = score
        self.seen: _Handed | None = None

    def get_label_manager(self, *args: Any, **kwargs: Any) -> _Labels:
        return _Labels(self._inner.get_label_manager(*args, **kwargs), self)

    @property
    def image_reader_writer_class(self) -> Callable[[], _Writer]:
        return partial(_make_writer, self._inner.image_reader_writer_class, self)


class _Handed(_Around):
    """Logits, and how they are to be resampled; whoever asks for anything else has the resampled array."""

    def __init__(self, configuration: Any, logits: Any, shape: Any, current_spacing: Any, new_spacing: Any):
        self.configuration, self._arguments = configuration, (shape, current_spacing, new_spacing)
        self.logits: Tensor = torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits

    @cached_property
    def _inner(self) -> Any:
        return self.configuration.resampling_fn_probabilities(self.logits, *self._arguments)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self._inner, *args, **kwargs)

    def resampled(self) -> Any:
        """As nnU-Net resamples them."""
        return self._inner

    def label_map(self, labels: Any) -> np.ndarray:
        """The decision in every voxel, without resampling all classes where the plans allow that."""
        grid = Grid.resampled(tuple(self.logits.shape), *self._arguments, self.configuration)
        return PredictedCase(self.logits, grid, labels, self.configuration).label_map()


class _Labels(_Around):
    """A label manager that takes logits which are not resampled yet."""

    def __init__(self, inner: Any, plans: _Plans):
        super().__init__(inner)
        self._plans = plans

    def convert_logits_to_segmentation(self, logits: Any) -> Any:
        if not isinstance(logits, _Handed):
            return self._inner.convert_logits_to_segmentation(logits)
        self._plans.seen = logits
        try:
            return logits.label_map(self._inner)
        except Exception as error:  # whatever it is, nnU-Net's own way is left
            warn(f"a case's labels are made by nnU-Net's own resampling: {error}")
            return self._inner.convert_logits_to_segmentation(logits.resampled())

    def apply_inference_nonlin(self, logits: Any) -> Any:
        if not isinstance(logits, _Handed):
            return self._inner.apply_inference_nonlin(logits)
        self._plans.seen = logits
        return self._inner.apply_inference_nonlin(logits.resampled())


class _Writer(_Around):
    """A reader and writer that scores a case once its label map is written."""

    def __init__(self, inner: Any, plans: _Plans):
        super().__init__(inner)
        self._plans = plans

    def write_seg(self, seg: np.ndarray, output_fname: str, properties: dict[str, Any]) -> None:
        self._inner.write_seg(seg, output_fname, properties)
        handed = self._plans.seen
        if handed is None:
            return
        self._plans.seen = None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # torch's softmax differs in the last bit with their number
        try:
            self._plans.score(output_fname, handed.logits, seg, properties, self._plans._inner, handed.configuration)
        except Exception as error:
            warn(f"{output_fname} is written and not scored: {error}")
        finally:
            torch.set_num_threads(threads)


def _make_writer(kind: Callable[[], Any], plans: _Plans) -> _Writer:
    return _Writer(kind(), plans)


def warn(line: str) -> None:
    """A line on stderr, from a process of the export pool too."""
    print(f"WARNING nnunet-calib: {' '.join(str(line).split())[:500]}", file=sys.stderr, flush=True)
