from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from robustboard.attacks.counting import PassCounter
from robustboard.attacks.kernels import square_moves as kernel
from robustboard.attacks.kernels.square import square
from robustboard.attacks.losses import margin_loss
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
NOTHING_BREAKS = "1/100000"


def attack(net: Any, threat: ThreatModel, **changes: Any) -> Tensor:
    options = {"seed": 0, "queries": 100} | changes
    return square(net.model, net.images, net.labels, threat=threat, keys=net.keys, **options)


def theirs(model: Any, threat: ThreatModel, *, queries: int, seed: int = 0) -> SquareAttack:
    """The authors' code as AutoAttack's standard version sets it up."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    return SquareAttack(
        model, norm=norm, n_queries=queries, eps=threat.radius, seed=seed, resc_schedule=False, device="cpu"
    )


def reference(net: Any, threat: ThreatModel, *, queries: int, seed: int) -> Tensor:
    with torch.random.fork_rng(), torch.no_grad():
        return theirs(net.model, threat, queries=queries, seed=seed).perturb(net.images, net.labels)


def their_areas(moves: Any, draws: Tensor, sides: list[int]) -> list[Any]:
    """Positions from [0, h - s) instead of [0, h - s]."""
    areas: list[Any] = []
    for (down, right), side in zip(draws.tolist(), sides, strict=True):
        top, left = int(down * (moves._height - side)), int(right * (moves._width - side))
        areas.append((..., slice(top, top + side), slice(left, left + side)))
    return areas


@THREATS
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_it_breaks_and_stays_inside(toy: Any, toy_of: Any, threat: ThreatModel, classes: int) -> None:
    """What is returned is an allowed image that the network misclassifies, or else the clean image to the last bit."""
    net = toy if classes == 10 else toy_of[classes]
    wide = threat.scaled(3 if classes > 2 else 5)
    adversarial = attack(net, wide)
    correct = torch.tensor(net.still_correct(adversarial))
    assert wide.contains(adversarial, net.images).all()
    assert torch.equal(adversarial[correct], net.images[correct])
    assert float(correct.float().mean()) < 0.6


@THREATS
@pytest.mark.parametrize("queries", [500, 1000])
def test_it_is_as_strong_as_the_authors_code(
    toy: Any, threat: ThreatModel, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square for square the authors' search, but for the last row and column, which only ours reaches.

    With their range of positions the robust counts over seeds differ no more than the seeds make them: for each
    example the share of seeds under which it survives is compared, whose variance is that of all runs together (zero
    for an example that no seed decides), and three standard deviations are allowed either way. With the whole range
    the attack may only be stronger; on images as small as these it clearly is.
    """
    net, seeds = toy.part(80), range(3)

    def survivors() -> Tensor:
        return torch.tensor([net.still_correct(attack(net, threat, queries=queries, seed=seed)) for seed in seeds])

    other = torch.tensor([net.still_correct(reference(net, threat, queries=queries, seed=seed)) for seed in seeds])
    whole_range = survivors()
    monkeypatch.setattr(kernel.Moves, "_areas", their_areas)
    ours = survivors()
    variance = torch.cat([ours, other]).float().var(dim=0).sum() * 2 / len(seeds)
    assert 0.1 < float(ours.float().mean()) < 0.9, "the toy must leave something to decide"
    assert abs(float((ours.sum() - other.sum()) / len(seeds))) <= 3 * float(variance.sqrt())
    assert int(whole_range.sum()) < int(other.sum())


@THREATS
def test_it_asks_less_often_than_the_authors_code(toy: Any, threat: ThreatModel) -> None:
    """A survivor costs the clean pass, the start and its queries; theirs looks twice more at it."""
    tight = ThreatModel.parse(threat.norm, NOTHING_BREAKS)
    with PassCounter(toy.model) as ours:
        adversarial = attack(toy, tight, queries=50)
    with PassCounter(toy.model) as other:
        reference(toy, tight, queries=50, seed=0)
    assert torch.equal(adversarial, toy.images)
    assert (ours.forwards, ours.backwards) == (52 * len(toy.labels), 0)
    assert other.forwards == 53 * len(toy.labels)


@THREATS
def test_broken_examples_stop_costing_passes(toy: Any, threat: ThreatModel) -> None:
    """Nobody is attacked more than a few queries longer than needed; a network that falls at once costs little."""
    with PassCounter(toy.model) as counter:
        adversarial = attack(toy, threat.scaled(6), queries=1000)
    survivors = sum(toy.still_correct(adversarial))
    assert survivors < 0.1 * len(toy.labels)
    assert counter.forwards < 1003 * survivors + 60 * len(toy.labels)


