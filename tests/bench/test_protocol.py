"""Tracks are frozen, said in four lines, and choose their examples and training data by content alone."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustboard.attacks.keyed import content_hash
from robustboard.bench.arrays import ImageSet
from robustboard.bench.corruptions import SETS
from robustboard.bench.datasets import Dataset, from_arrays, load_dataset
from robustboard.bench.protocol import (
    Track,
    load_track,
    resolve,
    select,
    track_from,
    track_ids,
    training_data,
)
from robustboard.errors import DataError, TrackError

FOUR_LINES = """
id = "my-images-linf@1"
dataset = {npz = "data.npz"}
threat = {norm = "linf", eps = "2/255"}
n = 200
"""

# The radius and data of every released track, as the papers and the board's plan have them.
FIRST = {
    "digits-linf@1": ("digits", "linf", "1/10"),
    "mnist-linf@1": ("mnist", "linf", "1/10"),
    "mnist-linf-0.3@1": ("mnist", "linf", "3/10"),
    "mnist-3v8-linf@1": ("mnist-3v8", "linf", "1/10"),
    "fmnist-linf@1": ("fashion-mnist", "linf", "1/10"),
    "cifar10-linf@1": ("cifar10", "linf", "8/255"),
    "cifar10-linf-2@1": ("cifar10", "linf", "2/255"),
    "cifar10-l2@1": ("cifar10", "l2", "1/2"),
    "cifar10-q75-linf@1": ("cifar10-q75", "linf", "8/255"),
    "cifar10-q75-linf-2@1": ("cifar10-q75", "linf", "2/255"),
    "cifar10-q75-l2@1": ("cifar10-q75", "l2", "1/2"),
    "cifar10-q75-plane-horse-linf@1": ("cifar10-q75-plane-horse", "linf", "8/255"),
    "cifar100-linf@1": ("cifar100", "linf", "8/255"),
    "tiny-imagenet-linf@1": ("tiny-imagenet", "linf", "1.785/255"),
}

# The second version of each has the complete corruption sets.
SECOND = {name.replace("@1", "@2"): said for name, said in FIRST.items()}
RELEASED = FIRST | SECOND
WHOLE = ("digits-linf@1", "digits-linf@2")  # judged whole, without a variant

# A released track never changes; a new meaning is a new version with a line of its own here.
FROZEN = {
    "cifar10-l2@1": "b7d3c5b933c633aa",
    "cifar10-l2-full@1": "4866553043305238",
    "cifar10-linf-2@1": "dbc383a4bc6d1069",
    "cifar10-linf-2-full@1": "80816138060ed8e8",
    "cifar10-linf@1": "7343eae662eab018",
    "cifar10-linf-full@1": "d736df6d8d40fd8e",
    "cifar10-q75-l2@1": "4fb472d212ef52b3",
    "cifar10-q75-l2-full@1": "d0794bd87d37a4ce",
    "cifar10-q75-linf-2@1": "22f3df8bc8367b4f",
    "cifar10-q75-linf-2-full@1": "9f5a0f8638b04cdc",
    "cifar10-q75-linf@1": "cd2b3cd5deca3447",
    "cifar10-q75-linf-full@1": "da36e21e27e1144c",
    "cifar10-q75-plane-horse-linf@1": "8a3cd100b30b7b13",
    "cifar10-q75-plane-horse-linf-full@1": "dcd8dc3f904bac82",
    "cifar100-linf@1": "2be6896d417bc6cf",
    "cifar100-linf-full@1": "bd1267e5bfb072c6",
    "digits-linf@1": "29315f316d16e393",
    "fmnist-linf@1": "1b81eaebd62d10f3",
    "fmnist-linf-full@1": "7e5639e70a654cdf",
    "mnist-3v8-linf@1": "2b14b2f6f1aaced0",
    "mnist-3v8-linf-full@1": "6b993b4dcb436b45",
    "mnist-linf-0.3@1": "b9d5ccc2821803bb",
    "mnist-linf-0.3-full@1": "5f21dfc528df0d88",
    "mnist-linf@1": "d53d989bb4bddc39",
    "mnist-linf-full@1": "2a9d6afd8f6e13b1",
    "tiny-imagenet-linf@1": "91ec7951d6758308",
    "tiny-imagenet-linf-full@1": "41602f01e692a00a",
    "cifar10-l2-full@2": "e7bf811d6d638956",
    "cifar10-l2@2": "05fe1a48dc7ddb9e",
    "cifar10-linf-2-full@2": "8c173243598c4190",
    "cifar10-linf-2@2": "ac199f50337b64c6",
    "cifar10-linf-full@2": "4fb0978598e4f2e2",
    "cifar10-linf@2": "a43a798ca80b3e1e",
    "cifar10-q75-l2-full@2": "65ed19b3e7110e77",
    "cifar10-q75-l2@2": "a617a8d1c8c5a570",
    "cifar10-q75-linf-2-full@2": "61e5883a0dc6ee06",
    "cifar10-q75-linf-2@2": "19ed72ec48ca8ba8",
    "cifar10-q75-linf-full@2": "1ff041c354729232",
    "cifar10-q75-linf@2": "a54ee93aea62fc1f",
    "cifar10-q75-plane-horse-linf-full@2": "86edb2b4a7b7a1e7",
    "cifar10-q75-plane-horse-linf@2": "5b001adb32b12275",
    "cifar100-linf-full@2": "8427eb0b491d0f68",
    "cifar100-linf@2": "49a887a4f69e4a62",
    "digits-linf@2": "66caa2ef4117b3b5",
    "fmnist-linf-full@2": "ba8fb6590b253a8d",
    "fmnist-linf@2": "f6a59d0af31ec74b",
    "mnist-3v8-linf-full@2": "b09625933282a2f4",
    "mnist-3v8-linf@2": "f50996c080fcf360",
    "mnist-linf-0.3-full@2": "1a1cbf787f69913b",
    "mnist-linf-0.3@2": "34cb3c42dae6369d",
    "mnist-linf-full@2": "399d2e34e2621a40",
    "mnist-linf@2": "259aadc1f4e2c933",
    "tiny-imagenet-linf-full@2": "8f089be44c9a2c88",
    "tiny-imagenet-linf@2": "f4e81b6f36434a3f",
}


def toy(n: int = 40, *, seed: int = 0, train: int = 60) -> Dataset:
    """Random images with three classes; the training part is drawn from other numbers."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, size=(n + train, 1, 4, 4), dtype=np.uint8)
    labels = rng.integers(0, 3, size=n + train)
    labels[:3] = [0, 1, 2]
    return from_arrays(images[:n], labels[:n], train=(images[n:], labels[n:]))


