"""A base model of random weights, and three annotated volumes of a bright ball that it was never trained on."""

from pathlib import Path

import numpy as np
import pytest

from nnunet_calib.fewshot.task.fit import fit_folder

from .hosts import phantom, write_image, write_model

STRUCTURE = 5


def write_case(root: Path, name: str, seed: int, orientation: str = "LPS", structure=None, image=None, **where) -> None:
    made, ball = phantom(seed)
    labels = (ball if structure is None else structure).astype(np.uint8) * STRUCTURE
    write_image(root / "images" / f"{name}_0000.nii.gz", made if image is None else image, orientation, **where)
    write_image(root / "labels" / f"{name}.nii.gz", labels, orientation, **where)


class Supports:
    """A model, a folder of supports and the task fitted to it."""

    def __init__(self, root: Path, cases: int = 3, **options):
        self.root, self.model = root, write_model(root / "model", **options)
        for i in range(cases):
            write_case(root, f"case_{i}", i)
        self.task = root / "ball.fewshot"
        self.fitted = self.fit(self.task)

    def fit(self, output: Path, **options):
        given = {"structures": {"ball": STRUCTURE}, "progress": False} | options
        return fit_folder(self.model, self.root / "images", self.root / "labels", output, **given)[0]


@pytest.fixture(scope="session")
def supports(tmp_path_factory) -> Supports:
    return Supports(tmp_path_factory.mktemp("supports"))
