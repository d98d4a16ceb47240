"""What registration carries from supports to a query, where the map is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from nnunet_calib.fewshot.volume.anatomy import Anatomy, signed_distance
from nnunet_calib.fewshot.volume.atlas import CAP_MM, Labelled, agreement, carry, sampled
from nnunet_calib.fewshot.volume.registration import Registration, Warp

SHAPE = (8, 10, 12)
TEXTURE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)  # no two places look alike
PLAIN = Anatomy(TEXTURE, np.zeros(SHAPE, np.uint8), (2.0, 1.0, 1.0))


def stays(*_):
    return Warp(np.eye(3), np.zeros(3))


def moves(*mm):
    return lambda *_: Warp(np.eye(3), np.array(mm, dtype=float))


def box(low: int, high: int, known=None) -> Labelled:
    mask = np.zeros(SHAPE, bool)
    mask[2:6, 2:8, low:high] = True
    return Labelled(PLAIN, signed_distance(mask, PLAIN.spacing, CAP_MM).astype(np.float16), known)


def test_the_vote_of_three_is_the_majority():
    supports = [box(2, 6), box(3, 7), box(8, 11)]
    carried = carry(PLAIN, supports, Registration(), stays)
    inside = [support.distance > 0 for support in supports]
    sure = np.min([np.abs(support.distance) for support in supports], axis=0) > 1.4  # of the border all are unsure
    majority = np.sum(inside, axis=0) >= 2
    assert sure.any()
    assert ((carried.log_odds > 0) == majority)[sure].all()


def test_the_support_that_looks_like_the_query_decides():
    """Two supports say different things on each side; the query looks like one on the left, the other on the right."""
    drawn = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    query = drawn[0]
    left = np.arange(SHAPE[2]) < 6
    looks = np.where(left, query, drawn[1]), np.where(left, drawn[2], query)
    supports = [
        replace(one, anatomy=replace(PLAIN, image=image))
        for one, image in zip((box(1, 5), box(7, 11)), looks, strict=True)
    ]
    carried = carry(replace(PLAIN, image=query), supports, Registration(), stays)
    inside = [support.distance.astype(np.float32) > 0 for support in supports]
    far = np.abs(np.arange(SHAPE[2]) - 5.5) > 3  # beyond the window
    assert ((carried.log_odds > 0) == np.where(left, *inside))[..., far].all()


def test_votes_weigh_as_published():
    """Two supports, their images off by known differences everywhere; the brightness of one is another scale's."""
    query = np.random.default_rng(0).permutation(np.linspace(0, 1, np.prod(SHAPE))).reshape(SHAPE).astype(np.float32)
    half = box(2, 6), box(6, 10)
    supports = [
        replace(half[0], anatomy=replace(PLAIN, image=5 * query + 3)),
        replace(half[1], anatomy=replace(PLAIN, image=1 - query)),
    ]
    carried = carry(replace(PLAIN, image=query), supports, Registration(), stays)
    vote, total = np.zeros(SHAPE), np.zeros(SHAPE)
    for support, looks in zip(half, (query, 1 - query), strict=True):
        p = 1 / (1 + np.exp(-support.distance.astype(float) / 2 ** (1 / 3)))
        for z, y, x in itertools.product((-1, 0, 1), repeat=3):
            if abs(z) + abs(y) + abs(x) == 3:  # corners are too far
                continue
            there = np.ix_(*(np.clip(np.arange(n) + u, 0, n - 1) for n, u in zip(SHAPE, (z, y, x), strict=True)))
            apart = ndimage.gaussian_filter(np.square(query - looks[there]), 0.7, mode="nearest") / query.var()
            vote += (apart + 0.01) ** -3 * p[there]
            total += (apart + 0.01) ** -3
    assert 1 / (1 + np.exp(-carried.log_odds)) == pytest.approx(vote / total, abs=1e-3)