def toy_track(**changes: object) -> Track:
    return track_from({"id": "toy@1", "dataset": "arrays", "threat": {"norm": "linf", "eps": "1/10"}, **changes})


def shuffled(dataset: Dataset, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)

    def turn(part: ImageSet) -> ImageSet:
        order = rng.permutation(len(part))
        return ImageSet(part.images[order], part.labels[order])

    assert dataset.train is not None
    train = turn(dataset.train)
    return Dataset(dataset.name, turn(dataset.test), dataset.classes, dataset.class_names, partial(lambda: train))


# --- the released tracks


def test_the_released_tracks_are_those_promised():
    bases = [name for name in track_ids() if "-full@" not in name]
    assert sorted(bases) == sorted(RELEASED)
    fulls = {name.replace("-full@", "@") for name in track_ids() if "-full@" in name}
    assert fulls == set(RELEASED) - set(WHOLE), "digits is judged whole already"


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_track_says_what_its_name_says(name):
    track = load_track(name)
    assert (track.id, track.dataset, track.threat.norm, track.threat.text) == (name, *RELEASED[name])
    assert track.n == ("all" if name in WHOLE else 1000)


@pytest.mark.parametrize("name", [name for name in RELEASED if name not in WHOLE])
def test_a_full_variant_differs_in_its_images_alone(name):
    base, full = load_track(name), load_track(name.replace("@", "-full@"))
    assert full.n == "all"
    changed = {key for key, value in full.frozen().items() if value != base.frozen()[key]}
    assert {"id", "title", "n"} <= changed <= {"id", "title", "n", "images_sha256"}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_version_differs_in_its_corruptions_alone(name):
    first, second = load_track(name.replace("@2", "@1")).frozen(), load_track(name).frozen()
    assert {key for key in first if first[key] != second[key]} == {"id", "title", "corruptions"}
    assert first.keys() == second.keys()
    suite = load_track(name).corruptions
    grey = second["dataset"] in ("mnist", "mnist-3v8", "fashion-mnist")
    assert suite.set == ("mnist-c-style" if grey else "cifar10-c-style")
    assert set(suite.names) == set(SETS[suite.set].names[: 15 if grey else 19])
    assert len(suite.conditions) == (15 if grey else 95)
    assert len(suite.attacked) == 5
    assert set(suite.attacked) <= set(suite.conditions)


