"""Robust training of two-layer ReLU networks in their convex, gated form (Kuelbs et al. 2024, arXiv 2405.14033).

Fixed gates g_p give every input its pattern s_p(x) = 1[g_p . x >= 0], and

    f(x) = sum_p s_p(x) (v_p - w_p) . x

is linear in v and w (Pilanci and Ergen 2020, arXiv 2002.10553). Where (2 s_p(x) - 1) v_p . x >= r |v_p|_* holds at
every training point, with the dual norm, and the same for w, the ReLU neuron of v_p is on or off over the whole ball
of radius r as the gate says. Then f is a ReLU network, and its worst margin over the ball is exactly that of a linear
function, e . x - r |e|_* (Bai et al. 2021, arXiv 2105.12237). `convex_relu_program` holds the constraints exactly;
here they are penalties, as in the authors' code, and the ReLU network that is deployed meets f where they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.threat import Norm
from robustboard.defenses.convex_features import FeatureMap
from robustboard.defenses.worst_margins import Comparisons

# A neuron below this share of the largest does not show in any logit.
_NEGLIGIBLE = 1e-6


class GatedNetwork(nn.Module):
    """The gated network under training.

    Args:
        features: what x stands for below; the ball is around its output.
        gates: g, (P, q).
        classes: K; two classes have one output f and the logits -f / 2 and f / 2.

    Attributes:
        positive: v, (P, q, O).
        negative: w, (P, q, O).
    """

    gates: Tensor

    def __init__(self, features: FeatureMap, gates: Tensor, *, classes: int) -> None:
        super().__init__()
        self.features, self.classes = features, classes
        self.register_buffer("gates", gates.detach().clone())
        shape = (*gates.shape, 1 if classes == 2 else classes)
        self.positive = nn.Parameter(gates.new_zeros(shape))
        self.negative = nn.Parameter(gates.new_zeros(shape))

    def patterns(self, x: Tensor) -> Tensor:
        """s, (N, P), of features (N, q)."""
        return (x @ self.gates.T >= 0).to(x)

    def effective(self, x: Tensor) -> Tensor:
        """The vectors e that the outputs are linear in at features (N, q): (N, O, q)."""
        return torch.einsum("np,pqo->noq", self.patterns(x), self.positive - self.negative)

    def size(self) -> Tensor:
        """The regulariser sum |v|_2 + |w|_2, a scalar; for the ReLU network, half of all squared weights."""
        return sum(
            (_lengths(part, "l2").sum() for part in (self.positive, self.negative)), torch.zeros(()).to(self.gates)
        )

    def violation(self, x: Tensor, *, norm: Norm, radius: float) -> Tensor:
        """By how much the constraints fail at features (N, q): the mean over examples of the sum, a scalar."""
        sides = 2 * self.patterns(x) - 1
        total = torch.zeros(()).to(x)
        for part in (self.positive, self.negative):
            kept = sides.unsqueeze(2) * torch.einsum("nq,pqo->npo", x, part)
            total = total + (radius * _lengths(part, norm) - kept).clamp(min=0).sum()
        return total / len(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, ...), with the gates as they are."""
        features = self.features(x)
        found = torch.einsum("noq,nq->no", self.effective(features), features)
        return torch.cat([-found / 2, found / 2], dim=1) if self.classes == 2 else found

    @torch.no_grad()
    def deployed(self) -> nn.Sequential:
        """The ReLU network of the inputs, in which v is the neuron v / sqrt(|v|) of weight sqrt(|v|), w of -sqrt(|w|).

        The neurons have no biases on the features: the first layer's biases are those of the features' centre, and the
        last layer's are zero.
        """
        vectors = torch.cat([self.positive.transpose(1, 2), -self.negative.transpose(1, 2)]).flatten(0, 1)
        signs = torch.ones_like(vectors[:, 0])
        signs[len(signs) // 2 :] = -1
        vectors = signs.unsqueeze(1) * vectors
        count = self.positive.shape[2]
        owners = functional.one_hot(torch.arange(len(vectors), device=vectors.device) % count, count).to(vectors)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        kept = lengths > _NEGLIGIBLE * lengths.max()
        if not bool(kept.any()):
            kept[0] = True
        roots = lengths[kept].sqrt().clamp(min=torch.finfo(lengths.dtype).tiny ** 0.5).unsqueeze(1)
        outputs = (signs[kept].unsqueeze(1) * roots * owners[kept]).T
        if self.classes == 2:
            outputs = torch.cat([-outputs / 2, outputs / 2])
        directions, offsets = self.features.folded(vectors[kept] / roots)
        # Interval bounds by auto_LiRPA need a bias in the last layer, be it zero.
        first, last = _linear(directions, offsets), _linear(outputs, torch.zeros_like(outputs[:, 0]))
        return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with these values; on the meta device its initialisation draws nothing from the global generator."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


def drawn_gates(features: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Normal gates (P, q), P <= count, with patterns on `features` (N, q) that differ and are not all off."""
    gates = torch.randn(count, features.shape[1], generator=draws, dtype=features.dtype)
    patterns = (gates @ features.T >= 0).to(torch.uint8)
    seen: dict[bytes, int] = {}
    for place, pattern in enumerate(patterns):
        if bool(pattern.any()):
            seen.setdefault(pattern.numpy().tobytes(), place)
    return gates[list(seen.values())] if seen else gates[:1]


def robust_loss(
    model: GatedNetwork, x: Tensor, comparisons: Comparisons, *, norm: Norm, radius: float, squared: bool = False
) -> Tensor:
    """The mean over examples of the sum over comparisons of the worst loss over the ball, exact under the constraints.

    Args:
        model: the network.
        x: features (N, q).
        comparisons: the margins of every example; the squared loss wants each output against the rest.
        norm: of the ball.
        radius: of the ball, in units of the features.
        squared: (1 - margin)^2 instead of max(0, 1 - margin).
    """
    mixed = torch.einsum("ro,noq->nrq", comparisons.mix, model.effective(x))
    vectors = mixed.gather(1, comparisons.rows.unsqueeze(2).expand(-1, -1, x.shape[1]))
    margins = comparisons.signs * torch.einsum("ncq,nq->nc", vectors, x)
    fall = radius * dual_lengths(vectors, norm)
    misses = (1 - margins).abs() + fall if squared else (1 - margins + fall).clamp(min=0)
    return (misses.square() if squared else misses).sum() / len(x)


def dual_lengths(vectors: Tensor, norm: Norm) -> Tensor:
    """How far a step of length one in `norm` moves a linear function: the L1 norm for L-inf, L2 for L2; (...)."""
    if norm == "linf":
        return vectors.abs().sum(dim=-1)
    # The square root has no gradient at zero, where the training starts.
    return (vectors.square().sum(dim=-1) + 1e-24).sqrt()


def _lengths(part: Tensor, norm: Norm) -> Tensor:
    return dual_lengths(part.transpose(1, 2), norm)
