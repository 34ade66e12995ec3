from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from robustboard.attacks.threat import ThreatModel
from robustboard.errors import TrackError

NORMS = st.sampled_from(["linf", "l2"])
EPS = st.sampled_from(["8/255", "2/255", "1/10", "3/10", "1/2", "1.785/255", "1/3", "1/1000000", "1"])
THREATS = st.builds(ThreatModel.parse, NORMS, EPS)
# Pixels of 8-bit images, the corners of the box, and floats down to the denormal numbers.
PIXELS = st.one_of(
    st.sampled_from([0.0, 1.0, float(np.float32(1e-40)), float(np.nextafter(np.float32(1), np.float32(0)))]),
    st.integers(0, 255).map(lambda level: float(np.float32(level / 255))),
    st.floats(0, 1, width=32),
)


def tensors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    return hnp.arrays(np.float32, (2, 3, 4, 4), elements=elements).map(torch.from_numpy)


IMAGES = tensors(PIXELS)
ANYWHERE = tensors(st.one_of(PIXELS, st.floats(-2, 3, width=32)))


def exactly_inside(threat: ThreatModel, perturbed: Tensor, images: Tensor) -> bool:
    """The definition, in exact rational arithmetic."""
    for after, before in zip(perturbed.flatten(1).tolist(), images.flatten(1).tolist(), strict=True):
        deltas = [Fraction(a) - Fraction(b) for a, b in zip(after, before, strict=True)]
        if not all(0 <= pixel <= 1 for pixel in after):
            return False
        if threat.norm == "linf" and max(map(abs, deltas)) > threat.eps:
            return False
        if threat.norm == "l2" and sum(d * d for d in deltas) > threat.eps**2:
            return False
    return True


@settings(max_examples=150, deadline=None)
@given(threat=THREATS, images=IMAGES, perturbed=ANYWHERE)
def test_projection_is_inside_in_exact_arithmetic(threat: ThreatModel, images: Tensor, perturbed: Tensor) -> None:
    """No rounding may put an adversarial example outside the ball: a break there would be no break."""
    projected = threat.project(perturbed, images)
    assert exactly_inside(threat, projected, images)
    assert threat.contains(projected, images).all()
    assert projected.dtype == torch.float32


@settings(max_examples=150, deadline=None)
@given(threat=THREATS, images=IMAGES, perturbed=ANYWHERE)
def test_projection_is_idempotent(threat: ThreatModel, images: Tensor, perturbed: Tensor) -> None:
    """What is inside stays, bit for bit: a stored example may be projected again."""
    once = threat.project(perturbed, images)
    assert torch.equal(threat.project(once, images), once)
    assert torch.equal(threat.project(images, images), images)


@settings(max_examples=100, deadline=None)
@given(eps=EPS, images=IMAGES, perturbed=ANYWHERE)
def test_linf_projection_wastes_no_float(eps: str, images: Tensor, perturbed: Tensor) -> None:
    """Each projected pixel is the nearest allowed float32: the next one towards the target is outside."""
    threat = ThreatModel.parse("linf", eps)
    projected = threat.project(perturbed, images)
    closer = torch.nextafter(projected, perturbed)
    moved = closer != projected
    outside = ((closer.double() - images.double()).abs() > threat.radius) | (closer < 0) | (closer > 1)
    assert bool(outside[moved].all())


@settings(max_examples=100, deadline=None)
@given(threat=THREATS, images=IMAGES, noise=tensors(st.floats(-1, 1, width=32)))
def test_start_is_inside(threat: ThreatModel, images: Tensor, noise: Tensor) -> None:
    assert exactly_inside(threat, threat.start(images, noise), images)


@settings(max_examples=150, deadline=None)
@given(threat=THREATS, images=IMAGES, perturbed=ANYWHERE)
def test_outer_box_covers_the_exact_ball(threat: ThreatModel, images: Tensor, perturbed: Tensor) -> None:
    """A certificate on the outer box covers the whole ball: both its exact faces and every projected image."""
    lower, upper = threat.outer_box(images)
    for low, high, pixel in zip(
        lower.flatten().tolist(), upper.flatten().tolist(), images.flatten().tolist(), strict=True
    ):
        assert Fraction(low) <= max(Fraction(pixel) - threat.eps, 0)
        assert Fraction(high) >= min(Fraction(pixel) + threat.eps, 1)
    projected = threat.project(perturbed, images)
    assert bool(((lower <= projected) & (projected <= upper)).all())
    assert float((upper - lower).max()) <= 2 * float(threat.eps) * (1 + 1e-6) + 1e-6