@pytest.mark.parametrize("name", FIRST)
def test_first_versions_say_nothing_of_attacks_on_corrupted_images(name):
    """Their hashes were made before there was such a table."""
    assert "robust" not in load_track(name).frozen()["corruptions"]
    assert load_track(name).corruptions.attacked == ()


@pytest.mark.parametrize("name", FROZEN)
def test_released_tracks_never_change(name):
    """Every published record carries this hash; editing a released track would orphan them all."""
    assert load_track(name).hash[:16] == FROZEN[name], "release a new version instead"


@pytest.mark.parametrize(
    ("prefix", "file"), [("mnist-", "mnist.npz"), ("cifar10-q75", "cifar10_q75.npz"), ("digits", None)]
)
def test_released_tracks_choose_the_images_they_were_released_with(data_file, prefix, file):
    folders = [data_file(file).parent] if file else []
    chosen = [name for name in track_ids() if name.startswith(prefix)]
    assert chosen
    data = {name: load_dataset(name, data_dirs=folders) for name in {str(load_track(t).dataset) for t in chosen}}
    for name in chosen:
        track = load_track(name)
        dataset = data[str(track.dataset)]
        assert track.images_sha256 is not None
        examples = select(track, dataset)
        assert len(examples) == min(len(dataset.test), 1000 if track.n == 1000 else len(dataset.test))
        assert resolve(track, dataset).hash == track.hash


# --- reading


def test_four_lines_are_a_track(tmp_path):
    (tmp_path / "track.toml").write_text(FOUR_LINES)
    track = load_track(tmp_path / "track.toml")
    assert track.threat.eps == Fraction(2, 255)
    assert track.dataset.npz == tmp_path / "data.npz"  # relative to the TOML
    assert track.title == track.id
    standard = load_track("mnist-linf@1")
    for part in ("attacks", "bounds", "audit", "corruptions", "training", "batch_size"):
        assert getattr(track, part) == getattr(standard, part)


def test_a_table_changes_only_the_keys_it_names(tmp_path):
    (tmp_path / "track.toml").write_text(FOUR_LINES + "[attacks.pgd]\nsteps = 7\nlosses = ['margin']\n")
    pgd = load_track(tmp_path / "track.toml").attacks.pgd
    assert (pgd.steps, pgd.losses, pgd.restarts) == (7, ("margin",), 5)


