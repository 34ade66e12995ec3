"""Each distortion against an independent implementation: scipy, Pillow, colorsys, or its formula written out."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from robustboard.bench.distortions import blur, canvas, digital, edges, noise, shapes, weather
from robustboard.bench.distortions.canvas import Draws
from robustboard.bench.distortions.spatter import _equalised, spatter


def natural(n: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth images with texture, (n, *shape), in [0, 1]."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.normal(size=(n, *shape)), (0, 0, 2, 2)) * 4
    return 1 / (1 + np.exp(-coarse - rng.normal(size=(n, *shape)) * 0.1))


def draws(n: int, *words: str | int) -> Draws:
    return Draws(*words, "test", keys=[str(i) for i in range(n)])


# --- what all of them draw with


def test_draws_are_uniform_and_open():
    drawn = Draws(0, "test", keys=["a"]).uniform(100_000)[0]
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.005


def test_every_image_has_a_stream_of_its_own():
    both, one = draws(2), Draws("test", keys=["1"])
    for shape in ((3,), (2, 2), ()):
        np.testing.assert_array_equal(both.uniform(*shape)[1], one.uniform(*shape)[0])
    assert set(draws(1).integers(-2, 3, 1000).ravel()) == {-2, -1, 0, 1, 2}
    assert set(draws(1).signs(100).ravel()) == {-1.0, 1.0}


def test_poisson_draws_are_the_quantiles_of_their_uniforms():
    means = np.tile(np.concatenate([[0, 1e-3, 0.3], np.linspace(1, 500, 197)]), (3, 5))
    share = draws(3).uniform(1000)
    np.testing.assert_array_equal(draws(3).poisson(means), np.where(means > 0, stats.poisson.ppf(share, means), 0))


@pytest.mark.parametrize(
    ("border", "mode"), [("mirror", "mirror"), ("reflect", "reflect"), ("constant", "grid-constant")]
)
def test_sampling_equals_scipy_inside_and_far_outside(border, mode):
    images = natural(2, (3, 9, 12))
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(-30, 40, size=(2, 2, 9, 12))
    found = canvas.sampled(images, rows, columns, border)
    for image, y, x, result in zip(images, rows, columns, found, strict=True):
        for channel, plane in zip(image, result, strict=True):
            np.testing.assert_allclose(plane, ndimage.map_coordinates(channel, [y, x], order=1, mode=mode), atol=1e-12)


@pytest.mark.parametrize("side", [8, 28, 32, 33])
@pytest.mark.parametrize("factor", [1, 1.05, 1.11, 1.25, 1.75, 2.5, 4.5])
def test_enlarging_equals_scipys_zoom_of_the_middle(side, factor):
    image = natural(1, (1, side, side))
    kept = math.ceil(side / factor)
    top = (side - kept) // 2
    zoomed = ndimage.zoom(image[0, 0, top : top + kept, top : top + kept], factor, order=1)
    trim = (len(zoomed) - side) // 2
    expected = zoomed[trim : trim + side, trim : trim + side]
    np.testing.assert_allclose(canvas.enlarged(image, factor)[0, 0], expected, atol=1e-12)


def test_motion_averages_along_one_ray():
    images = natural(3, (1, 12, 12))
    angles = np.array([-45.0, 10, 100])
    found = canvas.drag(images, 3, 1.5, angles)
    weights = np.exp(-(np.arange(7) ** 2) / (2 * 1.5**2))
    for image, angle, result in zip(images, angles, found, strict=True):
        expected = np.zeros((12, 12))
        for i, weight in enumerate(weights / weights.sum()):
            down = -math.ceil(i * math.sin(math.radians(angle)) - 0.5)
            right = -math.ceil(i * math.cos(math.radians(angle)) - 0.5)
            for y in range(12):
                for x in range(12):
                    expected[y, x] += weight * image[0, min(max(y + down, 0), 11), min(max(x + right, 0), 11)]
        np.testing.assert_allclose(result[0], expected, atol=1e-12)


def test_smoothed_noise_keeps_its_strength():
    field = draws(4).normal(1, 128, 128)
    spreads = [
        canvas.smooth(field * canvas.steadied(1.0, sigma), sigma, mode="wrap").std() for sigma in (1.0, 2.0, 4.0)
    ]
    np.testing.assert_allclose(spreads, spreads[0], rtol=0.05)


# --- noise


def test_shot_noise_has_the_variance_of_photon_counts():
    images = np.full((50, 1, 32, 32), 0.4)
    noisy = noise.shot_noise(images, 60, draws=draws(50))
    assert abs(noisy.mean() - 0.4) < 0.003
    assert abs(noisy.var() / (0.4 / 60) - 1) < 0.03
    np.testing.assert_allclose(noisy * 60, np.rint(noisy * 60), atol=1e-9)


def test_impulse_noise_strikes_each_channel_by_itself_half_with_salt():
    images = np.full((50, 3, 32, 32), 0.5)
    noisy = noise.impulse_noise(images, 0.2, draws=draws(50))
    assert abs((noisy == 1).mean() - 0.1) < 0.005
    assert abs((noisy == 0).mean() - 0.1) < 0.005
    struck = noisy != 0.5
    assert abs((struck[:, 0] & struck[:, 1]).mean() - 0.04) < 0.005, "channels are struck independently"


def test_speckle_noise_grows_with_the_value():
    images = np.stack([np.full((1, 64, 64), 0.2), np.full((1, 64, 64), 0.8)])
    spread = (noise.speckle_noise(images, 0.1, draws=draws(2)) - images).std(axis=(1, 2, 3))
    np.testing.assert_allclose(spread, [0.02, 0.08], rtol=0.05)


# --- blur


@pytest.mark.parametrize(("radius", "alias"), [(0.3, 0.4), (0.5, 0.6), (1, 0.2), (1.5, 0.1), (3, 0.1), (8, 0.5)])
def test_defocus_equals_one_correlation_with_the_smoothed_disk(radius, alias):
    places = np.arange(-9, 10)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(float)
    weights = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    kernel = disk / disk.sum()
    for axis in (0, 1):
        kernel = ndimage.convolve1d(kernel, weights / weights.sum(), axis=axis, mode="constant")
    image = natural(1, (3, 32, 32))
    expected = [ndimage.correlate(channel, kernel, mode="mirror") for channel in image[0]]
    np.testing.assert_allclose(blur.defocus_blur(image, radius, alias, scale=1.0)[0], expected, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("sigma", "delta", "turns"), [(0.4, 1, 2), (1.1, 3, 2)])
def test_glass_blur_equals_the_generators_own_loop(channels, sigma, delta, turns):
    """On colour images the generator's swap is aliased, so it copies; on grey ones (2-D arrays) it really swaps."""
    image = natural(1, (channels, 16, 16))
    offsets = draws(1).integers(-delta, delta, turns, 16 - 2 * delta, 16 - 2 * delta, 2)[0]
    x = np.uint8(ndimage.gaussian_filter(image[0], (0, sigma, sigma), mode="nearest") * 255).transpose(1, 2, 0)
    x = x[:, :, 0].copy() if channels == 1 else x.copy()
    for turn in range(turns):
        for i, h in enumerate(range(16 - delta, delta, -1)):
            for j, w in enumerate(range(16 - delta, delta, -1)):
                dy, dx = offsets[turn, i, j]
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
    expected = ndimage.gaussian_filter(x.reshape(16, 16, channels) / 255.0, (sigma, sigma, 0), mode="nearest")
    exchange = "swap" if channels == 1 else "duplicate"
    found = blur.glass_blur(image, sigma, delta, turns, draws=draws(1), scale=1.0, exchange=exchange)
    np.testing.assert_allclose(found[0].transpose(1, 2, 0), expected, atol=1e-12)


