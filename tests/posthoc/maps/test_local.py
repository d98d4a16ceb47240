"""Local temperature: starts at 1, finds a smooth map, and does not see where a volume was cut into tiles."""

import numpy as np
import pytest

from nnunet_calib.posthoc import LocalTemperature, load_calibrator
from nnunet_calib.posthoc.maps.calibrator import softmax

from ..simulated import drawn, ece, floor_of_ece, smooth_temperature


def test_starts_at_one_exactly():
    z, y, image, _ = smooth_temperature((6, 8, 8))
    fitted = LocalTemperature(image_channels=1, steps=1, learning_rate=1e-300).fit(z, y, image=image)
    assert (fitted.temperature_map(z, image) == 1).all()
    assert np.allclose(fitted.apply(z, image), softmax(z), atol=1e-15)


def test_finds_a_smooth_map():
    fit, test = smooth_temperature(seed=0), smooth_temperature(seed=1)
    fitted = LocalTemperature(image_channels=1, steps=100).fit(fit[0], fit[1], image=fit[2])
    z, y, image, truth = test
    found = fitted.temperature_map(z, image)
    assert (found > 0).all()
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.9
    p = fitted.apply(z, image).reshape(3, -1)
    raw = softmax(z).reshape(3, -1)
    assert ece(p, y.ravel()) < 0.1 * ece(raw, y.ravel())
    assert ece(p, y.ravel()) < 3 * floor_of_ece(p)


def test_tiles_with_the_margin_give_the_whole():
    z, y, _, _ = smooth_temperature((40, 12, 12))
    fitted = LocalTemperature(steps=5).fit(z, y)
    whole = fitted.apply(z)
    margin = LocalTemperature.margin
    first, second = fitted.apply(z[:, : 20 + margin])[:, :20], fitted.apply(z[:, 20 - margin :])[:, margin:]
    assert np.allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)
    less = fitted.apply(z[:, 20:])
    assert not np.allclose(less, whole[:, 20:], atol=1e-5)


def test_patches_regions_validity_and_file(tmp_path):
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 4, (2, 3, 8, 8, 8))
    inside = np.stack([drawn(softmax(np.stack([-o / 4, o / 4])), rng) for o in odds]) == 1
    valid = rng.uniform(size=odds.shape[1:]) < 0.8
    fitted = LocalTemperature(multilabel=True, steps=30).fit(odds, inside, valid)
    changed = LocalTemperature(multilabel=True, steps=30).fit(odds, inside ^ ~valid, valid)
    p = fitted.apply(odds)
    assert np.array_equal(p, changed.apply(odds))
    assert np.array_equal(p > 0.5, odds > 0)
    assert fitted.temperature_map(odds).mean() > 1.1
    loaded = load_calibrator(fitted.save(tmp_path))
    assert np.array_equal(loaded.apply(odds), p)


def test_needs_volumes():
    with pytest.raises(ValueError, match="volumes"):
        LocalTemperature().fit(np.zeros((3, 4)), np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match="image"):
        LocalTemperature(image_channels=1).fit(np.zeros((3, 2, 2, 2)), np.zeros((2, 2, 2), dtype=int))
