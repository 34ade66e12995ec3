"""Fine-tuning of the module that robustness needs least, from any adversarially trained network.

RiFT: Zhu et al. 2023 (arXiv 2308.02533, sec. 4; ICCV 2023). 1. Rank the modules by robust criticality
(`robust_criticality`). 2. Tune the least critical one alone on clean images. 3. Walk from the old to the new weights
and take the best point that keeps the robust accuracy (`interpolation`).

Two departures from the authors' code, which measures criticality, and chooses the epoch and alpha, on the test set:
here criticality is measured on training images, the last epoch counts, and alpha is chosen on the validation split.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from robustboard.attacks.keyed import derive_seed, generator
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Progress, Split, TrainingData
from robustboard.defenses.fingerprint import fingerprint
from robustboard.defenses.interpolation import Outcome, Rule, Selection, choose, interpolate, walk
from robustboard.defenses.robust_criticality import (
    Ascent,
    Ball,
    Criticality,
    adversarial_examples,
    candidates,
    robust_criticality,
)
from robustboard.defenses.training import Recipe, device_of, train
from robustboard.errors import DefenseError


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """RiFT's own hyper-parameters; the defaults are the paper's but for the evidence and the projection.

    Attributes:
        modules: which to tune: the `least-critical` (the method), or the `most-critical`, the `last` or `all` of them
            (the comparisons of tables 3 and 4).
        count: how many of the least or most critical.
        criticality_examples: training images that the criticality is measured on, at most.
        criticality_radius: the weight ball's radius over the norm of the module's weights.
        criticality_epochs: passes of the ascent in it.
        criticality_lr: its step length.
        criticality_variant: the authors' `code` or the `paper`'s algorithm 1, see `robust_criticality`.
        criticality_projection: after every `epoch` or every `step`.
        criticality_adversary: `fixed` adversarial examples, the paper's relaxed form, or examples made `fresh` as the
            weights move, the definition; see docs/tuning.md for where the two disagree.
        tuning_epochs: passes over the clean training images.
        tuning_lr: of SGD with momentum 0.9; it falls tenfold half-way.
        tuning_batch_size: images in a mini-batch, at most.
        tuning_weight_decay: the L2 penalty on the tuned weights.
        bn_mode: `train` lets the running statistics of every batch normalisation drift to those of clean images, as in
            the authors' code; `eval` keeps them, and keeps dropout off.
        augment: random crops and flips while tuning, as in the parent's training.
        grid: alpha takes the values 0, 1/grid, ..., 1.
        attack_steps: steps of the PGD that makes adversarial examples, a quarter of the radius each.
        rule: how a fall of robust accuracy is judged: `paired` by evidence, `mean` as in the paper (with margin 0.001).
        margin: the fall that is not accepted, a share.
        level: of the one-sided test.
    """

    modules: Literal["least-critical", "most-critical", "last", "all"] = "least-critical"
    count: int = 1
    criticality_examples: int = 3000
    criticality_radius: float = 0.1
    criticality_epochs: int = 10
    criticality_lr: float = 1.0
    criticality_variant: Literal["code", "paper"] = "code"
    criticality_projection: Literal["epoch", "step"] = "step"
    criticality_adversary: Literal["fixed", "fresh"] = "fixed"
    tuning_epochs: int = 10
    tuning_lr: float = 1e-3
    tuning_batch_size: int = 128
    tuning_weight_decay: float = 5e-4
    bn_mode: Literal["train", "eval"] = "train"
    augment: bool = False
    grid: int = 10
    attack_steps: int = 10
    rule: Rule = "paired"
    margin: float = 0.005
    level: float = 0.05

    def __post_init__(self) -> None:
        if self.count < 1 or self.criticality_examples < 1:
            raise ValueError(
                f"count and criticality_examples must be at least 1, not {self.count} and {self.criticality_examples}"
            )
        if self.count > 1 and self.modules in ("last", "all"):
            raise ValueError(f"count belongs to the least or most critical modules, not to {self.modules}")
        _ = self.ascent, self.recipe, self.selection  # which refuse what they do not take

    @property
    def selection(self) -> Selection:
        """How alpha is chosen."""
        return Selection(
            grid=self.grid, attack_steps=self.attack_steps, rule=self.rule, margin=self.margin, level=self.level
        )

    @property
    def ascent(self) -> Ascent:
        """How criticality is searched."""
        return Ascent(
            radius=self.criticality_radius,
            epochs=self.criticality_epochs,
            lr=self.criticality_lr,
            variant=self.criticality_variant,
            projection=self.criticality_projection,
        )

    @property
    def recipe(self) -> Recipe:
        """How the chosen modules are tuned."""
        return Recipe(
            architecture="the parent's",
            epochs=self.tuning_epochs,
            lr=self.tuning_lr,
            batch_size=self.tuning_batch_size,
            optimizer="sgd",
            schedule="half-way",
            weight_decay=self.tuning_weight_decay,
            augment=self.augment,
        )


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned network and the evidence for it.

    Attributes:
        network: in eval mode.
        modules: what was tuned.
        criticalities: by rising value; empty where the choice did not need them.
        outcomes: on the validation split, by rising alpha; the first is the parent's.
        alpha: the point that was chosen.
    """

    network: nn.Module
    modules: tuple[str, ...]
    criticalities: tuple[Criticality, ...]
    outcomes: tuple[Outcome, ...]
    alpha: float


