"""Between two networks of one shape: the line of weights between them, and the best point of it that is allowed.

RiFT's last step (Zhu et al. 2023, arXiv 2308.02533, sec. 4): of the networks (1 - alpha) theta_AT + alpha theta_FT it
takes the one that generalises best without losing robust accuracy. The authors' code reads both accuracies off the test
set; here they come from a validation split, so what may be lost is a question of evidence (`noninferiority`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustboard.attacks.keyed import content_hash
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, Progress, Split
from robustboard.defenses.fingerprint import fingerprint
from robustboard.defenses.noninferiority import is_noninferior
from robustboard.defenses.training import device_of

Rule = Literal["paired", "mean"]
_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the point on the line is chosen.

    Attributes:
        grid: alpha takes the values 0, 1/grid, ..., 1.
        attack_steps: steps of the PGD that robust accuracy is measured with, a quarter of the radius each.
        rule: `paired` asks for evidence at `level` that less than `margin` of the robust accuracy is lost; `mean`, the
            paper's with margin 0.001, compares the two accuracies.
        margin: a share.
        level: of the one-sided test.
    """

    grid: int = 10
    attack_steps: int = 10
    rule: Rule = "paired"
    margin: float = 0.005
    level: float = 0.05

    def __post_init__(self) -> None:
        if self.grid < 1 or self.attack_steps < 1:
            raise ValueError(f"grid and attack_steps must be at least 1, not {self.grid} and {self.attack_steps}")
        if not (0 < self.margin < 1 and 0 < self.level < 1):
            raise ValueError(f"margin and level must lie in (0, 1), not {self.margin:g} and {self.level:g}")


