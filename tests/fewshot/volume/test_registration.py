"""Registration on volumes that were moved by a known map."""

import time

import numpy as np
import pytest
from scipy import ndimage

from nnunet_calib.fewshot.volume import registrar
from nnunet_calib.fewshot.volume.anatomy import MOST_VOXELS, Anatomy, coarser, nearest_on_grid, on_grid, signed_distance
from nnunet_calib.fewshot.volume.registrar import Registrar
from nnunet_calib.fewshot.volume.registration import Registration, Warp, register

SHAPE, SPACING = (36, 48, 40), (2.0, 1.5, 1.5)
AFFINE, DEFORMABLE = Registration("affine"), Registration("deformable")


def body(shape=SHAPE, spacing=SPACING, moved=lambda mm: mm, which=2) -> tuple[Anatomy, np.ndarray]:
    """A body with three organs, as it appears after a map of places in mm, and the mask of one of them."""
    mm = moved((np.indices(shape) + 0.5) * np.reshape(spacing, (3, 1, 1, 1)))
    centre = np.reshape([36.0, 36.0, 30.0], (3, 1, 1, 1))

    def ball(place, radii):
        apart = (mm - np.reshape(place, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
        return np.square(apart).sum(axis=0) < 1

    image = np.zeros(shape)
    image[ball(centre[:, 0, 0, 0], (32, 30, 24))] = 1.0
    organs = [ball(*one) for one in (((40, 46, 36), (12, 10, 8)), ((52, 26, 34), (7, 8, 7)), ((24, 28, 24), (9, 7, 6)))]
    for one, value in zip(organs, (2.0, 3.0, 4.0), strict=True):
        image[one] = value
    noise = np.random.default_rng(0).normal(0, 0.05, shape)
    image = ndimage.gaussian_filter(image, 0.6) + noise
    return Anatomy(image.astype(np.float32), np.zeros(shape, np.uint8), spacing), organs[which]


def carried(warp: Warp, fixed: Anatomy, moving: Anatomy, mask: np.ndarray) -> np.ndarray:
    (distance,), beyond = warp.carry(fixed, moving, [signed_distance(mask, moving.spacing, 20.0)])
    return distance - beyond > 0


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def turned(degrees: float, shift, scale=1.0):
    a = np.deg2rad(degrees)
    matrix = scale * np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    centre = np.array([36.0, 36.0, 30.0])
    return lambda mm: np.tensordot(matrix, mm - centre.reshape(3, 1, 1, 1), 1) + (centre + shift).reshape(3, 1, 1, 1)


def bent(mm):
    """A smooth displacement of up to 5 mm."""
    z, y, x = mm
    return np.stack([z + 4 * np.sin(y / 14), y + 5 * np.sin(x / 16 + 1), x + 3 * np.sin(z / 15)])


def test_an_affine_map_is_found():
    fixed, there = body()
    moving, organ = body(moved=turned(12, (3.0, -4.0, 2.0), 1.08))
    found = carried(register(fixed, moving, AFFINE), fixed, moving, organ)
    assert dice(organ, there) < 0.75  # where they were stored
    assert dice(found, there) > 0.93


def test_a_bent_body_takes_the_deformation():
    fixed, there = body()
    moving, organ = body(moved=bent)
    straight, deformed = (
        dice(carried(register(fixed, moving, how), fixed, moving, organ), there) for how in (AFFINE, DEFORMABLE)
    )
    assert deformed > straight + 0.03
    assert deformed > 0.9


def test_the_deformation_has_no_folds():
    fixed, _ = body()
    moving, _ = body(moved=bent)
    places = register(fixed, moving, DEFORMABLE).places(fixed)
    rows = [np.stack([np.gradient(places[i], step, axis=a) for a, step in enumerate(SPACING)]) for i in range(3)]
    jacobian = np.linalg.det(np.moveaxis(np.stack(rows), (0, 1), (-2, -1)))
    assert jacobian.min() > 0


@pytest.mark.parametrize("kind", ["affine", "deformable"])
@pytest.mark.parametrize("cut", ["fixed", "moving"])
@pytest.mark.parametrize(("half", "which"), [(slice(None, 18), 2), (slice(18, None), 1)], ids=["lower", "upper"])
def test_fields_of_view_may_differ_by_half(kind, cut, half, which):
    fixed, there = body(which=which)
    moving, organ = body(moved=turned(6, (2.0, -3.0, 2.0)), which=which)

    def part(anatomy, mask):
        return Anatomy(anatomy.image[half], anatomy.base[half], anatomy.spacing), mask[half]

    if cut == "fixed":
        fixed, there = part(fixed, there)
    else:
        moving, organ = part(moving, organ)
    assert dice(carried(register(fixed, moving, Registration(kind)), fixed, moving, organ), there) > 0.85


def test_base_classes_are_a_start_where_volumes_hardly_overlap():
    fixed, there = body(shape=(60, 48, 40))
    moving, organ = body(shape=(60, 48, 40), moved=lambda mm: mm - np.reshape([44.0, 0, 0], (3, 1, 1, 1)))
    bases = [(one.image > 1.6) & (one.image < 2.4) for one in (fixed, moving)]
    fixed, moving = (
        Anatomy(one.image, base.astype(np.uint8), one.spacing) for one, base in zip((fixed, moving), bases, strict=True)
    )
    assert dice(carried(register(fixed, moving, AFFINE), fixed, moving, organ), there) > 0.85


def test_the_same_volumes_give_the_same_map():
    fixed, moving = body()[0], body(moved=bent)[0]
    one, other = register(fixed, moving, DEFORMABLE), register(fixed, moving, DEFORMABLE)
    assert (one.matrix == other.matrix).all()
    assert one.displacement.tobytes() == other.displacement.tobytes()


def test_the_limit_of_time_is_kept_and_told():
    shape = (64, 80, 80)
    fixed, moving = body(shape)[0], body(shape, moved=bent)[0]
    begin = time.monotonic()
    warp = register(fixed, moving, Registration("deformable", limit_s=0.05))
    assert warp.limited
    assert time.monotonic() - begin < 10
    assert not register(*(body((12, 16, 14), (6.0, 4.5, 4.5))[0] for _ in range(2)), AFFINE).limited


def test_what_shows_nothing_is_told_to_have_failed():
    empty = Anatomy(np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8), SPACING)
    warp = register(empty, body()[0], DEFORMABLE)
    assert warp.failed or np.isfinite(warp.places(empty)).all()


@pytest.mark.parametrize("shape", [(1, 48, 40), (3, 48, 40)])
def test_few_slices_are_registered_in_the_plane(shape):
    def slices(moved):
        anatomy, organ = body((36, 48, 40), moved=moved)
        middle = slice(14, 14 + shape[0])
        return Anatomy(anatomy.image[middle], anatomy.base[middle], SPACING), organ[middle]

    fixed, there = slices(lambda mm: mm)
    moving, organ = slices(turned(10, (0.0, -4.0, 3.0)))
    warp = register(fixed, moving, DEFORMABLE)
    assert warp.displacement.shape == (3, *shape)
    assert dice(carried(warp, fixed, moving, organ), there) > 0.85


def test_registrations_are_kept_by_what_the_volumes_hold(tmp_path, monkeypatch):
    fixed, moving = body()[0], body(moved=bent)[0]
    first = Registrar(tmp_path)(fixed, moving, DEFORMABLE)
    again = Registrar(tmp_path)
    monkeypatch.setattr(registrar, "register", lambda *_: pytest.fail("registered again"))
    copy = Anatomy(fixed.image.copy(), fixed.base, fixed.spacing)
    found = again(copy, moving, DEFORMABLE)
    assert (found.places(fixed) == first.places(fixed)).all()
    with pytest.raises(pytest.fail.Exception):
        again(moving, fixed, DEFORMABLE)
    with pytest.raises(pytest.fail.Exception):
        Registrar(tmp_path)(fixed, moving, AFFINE)


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path):
    fixed, moving = body()[0], body(moved=turned(5, (1.0, 1.0, 1.0)))[0]
    first = Registrar(tmp_path)(fixed, moving, AFFINE)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert (Registrar(tmp_path)(fixed, moving, AFFINE).matrix == first.matrix).all()