@pytest.mark.parametrize("off", [(0, 0, 1), (0, -1, 0), (1, 0, 0), (0, 1, -1)])
def test_images_say_where_a_registration_is_off_by_a_voxel(off):
    shown = replace(PLAIN, image=np.roll(TEXTURE, off, axis=(0, 1, 2)))
    distance = np.roll(box(2, 6).distance, off, axis=(0, 1, 2))
    carried = carry(PLAIN, [Labelled(shown, distance)], Registration(), stays)
    inner = (slice(2, -2),) * 3
    assert ((carried.log_odds > 0) == (box(2, 6).distance > 0))[inner].all()


def test_one_support_gives_its_own_distances():
    carried = carry(PLAIN, [box(2, 6)], Registration(), stays)
    own = box(2, 6).distance.astype(np.float32)
    assert carried.distance == pytest.approx(own, abs=0.02)
    assert carried.nearest == pytest.approx(own, abs=1e-4)
    assert carried.log_odds == pytest.approx(own / 2 ** (1 / 3), abs=0.02)  # of voxels of 2 mm3


def test_deep_inside_and_far_outside_log_odds_stay_finite():
    fine = replace(PLAIN, spacing=(0.2, 0.2, 0.2))
    for sign in (1, -1):
        deep = Labelled(fine, np.full(SHAPE, sign * 25, np.float16))
        carried = carry(fine, [deep, deep], Registration(), stays)
        assert carried.log_odds == pytest.approx(np.full(SHAPE, sign * np.log(1e12)), rel=1e-3)
    carried = carry(fine, [Labelled(fine, np.full(SHAPE, 4, np.float16))], Registration(), stays)
    assert carried.log_odds == pytest.approx(np.full(SHAPE, 20.0), rel=1e-3)


def test_voxels_without_a_value_are_dark():
    holes = TEXTURE.copy()
    holes[2, 3, 4] = np.nan
    query = Anatomy.of_arrays(holes, PLAIN.base, PLAIN.spacing)
    carried = carry(query, [box(2, 6)], Registration(), stays)
    assert np.isfinite(carried.log_odds).all()


def test_labels_move_with_the_map():
    query = replace(PLAIN, image=np.roll(TEXTURE, 3, axis=2))
    carried = carry(query, [box(2, 6)], Registration(), moves(0, 0, -3))  # x of the query is at x - 3 of the support
    assert carried.nearest[:, :, 3:] == pytest.approx(box(2, 6).distance[:, :, :-3].astype(np.float32), abs=1e-3)


def test_what_a_support_does_not_show_is_farther_the_farther_it_is():
    whole = np.zeros(SHAPE, bool)
    whole[:, :, :3] = True
    support = Labelled(PLAIN, signed_distance(whole, PLAIN.spacing, CAP_MM).astype(np.float16))
    carried = carry(PLAIN, [support], Registration(), moves(0, 0, -6))
    row = carried.nearest[4, 5]
    assert row[6] == pytest.approx(2.5, abs=0.01)
    assert row[5] == pytest.approx(2.5 - 0.5, abs=0.01)  # half a voxel beyond the outer face
    assert row[0] == pytest.approx(2.5 - 5.5, abs=0.01)


def test_where_an_annotation_does_not_count_the_others_decide():
    known = np.ones(SHAPE, bool)
    known[:, :, :8] = False
    both = carry(PLAIN, [box(2, 6), box(8, 11, known)], Registration(), stays)
    alone = carry(PLAIN, [box(2, 6)], Registration(), stays)
    assert both.log_odds[:, :, :7] == pytest.approx(alone.log_odds[:, :, :7], abs=0.05)
    assert both.log_odds[4, 5, 9] > alone.log_odds[4, 5, 9] + 1  # where it counts it has its say


