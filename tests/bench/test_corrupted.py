"""The corruption stages on a linear network: whether an image in a ball is misclassified is a formula there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import robustboard
from robustboard.bench import cli, operations
from robustboard.bench.arrays import as_floats
from robustboard.bench.contact_sheet import contact_sheet
from robustboard.bench.corrupted import made
from robustboard.bench.corruptions import SETS, corrupt
from robustboard.bench.datasets import from_arrays, load_dataset
from robustboard.bench.protocol import resolve, select, track_from
from robustboard.errors import DataError, GateError

LIGHT = {"pgd": {"steps": 20, "restarts": 1, "step": "1/4", "losses": ["margin"]}}


class Linear(nn.Module):
    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0])
        self.layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})

    def forward(self, x):
        return self.layer(x.flatten(1))

    def holds(self, images: np.ndarray, labels: np.ndarray, eps: float) -> np.ndarray:
        """By how much the label leads at worst in the ball of `eps` within [0, 1]: below 0 is misclassified, (N,)."""
        weight, bias = (part.detach().double().numpy() for part in self.layer.parameters())
        x = images.reshape(len(images), -1).astype(float)
        worst = np.full(len(x), np.inf)
        for other in range(len(weight)):
            slope = weight[labels] - weight[other]
            down, up = np.maximum(-eps, -x), np.minimum(eps, 1 - x)
            lead = (slope * x + np.minimum(slope * down, slope * up)).sum(axis=1) + bias[labels] - bias[other]
            worst = np.where(labels == other, worst, np.minimum(worst, lead))
        return worst


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def linear(digits):
    fitted = LogisticRegression(max_iter=300, C=0.1).fit(
        as_floats(digits.train.images).reshape(-1, 64), digits.train.labels
    )
    return Linear(fitted.coef_.astype(np.float32), fitted.intercept_.astype(np.float32))


def _track(n: int = 40, **changes):
    corruptions = {
        "set": "cifar10-c-style",
        "names": ["gaussian_noise", "glass_blur", "fog", "contrast"],
        "severities": [1, 4],
        "robust": {"examples": 25, "names": ["contrast", "gaussian_noise"], "severity": 4, "seed": 0},
    }
    content = {
        "id": "stages@1", "dataset": "arrays", "threat": {"norm": "linf", "eps": "1/40"}, "n": n, "attacks": LIGHT,
        "bounds": {"methods": ["crown"]}, "audit": {"certified_sample": 0, "smallest_margins": 0},
        "corruptions": corruptions, **changes,
    }  # fmt: skip
    return track_from(content)


def _score(linear, data, track):
    return robustboard.score(linear, track=track, data=data)


@pytest.fixture(scope="module")
def data(digits):
    return digits.test.images[:40], digits.test.labels[:40]


@pytest.fixture(scope="module")
def record(linear, data):
    return _score(linear, data, _track())


def _corrupted(outcomes: pd.DataFrame, data, name: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """The corrupted images and labels in the rows' order."""
    images = data[0][outcomes["index"]]
    keys = list(outcomes["example"])
    return corrupt(images, corruption=name, severity=severity, keys=keys, seed=0), outcomes["label"].to_numpy()


def test_accuracy_is_that_of_the_corrupted_pixels(record, linear, data):
    for name, severity in _track().corruptions.conditions:
        images, labels = _corrupted(record.outcomes, data, name, severity)
        expected = linear(torch.from_numpy(as_floats(images))).argmax(1).numpy() == labels
        np.testing.assert_array_equal(record.outcomes[f"corruption/{name}/{severity}"], expected)