@dataclass(frozen=True)
class Outcome:
    """What became of the validation examples at one point of the line.

    Attributes:
        alpha: where on the line, 0 at the parent and 1 at the tuned network.
        clean: boolean (N,), whether each image is classified correctly.
        robust: boolean (N,), whether it still is under attack; None where that could not change the choice.
    """

    alpha: float
    clean: Tensor
    robust: Tensor | None = None

    @property
    def correct(self) -> int:
        """How many images are classified correctly."""
        return int(self.clean.sum())


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha end of two states, buffers too; alpha = 0 and 1, and entries that agree, are exact.

    Entries that are not floating-point (counters) are the end's, except at alpha = 0.

    >>> interpolate({"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([1.0, 4.0])}, 0.25)
    {'w': tensor([0.2500, 4.0000])}
    """
    return {
        name: torch.lerp(value, end[name], alpha)
        if value.is_floating_point()
        else (value if alpha == 0 else end[name]).clone()
        for name, value in start.items()
    }


def is_admissible(parent: Outcome, point: Outcome, selection: Selection) -> bool:
    """Whether a point is known to keep the parent's robust accuracy, on the same examples."""
    if parent.robust is None or point.robust is None:
        return False
    if selection.rule == "paired":
        return is_noninferior(parent.robust, point.robust, margin=selection.margin, level=selection.level)
    lost = int(parent.robust.sum()) - int(point.robust.sum())
    # Counts, as a difference of two shares would not be exact.
    return lost <= selection.margin * len(parent.robust) * (1 + 1e-9)


def choose(outcomes: Sequence[Outcome], selection: Selection) -> Outcome:
    """The admissible point with the best clean accuracy, of equal ones the one nearest to the parent.

    The parent is always admissible. Under `paired` the points are tested in the order of alpha and the first that fails
    ends the tests: a fixed sequence of tests, unlike ten separate ones, keeps the level for all of them together. Under
    `mean` every point stands for itself, as in the authors' code.

    Args:
        outcomes: by rising alpha, the parent's (alpha = 0) first.
        selection: the rule.
    """
    parent = outcomes[0]
    allowed = [parent]
    for point in outcomes[1:]:
        if is_admissible(parent, point, selection):
            allowed.append(point)
        elif selection.rule == "paired":
            break
    return max(allowed, key=lambda point: (point.correct, -point.alpha))


def next_attack(outcomes: Sequence[Outcome], selection: Selection) -> int | None:
    """The place of the next point that must be attacked before `choose` can answer, None if there is none.

    Only a point with a better clean accuracy than the best so far can be chosen. Under `paired` it takes those before
    it, and none after a failed test; if no point is better than the parent, nothing needs an attack.
    """
    best = choose(outcomes, selection).correct
    open_places = [place for place, point in enumerate(outcomes) if point.robust is None]
    better = [place for place in open_places if outcomes[place].correct > best]
    if not better:
        return None
    if selection.rule == "mean":
        return 0 if outcomes[0].robust is None else better[0]
    tested = [point for point in outcomes[1 : open_places[0]] if not is_admissible(outcomes[0], point, selection)]
    return None if tested else open_places[0]


def walk(
    parent: nn.Module,
    tuned: nn.Module,
    validation: Split,
    threat: ThreatModel,
    selection: Selection,
    *,
    seed: int,
    progress: Progress,
    checkpoints: CheckpointStore,
) -> tuple[Outcome, ...]:
    """The outcomes on the validation split from the parent towards the tuned network.

    Every point is judged on clean images; attacked are only those points that the choice depends on, see `next_attack`.
    PGD's random starts are the same at every point, so two points differ by their weights alone. A walk that was killed
    continues from `checkpoints`.

    Args:
        parent: in eval mode.
        tuned: a network of the same shape.
        validation: what the point is chosen on.
        threat: the ball.
        selection: the grid and the rule.
        seed: of PGD's random starts.
        progress: told of every point.
        checkpoints: where finished points are kept.
    """
    start, end = parent.state_dict(), tuned.state_dict()
    identity = fingerprint(
        (selection, threat, seed), [*start.values(), *end.values(), validation.images, validation.labels]
    )
    outcomes = _read(checkpoints.load("rift-walk"), identity)
    progress.begin("choose alpha", selection.grid + 1)
    if outcomes:
        progress.advance(sum(point.robust is not None for point in outcomes))
    keys = [content_hash(image.numpy()) for image in validation.images]
    network = copy.deepcopy(parent)
    if not outcomes:
        for step in range(selection.grid + 1):
            network.load_state_dict(interpolate(start, end, step / selection.grid))
            outcomes.append(Outcome(step / selection.grid, _correct(network, validation)))
    while (place := next_attack(outcomes, selection)) is not None:
        network.load_state_dict(interpolate(start, end, outcomes[place].alpha))
        robust = _robust(network, validation, threat, keys, steps=selection.attack_steps, seed=seed)
        outcomes[place] = point = dataclasses.replace(outcomes[place], robust=robust)
        checkpoints.save("rift-walk", _state(outcomes, identity))
        progress.note(alpha=point.alpha, clean=point.correct / len(keys), robust=float(robust.float().mean()))
        progress.advance()
    progress.advance(sum(point.robust is None for point in outcomes))
    return tuple(outcomes)


def _correct(network: nn.Module, split: Split) -> Tensor:
    """Whether each image is classified correctly, boolean (N,) on the CPU."""
    device = device_of(network)
    parts = zip(torch.split(split.images, _BATCH), torch.split(split.labels, _BATCH), strict=True)
    with torch.no_grad():
        return torch.cat([network(images.to(device)).argmax(dim=1).cpu() == labels for images, labels in parts])


def _robust(
    network: nn.Module, split: Split, threat: ThreatModel, keys: Sequence[str], *, steps: int, seed: int
) -> Tensor:
    """Whether PGD from one random start leaves each image classified correctly, boolean (N,) on the CPU."""
    device, found = device_of(network), []
    for first in range(0, len(split), _BATCH):
        perturbed = pgd(
            network,
            split.images[first : first + _BATCH].to(device),
            split.labels[first : first + _BATCH].to(device),
            threat=threat,
            keys=keys[first : first + _BATCH],
            seed=seed,
            steps=steps,
            restarts=1,
            step_size=threat.radius / 4,
            losses=("ce",),
        )
        found.append(perturbed.cpu())
    return _correct(network, Split(torch.cat(found), split.labels))


def _state(outcomes: Sequence[Outcome], identity: str) -> dict[str, Any]:
    points = [(point.alpha, point.clean, point.robust) for point in outcomes]
    return {"identity": identity, "points": [list(point) for point in points]}


def _read(state: Mapping[str, Any] | None, identity: str) -> list[Outcome]:
    """The kept outcomes of this very walk."""
    if state is None or state.get("identity") != identity:
        return []
    return [Outcome(*point) for point in state["points"]]