def test_a_support_that_says_nothing_has_no_vote_however_alike_it_looks():
    """The query looks like the support that was not annotated, and not at all like the other."""
    drawn = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    nowhere = np.zeros(SHAPE, bool)
    annotated = replace(box(2, 6), anatomy=replace(PLAIN, image=drawn[1]))
    alike = replace(box(8, 11, nowhere), anatomy=replace(PLAIN, image=drawn[0]))
    query = replace(PLAIN, image=drawn[0])
    both = carry(query, [annotated, alike], Registration(), stays)
    assert both.log_odds == pytest.approx(carry(query, [annotated], Registration(), stays).log_odds, abs=0.1)

    def far(_, moving, how):  # the alike support lies beside the query
        return Warp(np.eye(3), np.array([0, 0, 50.0 if np.array_equal(moving.image, query.image) else 0.0]))

    beside = replace(alike, known=None)
    both = carry(query, [annotated, beside], Registration(), far)
    assert both.log_odds == pytest.approx(carry(query, [annotated], Registration(), stays).log_odds, abs=0.1)


def test_how_much_is_masked_out_does_not_say_how_alike_volumes_are():
    """The same tissue with more of its rim masked out is as like the query as before, away from the rim."""
    shape, drawn = (24, 24, 24), np.random.default_rng(0)
    tissue = ndimage.gaussian_filter(drawn.normal(size=(2, *shape)), (0, 1, 1, 1)).astype(np.float32) * 5 + 5
    inside = np.zeros((2, *shape), bool)
    inside[0, 2:-2, 2:-2, 2:-2] = inside[1, 4:-4, 4:-4, 4:-4] = True
    images = [
        np.where(part, one, -9).astype(np.float32)
        for part, one in zip(inside[[0, 1, 0]], tissue[[0, 0, 1]], strict=True)
    ]
    query, masked, other = (Anatomy(image, np.zeros(shape, np.uint8), (1.0, 1.0, 1.0)) for image in images)
    place = np.indices(shape)[2] - 11.5
    left = Labelled(masked, -place.astype(np.float16))  # it says that the left half is the structure
    right = Labelled(other, place.astype(np.float16))
    carried = carry(query, [left, right], Registration(), stays)
    deep = (slice(10, 14), slice(10, 14))
    assert ((carried.log_odds > 0) == (place < 0))[deep][..., 9:15].all()


def test_maps_are_read_at_voxels_of_a_finer_grid():
    grid = np.broadcast_to(np.arange(6, dtype=np.float32) * 2 + 1, (4, 4, 6)).copy()
    index = np.ravel_multi_index(np.array([[3, 3, 3], [2, 2, 2], [1, 6, 11]]), (8, 8, 12))
    assert sampled(grid, index, (8, 8, 12)).tolist() == pytest.approx([1.5, 6.5, 11.0])
    assert (sampled(grid, np.arange(grid.size), grid.shape) == grid.ravel()).all()


def test_agreement_is_the_slope_of_carried_classes():
    """A class whose border the carried one misses by noise of known slope."""
    shape, spacing = (40, 40, 40), (1.0, 1.0, 1.0)
    ball = ((np.indices(shape) - 19.5) ** 2).sum(axis=0) < 12**2
    image = np.zeros(shape, np.float32)
    moving = Anatomy(image, ball.astype(np.uint8), spacing)
    distance = signed_distance(ball, spacing, CAP_MM)
    found = []
    for slope in (0.3, 1.0, 2.0):
        drawn = np.random.default_rng(0).random(shape) < 1 / (1 + np.exp(-slope * distance))
        warp = Warp(np.eye(3), np.zeros(3))
        found.append(agreement(Anatomy(image, drawn.astype(np.uint8), spacing), moving, warp))
    assert found == pytest.approx([0.3, 1.0, 2.0], rel=0.15)
    assert agreement(moving, Anatomy(image, np.zeros(shape, np.uint8), spacing), warp) == 1.0
    away = Warp(np.eye(3), np.array([24.0, 0.0, 0.0]))
    assert agreement(moving, moving, away) < 0.2
