"""The corruptions keep to the published tables and formulas, and depend on nothing but image, severity and seed."""

from __future__ import annotations

import colorsys
import hashlib
import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression

from robustboard.bench.corruptions import FIRST_FIVE, SETS, SEVERITIES, Quirks, corrupt
from robustboard.bench.datasets import load_dataset
from robustboard.errors import DataError

CIFAR, MNIST = SETS["cifar10-c-style"], SETS["mnist-c-style"]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 64, 48)]

# make_cifar_c.py of the authors' repository, as in the reference table of the specification.
CIFAR_10_C = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}  # fmt: skip

# corruptions.py of the authors' repository, with the severity that is each function's default.
MNIST_C = {
    "shot_noise": (5, (60, 25, 12, 5, 3)),
    "impulse_noise": (4, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "glass_blur": (1, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (1, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "shear": (2, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "scale": (3, (1 / 0.9, 1 / 0.8, 1 / 0.7, 1 / 0.6, 1 / 0.5)),
    "rotate": (2, (0.2, 0.4, 0.6, 0.8, 1.0)),
    "brightness": (5, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "translate": (3, (1, 2, 3, 4, 5)),
    "stripe": (1, ((),)),
    "fog": (5, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "spatter": (
        4,
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    "dotted_line": (1, ((),)),
    "zigzag": (1, ((),)),
    "canny_edges": (1, ((),)),
    "gaussian_noise": (5, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "speckle_noise": (5, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (2, (1, 2, 3, 4, 6)),
    "defocus_blur": (1, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "zoom_blur": (5, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        5,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (5, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "contrast": (4, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (5, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    "jpeg_compression": (5, (25, 18, 15, 10, 7)),
    "pixelate": (3, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "elastic_transform": (
        1,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "quantize": (5, (5, 4, 3, 2, 1)),
    "line": (1, ((),)),
    "inverse": (1, ((),)),
}  # fmt: skip

# Of the image below at severity 3 (MNIST-C's: at the fixed one): a change here is a change of every corrupted score
# ever published.
GOLDEN = {
    "gaussian_noise": "906007b615ed1bf7",
    "shot_noise": "ce92d69b934f137f",
    "impulse_noise": "68ac2192e514cbac",
    "defocus_blur": "82f18517cff2373c",
    "glass_blur": "a8478ff632e2dbed",
    "motion_blur": "cf4ed45a7fda2fc5",
    "zoom_blur": "c8832e65dd213c05",
    "snow": "76c6f144b5dc0ee0",
    "frost": "8ed83fd94b9dc398",
    "fog": "7077c5113970f326",
    "brightness": "4a3666cca1fcb590",
    "contrast": "43d266ec01142a7c",
    "elastic_transform": "bb3400b15b7aa265",
    "pixelate": "2209224de789ef17",
    "jpeg_compression": "daed95e2ebd47746",
    "speckle_noise": "520cfea7f0539345",
    "gaussian_blur": "a0345ac66b94ac76",
    "spatter": "4e501c5cd9b0d0da",
    "saturate": "5dc774f9039cb745",
}
GOLDEN_MNIST = {
    "shot_noise": "b6c4a66c27992201",
    "impulse_noise": "d90fab9e48e93573",
    "glass_blur": "f7b33d0c596b2c6e",
    "motion_blur": "f40949fc288750bf",
    "shear": "f6b1fb78872f4bf1",
    "scale": "02ed483785f0a0ea",
    "rotate": "a187c9a2df262dc7",
    "brightness": "3705274b267598e3",
    "translate": "e706a3af7f12a6c0",
    "stripe": "fa773c8be574d1d8",
    "fog": "54ca2f8cbc85af50",
    "spatter": "47c8a043cda3072f",
    "dotted_line": "ba0634c9e364c3b7",
    "zigzag": "542b7cac0a4c8f2e",
    "canny_edges": "0c37ddc45244523c",
    "gaussian_noise": "859a121eecfc34f7",
    "speckle_noise": "92090230919911c3",
    "gaussian_blur": "bba0ee2941c64bd9",
    "defocus_blur": "084888a4abc1188a",
    "zoom_blur": "3806421ab53b97ff",
    "snow": "440162ed5e2633d2",
    "frost": "3218fbd8750d54ba",
    "contrast": "288be7550299e19e",
    "saturate": "ad029ab731abe230",
    "jpeg_compression": "43573384e1b74568",
    "pixelate": "aefae5f5bd37c203",
    "elastic_transform": "5acd2bcea2f61fb8",
    "quantize": "7caee3033f9120b6",
    "line": "01a759bfe9a1a14e",
    "inverse": "9915044429aa5546",
}
GOLDEN_JPEG_LIBRARY = "6.2"


def natural(n: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth images with texture, (n, *shape), uint8."""
    rng = np.random.default_rng(seed)
    coarse = gaussian_filter(rng.normal(size=(n, *shape)), (0, 0, 2, 2)) * 4 + rng.normal(size=(n, *shape)) * 0.1
    return (255 / (1 + np.exp(-coarse))).astype(np.uint8)


def keys(n: int) -> list[str]:
    return [f"{i:064x}" for i in range(n)]


def spoiled(images: np.ndarray, name: str, severity: int, **changes: object) -> np.ndarray:
    """Corrupted with keys 0, 1, ... and seed 0, unless `changes` says otherwise."""
    arguments = {"keys": keys(len(images)), "seed": 0} | changes
    return corrupt(images, corruption=name, severity=severity, **arguments)


def as_tuples(parameters: tuple) -> tuple:
    return tuple(one if isinstance(one, tuple) else (one,) for one in parameters)


def test_severities_are_those_of_the_cifar_10_c_generator():
    found = {name: known.parameters for name, known in CIFAR.corruptions.items()}
    assert found == {name: as_tuples(parameters) for name, parameters in CIFAR_10_C.items()}
    assert list(found) == list(CIFAR_10_C), "the fifteen of the paper come first, in its order"


def test_severities_are_those_of_the_mnist_c_generator():
    found = {name: (known.fixed, known.parameters) for name, known in MNIST.corruptions.items()}
    assert found == {name: (fixed, as_tuples(parameters)) for name, (fixed, parameters) in MNIST_C.items()}
    assert list(found)[:15] == list(MNIST_C)[:15], "the fifteen of the benchmark come first, in its order"


def conditions(suite: str) -> list[tuple[str, int]]:
    known = SETS[suite].corruptions
    return [(name, severity) for name in known for severity in range(1, len(known[name].parameters) + 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CIFAR.names)
def test_an_image_does_not_depend_on_its_batch(name, shape):
    """A shard, a resumed run or another order must not move a pixel."""
    images = natural(5, shape)
    whole = spoiled(images, name, 4, seed=3)
    order = [3, 0, 4]
    part = spoiled(images[order], name, 4, keys=[keys(5)[i] for i in order], seed=3)
    assert whole.dtype == np.uint8
    assert whole.shape == images.shape
    np.testing.assert_array_equal(whole[order], part)


@pytest.mark.parametrize("name", MNIST.names)
def test_an_image_of_the_mnist_set_does_not_depend_on_its_batch(name):
    images = natural(5, (1, 28, 28))
    fixed = MNIST.corruptions[name].fixed
    whole = spoiled(images, name, fixed, family="mnist-c-style")
    for place in range(5):
        alone = spoiled(images[place : place + 1], name, fixed, keys=keys(5)[place:][:1], family="mnist-c-style")
        np.testing.assert_array_equal(whole[place : place + 1], alone)


def test_more_images_than_are_worked_on_at_a_time_are_the_same_images():
    images = natural(200, (1, 8, 8))
    for name in CIFAR.names:
        whole = spoiled(images, name, 5)
        for batch in (1, 7) if name in ("snow", "contrast") else (93,):
            parts = [
                spoiled(images[begin : begin + batch], name, 5, keys=keys(200)[begin : begin + batch])
                for begin in range(0, 200, batch)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


STEADY = (
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "motion_blur",
    "zoom_blur", "fog", "brightness", "contrast", "jpeg_compression", "pixelate",
)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 64, 48)])
@pytest.mark.parametrize("name", STEADY)
def test_a_higher_severity_takes_an_image_further_away(name, shape):
    """Where one number grows; elsewhere a table trades one parameter against another, or turns to another liquid."""
    images = natural(12, shape)
    distances = [np.abs(spoiled(images, name, s).astype(float) - images).mean() for s in SEVERITIES]
    # Means of random draws, and pixels of 28 or 32 that a factor divides or not, may differ a little.
    assert all(later > 0.93 * sooner for sooner, later in itertools.pairwise(distances))
    assert distances[-1] > distances[0]


# A grey image has no saturation to change.
SEEN = [
    (name, shape)
    for name in CIFAR.names
    for shape in [*SHAPES, (3, 224, 224)]
    if not (name == "saturate" and shape[0] == 1)
]


@pytest.mark.parametrize(("name", "shape"), SEEN)
def test_the_highest_severity_is_visible_at_every_size(name, shape):
    images = natural(1 if shape[1] == 224 else 20, shape)
    assert np.abs(spoiled(images, name, 5).astype(float) - images).mean() > 1


def test_severity_hurts_on_average():
    """A linear classifier of the digits is right less and less often, over all corruptions together."""
    data = load_dataset("digits")
    model = LogisticRegression(max_iter=2000).fit(data.train.images.reshape(-1, 64) / 255, data.train.labels)

    def accuracy(images: np.ndarray) -> float:
        return float(model.score(images.reshape(-1, 64) / 255, data.test.labels))

    clean = accuracy(data.test.images)
    means = [
        np.mean([accuracy(spoiled(data.test.images, name, s, keys=data.test.hashes)) for name in CIFAR.names])
        for s in SEVERITIES
    ]
    assert [clean, *means] == sorted([clean, *means], reverse=True)
    assert clean - means[0] > 0.01
    assert means[0] - means[-1] > 0.1


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
    for side, scale in ((8, 0.5), (16, 0.5), (28, 0.875), (64, 2.0)):
        image = natural(1, (1, side, side))
        expected = gaussian_filter(image[0] / 255.0, (0, scale, scale), mode="nearest", truncate=4.0)
        np.testing.assert_array_equal(spoiled(image, "gaussian_blur", 5)[0], (expected * 255).astype(np.uint8))


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


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CIFAR.names), st.integers(1, 5), st.integers(0, 2**31 - 1), st.sampled_from(SHAPES))
def test_float_images_stay_float_and_in_the_box(name, severity, seed, shape):
    images = natural(2, shape, seed=seed % 100) / np.float32(255)
    out = spoiled(images, name, severity, seed=seed)
    assert out.dtype == np.float32
    assert out.min() >= 0
    assert out.max() <= 1
    if name not in ("jpeg_compression", "pixelate"):
        bytes_out = spoiled(np.rint(images * 255).astype(np.uint8), name, severity, seed=seed)
        # Glass blur and spatter cut levels in between, where the last bit of a float may tip a whole one.
        apart = np.abs(out * 255 - bytes_out) > 1 + 1e-3
        assert apart.mean() <= (0.02 if name in ("glass_blur", "spatter", "shot_noise") else 0), "but for truncation"


def test_the_input_is_left_alone():
    images = natural(2, (3, 32, 32))
    before = images.copy()
    for name in CIFAR.names:
        spoiled(images, name, 5)
    for name in MNIST.names:
        spoiled(images[:, :1, :28, :28].copy(), name, MNIST.corruptions[name].fixed, family="mnist-c-style")
    np.testing.assert_array_equal(images, before)


def ramps(channels: int, side: int) -> np.ndarray:
    ramp = np.add.outer(np.arange(side) * 5, np.arange(side) * 3)
    return np.stack([ramp, ramp[::-1], 255 - ramp])[:channels].astype(np.uint8)[None]


@pytest.mark.parametrize("name", CIFAR.names)
def test_golden_pixels(name):
    """Frozen tracks stay frozen: no numpy, scipy or Pillow upgrade may move a corrupted pixel unseen."""
    if name == "jpeg_compression" and features.version("jpg") != GOLDEN_JPEG_LIBRARY:
        pytest.skip(f"the golden JPEG pixels are of libjpeg-turbo {GOLDEN_JPEG_LIBRARY}")
    out = spoiled(ramps(3, 32), name, 3, keys=["ab" * 32])
    assert hashlib.sha256(out.tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", MNIST.names)
def test_golden_pixels_of_the_mnist_set(name):
    if name == "jpeg_compression" and features.version("jpg") != GOLDEN_JPEG_LIBRARY:
        pytest.skip(f"the golden JPEG pixels are of libjpeg-turbo {GOLDEN_JPEG_LIBRARY}")
    severity = MNIST.corruptions[name].fixed
    out = spoiled(ramps(1, 28), name, severity, keys=["ab" * 32], family="mnist-c-style")
    assert hashlib.sha256(out.tobytes()).hexdigest()[:16] == GOLDEN_MNIST[name]


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"]
)
def test_a_flat_image_stays_as_it_is(name):
    """A mean of equal levels is that level, though a sum of weights may end just below one on some machine."""
    flat = np.repeat(np.arange(1, 256, 23, dtype=np.uint8), 3 * 16 * 16).reshape(-1, 3, 16, 16)
    for severity in SEVERITIES:
        np.testing.assert_array_equal(spoiled(flat, name, severity), flat)


# --- the oddities of the originals, each a named option


def test_rounding_to_the_nearest_is_half_a_level_brighter_on_average():
    images = natural(10, (3, 32, 32))
    cut = spoiled(images, "gaussian_blur", 3).astype(float)
    near = spoiled(images, "gaussian_blur", 3, quirks=Quirks(rounding="nearest")).astype(float)
    assert set(np.unique(near - cut)) == {0.0, 1.0}
    assert abs((near - cut).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("name", "severity", "family", "quirk"),
    [
        ("glass_blur", 5, "cifar10-c-style", {"glass": "swap"}),
        ("glass_blur", 1, "mnist-c-style", {"glass": "duplicate"}),
        ("zoom_blur", 1, "cifar10-c-style", {"zoom": "excluded"}),
        ("spatter", 2, "mnist-c-style", {"spatter": "table"}),
    ],
)
def test_each_quirk_changes_its_own_corruption_alone(name, severity, family, quirk):
    images = natural(3, (1, 28, 28))
    quirks = Quirks(**quirk)
    changed = spoiled(images, name, severity, family=family, quirks=quirks)
    assert not np.array_equal(changed, spoiled(images, name, severity, family=family))
    for other, known in SETS[family].corruptions.items():
        if other != name:
            same = spoiled(images, other, known.fixed, family=family, quirks=quirks)
            np.testing.assert_array_equal(same, spoiled(images, other, known.fixed, family=family))


@pytest.mark.parametrize(("name", "family"), [("glass_blur", "cifar10-c-style"), ("glass_blur", "mnist-c-style")])
def test_the_default_glass_is_that_of_each_generator(name, family):
    images = natural(3, (1, 28, 28))
    own = "duplicate" if family == "cifar10-c-style" else "swap"
    np.testing.assert_array_equal(
        spoiled(images, name, 2, family=family), spoiled(images, name, 2, family=family, quirks=Quirks(glass=own))
    )


def test_the_first_five_are_of_the_set():
    assert set(FIRST_FIVE) <= set(CIFAR.names)
    assert len(FIRST_FIVE) == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corruption": "fogg"}, "known are gaussian_noise"),
        ({"severity": 0}, "1 to 5"),
        ({"severity": 6}, "1 to 5"),
        ({"images": np.zeros((1, 1, 8, 8))}, "float64"),
        ({"images": np.zeros((1, 2, 8, 8), dtype=np.uint8), "corruption": "jpeg_compression"}, "1 or 3 channels"),
        ({"images": np.zeros((1, 4, 8, 8), dtype=np.uint8), "corruption": "snow"}, "1 or 3 channels, not 4"),
        ({"images": np.zeros((1, 1, 4, 9), dtype=np.uint8), "corruption": "fog"}, "at least 8 x 8 pixels, not 4 x 9"),
        ({"family": "mnist-c-style"}, r"shape \(1, 28, 28\), not \(1, 8, 8\); use cifar10-c-style"),
        ({"family": "mnist-c-style", "corruption": "stripe", "severity": 2}, "severity of stripe must be 1, not 2"),
        ({"family": "cifar10-c"}, "not one that is made here; those are cifar10-c-style, mnist-c-style"),
        ({"keys": []}, "1 images to corrupt but 0 keys"),
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
