"""The reference engine's sentences as data: every kind that its code can write is recognised."""

from __future__ import annotations

import inspect

import pytest
from pyautoattack import checks

from robustboard.attacks.engine_warnings import EngineWarning, merged, read_warnings


@pytest.mark.parametrize(
    ("sentence", "check", "times"),
    [
        ('It seems to be a randomized defense! Please use version="rand".', "randomised", 1),
        ("It seems that the output is a probability distribution, please be sure.", "probabilities", 1),
        ("It seems to be a dynamic defense! The evaluation might be insufficient.", "dynamic", 1),
        ("There are 60 points with zero gradient! (Said 9 times, here the first.)", "zero gradients", 9),
        ("Square Attack has decreased the robust accuracy of 1.00%.", "square", 1),
        ("With only 2 classes it is not possible to use the DLR loss!", "few classes", 1),
        ("It seems that more target classes (9) than possible (3) are used in FAB-T!", "few classes", 1),
        ("Something new.", "other", 1),
    ],
)
def test_each_kind_is_read(sentence: str, check: str, times: int) -> None:
    (warning,) = read_warnings("apgd_t", [sentence])
    assert (warning.stage, warning.check, warning.times) == ("apgd_t", check, times)
    assert "Said" not in warning.message
    assert sentence.startswith(warning.message)


def test_a_count_too_long_to_read_is_part_of_the_message() -> None:
    """Whoever writes a sentence of five thousand digits is not to end the run with an error of Python's."""
    sentence = f"Something new. (Said {'9' * 5000} times, here the first.)"
    assert read_warnings("square", [sentence]) == [EngineWarning("square", "other", sentence, 1)]


def test_the_signs_are_the_engines_own_words() -> None:
    """Should the engine's wording change, its warnings would silently become `other`."""
    source = inspect.getsource(checks).lower()
    for words in ("randomized defense", "probability distribution", "dynamic defense", "zero gradient", "more target"):
        assert words in source
    assert "square attack has decreased" in source


def test_warnings_of_one_kind_are_merged_by_stage() -> None:
    warnings = [
        EngineWarning("apgd_t", "zero gradients", "There are 3 points.", 2),
        EngineWarning("apgd_t", "zero gradients", "There are 4 points.", 5),
        EngineWarning("square", "square", "Lower.", 1),
    ]
    assert merged(warnings) == [EngineWarning("apgd_t", "zero gradients", "There are 3 points.", 7), warnings[2]]
