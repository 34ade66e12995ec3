"""What the board's own attacks share: who is left, what broke the others, and which classes are worth a try.

An example leaves an attack at the forward pass that misclassifies it, so what is broken costs nothing any more. Every
draw is keyed and every step is of one example alone, so a verdict does not depend on who else is attacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robustboard.attacks.guards import require_eval, require_logits


class Survivors:
    """Examples under attack.

    Attributes:
        model: the classifier, in eval mode.
        images: the clean images (N, C, H, W).
        labels: int64 (N,).
        logits: of the clean images, (N, K).
        adversarial: (N, C, H, W), the misclassified image where one was found, else the clean one.
        broken: bool (N,).

    Raises:
        ModelError: if the model is in training mode, or its logits are not finite numbers of shape (N, K).
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        require_eval(model)
        self.model, self.images, self.labels = model, images, labels
        self.adversarial = images.clone()
        with torch.no_grad():
            self.logits: Tensor = model(images)
        if len(labels):
            require_logits(self.logits, labels)
        self.broken = self.logits.argmax(dim=1) != labels

    def left(self) -> Tensor:
        """The indices of those that no image has broken yet, int64."""
        indices: Tensor = (~self.broken).nonzero().flatten()
        return indices

    def note(self, rows: Tensor, points: Tensor, logits: Tensor) -> Tensor:
        """Keep the images `points` of `rows` that are misclassified, and say which of them are not, bool (R,).

        Of an example that is noted more than once, the first image is kept.

        Raises:
            ModelError: if a logit is not a finite number.
        """
        require_logits(logits, self.labels[rows])
        held = logits.argmax(dim=1) == self.labels[rows]
        if not bool(held.all()):
            new = ~held & ~self.broken[rows]
            self.adversarial[rows[new]], self.broken[rows[new]] = points.detach()[new], True
        return held

    def rounds(self, targets: Tensor | None, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each place of the ranking the unbroken examples whose class of that place is worth a try.

        The ranking is that of the clean logits: first the likeliest other class.

        Args:
            targets: bool (N, K), the classes that may still be reached; None for all.
            most: how many places there are.

        Yields:
            Rows, int64 (R,), and their target classes, int64 (R,).
        """
        others = self.logits.scatter(1, self.labels[:, None], -math.inf)
        ranking = others.argsort(dim=1, descending=True, stable=True)[:, :-1]
        for place in range(min(most, ranking.shape[1])):
            rows = self.left()
            classes = ranking[rows, place]
            if targets is not None:
                wanted = targets[rows, classes]
                rows, classes = rows[wanted], classes[wanted]
            if len(rows):
                yield rows, classes
