from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyautoattack
import pytest
import torch
from pyautoattack import checks
from torch import Tensor, nn

from robustboard.attacks.autoattack import STAGES, applicable, reference_checks, run_stage, square_gain
from robustboard.attacks.counting import PassCounter
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
SEED, BATCH = 0, 50


def cascade(net: Any, threat: ThreatModel, stages: tuple[str, ...]) -> tuple[list[bool], Tensor]:
    """The stages one after the other, each on what the last one left, as `run_standard_evaluation` does it."""
    adversarial, robust = net.images.clone(), torch.ones(len(net.labels), dtype=torch.bool)
    for stage in stages:
        todo = robust.nonzero().flatten()
        result = run_stage(
            net.model,
            net.images[todo],
            net.labels[todo],
            threat=threat,
            stage=stage,
            seed=SEED,
            batch_size=BATCH,
            classes=net.classes,
        )
        assert threat.contains(result.adversarial, net.images[todo]).all()
        with torch.no_grad():
            broken = net.model(result.adversarial).argmax(dim=1) != net.labels[todo]
        adversarial[todo[broken]] = result.adversarial[broken]
        robust[todo[broken]] = False
    return robust.tolist(), adversarial


def theirs(net: Any, threat: ThreatModel, stages: tuple[str, ...]) -> tuple[list[bool], Tensor]:
    """The engine's own evaluation; its standard version untouched where all four stages apply to ten classes."""
    engine = pyautoattack.AutoAttack(
        net.model,
        norm={"linf": "Linf", "l2": "L2"}[threat.norm],
        eps=threat.radius,
        seed=SEED,
        version="standard",
    )
    if stages != STAGES or net.classes < 10:
        engine.attacks_to_run = [stage.replace("_", "-") for stage in stages]
        engine.fab.n_target_classes = engine.apgd_targeted.n_target_classes = net.classes - 1
    adversarial, predicted = engine.run_standard_evaluation(net.images, net.labels, batch_size=BATCH)
    net.model.zero_grad(set_to_none=True)
    return (predicted == net.labels).tolist(), adversarial


@pytest.mark.parametrize(
    ("threat", "stages"),
    [(LINF, STAGES), (L2, ("apgd_ce", "apgd_t", "fab_t")), pytest.param(L2, STAGES, marks=pytest.mark.slow)],
)
def test_the_cascade_is_the_standard_evaluation(toy: Any, threat: ThreatModel, stages: tuple[str, ...]) -> None:
    """Same verdicts, and the same images but for the rounding inward, on three batches of the engine."""
    net = toy.part(120)
    robust, adversarial = cascade(net, threat, stages)
    expected, expected_images = theirs(net, threat, stages)
    assert 0.1 < sum(expected) / len(expected) < 0.9, "the toy must leave something to decide"
    assert robust == expected
    assert float((adversarial - expected_images).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("classes", "threat"),
    [
        (2, LINF.scaled(2)),
        pytest.param(3, LINF.scaled(2), marks=pytest.mark.slow),
        pytest.param(4, LINF, marks=pytest.mark.slow),
        pytest.param(2, L2.scaled(2), marks=pytest.mark.slow),
        pytest.param(3, L2.scaled(2), marks=pytest.mark.slow),
        pytest.param(4, L2.scaled(2), marks=pytest.mark.slow),
    ],
)
def test_few_classes_use_all_other_classes_as_targets(toy_of: Any, classes: int, threat: ThreatModel) -> None:
    """With its nine targets the engine itself fails on fewer than ten classes."""
    net = toy_of[classes].part(40)
    robust, _ = cascade(net, threat, applicable(classes))
    expected, _ = theirs(net, threat, applicable(classes))
    assert robust == expected
    assert 0 < sum(robust) < len(robust), "the toy must leave something to decide"


@THREATS
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("stage", ["apgd_ce", "fab_t", "square"])
def test_every_stage_breaks_networks_of_few_classes(toy_of: Any, threat: ThreatModel, classes: int, stage: str) -> None:
    """A stage that quietly found nothing on a binary track would inflate its robust accuracy."""
    net, wide = toy_of[classes].part(30), threat.scaled(6)
    result = run_stage(
        net.model,
        net.images,
        net.labels,
        threat=wide,
        stage=stage,
        seed=SEED,
        batch_size=BATCH,
        classes=classes,
    )
    assert sum(net.still_correct(result.adversarial)) < 0.3 * len(net.labels)