@THREATS
def test_verdicts_do_not_move_with_batch_or_order(toy: Any, threat: ThreatModel) -> None:
    """Whatever the split and order of the examples, each one's verdict is the same."""
    verdicts = toy.still_correct(attack(toy, threat, queries=520))
    order = torch.randperm(len(toy.labels), generator=torch.Generator().manual_seed(5))
    found = torch.empty_like(toy.images)
    for part in order.split(97):
        found[part] = square(
            toy.model,
            toy.images[part],
            toy.labels[part],
            threat=threat,
            keys=[toy.keys[i] for i in part.tolist()],
            seed=0,
            queries=520,
        )
    assert 0.1 < sum(verdicts) / len(verdicts) < 0.9, "the toy must leave something to decide"
    assert toy.still_correct(found) == verdicts


@THREATS
def test_more_queries_only_break_more(toy: Any, threat: ThreatModel) -> None:
    """The first queries of many are those of few, across the tables of draws too."""
    few = toy.still_correct(attack(toy, threat, queries=30))
    more = toy.still_correct(attack(toy, threat, queries=530))
    assert all(before or not after for before, after in zip(few, more, strict=True))
    assert sum(more) < sum(few)


@THREATS
def test_the_seed_moves_the_search(toy: Any, threat: ThreatModel) -> None:
    first, again, other = (attack(toy, threat, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (32, 32), (64, 48)])
def test_the_sides_are_those_of_the_authors_code(height: int, width: int) -> None:
    """Their own schedule, for every query of the standard version and beyond; L2's sides are odd and at least 3."""
    engine = theirs(None, LINF, queries=5000)
    for query in range(9000):
        wide = (engine.p_selection(query) * height * width) ** 0.5
        assert kernel._linf_side(query, height, width) == min(max(round(wide), 1), height, width)
        odd = max(round(wide), 3)
        assert kernel._l2_side(query, height, width) == min(odd + (odd % 2 == 0), height, width)


@pytest.mark.parametrize("side", [*range(1, 16), 21, 28, 29])
def test_the_bumps_are_those_of_the_authors_code(side: int) -> None:
    """Theirs is one of the two at random, on an engine of its own generator state."""
    with torch.random.fork_rng():
        seen = theirs(None, L2, queries=1).eta(side)
    upright, lying = kernel._bumps(side)
    assert torch.allclose(seen, upright, atol=1e-6) or torch.allclose(seen, lying, atol=1e-6)


class Recorder(nn.Module):
    """Keeps every image it is asked about; the answers are another model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.asked: list[Tensor] = []
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(images.detach().clone())
        logits: Tensor = self._model(images)
        return logits


@THREATS
def test_every_question_is_about_an_allowed_image(toy: Any, threat: ThreatModel) -> None:
    """Squares written into a shared buffer and taken back leave no trace outside the ball, for hundreds of queries."""
    net, narrow = toy.part(40), ThreatModel.parse(threat.norm, "1/5" if threat.norm == "l2" else "1/50")
    recorder = Recorder(net.model)
    square(recorder, net.images, net.labels, threat=narrow, keys=net.keys, seed=0, queries=520)
    whole = [images for images in recorder.asked if len(images) == len(net.images)]
    assert len(whole) >= 2
    assert all(narrow.contains(images, net.images).all() for images in whole)


@THREATS
def test_it_climbs_and_undoes_what_does_not_help(toy: Any, threat: ThreatModel) -> None:
    """Every proposal differs from the best point so far inside one or two squares alone, and no other pixel moves."""
    tight = ThreatModel.parse(threat.norm, "1/1000")
    net = toy.part(1)
    recorder = Recorder(net.model)
    square(recorder, net.images, net.labels, threat=tight, keys=net.keys, seed=0, queries=300)
    _, best, *proposals = recorder.asked
    squares = 1 if threat.norm == "linf" else 2
    with torch.no_grad():
        margin, first = (float(margin_loss(net.model(best), net.labels)) for _ in range(2))
        for query, proposal in enumerate(proposals):
            side = kernel._linf_side(query, 8, 8) if threat.norm == "linf" else kernel._l2_side(query, 8, 8)
            assert int((proposal != best).sum()) <= squares * side**2
            reached = float(margin_loss(net.model(proposal), net.labels))
            if reached > margin:
                best, margin = proposal, reached
    assert margin > first


def test_squares_reach_every_pixel() -> None:
    """Also those of the last row and column, which the authors' code leaves out."""
    images = torch.full((1, 1, 8, 8), 0.5)
    moves = kernel._Stripes(LINF, images, ["key"], 0)
    moves.deal(0)
    covered = torch.zeros(8, 8)
    for area in moves._places[201:]:
        covered[area] += 1
    assert bool((covered > 0).all())


