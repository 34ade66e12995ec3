"""The corruptions keep to CIFAR-10-C's table and formulas, and depend on nothing but image, severity and seed."""

from __future__ import annotations

import colorsys
import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from scipy.ndimage import gaussian_filter

from robustboard.bench.corruptions import CORRUPTIONS, NAMES, SEVERITIES, Draws, corrupt, spatial_scale
from robustboard.errors import DataError

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 64, 48)]

# make_cifar_c.py of the authors' repository, as in the reference table of the specification.
CIFAR_10_C = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "jpeg_compression": (80, 65, 58, 50, 40),
}

# Of the smooth colour image below at severity 3: a change here is a change of every corrupted score ever published.
GOLDEN = {
    "gaussian_noise": "906007b615ed1bf7",
    "gaussian_blur": "a0345ac66b94ac76",
    "contrast": "43d266ec01142a7c",
    "brightness": "4a3666cca1fcb590",
    "jpeg_compression": "daed95e2ebd47746",
}
GOLDEN_JPEG_LIBRARY = "6.2"


def natural(n: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth images with texture, (n, *shape), uint8."""
    rng = np.random.default_rng(seed)
    coarse = gaussian_filter(rng.normal(size=(n, *shape)), (0, 0, 2, 2)) * 4 + rng.normal(size=(n, *shape)) * 0.1
    return (255 / (1 + np.exp(-coarse))).astype(np.uint8)


def keys(n: int) -> list[str]:
    return [f"{i:064x}" for i in range(n)]


def test_severities_are_those_of_the_cifar_10_c_generator():
    assert {name: known.parameters for name, known in CORRUPTIONS.items()} == CIFAR_10_C


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name, shape):
    """A shard, a resumed run or another order must not move a pixel."""
    images, names = natural(5, shape), keys(5)
    whole = corrupt(images, corruption=name, severity=4, keys=names, seed=3)
    order = [3, 0, 4]
    part = corrupt(images[order], corruption=name, severity=4, keys=[names[i] for i in order], seed=3)
    assert whole.dtype == np.uint8
    assert whole.shape == images.shape
    np.testing.assert_array_equal(whole[order], part)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_higher_severity_takes_an_image_further_away(name, shape):
    images = natural(40, shape)
    distances = [
        np.abs(corrupt(images, corruption=name, severity=s, keys=keys(40), seed=0).astype(float) - images).mean()
        for s in SEVERITIES
    ]
    assert distances == sorted(distances)
    assert distances[-1] > distances[0]
    assert distances[-1] > 1, "the highest severity must be visible at every size"


def test_noise_has_the_promised_spread_and_is_drawn_afresh_for_each_word():
    images = np.full((20, 3, 32, 32), 0.5, dtype=np.float32)
    for severity, sigma in zip(SEVERITIES, CIFAR_10_C["gaussian_noise"], strict=True):
        noise = corrupt(images, corruption="gaussian_noise", severity=severity, keys=keys(20), seed=0) - images
        assert abs(noise.std() / sigma - 1) < 0.01
        assert abs(noise.mean()) < 0.02 * sigma
    one = {"corruption": "gaussian_noise", "severity": 1, "keys": keys(20), "seed": 0}
    base = corrupt(images, **one)
    assert not np.allclose(base[0], base[1])
    for other in ({"severity": 2}, {"seed": 1}, {"keys": keys(21)[1:]}):
        again = corrupt(images, **(one | other))
        # Not merely rescaled: the draws themselves are others.
        assert abs(np.corrcoef((base - images)[0].ravel(), (again - images)[0].ravel())[0, 1]) < 0.1


def test_brightness_raises_v_of_hsv():
    image = natural(1, (3, 8, 8))
    image[0, :, 0, 0] = 0
    image[0, :, 0, 1] = 255
    out = corrupt(image, corruption="brightness", severity=5, keys=keys(1), seed=0)[0].astype(int)
    for row in range(8):
        for column in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[0, :, row, column] / 255))
            expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))) * 255
            assert np.abs(out[:, row, column] - np.floor(expected)).max() <= 1


def test_grey_brightness_is_adding():
    image = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    out = corrupt(image, corruption="brightness", severity=3, keys=keys(1), seed=0)
    np.testing.assert_array_equal(out, (np.clip(image / 255.0 + 0.15, 0, 1) * 255).astype(np.uint8))


def test_blur_equals_the_original_formula_at_side_32_and_scales_with_the_side():
    image = natural(1, (3, 32, 32))
    for severity, sigma in zip(SEVERITIES, CIFAR_10_C["gaussian_blur"], strict=True):
        out = corrupt(image, corruption="gaussian_blur", severity=severity, keys=keys(1), seed=0)
        expected = gaussian_filter(image[0] / 255.0, (0, sigma, sigma), mode="nearest", truncate=4.0)
        np.testing.assert_array_equal(out[0], (np.clip(expected, 0, 1) * 255).astype(np.uint8))
    assert [spatial_scale(np.zeros((1, s, s))) for s in (8, 16, 28, 32, 64)] == [0.5, 0.5, 0.875, 1.0, 2.0]


def test_contrast_equals_the_original_formula():
    image = natural(1, (3, 32, 32))
    x = image[0].transpose(1, 2, 0) / 255.0
    means = np.mean(x, axis=(0, 1), keepdims=True)
    expected = np.uint8(np.clip((x - means) * 0.4 + means, 0, 1) * 255)
    out = corrupt(image, corruption="contrast", severity=3, keys=keys(1), seed=0)
    assert np.abs(out[0].transpose(1, 2, 0).astype(int) - expected).max() <= 1  # sums in another order may round apart


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_jpeg_is_what_pillow_makes_of_the_very_bytes(shape):
    image = natural(1, shape)
    picture = Image.fromarray(image[0, 0] if shape[0] == 1 else image[0].transpose(1, 2, 0))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=50)
    expected = np.asarray(Image.open(stream)).reshape(shape[1], shape[2], shape[0]).transpose(2, 0, 1)
    out = corrupt(image, corruption="jpeg_compression", severity=4, keys=keys(1), seed=0)
    np.testing.assert_array_equal(out[0], expected)


def test_uint8_is_truncated_and_unchanged_pixels_survive_the_round_trip():
    """The originals truncate; 255 divided and multiplied again must still be 255."""
    image = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(((image / 255.0) * 255).astype(np.uint8), image)
    flat = np.full((1, 1, 8, 8), 10, dtype=np.uint8)
    out = corrupt(flat, corruption="brightness", severity=1, keys=keys(1), seed=0)
    assert out[0, 0, 0, 0] == 22  # 10 + 12.75 = 22.75, cut


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(0, 2**31 - 1), st.sampled_from(SHAPES))
def test_float_images_stay_float_and_in_the_box(name, severity, seed, shape):
    images = natural(2, shape, seed=seed % 100) / np.float32(255)
    out = corrupt(images, corruption=name, severity=severity, keys=keys(2), seed=seed)
    assert out.dtype == np.float32
    assert out.min() >= 0
    assert out.max() <= 1
    if name != "jpeg_compression":
        bytes_out = corrupt(
            np.rint(images * 255).astype(np.uint8), corruption=name, severity=severity, keys=keys(2), seed=seed
        )
        assert np.abs(out * 255 - bytes_out).max() <= 1 + 1e-3, "the two paths differ only by truncation"


def test_the_input_is_left_alone():
    images = natural(2, (3, 32, 32))
    before = images.copy()
    for name in NAMES:
        corrupt(images, corruption=name, severity=5, keys=keys(2), seed=0)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("name", NAMES)
def test_golden_pixels(name):
    """Frozen tracks stay frozen: no numpy, scipy or Pillow upgrade may move a corrupted pixel unseen."""
    if name == "jpeg_compression" and features.version("jpg") != GOLDEN_JPEG_LIBRARY:
        pytest.skip(f"the golden JPEG pixels are of libjpeg-turbo {GOLDEN_JPEG_LIBRARY}")
    ramp = np.add.outer(np.arange(32) * 5, np.arange(32) * 3)
    image = np.stack([ramp, ramp[::-1], 255 - ramp]).astype(np.uint8)[None]
    out = corrupt(image, corruption=name, severity=3, keys=["ab" * 32], seed=0)
    assert hashlib.sha256(out.tobytes()).hexdigest()[:16] == GOLDEN[name]


def test_draws_are_uniform_and_open():
    drawn = Draws(0, "test").uniform((100_000,))
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.005


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corruption": "fogg"}, "known are gaussian_noise"),
        ({"severity": 0}, "1 to 5"),
        ({"severity": 6}, "1 to 5"),
        ({"images": np.zeros((1, 1, 8, 8))}, "float64"),
        ({"images": np.zeros((1, 2, 8, 8), dtype=np.uint8), "corruption": "jpeg_compression"}, "1 or 3 channels"),
    ],
)
def test_misuse_is_one_sentence(change, says):
    arguments = {
        "images": np.zeros((1, 1, 8, 8), dtype=np.uint8), "corruption": "contrast", "severity": 1, "keys": keys(1),
        "seed": 0,
    }  # fmt: skip
    arguments |= change
    with pytest.raises(DataError, match=says):
        corrupt(arguments.pop("images"), **arguments)
