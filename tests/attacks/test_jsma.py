"""JSMA against the algorithm written out naively, and the search for the best pair against all pairs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustboard.attacks.counting import PassCounter
from robustboard.attacks.jsma import default_pairs, jsma
from robustboard.attacks.saliency import best_pairs, largest_pairs
from robustboard.errors import ModelError, TrackError


def small_net(seed: int = 0, features: int = 16, classes: int = 4) -> nn.Sequential:
    """In float64, so that rounding decides no comparison between pairs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(features, 12), nn.Tanh(), nn.Linear(12, classes))
    return net.double().eval()


def some_images(count: int, seed: int = 0, side: int = 4) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, side, side, generator=draws, dtype=torch.float64)
    # Some features stand at the ends of [0, 1], as most of MNIST's do.
    return ((1.6 * images - 0.3).clamp(0, 1)).double()


def naive_jsma(
    net: nn.Module, image: Tensor, target: int, *, forward: str, temperature: float, theta: float, pairs: int
) -> tuple[Tensor, bool]:
    """Algorithms 1 and 3 of the paper for one image, with the whole Jacobian and a loop over all pairs."""
    point = image.clone().flatten()
    domain = [p for p in range(len(point)) if (point[p] < 1 if theta > 0 else point[p] > 0)]

    def outputs(flat: Tensor) -> Tensor:
        logits = net(flat.view_as(image).unsqueeze(0))[0]
        return (logits / temperature).softmax(dim=0) if forward == "softmax" else logits

    for _ in range(pairs):
        if int(net(point.view_as(image).unsqueeze(0)).argmax()) == target:
            break
        jacobian = torch.autograd.functional.jacobian(outputs, point)
        own = jacobian[target].tolist()
        others = (jacobian.sum(dim=0) - jacobian[target]).tolist()
        best, chosen = 0.0, None
        for p, q in itertools.combinations(domain, 2):
            alpha, beta = own[p] + own[q], others[p] + others[q]
            admissible = alpha > 0 > beta if theta > 0 else alpha < 0 < beta
            if admissible and -alpha * beta > best:
                best, chosen = -alpha * beta, (p, q)
        if chosen is None:
            break
        for p in chosen:
            point[p] = (point[p] + theta).clamp(0, 1)
            if point[p] in (0, 1):
                domain.remove(p)
    return point.view_as(image), int(net(point.view_as(image).unsqueeze(0)).argmax()) == target


@pytest.mark.parametrize("theta", [1.0, -1.0, 0.4, -0.4])
@pytest.mark.parametrize(("forward", "temperature"), [("softmax", 1.0), ("softmax", 30.0), ("logits", 1.0)])
def test_it_is_the_paper_s_algorithm(forward: Any, temperature: float, theta: float) -> None:
    """Pixel for pixel the images of the naive loop, for every source and target."""
    net, images = small_net(), some_images(5)
    rows, targets = images.repeat_interleave(4, dim=0), torch.arange(4).repeat(5)
    options = {"forward": forward, "temperature": temperature, "theta": theta, "pairs": 5}
    found = jsma(net, rows, targets, batch_size=7, **options)
    expected = [naive_jsma(net, row, int(target), **options) for row, target in zip(rows, targets, strict=True)]
    assert torch.equal(found.images, torch.stack([image for image, _ in expected]))
    assert found.success.tolist() == [success for _, success in expected]
    assert 0 < int(found.success.sum()) < len(rows), "some attempts must fail, or the ends are not tested"
    assert int(found.changed.max()) >= 6, "several steps must be needed, or little is compared"


def all_pairs(gains: Tensor, falls: Tensor, free: Tensor) -> Tensor:
    """The best score of each row among all pairs, -1 where none is admissible."""
    alpha, gamma = (values.unsqueeze(2) + values.unsqueeze(1) for values in (gains, falls))
    allowed = (alpha > 0) & (gamma > 0) & free.unsqueeze(2) & free.unsqueeze(1)
    allowed &= ~torch.eye(gains.shape[1], dtype=torch.bool)
    return (alpha * gamma).masked_fill(~allowed, -1.0).flatten(1).amax(dim=1)