def test_the_whole_budget_of_l2_is_spent(toy: Any) -> None:
    """With no clipping in the way each point lies on the sphere, as the paper's does; a wasted radius is strength."""
    images = torch.full((3, 2, 12, 12), 0.5)
    moves = kernel._Bumps(L2, images, list("abc"), 0)
    moves.deal(0)
    better = torch.tensor([True, False, True]).view(-1, 1, 1, 1)
    start = moves.points.clone()
    for place in range(400):
        moves.propose(place)
        moves.settle(better)
    lengths = L2.distance(moves.points, images)
    assert bool((lengths <= L2.radius).all())
    assert bool((lengths > 0.999 * L2.radius).all())
    assert torch.equal(moves.points[1], start[1])
    assert not torch.equal(moves.points[0], start[0])


@pytest.mark.parametrize(("height", "width"), [(5, 5), (9, 14), (14, 9), (6, 40)])
@THREATS
def test_odd_sizes_and_channels_are_admitted(threat: ThreatModel, height: int, width: int) -> None:
    """The authors' L2 start fails for some of these, such as 14 x 14."""
    images = torch.rand(4, 2, height, width, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * height * width, 3)).eval()
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    adversarial = square(model, images, labels, threat=threat, keys=list("abcd"), seed=0, queries=60)
    assert threat.contains(adversarial, images).all()


def test_it_leaves_model_and_global_randomness_alone(toy: Any) -> None:
    before = torch.random.get_rng_state()
    images, attacked = toy.images.clone(), attack(toy, LINF)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(toy.images, images)
    assert not attacked.requires_grad
    assert not attacked.is_inference()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.model.parameters())


def test_misclassified_images_are_returned_as_they_are(toy: Any) -> None:
    wrong = (toy.labels + 1) % 10
    adversarial = square(toy.model, toy.images, wrong, threat=LINF, keys=toy.keys, seed=0, queries=1)
    assert torch.equal(adversarial, toy.images)


@THREATS
def test_no_images_give_no_images(toy: Any, threat: ThreatModel) -> None:
    assert attack(toy.part(0), threat).shape == (0, 1, 8, 8)


class Late(nn.Module):
    """Sound for a number of calls, then what `spoil` makes of the logits."""

    def __init__(self, spoil: Callable[[Tensor], Tensor], calls: int) -> None:
        super().__init__()
        self._spoil, self._calls = spoil, calls
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self._calls -= 1
        logits = 5.0 * torch.eye(4, 10) + 0 * images.flatten(1)[:, :10]
        return logits if self._calls >= 0 else self._spoil(logits)


@pytest.mark.parametrize("calls", [0, 1, 2, 11])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda logits: logits * torch.nan, "logits are not finite numbers .nan seen"),
        (lambda logits: logits.index_fill(1, torch.tensor([9]), -torch.inf), "logits are not finite numbers .-inf"),
        (lambda logits: logits[:, 0], "shape .4, K"),
    ],
)
def test_a_broken_model_is_refused_with_a_sentence(spoil: Callable[[Tensor], Tensor], says: str, calls: int) -> None:
    """NaN margins never grow: a search that went on would call the network robust, whenever it starts to fail."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=says):
        square(Late(spoil, calls), images, torch.arange(4), threat=LINF, keys=list("abcd"), seed=0, queries=20)


def test_a_model_in_training_mode_is_refused(toy: Any) -> None:
    toy.model.train()
    try:
        with pytest.raises(ModelError, match=r"model\.eval"):
            attack(toy, LINF)
    finally:
        toy.model.eval()


def test_settings_that_are_not_defined_are_refused_with_a_sentence(toy: Any) -> None:
    small = torch.rand(2, 1, 4, 8)
    with pytest.raises(TrackError, match="at least one query"):
        attack(toy, LINF, queries=0)
    with pytest.raises(TrackError, match="5 x 5 pixels, not 4 x 8"):
        square(toy.model, small, toy.labels[:2], threat=L2, keys=list("ab"), seed=0)