def test_the_hash_knows_meaning_not_formatting_or_place(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.toml").write_text(FOUR_LINES)
    (tmp_path / "elsewhere" / "b.toml").write_text(
        "# the same\nn=200\nid='my-images-linf@1'\n[threat]\neps='4/510'\nnorm='linf'\n"
        "[dataset]\nnpz='data.npz'\n[attacks.pgd]\nsteps=40\n"
    )
    one, same = load_track(tmp_path / "a.toml"), load_track(tmp_path / "elsewhere" / "b.toml")
    assert one.hash == same.hash
    assert str(tmp_path) not in json.dumps(one.frozen())


@pytest.mark.parametrize(
    "change",
    [
        {"n": 7},
        {"batch_size": 100},
        {"threat": {"norm": "l2", "eps": "1/10"}},
        {"threat": {"norm": "linf", "eps": "1/11"}},
        {"attacks": {"pgd": {"seed": 1}}},
        {"attacks": {"pgd": {"step": "1/4"}}},
        {"bounds": {"methods": ["crown"]}},
        {"audit": {"certified_sample": 1}},
        {"corruptions": {"severities": [1, 2]}},
        {"corruptions": {"names": ["fog"]}},
        {"corruptions": {"robust": {"examples": 5, "names": ["contrast"], "severity": 1, "seed": 0}}},
        {"training": {"validation": 30}},
        {"hyper": {"pgd-at": {"epochs": 3}}},
    ],
)
def test_everything_that_can_move_a_verdict_is_under_the_hash(change):
    assert toy_track(**change).hash != toy_track().hash


@pytest.mark.parametrize("name", track_ids())
def test_a_frozen_track_reads_back(name):
    """A record carries the frozen content, and an audit must be able to run it again."""
    track = load_track(name)
    frozen = json.loads(json.dumps(track.frozen()))
    assert track_from(frozen) == track
    assert track_from(frozen).hash == track.hash


def test_a_track_cannot_be_changed():
    track = load_track("mnist-linf@1")
    with pytest.raises(Exception, match="frozen"):
        track.n = 5


def test_a_limited_track_is_another_track():
    track = load_track("mnist-linf@1")
    small = track.limited(50)
    assert (small.id, small.n, small.images_sha256) == ("mnist-linf-n50@1", 50, None)
    assert small.hash != track.hash
    assert track.limited(5000) is track
    with pytest.raises(TrackError, match="at least 1"):
        track.limited(0)


def test_two_classes_have_no_dlr():
    pgd = load_track("mnist-3v8-linf@1").attacks.pgd
    assert pgd.losses_for(2) == ("ce", "margin")
    assert pgd.losses_for(3) == ("ce", "margin", "dlr")


# --- what is wrong in a TOML


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("foo = 1", "the key foo is not known; allowed are attacks, audit"),
        (
            "[attacks.pgd]\nstepz = 1",
            r"pgd\.stepz is not known; allowed are losses, restarts, seed, step, steps",
        ),
        ("[attacks.pgd]\nsteps = '9'", r"attacks\.pgd\.steps must be a whole number, not '9'"),
        ("[attacks.pgd]\nsteps = true", "a whole number"),
        ("[attacks.pgd]\nsteps = 0", "greater than or equal to 1"),
        ("[attacks.pgd]\nstep = 0.25", "fraction in quotes"),
        ("[attacks.pgd]\nlosses = ['cw']", "'ce', 'margin' or 'dlr', not 'cw'"),
        ("[attacks.pgd]\nlosses = []", "not empty"),
        ("[attacks.autoattack]\nversion = 'rand'", "'standard'"),
        ("[bounds]\nmethods = ['magic']", "'alpha-crown', not 'magic'"),
        ("[bounds]\nmethods = ['ibp', 'ibp']", "without repetition"),
        ("[bounds]\nmethods = 'ibp'", "must be a list"),
        ("[corruptions]\nnames = ['fogg']", "a list out of gaussian_noise"),
        ("[corruptions]\nseverities = [6]", "less than or equal to 5"),
        ("[corruptions]\nseverities = []", r"severities must be a list without repetition"),
        ("[corruptions]\nseverities = [1, 1]", "without repetition"),
        ("[corruptions]\nseverities = 'fixed'", "the set cifar10-c-style fixes none"),
        ("[corruptions]\nset = 'mnist-c-style'\nnames = ['stripe']", 'severities that stripe has, or "fixed"'),
        ("[corruptions]\nset = 'mnist-c-style'\nnames = ['saturat']", "a list out of shot_noise, impulse_noise"),
        ("[corruptions]\nset = 'imagenet-c'", "'mnist-c'"),
        (
            "[corruptions.robust]\nexamples = 9\nnames = ['fog']\nseverity = 3\nseed = 0",
            "robust must be a table whose names and severity are among those of the suite",
        ),
        (
            "[corruptions.robust]\nexamples = 9\nnames = ['contrast']\nseverity = 3\nseed = 0\nfoo = 1",
            r"corruptions\.robust\.foo is not known; allowed are examples, names, seed, severity",
        ),
        ("[corruptions.robust]\nexamples = 9", r"corruptions\.robust\.names is missing"),
        ("[corruptions.robust]\nexamples = 9\nnames = ['contrast']\nseverity = 9\nseed = 0", "a severity from 1 to 5"),
        ('base = "mnist-linf@1"', "the key base is not known"),
        ("[training]\nvalidation = '3/2'", "a fraction below one"),
        ("[training]\ntrain = 'some'", 'or "all"'),
        ("[hyper.x]\na = nan", "finite number"),
        ("attacks = 3", "must be a table"),
        ("images_sha256 = 'ab'", "64 hexadecimal digits"),
        ("full = {}", "the key full is not known"),
        ("x =", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_sentence_with_key_and_remedy(tmp_path, extra, says):
    path = tmp_path / "track.toml"
    path.write_text(FOUR_LINES + extra)
    with pytest.raises(TrackError, match=says) as error:
        load_track(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "No Version"}, 'such as "mnist-linf@1"'),
        ({"dataset": "minst"}, "one of breast-cancer, .* or {npz = path}"),
        ({"dataset": {"npz": 3}}, "path of an npz file"),
        ({"dataset": {"nzp": "x"}}, "allowed are npz, classes"),
        ({"dataset": {"npz": "x", "classes": 1}}, "whole number from 2"),
        ({"threat": "linf"}, "must be a table"),
        ({"threat": {"norm": "linf"}}, r"threat\.eps is missing"),
        ({"threat": {"norm": "l1", "eps": "1/10"}}, "not one of linf and l2"),
        ({"threat": {"norm": "linf", "eps": 0.1}}, "exact fraction in quotes"),
        ({"n": 0}, 'a whole number from 1, or "all"'),
        ({"n": "most"}, 'a whole number from 1, or "all"'),
    ],
)
def test_a_mistaken_value_is_one_sentence(change, says):
    with pytest.raises(TrackError, match=says):
        toy_track(**change)


