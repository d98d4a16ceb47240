"""Curves while training: the numbers are those of the metrics, a continued training appends rightly."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_calib.training.curves import FILE, PICTURE, ValidationCounts, append

from .toy import IGNORE, KINDS, batch, build, prepare_folders


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for variable, folder in prepare_folders(tmp_path).items():
        monkeypatch.setenv(variable, folder)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)  # which takes a second


def binned(p: np.ndarray, true: np.ndarray) -> float:
    """ECE by its definition, with a loop over 15 bins [k/15, (k+1)/15)."""
    error = 0.0
    for k in range(15):
        inside = (p >= k / 15) & ((p < (k + 1) / 15) | (k == 14))
        if inside.any():
            error += inside.sum() / len(p) * abs(true[inside].mean() - p[inside].mean())
    return error


def rows(trainer) -> list[dict]:
    return [json.loads(line) for line in (Path(trainer.output_folder) / FILE).read_text().splitlines()]


def validate(trainer, kind: str, seeds=(0, 1)) -> None:
    trainer.on_train_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        outputs = [trainer.validation_step(batch(trainer, kind, seed=seed)) for seed in seeds]
        trainer.on_validation_epoch_end(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_definition_over_all_batches(kind):
    trainer = build("MbLSTrainer", {"calibrate_from": 0}, kind=kind, axes=2)
    validate(trainer, kind)
    (row,) = rows(trainer)
    probabilities, truths, terms = [], [], []
    trainer.network.eval()
    for seed in (0, 1):
        data = batch(trainer, kind, seed=seed)
        with torch.no_grad():
            z = trainer.network(data["data"])[0]
        y = data["target"][0]
        regions, ignore = kind.startswith("regions"), kind.endswith("ignore")
        valid = (~y[:, -1:] if regions else y != IGNORE) if ignore else torch.ones_like(y[:, :1], dtype=torch.bool)
        labels = (y[:, :2] if regions else y.clamp(max=2)) if ignore else y
        terms.append(trainer.loss.loss.calibration.parts(z, labels, valid))
        channels = z.shape[1]
        p = z.sigmoid() if regions else z.softmax(dim=1)
        true = labels if regions else torch.cat([labels == c for c in range(channels)], dim=1)
        keep = valid.expand_as(p).movedim(1, 0).flatten(1)[0].numpy()
        probabilities.append(p.movedim(1, 0).flatten(1).numpy()[:, keep])
        truths.append(true.movedim(1, 0).flatten(1).numpy()[:, keep])
    p, true = np.concatenate(probabilities, axis=1), np.concatenate(truths, axis=1)
    assert row["CECE"] == pytest.approx(np.mean([binned(*each) for each in zip(p, true, strict=True)]), abs=1e-6)
    if kind.startswith("labels"):
        top = p.argmax(axis=0)
        hit = np.take_along_axis(true, top[None], axis=0)[0]
        assert row["ECE"] == pytest.approx(binned(p.max(axis=0), hit), abs=1e-6)
    else:
        assert "ECE" not in row
    for name in terms[0]:
        assert row[f"loss/{name}"] == pytest.approx(float(terms[0][name] + terms[1][name]) / 2, rel=1e-5)
    assert (row["epoch"], row["share"]) == (0, 1)
    assert (Path(trainer.output_folder) / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_validation_loss_is_the_one_of_training():
    trainer = build("MEEPTrainer", {"calibrate_from": 0}, axes=2)
    objective, data = trainer.loss.loss, batch(trainer, "labels")
    with torch.no_grad():
        output = trainer.network(data["data"])[0]
        learning = objective(output, data["target"][0])
        objective.calibration.eval()
        torch.testing.assert_close(objective(output, data["target"][0]), learning)


def test_before_the_objective_calibration_is_counted_too():
    trainer = build("MbLSTrainer", {"num_epochs": 4}, axes=2)
    validate(trainer, "labels")
    assert rows(trainer)[0].keys() == {"epoch", "ECE", "CECE", "share"}


def test_multipliers_are_among_the_curves_and_go_to_nnunets_loggers():
    class Logger:
        def __init__(self):
            self.seen = {}

        def update_config(self, config):
            pass

        def log(self, key, value, step):
            self.seen[key] = step

    trainer = build("CRaCTrainer", {"calibrate_from": 0}, axes=2)
    trainer.logger.loggers.append(logger := Logger())
    validate(trainer, "labels")
    assert {"multiplier/boundary_0", "multiplier/inside_2", "loss/penalty"} <= rows(trainer)[0].keys()
    assert {"nnunet_calib/ECE", "nnunet_calib/CECE", "nnunet_calib/share", "nnunet_calib/multiplier/inside_2"} <= (
        logger.seen.keys()
    )


def test_a_continued_training_replaces_the_lines_from_its_first_epoch_on(tmp_path):
    for epoch in range(4):
        append(tmp_path, epoch, {"ECE": 0.1 * epoch})
    append(tmp_path, 2, {"ECE": float("nan")})  # continued from the checkpoint of epoch 1
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[-1]["ECE"] == "nan"
    assert [file for file in os.listdir(tmp_path) if file.startswith(".")] == []


def test_an_epoch_starts_with_nothing():
    counts = ValidationCounts()
    z, y = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 1, 8, 8))
    counts.add(z, y, None, False)
    first = counts.scores(False)
    counts.add(z, y, None, False)
    assert counts.scores(False) == first
    assert counts.scores(False) == {}


def test_a_network_that_gives_no_numbers_has_no_numbers_in_the_curves():
    counts = ValidationCounts()
    counts.add(torch.full((1, 3, 8, 8), float("nan")), torch.zeros(1, 1, 8, 8).long(), None, False)
    assert all(np.isnan(value) for value in counts.scores(False).values())
