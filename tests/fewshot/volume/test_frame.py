"""Chunks and the frame they lie in: pairings as in the papers, and positions that mean the same in two bodies."""

import numpy as np
import pytest
import torch

from nnunet_calib.fewshot.volume.frame import (
    Alignment,
    Chunks,
    Frame,
    align,
    frame_of_landmarks,
    frame_of_volumes,
    landmarks,
)


def test_a_hard_chunk_is_the_interval_of_the_coordinate():
    weights = Chunks(4, "hard").weights(torch.tensor([0, 0.2499, 0.25, 0.6, 0.999, 1.0, -3, 7]))
    assert weights.argmax(dim=1).tolist() == [0, 0, 1, 2, 3, 3, 0, 3]
    assert (weights.sum(dim=1) == 1).all()


def test_interpolated_chunks_are_triangles_around_their_centres():
    chunks = Chunks(3)
    t = torch.linspace(0, 1, 101)
    expected = []
    for one in t.tolist():
        place = min(max(one * 3 - 0.5, 0), 2)
        expected.append([max(0, 1 - abs(place - i)) for i in range(3)])
    torch.testing.assert_close(chunks.weights(t), torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        chunks.weights(torch.tensor([1 / 6, 1 / 3])), torch.tensor([[1, 0, 0], [0.5, 0.5, 0]]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("mode", ["hard", "interpolated"])
def test_one_chunk_has_all_the_weight(mode):
    assert (Chunks(1, mode).weights(torch.linspace(-1, 2, 7)) == 1).all()


def test_chunks_that_make_no_sense_are_refused():
    for count, mode in ((0, "hard"), (3, "soft")):
        with pytest.raises(ValueError, match="chunks must be"):
            Chunks(count, mode)


def body(shape, spacing, scale=(1, 1, 1), shift=(0, 0, 0), classes=6):
    """Ellipsoids in a volume; the body is scaled about mm 0 and shifted."""
    rng = np.random.default_rng(3)
    mm = [(np.arange(n) + 0.5) * step for n, step in zip(shape, spacing, strict=True)]
    labels = np.zeros(shape, dtype=np.uint8)
    for c in range(1, classes + 1):
        centre, radius = rng.uniform(40, 120, 3), rng.uniform(10, 16, 3)
        square = sum(
            np.square((x - s * m - t) / (s * r)).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis, (x, m, r, s, t) in enumerate(zip(mm, centre, radius, scale, shift, strict=True))
        )
        labels[square < 1] = c
    return labels


def test_landmarks_of_a_box():
    labels = np.zeros((20, 30, 40), dtype=np.int64)
    labels[4:14, 10:30, 5:25] = 2
    place = landmarks(labels, [1, 2], (2.0, 1.0, 0.5))
    assert set(place) == {2}
    # 1 % of the voxels lie beyond each end; the second axis ends at the edge of the volume
    expected = [[8 + 0.2, 18, 28 - 0.2], [10 + 0.2, np.nan, np.nan], [2.5 + 0.1, 7.5, 12.5 - 0.1]]
    np.testing.assert_allclose(place[2], expected, atol=1e-9)


def test_a_stray_voxel_moves_no_landmark_far():
    labels = np.zeros((40, 40, 40), dtype=np.uint8)
    labels[10:20, 10:20, 10:20] = 1
    clean = landmarks(labels, [1], (1, 1, 1))[1]
    labels[35, 35, 35] = 1
    assert np.abs(landmarks(labels, [1], (1, 1, 1))[1] - clean).max() < 0.1


def test_alignment_recovers_scale_and_shift():
    scale, shift = np.array([1.08, 0.95, 1.0]), np.array([-12.0, 9.0, 0.0])
    task = landmarks(body((75, 80, 85), (2, 2, 2)), range(1, 7), (2, 2, 2))
    query = landmarks(body((50, 100, 90), (3, 1.7, 2), 1 / scale, -shift / scale), range(1, 7), (3, 1.7, 2))
    found_scale, found_shift, count = align(query, task)
    assert (count >= 12).all()
    # the ridge draws the scale towards 1 a little; what counts is where voxels end up
    for x in (40, 80, 120):
        np.testing.assert_allclose(found_scale * x + found_shift, scale * x + shift, atol=2.0)
    np.testing.assert_allclose(found_scale, scale, atol=0.03)


def test_a_class_predicted_in_the_wrong_place_has_little_say():
    task = landmarks(body((75, 80, 85), (2, 2, 2)), range(1, 7), (2, 2, 2))
    query = {c: place.copy() for c, place in task.items()}
    query[3] = query[3] + 60
    scale, shift, _ = align(query, task)
    assert np.abs(scale * 80 + shift - 80).max() < 3


def test_one_landmark_gives_a_shift_and_none_the_ends_of_the_volume():
    place = np.full((3, 3), np.nan)
    place[0, 1] = 50.0
    scale, shift, count = align({1: place}, {1: place + 7})
    assert (scale[0], shift[0], count[0]) == (pytest.approx(1), pytest.approx(7), 1)
    frame, _ = frame_of_landmarks([np.array([100.0, 80, 60])], [{1: place}])
    alignment = frame.align(np.array([120.0, 40, 30]), {1: place + 4})
    assert frame.position(alignment(np.array([54.0, 40, 30]))) == pytest.approx([0.5, 1, 1])


def test_other_fields_of_view_get_the_same_positions():
    spacing = (2.0, 2.0, 2.0)
    whole = body((75, 80, 85), spacing)
    cut = whole[12:70]
    frame, (first, second) = frame_of_landmarks(
        [np.array(v.shape) * 2.0 for v in (whole, cut)], [landmarks(v, range(1, 7), spacing) for v in (whole, cut)]
    )
    here, there = frame.position(first(np.array([80.0, 70, 60]))), frame.position(second(np.array([56.0, 70, 60])))
    np.testing.assert_allclose(here, there, atol=0.01)
    ends = [frame.position(first(end)) for end in (np.zeros(3), np.array(whole.shape) * 2.0)]
    np.testing.assert_allclose(ends, [[0, 0, 0], [1, 1, 1]], atol=0.01)


def test_volumes_are_split_by_their_ends():
    frame, (first, second) = frame_of_volumes([np.array([100.0, 100, 100]), np.array([50.0, 200, 100])])
    assert frame.position(first(np.array([30.0, 30, 30]))) == pytest.approx([0.3, 0.3, 0.3])
    assert frame.position(second(np.array([30.0, 30, 30]))) == pytest.approx([0.6, 0.15, 0.3])


def test_what_of_a_volume_the_supports_show():
    frame = Frame("aligned", np.zeros(3), np.array([100.0, 100.0, 50.0]), {})
    size = np.array([200.0, 80.0, 100.0])
    found = Alignment(np.ones(3), np.array([-150.0, 30.0, 20.0]), np.array([3, 3, 0]))
    # 50 of 200 mm overlap, 70 of 80; nothing is known of where the third lies, but it is twice as long
    assert frame.shown(size, found).tolist() == [0.25, 0.875, 0.5]
