"""What each method minimises, checked against the formulas of its paper on networks small enough to see through."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.keyed import generator
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.adversarial import FgsmHyper, FgsmTraining, PgdTraining, Trades, TradesHyper, least_agreeing
from robustboard.defenses.architectures import build
from robustboard.defenses.batches import Batch
from robustboard.defenses.ibp import CrownIbp, CrownIbpHyper, Ibp, IbpHyper, verified_cross_entropy
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")


def batch(count: int = 6, *, done: float = 0.0, classes: int = 3) -> Batch:
    draws = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(count, 1, 4, 4, generator=draws)
    return Batch(images, torch.arange(count) % classes, done, generator("draws"))


def data_of(some: Batch, classes: int = 3) -> TrainingData:
    split = Split(some.images, some.labels)
    return TrainingData("tiny", split, split, classes)


def network(name: str = "mlp-9", classes: int = 3) -> nn.Sequential:
    return build(name, image_shape=(1, 4, 4), classes=classes, seed=0)


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def test_fgsm_training_is_exact_on_a_linear_network() -> None:
    """On two linear logits FGSM is the worst case: the margin falls by eps times an L1 norm of weights."""
    model, some = linear(), batch(classes=2)
    hyper = FgsmHyper(architecture="mlp-1", epochs=1, alpha=0.25)
    loss = FgsmTraining().objective(model, hyper, data_of(some, 2), LINF)(some)
    with torch.no_grad():
        logits = model(some.images)
        weights = model[1].weight
        own, other = some.labels, 1 - some.labels
        margin = logits.gather(1, own[:, None])[:, 0] - logits.gather(1, other[:, None])[:, 0]
        fall = LINF.radius * (weights[own] - weights[other]).abs().sum(dim=1)
        expected = 0.25 * functional.softplus(-margin).mean() + 0.75 * functional.softplus(-(margin - fall)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pgd_training_reaches_the_worst_case_of_a_linear_network() -> None:
    """With two classes and L2, the worst case is a step of length eps along the weight difference."""
    model, some = linear(), batch(classes=2)
    method = PgdTraining()
    threat = ThreatModel.parse("l2", "1/10")  # the ball stays inside the pixel box
    hyper = dataclasses.replace(method.defaults(data_of(some, 2), threat), steps=50, ramp=0.0)
    loss = method.objective(model, hyper, data_of(some, 2), threat)(some)
    with torch.no_grad():
        logits, weights = model(some.images), model[1].weight
        own, other = some.labels, 1 - some.labels
        margin = (logits.gather(1, own[:, None]) - logits.gather(1, other[:, None]))[:, 0]
        worst = margin - 0.1 * (weights[own] - weights[other]).norm(dim=1)
    assert loss.item() == pytest.approx(functional.softplus(-worst).mean().item(), rel=1e-3)


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_trades_finds_disagreement_inside_the_ball(threat: ThreatModel) -> None:
    model, some = network(), batch()
    hyper = TradesHyper(architecture="mlp-9", epochs=1, steps=10, step_size=threat.radius / 4)
    found = least_agreeing(model, some, threat=threat, hyper=hyper)
    assert bool(threat.contains(found, some.images).all())
    with torch.no_grad():
        clean = model(some.images).softmax(dim=1)

        def divergence(images: Tensor) -> Tensor:
            moved = model(images).softmax(dim=1)
            return (clean * (clean / moved).log()).sum(dim=1)

        random = threat.start(some.images, some.noise(threat.norm))
        assert bool((divergence(found) > divergence(random)).all())


def test_trades_loss_is_the_paper_s_sum() -> None:
    """CE(f(x), y) + beta KL(f(x) || f(x')), eq. 5; without beta it is the clean loss."""
    model, some = network(), batch()
    losses = {}
    for beta in (0.0, 1.0, 6.0):
        hyper = TradesHyper(architecture="mlp-9", epochs=1, steps=3, step_size=0.03, beta=beta)
        same_draws = Batch(some.images, some.labels, 0.0, generator("draws"))
        losses[beta] = Trades().objective(model, hyper, data_of(some), LINF)(same_draws).item()
    clean = functional.cross_entropy(model(some.images), some.labels).item()
    assert losses[0.0] == pytest.approx(clean, rel=1e-6)
    assert losses[1.0] > clean
    assert losses[6.0] - clean == pytest.approx(6 * (losses[1.0] - clean), rel=1e-4)


def test_perturbations_are_made_in_eval_mode_and_leave_no_gradients() -> None:
    """Batch statistics move by the loss's own passes alone, and parameters get gradients from the loss alone."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    some, method = batch(done=0.5), PgdTraining()
    method.objective(model, method.defaults(data_of(some), LINF), data_of(some), LINF)(some)
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[arg-type]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def intervals(model: nn.Sequential, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
    """Interval bounds on the margins of a perceptron with one hidden layer, written out by hand."""
    first, last = model[1], model[3]
    centre, half = ((lower + upper) / 2).flatten(1), ((upper - lower) / 2).flatten(1)
    middle, spread = centre @ first.weight.T + first.bias, half @ first.weight.abs().T  # type: ignore[operator, union-attr]
    low, high = (middle - spread).relu(), (middle + spread).relu()
    rows = []
    for place, label in enumerate(labels.tolist()):
        for other in (k for k in range(len(last.bias)) if k != label):  # type: ignore[arg-type]
            weight = last.weight[label] - last.weight[other]  # type: ignore[index]
            offset = last.bias[label] - last.bias[other]  # type: ignore[index]
            rows.append(weight.clamp(min=0) @ low[place] + weight.clamp(max=0) @ high[place] + offset)
    return torch.stack(rows).view(len(labels), -1)


def test_ibp_loss_is_the_paper_s_mixture() -> None:
    """kappa CE(z) + (1 - kappa) CE(worst logits), half-way up the ramp, against interval arithmetic by hand."""
    model = network()
    hyper = IbpHyper(architecture="mlp-9", epochs=1, warmup=0.0, ramp=1.0, kappa=0.2, eps_scale=1.5)
    some = batch(done=0.5)
    loss = Ibp().objective(model, hyper, data_of(some), LINF)(some)
    radius, kappa = 0.5 * 1.5 * LINF.radius, 1 - 0.8 * 0.5
    margins = intervals(model, some.images - radius, some.images + radius, some.labels)
    worst = torch.cat([torch.zeros(len(margins), 1), -margins], dim=1)
    verified = functional.cross_entropy(worst, torch.zeros(len(margins), dtype=torch.long))
    clean = functional.cross_entropy(model(some.images), some.labels)
    assert loss.item() == pytest.approx((kappa * clean + (1 - kappa) * verified).item(), rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_crown_ibp_hands_over_to_intervals() -> None:
    """At the end of the ramp beta is zero and the loss is IBP's; before, tighter bounds make it smaller."""
    model, some = network("mlp-20-20"), batch()
    shared = {"architecture": "mlp-20-20", "epochs": 1, "warmup": 0.0, "ramp": 0.5, "kappa": 0.0}
    ibp = Ibp().objective(model, IbpHyper(**shared), data_of(some), LINF)  # type: ignore[arg-type]
    crown = CrownIbp().objective(model, CrownIbpHyper(**shared), data_of(some), LINF)  # type: ignore[arg-type]
    late, early = batch(done=0.9), batch(done=0.25)
    assert crown(late).item() == pytest.approx(ibp(late).item(), rel=1e-6)
    assert crown(early).item() < ibp(early).item()


@pytest.mark.parametrize("method", [Ibp, CrownIbp])
def test_warm_up_is_clean_training(method: type[Ibp] | type[CrownIbp]) -> None:
    model, some = network(), batch(done=0.01)
    loss = method().objective(model, CrownIbpHyper(architecture="mlp-9", epochs=1), data_of(some), LINF)(some)
    assert loss.item() == functional.cross_entropy(model(some.images), some.labels).item()


def test_verified_cross_entropy_is_that_of_the_worst_logits() -> None:
    margins = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    expected = [math.log(1 + math.exp(-2) + math.exp(1)), math.log(1 + math.exp(-0.5) + math.exp(-3))]
    assert verified_cross_entropy(margins).item() == pytest.approx(sum(expected) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["ibp", "crown-ibp"])
def test_interval_methods_refuse_l2_in_a_sentence(name: str) -> None:
    data, defense = data_of(batch()), registry.create(name)
    reason = defense.unsuited(data, L2)
    assert reason == f"{name} trains on interval bounds of L-inf boxes, so it does not suit an l2 track."
    with pytest.raises(DefenseError, match="does not suit an l2 track"):
        defense.fit(data, L2, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore())


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_defaults_exist_for_every_kind_of_image(name: str, shape: tuple[int, int, int]) -> None:
    """Small grey images get a perceptron, colour images are augmented; two-layer networks are their own."""
    split = Split(torch.rand(50, *shape), torch.arange(50) % 10)
    hyper = registry.create(name).hyper(TrainingData("any", split, split, 10), LINF)
    if name == "convex":
        assert (hyper.architecture, hyper.augment) == ("two-layer", False)
        return
    assert hyper.architecture == ("mlp-100-50" if shape == (1, 8, 8) else "cnn-small")
    assert hyper.augment == (shape[0] == 3)