def test_signed_distance_has_its_border_between_voxels():
    mask = np.zeros((1, 1, 9), bool)
    mask[..., 3:6] = True
    assert signed_distance(mask, (1, 1, 1), 3.0)[0, 0].tolist() == [-2.5, -1.5, -0.5, 0.5, 1.5, 0.5, -0.5, -1.5, -2.5]
    assert (signed_distance(np.zeros((4, 4, 4), bool), (1, 1, 1), 3.0) == -3).all()
    assert (signed_distance(np.ones((4, 4, 4), bool), (1, 1, 1), 3.0) == 3).all()


def test_large_volumes_are_registered_on_a_coarser_grid():
    shape, spacing = (300, 512, 512), (1.5, 0.8, 0.8)
    found = coarser(shape, spacing)
    steps = np.multiply(shape, spacing) / found
    assert 0.8 * MOST_VOXELS < np.prod(found) <= MOST_VOXELS
    assert steps.max() / steps.min() < 1.1
    assert coarser((40, 50, 60), (1, 1, 1)) == (40, 50, 60)
    thick = np.array((36, 1000, 1000)), (8.0, 0.7, 0.7)
    assert coarser(*thick)[0] == 36


def test_grids_share_their_outer_faces():
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32) + 0.5, (4, 4, 12))
    assert on_grid(ramp, (4, 4, 6))[0, 0, 1:-1] == pytest.approx([3, 5, 7, 9], abs=1e-4)
    assert nearest_on_grid(np.arange(12).reshape(1, 1, 12), (1, 1, 4)).ravel().tolist() == [1, 4, 7, 10]