def run(net: Any, stage: str, model: nn.Module | None = None, threat: ThreatModel = LINF) -> Any:
    return run_stage(
        model or net.model,
        net.images,
        net.labels,
        threat=threat,
        stage=stage,
        seed=SEED,
        batch_size=BATCH,
        classes=net.classes,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_the_caller_is_left_alone(toy: Any, stage: str) -> None:
    """The engine seeds global generators, fills parameter gradients and logs to the root: none of it leaks."""
    net, logger = toy.part(10), logging.getLogger("auto-attack")
    state, handlers, propagate = torch.random.get_rng_state(), list(logger.handlers), logger.propagate
    images = net.images.clone()
    frozen = net.model[1].bias.requires_grad_(False)
    try:
        result = run(net, stage)
        assert [p.requires_grad for p in net.model.parameters()] == [p is not frozen for p in net.model.parameters()]
    finally:
        frozen.requires_grad_(True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(net.images, images)
    assert all(parameter.grad is None for parameter in net.model.parameters())
    assert (logger.handlers, logger.propagate) == (handlers, propagate)
    assert torch.is_grad_enabled()
    assert not result.adversarial.requires_grad


def test_verdicts_do_not_depend_on_global_seeds(toy: Any) -> None:
    net = toy.part(20)
    first = run(net, "apgd_ce").adversarial
    torch.manual_seed(123)
    assert torch.equal(run(net, "apgd_ce").adversarial, first)


def test_a_stage_costs_what_the_paper_says(toy: Any) -> None:
    """APGD-CE on a robust example: 100 steps and a start, all with gradients, and no check forwards besides."""
    net = toy.part(10)
    with PassCounter(net.model) as counter:
        run(net, "apgd_ce", threat=ThreatModel.parse("linf", "1/100000"))
    assert counter.backwards == 10 * 101
    assert counter.forwards == 10 * 102


def test_an_error_inside_the_model_restores_everything(toy: Any) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy.model

        def forward(self, images: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("out of order")
            return self.inner(images)

    logger = logging.getLogger("auto-attack")
    handlers, state = list(logger.handlers), torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="out of order"):
        run(toy.part(5), "apgd_ce", Fails().eval())
    assert all(parameter.requires_grad for parameter in toy.model.parameters())
    assert logger.handlers == handlers
    assert torch.equal(torch.random.get_rng_state(), state)


class Wrapped(nn.Module):
    """The toy behind a function of its logits."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self._change = inner, change

    def forward(self, images: Tensor) -> Tensor:
        return self._change(self.inner(images))


def test_zero_gradients_are_reported_once_with_a_count(toy: Any) -> None:
    """The engine says it anew for every batch and target; a record needs it once."""
    net = toy.part(60)
    flat = Wrapped(net.model, lambda logits: logits.round() + 0 * logits).eval()
    warnings = run(net, "apgd_t", flat, ThreatModel.parse("linf", "1/1000")).warnings
    assert len(warnings) == 1
    assert "zero gradient" in warnings[0]
    assert "times" in warnings[0]
    assert "flags_doc" not in warnings[0]


def test_an_honest_model_passes_the_checks(toy: Any) -> None:
    assert reference_checks(toy.model, toy.images, toy.labels, classes=10, batch_size=BATCH) == ()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_no_reason_for_a_warning(toy_of: Any, classes: int) -> None:
    net = toy_of[classes]
    assert reference_checks(net.model, net.images, net.labels, classes=classes, batch_size=BATCH) == ()


def _gradient_inside(logits: Tensor) -> Tensor:
    with torch.enable_grad():
        point = torch.ones(1, requires_grad=True)
        (slope,) = torch.autograd.grad(point.square().sum(), point)
    return logits * slope


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda logits: logits + torch.randn_like(logits), "randomized defense"),
        (lambda logits: logits.softmax(dim=1), "probability distribution"),
        (_gradient_inside, "dynamic defense"),
    ],
)
def test_a_suspect_model_is_named(toy: Any, change: Callable[[Tensor], Tensor], says: str) -> None:
    """The three traps that AutoAttack's authors look for; and one suspect must not taint the next model."""
    model = Wrapped(toy.model, change).eval()
    warnings = reference_checks(model, toy.images, toy.labels, classes=10, batch_size=BATCH)
    assert [says in warning for warning in warnings] == [True]
    assert warnings[0][0].isupper()
    assert reference_checks(toy.model, toy.images, toy.labels, classes=10, batch_size=BATCH) == ()


def test_the_checks_keep_the_tracer_of_coverage_and_debuggers(toy: Any) -> None:
    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        reference_checks(toy.model, toy.images, toy.labels, classes=10, batch_size=BATCH)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert set(checks.funcs) == {"grad", "backward", "_make_grads"}


def test_counting_passes_does_not_look_like_a_dynamic_defense(toy: Any) -> None:
    """The engine's check traces function names; our own hooks must not carry the ones that it looks for."""
    with PassCounter(toy.model, on_forward=lambda examples: None):
        assert reference_checks(toy.model, toy.images, toy.labels, classes=10, batch_size=BATCH) == ()


def test_square_gaining_is_a_warning() -> None:
    """More than 0.2 points found without gradients suggests that the gradients lie."""
    assert "Square Attack has decreased" in square_gain(before=0.5, after=0.45)[0]
    assert square_gain(before=0.5, after=0.4985) == ()


def test_nan_logits_are_refused(toy: Any) -> None:
    for stage in STAGES:
        with pytest.raises(ModelError, match="logits are not finite"):
            run(toy.part(5), stage, Wrapped(toy.model, lambda logits: logits * torch.nan).eval())


@pytest.mark.parametrize("stage", ["apgd_ce", "apgd_t", "fab_t"])
def test_missing_gradients_are_refused(toy: Any, stage: str) -> None:
    with pytest.raises(ModelError, match="no gradient"):
        run(toy.part(5), stage, Wrapped(toy.model, lambda logits: logits.detach()).eval())


@THREATS
@pytest.mark.parametrize("stage", ["apgd_ce", "apgd_t", "fab_t"])
def test_a_model_without_slope_is_no_error_and_no_break(toy: Any, threat: ThreatModel, stage: str) -> None:
    """FAB divides zero by zero there; what comes back must still be inside the ball, and honest."""
    net = toy.part(5)
    constant = Wrapped(net.model, lambda logits: torch.eye(10)[net.labels[: len(logits)]] + 0 * logits).eval()
    result = run(net, stage, constant, threat)
    assert threat.contains(result.adversarial, net.images).all()


def test_wrong_class_counts_are_refused(toy: Any) -> None:
    with pytest.raises(ModelError, match="K = 7"):
        run_stage(
            toy.model,
            toy.images,
            toy.labels,
            threat=LINF,
            stage="apgd_ce",
            seed=0,
            batch_size=BATCH,
            classes=7,
        )


def test_a_model_in_training_mode_is_refused(toy: Any) -> None:
    toy.model.train()
    try:
        with pytest.raises(ModelError, match=r"model\.eval"):
            run(toy, "apgd_ce")
        with pytest.raises(ModelError, match=r"model\.eval"):
            reference_checks(toy.model, toy.images, toy.labels, classes=10, batch_size=BATCH)
    finally:
        toy.model.eval()


@pytest.mark.parametrize(
    ("stage", "classes", "norm", "side", "says"),
    [
        ("apgd_dlr", 10, "linf", 8, "apgd_ce, apgd_t, fab_t, square"),
        ("apgd_t", 3, "linf", 8, "at least 4 classes"),
        ("square", 10, "l2", 4, "5 x 5"),
    ],
)
def test_an_inapplicable_stage_is_refused_with_a_sentence(
    toy: Any, stage: str, classes: int, norm: str, side: int, says: str
) -> None:
    with pytest.raises(TrackError, match=says):
        run_stage(
            toy.model,
            torch.zeros(1, 1, side, side),
            torch.zeros(1, dtype=torch.long),
            threat=ThreatModel.parse(norm, "1/10"),
            stage=stage,
            seed=0,
            batch_size=BATCH,
            classes=classes,
        )


def test_no_images_give_no_images(toy: Any) -> None:
    for stage in STAGES:
        assert run(toy.part(0), stage).adversarial.shape == (0, 1, 8, 8)
    assert reference_checks(toy.model, toy.images[:0], toy.labels[:0], classes=10, batch_size=BATCH) == ()


def test_the_room_opens_without_heavy_libraries() -> None:
    """`import robustboard.attacks` must stay quick, and work where the bounds' library is not installed."""
    code = (
        "import sys, robustboard.attacks as a, robustboard.attacks.autoattack;"
        "print(sorted({'auto_LiRPA', 'pyautoattack'} & set(sys.modules)), [n for n in a.__all__ if not hasattr(a, n)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