def fine_tune(
    network: nn.Module,
    data: TrainingData,
    threat: ThreatModel,
    settings: FineTuning,
    *,
    seed: int,
    progress: Progress | None = None,
    checkpoints: CheckpointStore | None = None,
) -> Tuned:
    """RiFT from any trained network, which stays as it is.

    Args:
        network: images (N, C, H, W) to logits (N, K), adversarially trained in whatever way.
        data: what it was trained on, and the validation split that alpha is chosen on.
        threat: what it is to withstand.
        settings: of RiFT.
        seed: the one source of randomness.
        progress: told of every step.
        checkpoints: where states are kept; a run that was killed continues from them to the same weights.

    Raises:
        DefenseError: if there is nothing to tune or nothing to choose on, or the tuning diverges.
    """
    if not len(data.train) or not len(data.validation):
        raise DefenseError(f"RiFT needs training and validation images, and {data.name} lacks one of them.")
    progress, checkpoints = progress or NoProgress(), checkpoints or CheckpointStore()
    parent = copy.deepcopy(network).eval()
    found: tuple[Criticality, ...] = ()
    if settings.modules in ("least-critical", "most-critical"):
        found = rank_modules(parent, data, threat, settings, seed=seed, progress=progress, checkpoints=checkpoints)
    chosen = chosen_modules(parent, found, settings)
    tuned = tune_modules(parent, chosen, data, threat, settings, seed=seed, progress=progress, checkpoints=checkpoints)
    selection = settings.selection
    outcomes = walk(
        parent, tuned, data.validation, threat, selection, seed=seed, progress=progress, checkpoints=checkpoints
    )
    best = choose(outcomes, selection)
    tuned.load_state_dict(interpolate(parent.state_dict(), tuned.state_dict(), best.alpha))
    return Tuned(tuned, chosen, found, outcomes, best.alpha)


def rank_modules(
    parent: nn.Module,
    data: TrainingData,
    threat: ThreatModel,
    settings: FineTuning,
    *,
    seed: int,
    progress: Progress,
    checkpoints: CheckpointStore,
) -> tuple[Criticality, ...]:
    """The criticality of every module on adversarial training images, the least critical first.

    Raises:
        DefenseError: if the network has no convolution or linear layer.
    """
    names = candidates(parent)
    if not names:
        raise DefenseError("RiFT tunes a convolution or linear layer, and this network has none with weights.")
    order = torch.randperm(len(data.train), generator=generator(seed, "criticality examples"))
    drawn = order[: settings.criticality_examples]
    split = Split(data.train.images[drawn], data.train.labels[drawn])
    fresh = settings.criticality_adversary == "fresh"
    words = (settings.ascent, fresh, settings.attack_steps, threat, seed, names)
    identity = fingerprint(words, [*parent.state_dict().values(), split.images, split.labels])
    state = checkpoints.load("rift-criticality") or {}
    kept = state["found"] if state.get("identity") == identity else {}
    done = {name: Criticality(name, *values) for name, values in kept.items()}
    progress.begin("criticality", len(names) * settings.criticality_epochs)
    ball = Ball(split.images, threat) if fresh else None
    if len(done) < len(names):
        # Examples that go on moving must start from an attack that has converged, or it would count for the weights.
        steps = settings.attack_steps * (3 if fresh else 1)
        split = adversarial_examples(parent, split, threat=threat, steps=steps, seed=seed)
    for name in names:
        if name in done:
            progress.advance(settings.criticality_epochs)
            continue
        done[name] = robust_criticality(
            parent, name, split, ascent=settings.ascent, seed=seed, ball=ball, progress=progress
        )
        progress.note(**{f"criticality {name}": done[name].value})
        found = {key: list(dataclasses.astuple(value)[1:]) for key, value in done.items()}
        checkpoints.save("rift-criticality", {"identity": identity, "found": found})
    # Sorting is stable: of equally critical modules the one nearer to the input comes first.
    return tuple(sorted((done[name] for name in names), key=lambda one: one.value))


def chosen_modules(network: nn.Module, criticalities: Sequence[Criticality], settings: FineTuning) -> tuple[str, ...]:
    """The names of the modules to tune.

    Args:
        network: the parent.
        criticalities: by rising value; not looked at for `last` and `all`.
        settings: say which.

    Raises:
        DefenseError: if there are fewer modules than wanted.
    """
    names = candidates(network)
    if settings.modules == "all":
        return tuple(name for name, module in network.named_modules() if any(True for _ in _own(module)))
    if not names or settings.count > len(names):
        raise DefenseError(
            f"RiFT is to tune {settings.count} modules, but this network has {len(names)} to choose from."
        )
    if settings.modules == "last":
        return names[-1:]
    ranked = tuple(one.module for one in criticalities)
    return ranked[: settings.count] if settings.modules == "least-critical" else ranked[::-1][: settings.count]


def tune_modules(
    parent: nn.Module,
    modules: Sequence[str],
    data: TrainingData,
    threat: ThreatModel,
    settings: FineTuning,
    *,
    seed: int,
    progress: Progress,
    checkpoints: CheckpointStore,
) -> nn.Module:
    """A copy of the parent whose `modules` minimise the clean loss, all other parameters the parent's."""
    network = copy.deepcopy(parent)
    moving = {id(value) for name in modules for value in _own(network.get_submodule(name))}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in moving)
    network = train(
        network,
        lambda batch: functional.cross_entropy(network(batch.images), batch.labels),
        data,
        settings.recipe,
        threat=threat,
        name="rift",
        seed=derive_seed(seed, "fine-tuning"),
        device=device_of(parent),
        progress=progress,
        checkpoints=checkpoints,
        frozen_statistics=settings.bn_mode == "eval",
    )
    for mine, before in zip(network.parameters(), parent.parameters(), strict=True):
        mine.requires_grad_(before.requires_grad)
    return network


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a module itself holds; those of modules inside it are not its own."""
    return module.parameters(recurse=False)
