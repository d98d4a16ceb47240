"""The protocol of the MarginLoss and NACL code, against the formula written in torch as they have it."""

import math

import numpy as np
import pytest

from nnunet_calib.metrics import nacl_calibration

from ...folders import ambiguous

torch = pytest.importorskip("torch")


def in_torch(confidence, correct, bins=15):
    """Bins (lo, hi] on linspace(0, 1, bins + 1), weights n_k / n; means in float64."""
    edges = torch.linspace(0, 1, bins + 1)
    total = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = confidence.gt(low) & confidence.le(high)
        if inside.any():
            gap = confidence[inside].double().mean() - correct[inside].double().mean()
            total += abs(float(gap)) * float(inside.double().mean())
    return total


@pytest.mark.parametrize("on_edges", [False, True])
def test_agrees_with_the_formula(on_edges):
    labels, p = ambiguous(1, (12, 20, 20), classes=4)
    labels[labels == 3] = 0  # the largest label present is 2: class 3 is left out of CECE
    if on_edges:
        p = (np.round(p * 15) / 15).astype(np.float32)  # many on the edges, many zeros
    inside = torch.from_numpy(labels != 0)
    foreground, at = torch.from_numpy(p)[:, inside], torch.from_numpy(labels)[inside].long()
    confidence, top = foreground.max(dim=0)
    ours = nacl_calibration((channel for channel in p), labels)
    assert ours["ECE"] == pytest.approx(in_torch(confidence, top == at), abs=1e-12)
    assert ours["CECE"] == pytest.approx(np.mean([in_torch(foreground[c], at == c) for c in range(3)]), abs=1e-12)
    assert ours["n"] == np.count_nonzero(labels)


@pytest.mark.parametrize("bins", [7, 10, 15, 20])
def test_every_edge_is_torchs(bins):
    """A voxel on an edge of torch.linspace is in the bin below it, so that float32 decides as it did for them."""
    for edge in torch.linspace(0, 1, bins + 1).numpy()[1:]:
        for p in (edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(2))):
            if p <= 1:
                both = np.array([[0, 0], [p, p - np.float32(0.5 / bins)]], dtype=np.float32)
                confidence = torch.from_numpy(both[1])
                ours = nacl_calibration(both, np.array([1, 1]), bins=bins)
                expected = in_torch(confidence, torch.tensor([True, True]), bins)
                assert ours["ECE"] == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    """Foreground voxels: .9 right, .6 wrong (background); the third, background, does not count. Two bins.

    ECE: both in (.5, 1]: |1.5 - 1| / 2. CECE: class 0 |.1 - 0| and |.6 - 0|, class 1 |.9 - 1| and |.4 - 1|.
    """
    p = np.array([[0.1, 0.6, 0.2], [0.9, 0.4, 0.8]])
    ours = nacl_calibration(p, np.array([1, 1, 0]), bins=2)
    assert ours["ECE"] == pytest.approx(0.25)
    assert ours["CECE"] == pytest.approx((0.7 / 2 + 0.7 / 2) / 2)


def test_probabilities_of_zero_are_in_no_bin_but_count():
    p = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert nacl_calibration(p, np.array([1, 1]))["CECE"] == pytest.approx(0.5 * (0.5 + 0))


def test_ignored_voxels_do_not_count():
    labels, p = ambiguous(2, (5, 6, 7))
    mask = np.arange(labels.size).reshape(labels.shape) % 3 != 0
    assert nacl_calibration(p, labels, mask=mask) == nacl_calibration(p, np.where(mask, labels, 0))


def test_without_foreground_there_is_no_number():
    result = nacl_calibration(np.ones((2, 3)), np.zeros(3, dtype=int))
    assert result["n"] == 0
    assert math.isnan(result["ECE"])
    assert math.isnan(result["CECE"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="label 2 in the reference, but 2 channels"):
        nacl_calibration(np.ones((2, 3)), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="channel 0 has shape"):
        nacl_calibration(np.ones((2, 3)), np.array([0, 1]))
