"""Targeted FAB, the fast adaptive boundary attack (Croce & Hein 2020, arXiv 1907.02044, alg. 1).

It looks for the nearest misclassified image: the model is replaced by its linearisation at the current point, the
hyperplane between the label and the target is approached from the current point and from the clean image at once, and
whenever a point is misclassified a step back towards the clean image is taken. The constants are those of AutoAttack's
standard version (arXiv 2003.01690); there is no random start, so there is nothing to draw.

What is asked here is only whether there is such an image in a given ball, so an example stops where FAB alone would go
on to come still nearer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustboard.attacks.guards import require_eval, require_finite, require_shape
from robustboard.attacks.kernels.hyperplane import displacement
from robustboard.attacks.kernels.survivors import Survivors
from robustboard.attacks.steepest import gradient_at
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import TrackError

# The names of the paper: the largest weight of the clean image, the overshoot, and the step back.
_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9
_SHORTEST_WAY = 1e-8
# The misclassified points worth a query at their projection: those that one step back would carry into the ball.
_REACH = 1 / _BETA
# A backward pass through a small network costs about three forward passes, and the pass that looked at a point can be
# carried on only for all examples at once: it pays if at most so many of them have stepped back since.
_MOST_STEPPED_BACK = 0.25


def fab_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    targets: Tensor | None = None,
    most: int = 9,
    steps: int = 100,
) -> Tensor:
    """One run of FAB towards each of the likeliest other classes.

    An example leaves at the first misclassified image inside the ball, whatever its class. A misclassified point just
    outside is projected onto the ball and asked about there, once for every approach. Nothing is random, and the
    verdict of an example does not depend on the others.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, on the model's device.
        labels: int64 (N,).
        threat: the ball.
        targets: bool (N, K), the classes that may still be reached; None for all.
        most: how many target classes are tried for each example, likeliest first; AutoAttack's standard is 9.
        steps: of a run.

    Returns:
        (N, C, H, W): the misclassified image where one was found, the clean image elsewhere; all satisfy
        `threat.contains`.

    Raises:
        TrackError: for no steps or no targets.
        ModelError: if the model is in training mode, or its logits or input gradients are missing or not finite.
    """
    require_eval(model)
    if steps < 1 or most < 1:
        raise TrackError(f"FAB needs at least one step and one target class, not {steps} and {most}.")
    if not len(images):
        return images.clone()
    survivors = Survivors(model, images, labels)
    for rows, classes in survivors.rounds(targets, most):
        with torch.no_grad():
            _Run(survivors, threat, rows, classes).go(steps)
    return survivors.adversarial


class _Run:
    """One run towards a class for each example; who is broken leaves it.

    Attributes:
        rows: whom the run still attacks, int64 (R,).
        classes: their targets, int64 (R,).
        places: (2, R, d), the current points before the clean images.
        nearest: the distance of the nearest misclassified point so far, (R,).
    """

    def __init__(self, survivors: Survivors, threat: ThreatModel, rows: Tensor, classes: Tensor) -> None:
        self._survivors, self._threat = survivors, threat
        self.rows, self.classes = rows, classes
        clean = survivors.images[rows].flatten(1)
        self.places = clean.expand(2, -1, -1).clone()
        self.nearest = clean.new_full((len(rows),), _REACH * threat.radius)
        self._labels = survivors.labels[rows]
        self._look: tuple[Tensor, Tensor, Tensor] | None = None

    def go(self, steps: int) -> None:
        """Make so many steps, or as many as it takes to break everybody."""
        for step in range(steps):
            self._judge(self._moved(*self._linearised()), last=step + 1 == steps)
            if not len(self.rows):
                return

    def _linearised(self) -> tuple[Tensor, Tensor]:
        """The target's logit less the label's at the current points, (R,), and its gradient there, (R, d)."""
        if self._look is None:
            return self._slope(*self._forward(self.places[0]), slice(None))
        pixels, logits, back = self._look
        value, gradient = self._slope(pixels, logits, slice(None))
        if not len(back):
            return value, gradient
        # Not in place: the gradient of a sum over pixels is one number expanded, whose memory is shared.
        values, gradients = self._slope(*self._forward(self.places[0][back]), back)
        return value.index_copy(0, back, values), gradient.index_copy(0, back, gradients)

    def _slope(self, pixels: Tensor, logits: Tensor, part: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Value and gradient from a pass of a part of the examples; the parameters get no gradient."""
        with torch.enable_grad():
            ends = torch.stack((self.classes[part], self._labels[part]), dim=1)
            target, label = logits.gather(1, ends).unbind(dim=1)
            value = target - label
            total = value.sum()
        return value.detach(), gradient_at(pixels, total).flatten(1)

    def _forward(self, points: Tensor, *, graph: bool = True) -> tuple[Tensor, Tensor]:
        """The points as images, and their logits."""
        pixels = points.view(-1, *self._survivors.images.shape[1:]).detach()
        with torch.set_grad_enabled(graph):
            logits: Tensor = self._survivors.model(pixels.requires_grad_(graph))
        require_shape(logits, len(points), self._survivors.logits.shape[1])
        require_finite(logits, "logits")
        return pixels, logits

    def _moved(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The next points, (R, d): beyond the hyperplane by eta, and drawn to the clean image by alpha."""
        points, clean = self.places
        gone = points - clean
        require_finite(gradient, "input gradients")
        values = torch.stack((value, value - torch.linalg.vecdot(gradient, gone)))
        ways = displacement(self.places, gradient, values, self._threat.norm)
        lengths = self._length(ways).clamp(min=_SHORTEST_WAY)
        alpha = (lengths[0] / lengths.sum(dim=0)).clamp(max=_ALPHA_MAX).unsqueeze(1)
        drawn = torch.addcmul(points, gone, -alpha)
        return drawn.addcmul_(ways[0], _ETA * (1 - alpha)).addcmul_(ways[1], _ETA * alpha).clamp_(0.0, 1.0)

    def _judge(self, tips: Tensor, *, last: bool) -> None:
        """Keep what is misclassified inside the ball, and step back from what is misclassified outside."""
        pixels, logits = self._forward(tips, graph=not last)
        fooled = logits.argmax(dim=1) != self._labels
        gone = tips - self.places[1]
        length = self._length(gone)
        closer = fooled & (length < self.nearest)
        self.nearest = torch.where(closer, length, self.nearest)
        self.places[0] = torch.addcmul(tips, gone, (_BETA - 1) * fooled.unsqueeze(1))
        held = self._ask(closer.nonzero().flatten(), tips)
        if held is not None:
            self._look = None
            self._compact(held)
        else:
            back = fooled.nonzero().flatten()
            self._look = (pixels, logits, back) if len(back) <= _MOST_STEPPED_BACK * len(fooled) else None

    def _ask(self, part: Tensor, tips: Tensor) -> Tensor | None:
        """Query the projections onto the ball of a part of the points; who is left, or None if that is everybody."""
        if not len(part):
            return None
        rows = self.rows[part]
        clean = self._survivors.images[rows]
        points = self._threat.project(tips[part].view_as(clean), clean)
        held = self._survivors.note(rows, points, self._survivors.model(points))
        if bool(held.all()):
            return None
        left = torch.ones_like(self.rows, dtype=torch.bool)
        left[part] = held
        return left

    def _compact(self, left: Tensor) -> None:
        self.rows, self.classes, self._labels = self.rows[left], self.classes[left], self._labels[left]
        self.places, self.nearest = self.places[:, left], self.nearest[left]

    def _length(self, ways: Tensor) -> Tensor:
        """The norm of each way, over the last dimension."""
        return ways.abs().amax(dim=-1) if self._threat.norm == "linf" else torch.linalg.vector_norm(ways, dim=-1)