def test_robust_means_that_no_image_in_the_ball_around_the_corrupted_one_is_misclassified(record, linear, data):
    """A ball around the clean image, or of another radius, would give other verdicts."""
    seen, differing = set(), 0
    for name in ("contrast", "gaussian_noise"):
        column = record.outcomes[f"robust_corruption/{name}/4"]
        images, labels = _corrupted(record.outcomes, data, name, 4)
        truth = linear.holds(as_floats(images), labels, 1 / 40) > 0
        chosen = column.notna().to_numpy()
        assert chosen.sum() == 25
        np.testing.assert_array_equal(column[chosen].to_numpy(bool), truth[chosen])
        seen |= set(column[chosen])
        around_clean = linear.holds(as_floats(data[0][record.outcomes["index"]]), labels, 1 / 40) > 0
        differing += int((around_clean != truth)[chosen].sum())
    assert differing, "the test must tell the two balls apart"
    assert seen == {True, False}


def test_the_metrics_and_the_cost_are_in_the_record(record):
    assert record.metrics["corruption/robust"].n == 25
    assert record.metrics["corruption/robust"].value < record.metrics["corruption"].value
    assert record.cost["robust corruption"].backwards > 0
    assert set(record.metrics) >= {"corruption/robust/contrast/4", "corruption/glass_blur/1"}


def test_the_attacked_examples_do_not_depend_on_the_order_of_the_data(record, linear, data):
    order = np.random.default_rng(1).permutation(40)
    again = _score(linear, (data[0][order], data[1][order]), _track())
    tables = [
        one.outcomes.sort_values("example", ignore_index=True).filter(regex="^(robust_)?corruption/")
        for one in (record, again)
    ]
    assert tables[0].equals(tables[1])


def test_a_track_without_the_table_attacks_no_corrupted_image(linear, data):
    plain = _score(linear, data, _track(corruptions={"names": ["contrast"], "severities": [1]}))
    assert "corruption/robust" not in plain.metrics
    assert "robust corruption" not in plain.cost
    assert not [column for column in plain.outcomes if column.startswith("robust_corruption")]


def test_verdicts_are_the_same_for_batches_of_1_7_and_512(linear, digits):
    """All nineteen corruptions, and the attacks on corrupted images."""
    few = digits.test.images[:14], digits.test.labels[:14]
    suite = {
        "names": list(SETS["cifar10-c-style"].names), "severities": [2, 5],
        "robust": {"examples": 6, "names": ["contrast", "fog"], "severity": 5, "seed": 0},
    }  # fmt: skip
    tables = [
        _score(linear, few, _track(14, batch_size=size, corruptions=suite)).outcomes.filter(regex="corruption/")
        for size in (1, 7, 512)
    ]
    assert tables[0].shape == (14, 40)
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert 0 < tables[0].filter(regex="^corruption/").to_numpy(bool).mean() < 1


def test_an_attack_that_leaves_the_ball_around_a_corrupted_image_stops_the_run(linear, data, monkeypatch):
    pgd, calls = operations.pgd, []

    def wide_after_the_first(*args, threat, **kw):
        calls.append(1)
        return pgd(*args, threat=threat if len(calls) == 1 else threat.scaled(2), **kw)

    monkeypatch.setattr(operations, "pgd", wide_after_the_first)
    with pytest.raises(GateError, match="PGD left the linf ball of radius 1/40"):
        _score(linear, data, _track())
    assert len(calls) == 2, "one shard of clean images, then one of corrupted ones"


def test_the_mnist_set_judges_each_corruption_once_at_its_own_severity():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, size=(12, 1, 28, 28), dtype=np.uint8), np.arange(12) % 4
    weight = rng.normal(size=(4, 784)).astype(np.float32) / 28
    suite = {"set": "mnist-c-style", "names": list(SETS["mnist-c-style"].names[:15]), "severities": "fixed"}
    record = _score(Linear(weight, np.zeros(4, dtype=np.float32)), data, _track(12, corruptions=suite))
    columns = record.outcomes.filter(regex="^corruption/").columns
    assert len(columns) == 15
    assert {"corruption/fog/5", "corruption/spatter/4", "corruption/stripe/1"} <= set(columns)


