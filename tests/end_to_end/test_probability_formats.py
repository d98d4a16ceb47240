"""A folder has the same scores whatever format its probabilities have."""

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_calib.cli.main import main
from nnunet_calib.data.images import read_labels
from nnunet_calib.data.probabilities import ProbabilityFile

from ..folders import Folders, assert_same


@pytest.mark.parametrize("reader", [None, "NibabelIO", "NibabelIOWithReorient"])
def test_npz_compact_and_nifti_give_the_same_record(tmp_path, reader):
    folders = Folders(tmp_path, **({} if reader is None else {"overwrite_image_reader_writer": reader}))
    spacing = (3.0, 0.8, 0.7)
    folders.add_ambiguous("case", spacing=spacing)
    if reader == "NibabelIOWithReorient":  # what it reads, and so what nnU-Net exports, is turned to RAS
        turned = np.load(folders.prediction / "case.npz")["probabilities"][:, :, ::-1, ::-1]
        np.savez_compressed(folders.prediction / "case.npz", probabilities=turned)
    assert main(folders.words) == 0
    (npz,) = folders.summary()["metric_per_case"]

    words = ["convert", str(folders.prediction), "-o", str(folders.prediction), "--to", "compact", "-np", "1"]
    assert main(words) == 0
    assert main(folders.words) == 0
    (compact,) = folders.summary()["metric_per_case"]

    p = np.load(folders.prediction / "case.npz")["probabilities"]
    (folders.prediction / "case.npz").unlink()
    (folders.prediction / "case.nncp").unlink()
    affine = np.diag([-0.7, -0.8, 3, 1])  # of what SimpleITK writes
    if reader == "NibabelIOWithReorient":
        affine = np.array([[0.7, 0, 0, -0.7 * 11], [0, 0.8, 0, -0.8 * 13], [0, 0, 3, 0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(p.transpose(3, 2, 1, 0), affine)
    nibabel.save(image, folders.prediction / "case_probabilities.nii.gz")
    read = {None: SimpleITKIO, "NibabelIO": NibabelIO, "NibabelIOWithReorient": NibabelIOWithReorient}[reader]
    labels = read_labels(folders.prediction / "case.nii.gz", read, (0, 1, 2))
    ProbabilityFile(folders.prediction / "case_probabilities.nii.gz").check_fits(
        3, labels.labels.shape, labels.place.affine
    )
    assert main(folders.words) == 0
    (nifti,) = folders.summary()["metric_per_case"]

    assert npz["calibration"]
    for record, ending in ((npz, ".npz"), (compact, ".nncp"), (nifti, "_probabilities.nii.gz")):
        assert record.pop("probabilities_file").endswith(f"case{ending}")
        assert_same(record, npz)