@pytest.mark.parametrize("key", ["id", "dataset", "threat"])
def test_what_a_track_cannot_do_without_is_named(key):
    content = {"id": "toy@1", "dataset": "digits", "threat": {"norm": "linf", "eps": "1/10"}}
    del content[key]
    with pytest.raises(TrackError, match=f"the key {key} is missing"):
        track_from(content)


def test_an_unknown_id_lists_its_neighbours():
    with pytest.raises(TrackError, match=r"did you mean mnist-linf@2 or mnist-linf@1.*`robustboard tracks`"):
        load_track("mnist-linf")
    for wrong in ("digits-linf-full@2", "standard", "standard-2", "", "mnist-linf@3"):
        with pytest.raises(TrackError, match="is not known"):
            load_track(wrong)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TrackError, match="No such file"):
        load_track(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrackError, match="not valid TOML"):
        load_track(tmp_path / "binary.toml")


def test_nobody_elses_file_takes_a_released_id(tmp_path):
    """Two meanings under one id would mix two boards."""
    path = tmp_path / "track.toml"
    path.write_text(FOUR_LINES.replace("my-images-linf@1", "mnist-linf@1"))
    with pytest.raises(TrackError, match="that of a released track"):
        load_track(path)


# --- choosing examples


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 45))
def test_the_choice_does_not_depend_on_the_order_of_the_data(seed, n):
    data = toy()
    track = toy_track(n=n)
    here, there = select(track, data), select(track, shuffled(data, seed))
    assert here.hashes == there.hashes
    assert here.sha256 == there.sha256
    np.testing.assert_array_equal(here.images, there.images)
    np.testing.assert_array_equal(here.labels, there.labels)
    assert len(here) == min(n, 40)


def test_the_choice_is_of_the_smallest_hashes():
    data = toy()
    examples = select(toy_track(n=10), data)
    assert list(examples.hashes) == sorted(data.test.hashes)[:10]
    assert [content_hash(image) for image in examples.images] == list(examples.hashes)
    np.testing.assert_array_equal(data.test.images[examples.order], examples.images)
    np.testing.assert_array_equal(data.test.labels[examples.order], examples.labels)
    tensor = examples.tensor()
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(examples.images).float().div(255))