@settings(max_examples=100, deadline=None)
@given(eps=EPS)
def test_radius_is_the_largest_float32_below_eps(eps: str) -> None:
    threat = ThreatModel.parse("linf", eps)
    radius = np.float32(threat.radius)
    assert Fraction(float(radius)) <= threat.eps
    assert Fraction(float(np.nextafter(radius, np.float32(2)))) > threat.eps


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_contains_has_no_slack(norm: str) -> None:
    """A perturbation of the whole radius is allowed, one float32 more is not; NaN and box violations are not either."""
    threat = ThreatModel.parse(norm, "1/4")
    images = torch.zeros(6, 1, 2, 2)
    perturbed = images.clone()
    perturbed[1, 0, 0, 0] = 0.25
    perturbed[2, 0, 0, 0] = torch.nextafter(torch.tensor(0.25), torch.tensor(1.0))
    perturbed[3, 0, 0, 0] = torch.nan
    perturbed[4, 0, 0, 0] = -1e-8
    images[5] = 1.0
    perturbed[5] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert threat.contains(perturbed, images).tolist() == [True, True, False, False, False, False]


def test_a_ten_percent_larger_ball_is_caught() -> None:
    """The judge can tell a cheating attack from an honest one."""
    honest = ThreatModel.parse("linf", "1/10")
    images = torch.full((4, 1, 3, 3), 0.5)
    cheating = honest.scaled(Fraction(11, 10)).project(images + 1, images)
    assert not honest.contains(cheating, images).any()
    assert honest.contains(honest.project(cheating, images), images).all()


def test_l2_projection_keeps_the_radius_in_use() -> None:
    """Rounding inward costs next to nothing: the projected image lies within a few millionths of the sphere."""
    threat = ThreatModel.parse("l2", "1/2")
    images = torch.full((3, 3, 32, 32), 0.5)
    far = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = threat.distance(threat.project(far, images), images)
    assert bool((distances > 0.5 * (1 - 2e-5)).all())


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        ("8/255", "8/255"),
        ("2/255", "2/255"),
        ("5/255", "5/255"),
        ("1.785/255", "1.785/255"),
        ("0.1", "1/10"),
        ("3/10", "3/10"),
        ("1/2", "1/2"),
        ("1", "1"),
        ("1/8", "1/8"),
        ("1/700", "1/700"),
    ],
)
def test_text_reads_as_the_field_writes_it(eps: str, text: str) -> None:
    threat = ThreatModel.parse("linf", eps)
    assert threat.text == text
    assert ThreatModel.parse("linf", threat.text) == threat


@pytest.mark.parametrize(
    ("norm", "eps", "says"),
    [
        ("l1", "8/255", "not one of linf and l2"),
        ("linf", 8 / 255, "exact fraction"),
        ("linf", True, "exact fraction"),
        ("linf", None, "exact fraction"),
        ("linf", "eight", "fraction such as"),
        ("linf", "8/", "fraction such as"),
        ("linf", "1/1/2", "fraction such as"),
        ("linf", "1/0", "fraction such as"),
        ("linf", "0", "positive"),
        ("l2", "-1/2", "positive"),
        ("linf", "8", "too large"),
        ("l2", "1e400", "fraction such as"),
        ("l2", "1e40", "too large"),
        ("l2", 10**40, "too large"),
        ("l2", "1e-400", "fraction such as"),
        ("l2", "1e-60", "too small"),
        ("linf", "1e999999999", "fraction such as"),
        ("linf", "1/1e-999999999", "fraction such as"),
        ("linf", "0." + "1" * 1000, "not a text of 1002 characters"),
        pytest.param("linf", 10**5000, "so many digits", id="too long for Python to print"),
    ],
)
def test_a_bad_threat_is_refused_with_a_sentence(norm: object, eps: object, says: str) -> None:
    with pytest.raises(TrackError, match=says) as caught:
        ThreatModel.parse(norm, eps)
    assert str(caught.value).endswith(".")


def test_a_float_radius_is_refused_by_the_constructor() -> None:
    """A notebook's `ThreatModel("linf", 8 / 255)` would otherwise run at a radius that is not 8/255."""
    with pytest.raises(TrackError, match="exact"):
        ThreatModel("linf", 8 / 255)  # type: ignore[arg-type]