def test_what_was_masked_out_is_as_dark_as_the_darkest():
    image = np.random.default_rng(0).normal(0, 1, (12, 12, 12)).astype(np.float32)
    image[:4] = 0  # nnU-Net's z-scores within a mask: 0 is the mean of the rest
    seen = Anatomy.of_arrays(image, np.zeros(image.shape, np.uint8), (1.0, 1.0, 1.0)).image
    assert seen[:4].max() < -2
    assert seen[4:] == pytest.approx(image[4:], abs=2e-3)


@pytest.mark.parametrize("how", [AFFINE, DEFORMABLE])
def test_intensities_that_lead_away_from_the_models_classes_are_not_followed(how):
    """A large bright body that lies the same in both, and beside it a dim heart, which lies 20 mm further on."""
    grid = (np.indices(SHAPE) + 0.5) * np.reshape(SPACING, (3, 1, 1, 1))

    def volume(along: float) -> tuple[Anatomy, np.ndarray]:
        body = np.square((grid - np.reshape([36, 36, 16], (3, 1, 1, 1))) / np.reshape([30, 30, 13], (3, 1, 1, 1)))
        heart = np.square(grid - np.reshape([36, along, 48], (3, 1, 1, 1))).sum(axis=0) < 9**2
        image = 4.0 * (body.sum(axis=0) < 1) + 0.3 * heart + np.random.default_rng(0).normal(0, 0.05, SHAPE)
        return Anatomy(image.astype(np.float32), heart.astype(np.uint8), SPACING), heart

    (fixed, there), (moving, here) = volume(26.0), volume(46.0)
    blind = [Anatomy(one.image, np.zeros(SHAPE, np.uint8), SPACING) for one in (fixed, moving)]
    assert dice(carried(register(*blind, how), fixed, moving, here), there) < 0.2
    assert dice(carried(register(fixed, moving, how), fixed, moving, here), there) > 0.7