def test_a_smaller_n_is_the_beginning_of_a_larger():
    data = toy()
    assert select(toy_track(n=10), data).hashes == select(toy_track(n="all"), data).hashes[:10]


def test_a_repeated_image_is_judged_once_whatever_its_labels_order():
    """Draws and verdicts are keyed by content, so two rows of one image would be one."""
    data = toy()
    images = np.concatenate([data.test.images, data.test.images[:2]])
    labels = np.concatenate([data.test.labels, [2, data.test.labels[1]]])
    labels[0] = 1
    for order in (np.arange(42), np.arange(42)[::-1]):
        examples = select(toy_track(n="all"), from_arrays(images[order], labels[order]))
        assert len(set(examples.hashes)) == len(examples) == 40
        assert examples.labels[examples.hashes.index(data.test.hashes[0])] == 1


def test_images_or_labels_other_than_the_released_are_refused():
    data = toy()
    track = resolve(toy_track(n=10), data)
    assert select(track, data).sha256 == track.images_sha256
    relabelled = from_arrays(data.test.images, (data.test.labels + 1) % 3)
    for other in (toy(seed=1), relabelled):
        with pytest.raises(DataError, match=r"not those of toy@1"):
            select(track, other)


def test_resolving_makes_the_hash_follow_the_images():
    track = toy_track(n=10)
    assert resolve(track, toy()).hash == resolve(track, shuffled(toy(), 3)).hash
    assert resolve(track, toy()).hash != resolve(track, toy(seed=1)).hash


def test_a_track_is_not_run_on_other_data():
    for action in (select, training_data):
        with pytest.raises(DataError, match="a track on mnist, not on arrays"):
            action(load_track("mnist-linf@1"), toy())


# --- training data


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_training_data_does_not_depend_on_the_order_of_the_data(seed):
    here, there = training_data(toy_track(), toy()), training_data(toy_track(), shuffled(toy(), seed))
    for one, other in ((here.train, there.train), (here.validation, there.validation)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_training_data_is_split_scaled_and_complete():
    data = training_data(toy_track(), toy())
    assert (len(data.train), len(data.validation), data.classes) == (54, 6, 3)
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.max() <= 1
    rows = {image.numpy().tobytes() for part in (data.train, data.validation) for image in part.images}
    assert len(rows) == 60, "no image is lost, and none is in both parts"


def test_no_test_image_reaches_a_defense():
    """Also one that this track does not judge: all tracks of a data set share their models."""
    data = toy()
    assert data.train is not None
    leaky = (
        np.concatenate([data.train.images, data.test.images[:5]]),
        np.concatenate([data.train.labels, data.test.labels[:5]]),
    )
    kept = training_data(toy_track(n=1), from_arrays(data.test.images, data.test.labels, train=leaky))
    assert len(kept.train) + len(kept.validation) == 60
    tests = {(image / np.float32(255)).tobytes() for image in data.test.images}
    for part in (kept.train, kept.validation):
        assert not tests & {image.numpy().tobytes() for image in part.images}


def test_training_sizes_are_kept_or_refused():
    data = training_data(toy_track(training={"train": 20, "validation": 15}), toy())
    assert (len(data.train), len(data.validation)) == (20, 15)
    for sizes in ({"train": 50, "validation": 15}, {"validation": 60}, {"validation": "1/100"}):
        with pytest.raises(DataError, match=r"set training\.train and training\.validation"):
            training_data(toy_track(training=sizes), toy())


def test_data_without_a_training_part_says_so():
    with pytest.raises(DataError, match="no training part"):
        training_data(toy_track(), from_arrays(toy().test.images, toy().test.labels))


def test_tracks_of_one_data_set_train_on_the_same_images():
    digits = load_dataset("digits")
    data = training_data(load_track("digits-linf@1"), digits)
    assert (len(data.train), len(data.validation)) == (1294, 143)
    assert data.image_shape == (1, 8, 8)
