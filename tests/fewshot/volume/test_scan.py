import numpy as np

from nnunet_calib.fewshot.volume.scan import whole_volumes


def test_classes_cut_by_the_field_of_view_or_of_a_few_voxels_have_no_volume():
    labels = np.zeros((10, 24, 26), dtype=np.uint8)
    labels[2:5, 3:11, 3:11] = 1
    labels[7:, 3:11, 3:11] = 2
    labels[2:5, 3:11, 18:26] = 3
    labels[4, 14:21, 3:10] = 4
    assert whole_volumes(labels, 0.5) == {1: 96.0}, "2 and 3 touch an end, 4 has 49 voxels"
    assert whole_volumes(labels[3:4], 0.5) == {1: 32.0}, "slices of 2d models have no ends"