def score(gains: Tensor, falls: Tensor, features: Tensor) -> Tensor:
    return gains.gather(1, features).sum(dim=1) * falls.gather(1, features).sum(dim=1)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-4, 4), st.integers(-4, 4), st.booleans()),
        min_size=2,
        max_size=9,
    )
)
def test_the_pruned_search_finds_the_best_of_all_pairs(features: list[tuple[int, int, bool]]) -> None:
    """Small whole numbers make ties, equal features and empty sets common."""
    gains, falls = (torch.tensor([[float(feature[k]) for feature in features]]) for k in (0, 1))
    free = torch.tensor([[feature[2] for feature in features]])
    chosen, found = best_pairs(gains, falls, free)
    best = all_pairs(gains, falls, free)
    assert found.tolist() == (best >= 0).tolist()
    if found:
        assert score(gains, falls, chosen).tolist() == best.tolist()
        assert chosen[0, 0] != chosen[0, 1]
        assert bool(free.gather(1, chosen).all())


@pytest.mark.parametrize("correlation", [0.0, 0.9, -0.99])
def test_the_pruned_search_is_exact_on_many_features(correlation: float) -> None:
    """The same float32 score as the best of all pairs, bit for bit; rows of a table are of different lengths."""
    draws = torch.Generator().manual_seed(0)
    gains = torch.randn(20, 300, generator=draws)
    falls = correlation * gains + (1 - correlation**2) ** 0.5 * torch.randn(20, 300, generator=draws)
    free = torch.rand(20, 300, generator=draws) < torch.rand(20, 1, generator=draws)
    chosen, found = best_pairs(gains, falls, free)
    best = all_pairs(gains, falls, free)
    assert torch.equal(found, best >= 0)
    assert torch.equal(score(gains, falls, chosen)[found], best[found])
    assert int(found.sum()) >= 15


def test_the_pruned_search_survives_its_worst_case() -> None:
    """Every feature on the first front, in more rows than one table of scores may hold."""
    gains = torch.linspace(-1, 3, 500).repeat(24, 1)
    falls = torch.linspace(2, 0.5, 500) + torch.linspace(0, 1, 24).unsqueeze(1)
    free = torch.ones_like(gains, dtype=torch.bool)
    chosen, found = best_pairs(gains, falls, free)
    assert bool(found.all())
    assert torch.equal(score(gains, falls, chosen), all_pairs(gains, falls, free))


def test_of_a_softmax_the_best_pair_is_the_two_largest_derivatives() -> None:
    """Softmax outputs sum to one, so that b = -a: the search over pairs and the two largest must agree."""
    draws = torch.Generator().manual_seed(0)
    gains = torch.randn(200, 40, generator=draws) - 2 * torch.rand(200, 1, generator=draws)
    free = torch.rand(200, 40, generator=draws) < 0.2
    wanted, admissible = best_pairs(gains, gains, free)
    chosen, found = largest_pairs(gains, free)
    assert torch.equal(found, admissible)
    assert torch.equal(chosen[found].sort(dim=1).values, wanted[found].sort(dim=1).values)
    assert 0 < int(found.sum()) < 200


def test_the_smallest_derivatives_are_still_told_apart() -> None:
    """Near saturation a derivative is 1e-30, and its square is zero in float32: sums are compared, not squares."""
    gains = torch.tensor([[1e-30, 3e-30, 2e-30]])
    chosen, found = largest_pairs(gains, torch.ones(1, 3, dtype=torch.bool))
    assert sorted(chosen[0].tolist()) == [1, 2]
    assert bool(found)


def attempts(net: Any, count: int) -> tuple[Tensor, Tensor]:
    """Every wrong class of the first images."""
    rows = net.images[:count].repeat_interleave(9, dim=0)
    targets = torch.cat([torch.tensor([k for k in range(10) if k != label]) for label in net.labels[:count].tolist()])
    return rows, targets


@pytest.mark.parametrize("forward", ["softmax", "logits"])
@pytest.mark.parametrize(("theta", "end"), [(1.0, 1.0), (-1.0, 0.0)])
def test_budget_and_domain(toy: Any, forward: Any, theta: float, end: float) -> None:
    """At most two features a step, each moved to its end once; the rest of the image is untouched."""
    rows, targets = attempts(toy, 30)
    for pairs in (1, 3, 6):
        found = jsma(toy.model, rows, targets, forward=forward, theta=theta, pairs=pairs)
        moved = found.images != rows
        assert torch.equal(found.changed, moved.flatten(1).sum(dim=1))
        assert int(found.changed.max()) == 2 * pairs
        assert bool((found.changed % 2 == 0).all()), "a feature that stands at the end is never chosen"
        assert bool((found.images[moved] == end).all())
        with torch.no_grad():
            assert torch.equal(found.success, toy.model(found.images).argmax(dim=1) == targets)


def test_the_default_budget_is_the_paper_s() -> None:
    """14.5 % of MNIST's 784 features are 56 pairs, 112 features; of 64 they are 4 pairs."""
    assert default_pairs(784) == 56
    assert default_pairs(64) == 4