def test_swapping_keeps_every_pixel_and_copying_does_not():
    image = np.arange(256, dtype=float).reshape(1, 1, 16, 16) / 255
    both = {
        exchange: blur.glass_blur(image, 1e-3, 1, 1, draws=draws(1), scale=1.0, exchange=exchange)
        for exchange in ("swap", "duplicate")
    }
    assert len(np.unique(both["swap"].round(6))) == 256
    assert len(np.unique(both["duplicate"].round(6))) < 256


@pytest.mark.parametrize(("largest", "count"), [(1.06, 7), (1.11, 12), (1.16, 16), (1.21, 21), (1.26, 26)])
def test_zoom_blur_counts_its_factors_as_the_generator_does(largest, count):
    """Rounding puts 1.06 and 1.11 into the generator's ranges, which were to end before them."""
    assert len(np.arange(1, largest, 0.01)) == count
    image = natural(1, (1, 32, 32))
    both = {last: blur.zoom_blur(image, largest, 0.01, last=last) for last in ("original", "excluded")}
    assert (count > round((largest - 1) / 0.01)) == (not np.array_equal(*both.values()))
    for last, factors in (
        ("original", np.arange(1, largest, 0.01)),
        ("excluded", np.arange(1, largest, 0.01)[: round((largest - 1) / 0.01)]),
    ):
        expected = (image + sum(canvas.enlarged(image, float(f)) for f in factors)) / (len(factors) + 1)
        np.testing.assert_allclose(both[last], expected, atol=1e-12)


