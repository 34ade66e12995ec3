"""Reading a classifier: what is read is the classifier, and what cannot be read is refused with a sentence."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustboard.attacks.complete.network import ReluNetwork
from robustboard.attacks.complete.reduction import reduce_to_box
from robustboard.attacks.counting import PassCounter
from robustboard.defenses.architectures import Normalize
from robustboard.errors import BoundsError


def dense(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.second, self.skip = nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(4, 5, 1, stride=2)
        self.norm, self.out = nn.BatchNorm2d(5), nn.Linear(5, 5)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = torch.relu(self.second(functional.relu(self.norm(self.first(x)))) + self.skip(x))
        return self.out(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Scaled(nn.Module):
    """Normalisation by hand, a reshape by the image's own size, a change of type, and a weighted difference."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4]).view(-1, 1, 1))
        self.hidden, self.out = nn.Linear(64, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = ((x.float() - self.mean) / 0.3).view(x.shape[0], -1)
        return 2 * self.out(self.hidden(x).relu()) - 0.5


def batch_norm() -> nn.Sequential:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(-1, 1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), norm, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5)
    )


def normalised() -> nn.Sequential:
    return nn.Sequential(Normalize(torch.tensor([0.3]), torch.tensor([0.2])), *dense(64, 8, 6, 5))


class InPlace(nn.Module):
    """The usual residual block: sums and ReLUs in place, of what nobody reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.out = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(256, 5)

    def forward(self, x):
        x = self.relu(self.stem(x))
        out = self.norm(self.inner(x))
        out += x
        out *= 0.5
        return self.out(self.relu(out).flatten(1))


def weight_normalised() -> nn.Sequential:
    model = dense(64, 10, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the hook's successor is a parametrization
        nn.utils.weight_norm(model[1])
        nn.utils.spectral_norm(model[3])
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, 8, 8))
    return model


NETWORKS = {
    "in place": InPlace,
    "dense": lambda: dense(64, 10, 8, 5),
    "linear": lambda: dense(64, 5),
    "convolution and batch normalisation": batch_norm,
    "normalised": normalised,
    "residual": Residual,
    "written by hand": Scaled,
}


@pytest.fixture(params=sorted(NETWORKS))
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NETWORKS[request.param]().eval()


def test_the_reading_has_the_models_logits(model):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = ReluNetwork(model, images[:1])
    torch.testing.assert_close(network.logits(images), model(images).double(), atol=1e-5, rtol=0)


def test_the_reduced_network_is_the_network_on_its_box(model):
    """What is folded away is folded exactly: at points of the box all margins agree to float64 precision."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(64, generator=generator, dtype=torch.float64)
    lower, upper = (image - 0.2).clamp(min=0), (image + 0.2).clamp(max=1)
    network = ReluNetwork(model, torch.zeros(1, 1, 8, 8))
    problem = reduce_to_box(
        network, lower, upper, label=2, targets=(0, 1, 4), classes=5, iterations=5, memory_bytes=1 << 30
    )
    points = lower + (upper - lower) * torch.rand(50, 64, generator=generator, dtype=torch.float64)
    logits = network.logits(points.view(-1, 1, 8, 8))
    expected = logits[:, [2]] - logits[:, [0, 1, 4]]
    torch.testing.assert_close(problem.network.evaluate(problem.margins, points), expected, atol=1e-10, rtol=0)
    assert (network.layers == 0) == (len(problem.network) == 0), "a ball this large leaves neurons unstable"


def test_what_was_read_does_not_follow_the_model(model):
    """The copy is the model of that moment, and the model is left as it was."""
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    before = model(image)
    network = ReluNetwork(model, image)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(image), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(network.logits(image), before.double(), atol=1e-5, rtol=0)


class Squares(nn.Module):
    def forward(self, x):
        return (x * x).flatten(1)


class Ratio(nn.Module):
    def forward(self, x):
        x = x.flatten(1)
        return 1 / (x + 1)


class Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class ByName(nn.Module):
    """The image's features given to an operation by name: the second factor is easily overlooked."""

    def forward(self, x):
        x = x.flatten(1)
        return torch.mul(x, other=x)


class Truncated(nn.Module):
    def forward(self, x):
        return torch.div(x.flatten(1), 0.05, rounding_mode="trunc")


class NamedFlatten(nn.Module):
    def forward(self, x):
        return torch.flatten(input=x, start_dim=1)


