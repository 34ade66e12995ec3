"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search that asks for logits alone.

Each query redraws the perturbation inside one square (L-inf), or moves the budget of two squares into one (L2), and
keeps the result where the margin grows; `square_moves` says how. As in AutoAttack's standard version there is one run,
with p = 0.8 at first, halved at fixed queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustboard.attacks.guards import require_eval, require_finite, require_shape
from robustboard.attacks.kernels.square_moves import LEAST_SIDE, MOVES, TABLE, Moves
from robustboard.attacks.kernels.survivors import Survivors
from robustboard.attacks.losses import margin_loss
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import TrackError

# Looking for the broken waits for the device, and taking them out copies the others.
_LOOK_EVERY = 8


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    queries: int = 5000,
) -> Tensor:
    """Square Attack with the margin loss, one run, and AutoAttack's schedule of sizes.

    The start depends on (seed, key), the squares on (seed, query), and the signs of L2 on (seed, query, key), so
    neither the batch nor the order matters. The schedule is not drawn together for fewer queries: the first of many
    queries are those of few.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K). No gradient is asked for.
        images: the clean images, on the model's device.
        labels: int64 (N,).
        threat: the ball.
        keys: a content hash an example, `keyed.content_hash`.
        seed: of all draws.
        queries: how many squares are tried; each is one forward pass of the examples that are left.

    Returns:
        (N, C, H, W): the misclassified image where one was found, the clean image elsewhere; all satisfy
        `threat.contains`.

    Raises:
        TrackError: for no queries, or images below 5 x 5 pixels in L2, where the attack is not defined.
        ModelError: if the model is in training mode, or its logits are not finite numbers of shape (N, K).
    """
    require_eval(model)
    if queries < 1:
        raise TrackError(f"Square Attack needs at least one query, not {queries}.")
    if threat.norm == "l2" and min(images.shape[-2:]) < LEAST_SIDE:
        size = " x ".join(str(side) for side in images.shape[-2:])
        raise TrackError(f"Square Attack in L2 needs images of at least 5 x 5 pixels, not {size}; leave it out.")
    if not len(images):
        return images.clone()
    survivors = Survivors(model, images, labels)
    rows = survivors.left()
    if len(rows):
        moves = MOVES[threat.norm](threat, images[rows], [keys[row] for row in rows.tolist()], seed)
        # Not inference mode: what a model caches in a forward pass must still serve gradient attacks later.
        with torch.no_grad():
            _Search(survivors, rows, threat, moves).run(queries)
    return survivors.adversarial


class _Search:
    """The common loop: propose, query, and keep what raises the margin."""

    def __init__(self, survivors: Survivors, rows: Tensor, threat: ThreatModel, moves: Moves) -> None:
        self._survivors, self._rows, self._threat, self._moves = survivors, rows, threat, moves
        self._labels = survivors.labels[rows]
        self._recent: list[Tensor] = []
        self._margins = torch.empty(0)

    def run(self, queries: int) -> None:
        """Ask up to `queries` times beside the start; stop as soon as nobody is left."""
        self._margins = self._query()
        self._release()
        for first in range(0, queries, TABLE):
            if not len(self._rows):
                return
            self._moves.deal(first)
            for query in range(first, min(first + TABLE, queries)):
                self._moves.propose(query - first)
                margins = self._query()
                # A point is only ever replaced by one of a larger margin, so the broken ones that are still here stay
                # broken. A first misclassification is such a rise too: until then the margin was negative.
                self._moves.settle((margins > self._margins).view(-1, 1, 1, 1))
                self._margins = torch.maximum(margins, self._margins)
                if (query + 1) % _LOOK_EVERY == 0 or query + 1 == queries:
                    self._release()
                    if not len(self._rows):
                        return

    def _query(self) -> Tensor:
        logits = self._survivors.model(self._moves.points)
        require_shape(logits, len(self._rows), self._survivors.logits.shape[1])
        self._recent.append(logits)
        return margin_loss(logits, self._labels)

    def _release(self) -> None:
        """Let the broken go, once the image that is handed out is seen to be misclassified."""
        require_finite(torch.cat(self._recent), "logits")
        self._recent.clear()
        fallen = (self._margins >= 0).nonzero().flatten()
        if not len(fallen):
            return
        rows = self._rows[fallen]
        points = self._threat.project(self._moves.points[fallen], self._survivors.images[rows])
        held = self._survivors.note(rows, points, self._survivors.model(points))
        staying = torch.ones_like(self._rows, dtype=torch.bool)
        staying[fallen] = held
        left = staying.nonzero().flatten()
        if len(left) < len(self._rows):
            self._rows, self._labels, self._margins = self._rows[left], self._labels[left], self._margins[left]
            self._moves.keep(left)