# --- weather


def test_the_plasma_is_diamond_square_on_a_torus():
    side, decay, count = 8, 2.0, 2
    found = weather.plasma(draws(count), side, decay)
    stream = draws(count)
    heights = np.zeros((count, side, side))
    step, rough = side, 100.0
    while step >= 2:
        half, n = step // 2, side // step
        kinds = (
            ((half, half), ((half, half), (half, -half), (-half, half), (-half, -half))),
            ((0, half), ((half, 0), (-half, 0), (0, half), (0, -half))),
            ((half, 0), ((half, 0), (-half, 0), (0, half), (0, -half))),
        )
        for (y0, x0), neighbours in kinds:
            wobble = rough * rough * (2 * stream.uniform(n, n) - 1)
            for i in range(n):
                for j in range(n):
                    y, x = y0 + i * step, x0 + j * step
                    mean = sum(heights[:, (y + dy) % side, (x + dx) % side] for dy, dx in neighbours) / 4
                    heights[:, y, x] = mean + wobble[:, i, j]
        step, rough = half, rough / decay
    for height, result in zip(heights, found, strict=True):
        np.testing.assert_allclose(result, (height - height.min()) / np.ptp(height), atol=1e-12)


def test_fog_keeps_the_brightest_value_at_most():
    images = natural(3, (3, 32, 32)) * 0.6
    hazy = weather.fog(images, 1.5, 1.75, draws=draws(3))
    assert (hazy.max(axis=(1, 2, 3)) <= images.max(axis=(1, 2, 3)) + 1e-12).all()
    haze = weather.plasma(draws(3), 32, 1.75)[0]
    top = images[0].max()
    np.testing.assert_allclose(hazy[0], (images[0] + 1.5 * haze) * top / (top + 1.5), atol=1e-12)


def test_snow_is_a_whitened_image_and_the_same_flakes_twice():
    """What snow adds to black is a layer and the layer turned by 180 degrees."""
    black = np.zeros((2, 3, 32, 32))
    added = weather.snow(black, 0.1, 0.2, 1, 0.6, 8, 3, 1.0, draws=draws(2), scale=1.0)
    np.testing.assert_allclose(added, added[:, :, ::-1, ::-1], atol=1e-12)
    assert (added >= 0).all()
    assert 0 < added.mean() < 0.2
    grey = np.full((1, 1, 32, 32), 0.2)
    without = weather.snow(grey, -9, 0.1, 1, 0.6, 8, 3, 0.9, draws=draws(1), scale=1.0)
    np.testing.assert_allclose(without, 0.9 * 0.2 + 0.1 * (0.2 * 1.5 + 0.5))


