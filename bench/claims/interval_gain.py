"""What the interval attack adds to PGD (Wang et al. 2019, arXiv 1906.02282), at equal numbers of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustboard.attacks.interval import ascents, interval_attack
from robustboard.attacks.keyed import derive_seed
from robustboard.attacks.pgd import pgd
from robustboard.bench.claims.claim import Measurement, Under, number, share
from robustboard.bench.claims.laboratory import Laboratory, Trained
from robustboard.defenses.adapter import Split
from robustboard.defenses.verifier import Verifier

TRACK = "mnist-linf-0.3@1"
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    # The paper's first network.
    "mlp-512-512": {"architecture": "mlp-512-512"},
    "cnn-small": {},
}
METHODS: Mapping[str, tuple[str, Under]] = {
    "pgd": ("PGD on cross-entropy", "paper"),
    "interval": ("the interval attack on cross-entropy", "paper"),
    "pgd-margin": ("PGD on the margin", "control"),
    "interval-margin": ("the interval attack on the margin", "control"),
    "protocol": ("the protocol's PGD, three losses with five random starts each", "protocol"),
}


def interval_gain(
    lab: Laboratory, *, images: int = 250, restarts: int = 3, steps: int = 40, limit: int | None = None
) -> dict[str, Measurement]:
    """What both attacks break of networks that were adversarially trained on MNIST at 3/10.

    Args:
        lab: where the networks come from.
        images: how many correctly classified test images are attacked.
        restarts: of the interval attack; PGD has as many random starts as that has ascents.
        steps: gradient steps an ascent, of 0.01 each.
        limit: how many training images the networks see; None is all.
    """
    found: dict[str, Measurement] = {}
    pairs = []
    for name, settings in NETWORKS.items():
        trained = lab.network("pgd-at", TRACK, limit=limit, **settings)
        with torch.no_grad():
            predictions = trained.model(trained.test.images.to(lab.device)).argmax(dim=1).cpu()
        right = (predictions == trained.test.labels).nonzero().flatten()
        found[f"{name} clean"] = share(f"test accuracy, {name}", predictions == trained.test.labels, under="control")
        places = right[:images]
        broken = {method: _broken(lab, trained, places, method, restarts, steps) for method in METHODS}
        for method, (words, under) in METHODS.items():
            found[f"{name} {method}"] = share(f"broken by {words}, {name}", broken[method], under=under)
        pairs.append((broken["pgd"].numpy(), broken["interval"].numpy()))
        found[f"{name} gain"] = relative_gain(f"relative gain of the interval attack, {name}", pairs[-1:], lab.seed)
        bounded = Split(trained.test.images[places[:50]], trained.test.labels[places[:50]])
        verified = Verifier(trained.model, trained.data, trained.threat, bound="sym").verified(bounded)
        found[f"{name} verified"] = share(f"proved by symbolic intervals, {name}", verified, under="control")
    found["gain"] = relative_gain("relative gain of the interval attack, mean of the networks", pairs, lab.seed)
    return found


def relative_gain(what: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int) -> Measurement:
    """The mean over networks of (second - first) / first, counts of broken examples; a percentile bootstrap interval.

    Where the first attack breaks nothing, its count is taken for one.

    >>> first, second = np.arange(10) < 4, np.arange(10) < 6
    >>> relative_gain("gain", [(first, second)], 0).value
    0.5
    """
    draws = np.random.default_rng(derive_seed(seed, "relative gain"))

    def gain(chosen: Sequence[np.ndarray]) -> float:
        each = []
        for (first, second), rows in zip(pairs, chosen, strict=True):
            base = max(1, int(first[rows].sum()))
            each.append((int(second[rows].sum()) - int(first[rows].sum())) / base)
        return float(np.mean(each))

    sizes = [len(first) for first, _ in pairs]
    value = gain([np.arange(size) for size in sizes])
    resampled = [gain([draws.integers(size, size=size) for size in sizes]) for _ in range(2000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return number(what, value, sum(sizes), low=min(value, float(low)), high=max(value, float(high)))


def _broken(lab: Laboratory, trained: Trained, places: Tensor, method: str, restarts: int, steps: int) -> Tensor:
    """Which of the test images at `places` a method breaks, booleans (N,)."""
    model, threat = trained.model, trained.threat
    images, labels = trained.test.images[places].to(lab.device), trained.test.labels[places].to(lab.device)
    keys = [trained.keys[place] for place in places.tolist()]
    loss = "margin" if method.endswith("margin") else "ce"
    rule = trained.track.attacks.pgd
    lab.progress.begin(f"{METHODS[method][0]}, {len(places)} images", 1)
    if method == "protocol":
        points = pgd(
            model,
            images,
            labels,
            threat=threat,
            keys=keys,
            seed=rule.seed,
            steps=rule.steps,
            restarts=rule.restarts,
            step_size=float(rule.step) * threat.radius,
            losses=rule.losses,
        )
    elif method.startswith("pgd"):
        points = pgd(
            model,
            images,
            labels,
            threat=threat,
            keys=keys,
            seed=lab.seed,
            steps=steps,
            restarts=ascents(restarts),
            step_size=0.01,
            losses=(loss,),
        )
    else:
        points = interval_attack(
            model,
            images,
            labels,
            threat=threat,
            keys=keys,
            seed=lab.seed,
            steps=steps,
            restarts=restarts,
            step_size=0.01,
            loss=loss,
        ).images
    lab.progress.advance()
    with torch.no_grad():
        broken: Tensor = (model(points).argmax(dim=1) != labels).cpu()
    return broken