def test_images_that_a_set_cannot_take_are_refused_before_any_work(linear, data, monkeypatch):
    monkeypatch.setattr(operations, "pgd", None)
    suite = {"set": "mnist-c-style", "names": ["fog"], "severities": "fixed"}
    with pytest.raises(DataError, match=r"is for images of shape \(1, 28, 28\), not \(1, 8, 8\)"):
        _score(linear, data, _track(corruptions=suite))


def test_official_corruptions_of_other_images_are_refused(linear, data):
    with pytest.raises(DataError, match=r"holds corrupted images of cifar10, but stages@1 is a track on arrays"):
        _score(linear, data, _track(corruptions={"set": "cifar10-c", "names": ["fog"]}))


# --- the contact sheet


def _sheet(track, data, first=0):
    dataset = from_arrays(*data)
    track, examples = resolve(track, dataset), select(track, dataset)
    return contact_sheet(track, examples, made(track, examples), first=first), examples


def test_the_sheet_shows_the_very_pixels_in_rows_of_corruptions_and_columns_of_severities(data):
    sheet, examples = _sheet(_track(), data, first=3)
    pixels = np.asarray(sheet)
    shown = [examples.images[3]] + [
        corrupt(examples.images[3:4], corruption="contrast", severity=s, keys=examples.hashes[3:4], seed=0)[0]
        for s in (1, 4)
    ]
    factor = 96 // 8
    tiles = [np.repeat(np.repeat(image[0], factor, 0), factor, 1) for image in shown]
    bottom = [_place(pixels, tile) for tile in tiles]
    assert [y for y, _ in bottom][1:] == [bottom[1][0]] * 2, "one row for a corruption"
    assert bottom[1][1] < bottom[2][1], "severities rise to the right"
    assert len({tuple(color) for color in pixels[:, :150].reshape(-1, 3)}) > 2, "labels on the left"


def test_a_sheet_of_thin_images_stays_small():
    images = np.random.default_rng(0).integers(0, 256, size=(4, 1, 8, 3000), dtype=np.uint8)
    sheet, _ = _sheet(_track(), (images, np.arange(4)))
    assert sheet.size[0] < 4 * 3000
    assert sheet.size[1] < 1000


def test_a_track_without_corruptions_has_no_sheet(data):
    track = _track()
    bare = track.model_copy(update={"corruptions": track.corruptions.model_copy(update={"names": ()})})
    with pytest.raises(DataError, match="has no corruptions to show"):
        _sheet(bare, data)


def _place(pixels: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """Where a grey tile stands, the lowest place if there are several."""
    height, width = tile.shape
    for y in range(pixels.shape[0] - height, -1, -1):
        for x in range(pixels.shape[1] - width, -1, -1):
            if pixels[y, x, 0] == tile[0, 0] and (pixels[y : y + height, x : x + width] == tile[..., None]).all():
                return y, x
    raise AssertionError("the tile is not on the sheet")


def test_a_sheet_of_fixed_severities_shows_several_examples():
    images = np.random.default_rng(0).integers(0, 256, size=(8, 1, 28, 28), dtype=np.uint8)
    suite = {"set": "mnist-c-style", "names": ["stripe", "fog"], "severities": "fixed"}
    sheet, examples = _sheet(_track(8, corruptions=suite), (images, np.arange(8) % 4))
    pixels = np.asarray(sheet)
    tops = set()
    for image in examples.images[:6]:
        tops.add(_place(pixels, np.repeat(np.repeat(image[0], 3, 0), 3, 1))[0])
    assert len(tops) == 1, "the clean images are one row"


def test_an_example_that_is_not_there_is_refused(data):
    with pytest.raises(DataError, match="has the examples 0 to 39, not 40"):
        _sheet(_track(), data, first=40)


def test_the_command_writes_the_sheet(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "sheet.png"
    monkeypatch.setattr("sys.argv", ["robustboard", "corruptions", "--track", "digits-linf@2", "--out", str(out)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 19 * 96