def test_frost_adds_a_bluish_texture_of_its_own_to_each_image():
    black = np.zeros((20, 3, 32, 32))
    ice = weather.frost(black, 1, 1.0, draws=draws(20), scale=1.0)
    assert 0 <= ice.min() < ice.max() <= 1
    assert 0.25 < ice.mean() < 0.75
    assert ice[:, 0].mean() < ice[:, 1].mean() < ice[:, 2].mean()
    assert abs(np.corrcoef(ice[0].ravel(), ice[1].ravel())[0, 1]) < 0.5
    bright = natural(20, (3, 32, 32))
    np.testing.assert_allclose(
        weather.frost(bright, 0.8, 0.4, draws=draws(20), scale=1.0), 0.8 * bright + 0.4 * ice, atol=1e-12
    )


def test_mud_hides_what_it_covers_and_water_only_adds_light():
    images = natural(4, (3, 32, 32)) * 0.9 + 0.05
    muddy = spatter(images, 0.65, 0.1, 0.7, 0.69, 0.6, 1, draws=draws(4), scale=1.0)
    mud = np.array([63, 42, 20]).reshape(3, 1, 1) / 255
    cover = (muddy - images) / (mud - images)
    assert np.ptp(cover, axis=1).max() < 1e-9, "one cover for all channels"
    assert ((np.abs(cover) < 1e-9) | ((cover >= 0.8 - 1e-9) & (cover <= 1 + 1e-9))).all()
    assert 0.01 < (cover[:, 0] > 0.5).mean() < 0.5
    wet = spatter(images, 0.65, 0.3, 1, 0.69, 0.5, 0, draws=draws(4), scale=1.0) - images
    np.testing.assert_allclose(wet[:, 1], wet[:, 2], atol=1e-12)
    np.testing.assert_allclose(wet[:, 0] * 238 / 175, wet[:, 1], atol=1e-12)
    assert wet.min() >= 0
    assert wet.max() == pytest.approx(0.5 * 238 / 255)


def test_equalising_gives_every_level_its_rank():
    levels = np.array([[0, 0, 3], [7, 7, 7.0]])
    np.testing.assert_array_equal(_equalised(levels), [[0, 0, 64], [255, 255, 255]])  # 255 / 4 = 63.75
    np.testing.assert_array_equal(_equalised(np.full((2, 2), 5.0)), np.zeros((2, 2)))


# --- digital


@pytest.mark.parametrize("of", ["saturation", "hsv"])
@pytest.mark.parametrize(("factor", "addend"), [(0.3, 0), (2, 0.1), (20, 0.2)])
def test_saturating_is_done_in_hsv(of, factor, addend):
    image = np.random.default_rng(0).integers(0, 5, size=(1, 3, 8, 8)) / 4  # many ties, black, white and grey
    found = digital.saturate(image, factor, addend, of=of)
    for row in range(8):
        for column in range(8):
            hsv = list(colorsys.rgb_to_hsv(*image[0, :, row, column]))
            chosen = (0, 1, 2) if of == "hsv" else (1,)
            for part in chosen:
                hsv[part] = min(max(hsv[part] * factor + addend, 0), 1)
            np.testing.assert_allclose(found[0, :, row, column], colorsys.hsv_to_rgb(*hsv), atol=1e-12)


@pytest.mark.parametrize(("of", "weights"), [("saturation", [0.299, 0.587, 0.114]), ("hsv", [0.2125, 0.7154, 0.0721])])
def test_a_grey_image_saturates_as_equal_channels(of, weights):
    grey = natural(1, (1, 8, 8))
    colour = digital.saturate(np.repeat(grey, 3, axis=1), 2, 0.1, of=of)
    found = digital.saturate(grey, 2, 0.1, of=of)
    np.testing.assert_allclose(found[0, 0], np.tensordot(weights, colour[0], 1), atol=1e-12)


