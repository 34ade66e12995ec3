"""The classifier contract: every way in which a model can break it is found before any long work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustboard.defenses.contract import check_classifier, examine_classifier
from robustboard.errors import ModelError


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 48).view(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class Probabilities(Linear):
    def forward(self, x):
        return super().forward(x).softmax(1)


class NotANumber(Linear):
    def forward(self, x):
        logits = super().forward(x)
        return torch.where(torch.arange(len(x)).view(-1, 1) == 2, torch.nan, logits)


class Random(Linear):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.rand_like(x))


class BatchDependent(Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class OtherUnderAutograd(Linear):
    def forward(self, x):
        return super().forward(x) + (5.0 if torch.is_grad_enabled() else 0.0)


class Detached(Linear):
    def forward(self, x):
        return super().forward(x.detach()).detach()


class DetachedInput(Linear):
    """Its parameters still get a gradient, its input does not."""

    def forward(self, x):
        return super().forward(x.detach())


class Squeezed(Linear):
    def forward(self, x):
        return super().forward(x).squeeze(0)


class FailsUnderAutograd(Linear):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError("inference only")
        return super().forward(x)


class WrongShape(Linear):
    def forward(self, x):
        return super().forward(x)[:, :2]


class Double(Linear):
    def forward(self, x):
        return super().forward(x).double()


class Raises(Linear):
    def forward(self, x):
        raise RuntimeError("size mismatch")


class NotATensor(Linear):
    def forward(self, x):
        return [super().forward(x)]


class NotANumberUnderAutograd(Linear):
    def forward(self, x):
        return super().forward(x) * (torch.nan if torch.is_grad_enabled() else 1.0)


class WiderUnderAutograd(Linear):
    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits, logits], dim=1) if torch.is_grad_enabled() else logits


class DoubleUnderAutograd(Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.double() if torch.is_grad_enabled() else logits


class AltersItsInput(Linear):
    def forward(self, x):
        if not torch.is_grad_enabled():
            x.data.mul_(0.5)
        return super().forward(x)


class AltersItsInputUnderAutograd(Linear):
    def forward(self, x):
        if torch.is_grad_enabled():
            x.data.mul_(0.5)
        return super().forward(x)


IMAGES = torch.linspace(0, 1, 4 * 16).view(4, 1, 4, 4)


def test_an_honest_classifier_passes():
    check_classifier(Linear().eval(), IMAGES, classes=3)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Probabilities, "probabilities instead of logits"),
        (NotANumber, "NaN or infinite logits for 1 of 4"),
        (Random, "differently the second time"),
        (BatchDependent, "differently alone than in a batch"),
        (OtherUnderAutograd, "differently when gradients are recorded"),
        (Detached, "No gradient reaches"),
        (DetachedInput, "No gradient reaches"),
        (FailsUnderAutograd, "gradients are recorded: RuntimeError: inference only"),
        (Squeezed, r"shape \(N, 3\).*1 images.*\(3,\)"),
        (WrongShape, r"shape \(N, 3\).*\(4, 2\)"),
        (Double, "float32 logits, not float64"),
        (Raises, "RuntimeError: size mismatch"),
        (NotATensor, "not list"),
        (NotANumberUnderAutograd, "differently when gradients are recorded"),
        (WiderUnderAutograd, r"shape \(N, 3\).*\(4, 6\)"),
        (DoubleUnderAutograd, "float32 logits, not float64"),
        (AltersItsInput, "alters the images that it is given"),
        (AltersItsInputUnderAutograd, "alters the images that it is given"),
    ],
)
def test_a_broken_rule_is_named(broken, sentence):
    with pytest.raises(ModelError, match=sentence):
        check_classifier(broken().eval(), IMAGES, classes=3)


def test_a_change_that_is_no_number_is_a_finite_one():
    """A record holds finite numbers only, and NaN is larger than no threshold."""
    found = examine_classifier(NotANumberUnderAutograd().eval(), IMAGES, classes=3)
    assert 1e38 < found.autograd_change < float("inf")


def test_a_refused_model_leaves_the_callers_images_alone():
    images = IMAGES.clone()
    with pytest.raises(ModelError, match="alters"):
        examine_classifier(AltersItsInput().eval(), images, classes=3)
    assert torch.equal(images, IMAGES)


def test_train_mode_is_refused():
    with pytest.raises(ModelError, match=r"model\.eval"):
        check_classifier(Linear(), IMAGES, classes=3)