class Size(nn.Module):
    """A layer whose name is that of a tensor's method."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Hardshrink(0.05)

    def forward(self, x):
        x = x.flatten(1)
        return 0.0 * x + self.size(x)


class WritesOverASum(nn.Module):
    """`other` is the same tensor as `z`, and so is what is added to it."""

    def forward(self, x):
        other = z = 2.0 * x.flatten(1)
        z += torch.relu(x.flatten(1) - 0.5)
        return other


class WritesOverAView(nn.Module):
    def forward(self, x):
        hidden = x - 0.5
        kept = hidden.flatten(1)
        return functional.relu(hidden, inplace=True).flatten(1) + kept


class WritesOverItsInput(nn.Module):
    def forward(self, x):
        x -= 0.5
        return x.flatten(1)


def written_by_a_layer() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            hidden = x.flatten(1) - 0.5
            return self.relu(hidden) + hidden

    return Net()


def hooked(register: str) -> nn.Module:
    model = dense(64, 5)
    # `None` leaves everything as it is, but what a hook does cannot be read.
    getattr(model[1], register)(lambda *_: None)
    return model


def patched() -> nn.Module:
    model = dense(64, 5)
    linear = model[1]
    linear.forward = lambda x: functional.linear(x, linear.weight, linear.bias).abs()
    return model


OVER = "write over what they read again"
REFUSED = {
    "a product by name": (ByName(), "mul"),
    "a division that rounds": (Truncated(), "div"),
    "flatten by name": (NamedFlatten(), "flatten"),
    "a layer named size": (Size(), "Hardshrink"),
    "a sum in place": (WritesOverASum(), OVER),
    "a view of what is written over": (WritesOverAView(), OVER),
    "a layer in place": (written_by_a_layer(), OVER),
    "the image written over": (WritesOverItsInput(), "write over their input"),
    "a hook": (hooked("register_forward_hook"), "forward hooks"),
    "a pre-hook": (hooked("register_forward_pre_hook"), "forward hooks"),
    "a forward of its own": (patched(), "Linear"),
    "max pooling": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 5)), "MaxPool2d"),
    "sigmoid": (nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Sigmoid()), "Sigmoid"),
    "leaky": (nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.LeakyReLU()), "LeakyReLU"),
    "a product of activations": (Squares(), "mul"),
    "a division by activations": (Ratio(), "truediv"),
    "a decision on the input": (Branches(), "cannot trace"),
    "batch statistics": (
        nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 5)),
        "BatchNorm2d",
    ),
    "a shape fixed in code": (nn.Sequential(nn.Unflatten(1, (3, 7)), nn.Flatten()), "cannot run"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_other_operations_are_refused_by_name(case):
    model, words = REFUSED[case]
    with pytest.raises(BoundsError, match=words):
        ReluNetwork(model.eval(), torch.zeros(1, 1, 8, 8))


def test_the_projects_own_counter_is_no_obstacle():
    model = dense(64, 5).eval()
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with PassCounter(model) as counter:
        logits = ReluNetwork(model, images[:1]).logits(images)
    torch.testing.assert_close(logits, model(images).double(), atol=1e-5, rtol=0)
    assert counter.forwards == 0


def test_weights_normalised_by_hooks_are_read():
    model = weight_normalised()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).double()
    torch.testing.assert_close(ReluNetwork(model, images[:1]).logits(images), expected, atol=1e-4, rtol=1e-5)


def test_a_neuron_without_finite_bounds_is_refused():
    model = dense(64, 3, 5)
    with torch.no_grad():
        model[1].bias[0] = -torch.inf
    ends = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    with pytest.raises(BoundsError, match="without finite bounds"):
        reduce_to_box(
            ReluNetwork(model, torch.zeros(1, 1, 8, 8)),
            *ends,
            label=0,
            targets=(1,),
            classes=5,
            iterations=0,
            memory_bytes=1 << 30,
        )


def test_a_network_that_is_too_large_is_refused():
    network = ReluNetwork(dense(64, 50, 50, 5), torch.zeros(1, 1, 8, 8))
    with pytest.raises(BoundsError, match="unstable neurons needs over"):
        reduce_to_box(
            network,
            torch.zeros(64, dtype=torch.float64),
            torch.ones(64, dtype=torch.float64),
            label=0,
            targets=(1,),
            classes=5,
            iterations=0,
            memory_bytes=1000,
        )