@pytest.mark.parametrize(("border", "modes"), [(("mirror", "reflect"), ("mirror", "reflect"))])
def test_elastic_is_an_affine_map_and_a_smooth_displacement(border, modes):
    image = natural(1, (2, 32, 32))
    strength, sigma, slant = 0.08, 0.06, 0.06
    found = digital.elastic_transform(image, strength, sigma, slant, draws=draws(1), border=border, reference=32)
    stream = draws(1)
    points = np.array([[26.0, 26], [26, 6], [6, 6]])  # the middle 16 and a third of the side, as (x, y)
    targets = points + slant * 32 * (2 * stream.uniform(3, 2)[0] - 1)
    matrix = np.linalg.solve(np.column_stack([points, np.ones(3)]), targets).T  # (x', y') of (x, y, 1)
    y, x = np.indices((32, 32))
    backward = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    xs = backward[0, 0] * x + backward[0, 1] * y + backward[0, 2]
    ys = backward[1, 0] * x + backward[1, 1] * y + backward[1, 2]
    dx, dy = (
        ndimage.gaussian_filter(rough, sigma * 32, mode="reflect", truncate=3) * strength * 32
        for rough in 2 * stream.uniform(2, 32, 32)[0] - 1
    )
    for channel, result in zip(image[0], found[0], strict=True):
        bent = ndimage.map_coordinates(channel, [ys, xs], order=1, mode=modes[0])
        expected = ndimage.map_coordinates(bent, [y + dy, x + dx], order=1, mode=modes[1])
        np.testing.assert_allclose(result, expected, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixelate_is_what_pillow_makes_of_the_very_bytes(channels):
    raster = (natural(1, (channels, 32, 32)) * 255).astype(np.uint8)
    picture = Image.fromarray(raster[0, 0] if channels == 1 else np.ascontiguousarray(raster[0].transpose(1, 2, 0)))
    expected = np.asarray(picture.resize((24, 24), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX))
    for factor, scale in ((0.75, 1.0), (0.75, 0.5), (1.5, 2.0)):
        found = digital.pixelate(raster / 255, factor, scale=scale)[0] * 255
        np.testing.assert_allclose(found.transpose(1, 2, 0), expected.reshape(32, 32, channels), atol=1e-9)


def test_quantize_and_inverse_are_their_formulas():
    levels = np.arange(256).reshape(1, 1, 16, 16) / 255
    assert len(np.unique(digital.quantize(levels, 3).round(9))) == 8
    assert np.abs(digital.quantize(levels, 3) - levels).max() <= 1 / 14 + 1e-12
    np.testing.assert_array_equal(digital.inverse(levels), 1 - levels)


# --- the shapes of MNIST-C


def _warp(image: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """scipy's affine map about the middle; the matrix is for (x, y), scipy's for (y, x)."""
    swapped = np.array(matrix)[::-1, ::-1]
    offset = np.full(2, 13.5) - swapped @ np.full(2, 13.5)
    return ndimage.affine_transform(image, swapped, offset, order=1, mode="grid-constant")


def test_warps_equal_scipys_affine_map_to_either_side():
    images = natural(12, (1, 28, 28))
    for name, angle in (("shear", 0.4), ("rotate", 0.4)):
        found = getattr(shapes, name)(images, angle, draws=draws(12, name))
        sides = []
        for image, result in zip(images, found, strict=True):
            both = []
            for sign in (-1, 1):
                c, s = math.cos(sign * angle), math.sin(sign * angle)
                both.append(_warp(image[0], [[1, -s], [0, c]] if name == "shear" else [[c, -s], [s, c]]))
            near = [np.abs(result[0] - one).max() < 1e-12 for one in both]
            assert sum(near) == 1
            sides.append(near[0])
        assert 0 < sum(sides) < 12, "both sides must occur"
    np.testing.assert_allclose(
        shapes.scale(images, 1 / 0.7)[0, 0], _warp(images[0, 0], [[1 / 0.7, 0], [0, 1 / 0.7]]), atol=1e-12
    )


def test_translating_moves_along_both_axes_and_leaves_black_behind():
    images = natural(12, (1, 28, 28)) + 0.1
    moved = shapes.translate(images, 3, draws=draws(12))
    seen = set()
    for image, result in zip(images[:, 0], moved[:, 0], strict=True):
        for dy in (-3, 3):
            for dx in (-3, 3):
                expected = ndimage.shift(image, (dy, dx), order=1, mode="constant")
                if np.allclose(result, expected):
                    seen.add((dy, dx))
        assert (result == 0).sum() == 28 * 28 - 25 * 25
    assert len(seen) == 4


def test_a_stroke_fades_with_the_logarithm_of_its_vertical_distance():
    painted = shapes.stroke(0, 10, 27, 10)
    for row in range(28):
        distance = min(abs(row - 10), 2.2999999)
        assert painted[row, 5] == pytest.approx(max(math.log(1 - distance / 2.3) + 1, 0), abs=1e-6)
    assert (painted[:, 27:] == 0).all()
    assert (shapes.stroke(5, 1, 9, 7)[:, [0, 4, 9, 20]] == 0).all()
    assert (shapes.stroke(5, 1, 5, 7) == 0).all()


def test_dots_leave_out_every_other_pair_of_columns():
    black = np.zeros((6, 1, 28, 28))
    dotted = shapes.dotted_line(black, draws=draws(6))[:, 0]
    inked = dotted.max(axis=1) > 0
    assert not inked[:, np.arange(28) % 4 < 2].any()
    assert inked[:, 2:27][:, (np.arange(2, 27) % 4) >= 2].all()
    straight = shapes.line(black, draws=draws(6))[:, 0].max(axis=1) > 0
    assert straight[:, 5:22].all()


def test_a_zigzag_runs_up_and_down_across_the_digit():
    drawn = shapes.zigzag(np.zeros((20, 1, 28, 28)), draws=draws(20))[:, 0]
    rows = np.where(drawn.max(axis=1) > 0.5, drawn.argmax(axis=1), -1)
    # A zigzag near the edge may leave the image; one in the middle turns several times.
    middle = [row[4:23] for row in rows if (row[4:23] > 0).all()]
    assert middle
    for row in middle:
        steps = np.sign(np.diff(row))
        assert (np.diff(steps[steps != 0]) != 0).sum() >= 3
    assert (drawn[:, :, :2] == 0).all()


def test_stripes_invert_the_outer_quarters():
    image = natural(1, (1, 28, 28))
    striped = shapes.stripe(image)
    outer = (np.arange(28) < 7) | (np.arange(28) >= 21)
    np.testing.assert_array_equal(striped[..., outer], 1 - image[..., outer])
    np.testing.assert_array_equal(striped[..., ~outer], image[..., ~outer])


def test_edges_of_a_square_are_one_closed_line_around_it():
    plane = np.zeros((28, 28))
    plane[8:20, 8:20] = 1
    found = edges.canny(plane, sigma=1.0, low=0.1, high=0.2)
    inside, outside = np.zeros_like(found), np.zeros_like(found)
    inside[10:18, 10:18] = outside[6:22, 6:22] = True
    assert not found[inside].any()
    assert not found[~outside].any()
    holes, count = ndimage.label(~found)
    assert count == 2, "the line closes"
    assert holes[0, 0] != holes[14, 14]
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(edges.canny(np.rot90(plane), sigma=1.0, low=0.1, high=0.2), np.rot90(found))


def test_weak_edges_count_only_where_they_touch_a_strong_one():
    weak = np.zeros((28, 28))
    weak[:, 6:] = 0.03
    assert not edges.canny(weak, sigma=1.0, low=0.05, high=0.2).any()
    assert edges.canny(weak, sigma=1.0, low=0.05, high=0.06)[4, 4:8].any()
    growing = np.zeros((28, 28))
    growing[:, 6:] = np.linspace(0.03, 0.1, 28)[:, None]  # the same step, strong enough at its lower end
    assert edges.canny(growing, sigma=1.0, low=0.05, high=0.2)[4, 4:8].any()
    assert not edges.canny(growing, sigma=1.0, low=0.05, high=0.5).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_a_ridge_is_never_below_the_low_threshold(seed):
    plane = natural(1, (1, 20, 20), seed=seed)[0, 0]
    down, right = ndimage.sobel(plane, axis=0), ndimage.sobel(plane, axis=1)
    strength = np.hypot(down, right)
    found = edges.linked(down, right, strength, low=0.3, high=0.6)
    assert (strength[found] >= 0.3).all()
    groups, count = ndimage.label(found, structure=np.ones((3, 3)))
    assert all(strength[groups == one].max() >= 0.6 for one in range(1, count + 1))
