"""The fast attack: short targeted APGD runs, each of which begins with what the example's earlier runs have learned.

Its parts are known. The margin of probabilities as loss is PMA's (Xie et al. 2024, arXiv 2411.15210); that few targets
are tried, those to which a short attack came nearest, is the MM attack's (Gao et al. 2022, arXiv 2206.07314); that
starts are learned and hopeless examples abandoned is A3's (Liu et al. 2022, arXiv 2203.05154). A3 learns from the
examples that it has broken and abandons a share of the examples; here an example learns from its own runs alone and is
abandoned by a rule of its own, so that its verdict does not depend on who else is attacked.

It has neither FAB nor an attack without gradients, so a network that hides its gradients looks robust to it.
benchmarks/noninferiority.py compares it with the cascade's attacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.kernels.apgd import Objective, ascend_from
from robustboard.attacks.kernels.survivors import Survivors
from robustboard.attacks.threat import ThreatModel

# Two rounds for everybody, the later ones for whom they have brought near: targets and steps of a round.
_FIRST_ROUNDS, _FIRST_TARGETS, _FIRST_STEPS = 2, 3, 20
_LATER_ROUNDS, _LATER_TARGETS, _LATER_STEPS = 10, 2, 10
# Near is what has lost all but this share of its clean margin. Of ten networks no example that the first rounds left
# farther away was broken by ten later rounds.
_NEAR = 0.3
# The probabilities are those of logits scaled so that the clean margin is this: at their own scale a network with large
# logits has probabilities of exactly 0 and 1, and no gradient.
_CLEAN_MARGIN, _SMALLEST_MARGIN = 4.0, 1e-6

FORWARDS = 1 + _FIRST_ROUNDS * _FIRST_TARGETS * (_FIRST_STEPS + 1) + _LATER_ROUNDS * _LATER_TARGETS * (_LATER_STEPS + 1)
"""Forward passes of an example that survives all rounds; one that is abandoned costs 127. For progress bars only."""


def fast(
    model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, keys: Sequence[str], seed: int
) -> Tensor:
    """Rounds of short APGD runs towards the classes that came nearest so far.

    The first round starts at the clean image and the second at a random point of the ball. Each later one starts at a
    random point around the nearest image so far, with only those examples that have come near. Rounds take the margin
    of probabilities and the margin of logits by turns: examples that one of them leads into a dead end are the other's.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images.
        labels: int64 (N,).
        threat: the ball.
        keys: what each example's draws are keyed by, N content hashes.
        seed: of the draws.

    Returns:
        (N, C, H, W): the misclassified image of the ball where one was found, the clean image elsewhere.

    Raises:
        ModelError: if the model is in training mode, or its logits or input gradients are missing or not finite.
    """
    survivors = _Nearest(model, images, labels)
    clean = survivors.margins.clone()
    losses = _probability_margin(_CLEAN_MARGIN / clean.neg().clamp(min=_SMALLEST_MARGIN)), _logit_margin
    for number in range(_FIRST_ROUNDS + _LATER_ROUNDS):
        first = number < _FIRST_ROUNDS
        worth = torch.ones_like(survivors.broken) if first else survivors.margins >= _NEAR * clean
        for place, rows, goal in survivors.round(_FIRST_TARGETS if first else _LATER_TARGETS, worth):
            starts = images[rows]
            if number:
                words = (seed, "fast", number, place)
                centres = starts if first else survivors.nearest[rows]
                starts = _around(centres, starts, threat, [keys[row] for row in rows.tolist()], words)
            steps = _FIRST_STEPS if first else _LATER_STEPS
            ascend_from(survivors, rows, goal, losses[number % 2], starts, threat, steps)
    return survivors.adversarial


class _Nearest(Survivors):
    """Examples under attack, and how near their runs have come: every pass that an attack looks at teaches.

    Attributes:
        gaps: (N, K), the largest lead of each class over the label so far; minus infinity for the label.
        margins: (N,), the largest of them, negative while the example is unbroken.
        nearest: (N, C, H, W), the image where it was reached.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__(model, images, labels)
        self.gaps = _leads(self.logits, labels)
        self.margins = self.gaps.amax(dim=1)
        self.nearest = images.clone()

    def note(self, rows: Tensor, points: Tensor, logits: Tensor) -> Tensor:
        """As `Survivors.note`; learns from what the points came to."""
        held = super().note(rows, points, logits)
        leads = _leads(logits, self.labels[rows])
        self.gaps[rows] = torch.maximum(self.gaps[rows], leads)
        margins = leads.amax(dim=1)
        better = margins > self.margins[rows]
        self.margins[rows[better]], self.nearest[rows[better]] = margins[better], points.detach()[better]
        return held

    def round(self, targets: int, worth: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each place of the ranking by nearness, as it stands now, those who are wanted and unbroken.

        Args:
            targets: how many places.
            worth: who is worth a try, bool (N,).

        Yields:
            The place, rows, int64 (R,), and their goals, int64 (R, 3): label, target class and row.
        """
        ranking = self.gaps.argsort(dim=1, descending=True, stable=True)[:, :-1]
        for place in range(min(targets, ranking.shape[1])):
            rows = (worth & ~self.broken).nonzero().flatten()
            if len(rows):
                yield place, rows, torch.stack([self.labels[rows], ranking[rows, place], rows], dim=1)


def _leads(logits: Tensor, labels: Tensor) -> Tensor:
    """Each class's logit less the label's, (R, K); minus infinity for the label."""
    own = labels[:, None]
    return (logits - logits.gather(1, own)).scatter(1, own, -math.inf)


def _logit_margin(logits: Tensor, goal: Tensor) -> Tensor:
    own, target = logits.gather(1, goal[:, :2]).unbind(dim=1)
    return target - own


def _probability_margin(scales: Tensor) -> Objective:
    """The margin of the probabilities of logits times `scales`, (N,)."""
    return lambda logits, goal: _logit_margin((logits * scales[goal[:, 2], None]).softmax(dim=1), goal)


def _around(
    centres: Tensor, images: Tensor, threat: ThreatModel, keys: Sequence[str], words: Sequence[str | int]
) -> Tensor:
    """A random point about each centre, at up to a radius from it, in the ball around the image."""
    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    noise = draw(keys, images.shape[1:], *words).to(images.device)
    return threat.project(threat.start(centres, noise), images)