def test_more_budget_only_adds_successes(toy: Any) -> None:
    rows, targets = attempts(toy, 20)
    short, long = (jsma(toy.model, rows, targets, pairs=pairs) for pairs in (3, 6))
    assert bool((long.success | ~short.success).all())
    assert int(long.success.sum()) > int(short.success.sum())
    assert torch.equal(long.images[short.success], short.images[short.success]), "what has succeeded is left alone"


def test_what_is_classified_as_the_target_is_left_alone(toy: Any) -> None:
    found = jsma(toy.model, toy.images[:10], toy.labels[:10])
    assert bool(found.success.all())
    assert torch.equal(found.images, toy.images[:10])


def test_finished_attempts_leave(toy: Any) -> None:
    """Attempts that have succeeded, and those without an admissible pair, cost no further passes."""
    with PassCounter(toy.model) as counter:
        jsma(toy.model, toy.images[:50], toy.labels[:50])
    assert counter.forwards == 50

    rows, targets = attempts(toy, 20)
    with PassCounter(toy.model) as counter:
        found = jsma(toy.model, rows, targets, pairs=8)
    assert counter.forwards == int((found.changed // 2 + 1).sum())


class Scaled(nn.Module):
    """A network whose logits are a power of two times larger, which float32 does exactly."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.inner(images)


def test_large_logits_stall_it_until_they_are_divided(toy: Any) -> None:
    """This is what hides a distilled network from JSMA; on z / T the attack is the same again, bit for bit."""
    rows, targets = attempts(toy, 20)
    plain = jsma(toy.model, rows, targets)
    loud = Scaled(toy.model, 2.0**14).eval()
    hidden = jsma(loud, rows, targets)
    assert plain.success.float().mean() > 0.6
    assert hidden.success.float().mean() < 0.02
    assert bool((hidden.changed == 0).float().mean() > 0.95), "where the softmax is flat no pair is admissible"
    assert torch.equal(jsma(loud, rows, targets, temperature=2.0**14).images, plain.images)


def test_on_logits_their_scale_does_not_matter(toy: Any) -> None:
    rows, targets = attempts(toy, 10)
    plain = jsma(toy.model, rows, targets, forward="logits")
    loud = jsma(Scaled(toy.model, 2.0**14).eval(), rows, targets, forward="logits")
    assert torch.equal(plain.images, loud.images)
    assert bool(plain.success.any())


def test_colour_channels_are_features_of_their_own() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[0] = 1.0
        net[1].weight[1, [5, 40]] = 3.0  # a pixel of the first channel, and one of the last
    found = jsma(net, torch.full((1, 3, 4, 4), 0.1), torch.tensor([1]), pairs=1)
    assert (found.images != 0.1).flatten().nonzero().flatten().tolist() == [5, 40]


def test_no_images_give_no_attempts(toy: Any) -> None:
    found = jsma(toy.model, toy.images[:0], toy.labels[:0])
    assert found.images.shape == (0, 1, 8, 8)
    assert found.success.tolist() == found.changed.tolist() == []


def test_it_leaves_the_model_and_the_images_alone(toy: Any) -> None:
    rows, targets = attempts(toy, 5)
    before = rows.clone()
    found = jsma(toy.model, rows, targets)
    assert torch.equal(rows, before)
    assert not found.images.requires_grad
    assert all(parameter.grad is None for parameter in toy.model.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"forward": "loss"}, "softmax or logits, not of 'loss'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"theta": 0.0}, "must lie in"),
        ({"theta": 1.5}, "must lie in"),
        ({"pairs": 0}, "0 pairs of 64 features are too few"),
    ],
)
def test_settings_are_refused_in_a_sentence(toy: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrackError, match=sentence):
        jsma(toy.model, toy.images[:2], toy.labels[:2], **options)


class Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(images.flatten(1)[:, :10])


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda logits: logits * float("nan"), "logits are not finite"),
        (lambda logits: logits.detach(), "no gradient"),
        (lambda logits: logits.sqrt() + 1 - logits.sqrt(), "gradients are not finite"),
        (lambda logits: logits[:, :5], "returns 5 classes, but label 9 occurs"),
    ],
)
def test_broken_models_are_refused(answer: Any, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        jsma(Answers(answer).eval(), torch.zeros(1, 1, 8, 8), torch.tensor([9]))


def test_a_model_in_training_mode_is_refused(toy: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.eval"):
        jsma(Scaled(toy.model, 1.0).train(), toy.images[:1], toy.labels[:1])
    toy.model.eval()
