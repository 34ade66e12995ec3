"""Measures of convex adversarial training on problems that its programs solve to the optimum.

The table of the paper's first experiment, breast cancer, prepared as in `breast_cancer`; `convex` has the claims.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from robustboard.attacks.pgd import pgd
from robustboard.attacks.quadratic import QuadraticNetwork, margin_forms
from robustboard.bench.claims.breast_cancer import FOLDS, Fold, UnitBox, folds, margins, pooled, survives_linf
from robustboard.bench.claims.claim import Measurement, Verdict, mean, number, paired_difference, share
from robustboard.bench.claims.laboratory import Laboratory
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.boundary_distance import boundary_distance
from robustboard.defenses.burer_monteiro import UnitNeurons, hinge_loss
from robustboard.defenses.convex_features import FeatureMap
from robustboard.defenses.convex_programs import Ball, Floats, Solution, solve
from robustboard.defenses.neural_decomposition import quadratic_network
from robustboard.defenses.worst_margins import pairs_of

BETA = 1e-3
RADIUS = 0.2
# What "large increases" is taken to mean, in points.
LARGE = 5.0


def trained(fold: Fold, radius: float) -> Solution:
    """The global optimum of the program on a fold; radius zero is the original convex training."""
    return solve(fold.train, fold.train_labels, classes=2, beta=BETA, ball=Ball("l2", radius))


def network_of(solution: Solution) -> QuadraticNetwork:
    """The network of a program's solution, with fixed weights."""
    return quadratic_network(solution.positive, solution.negative).requires_grad_(requires_grad=False)


def breast_cancer(
    lab: Laboratory,
    *,
    count: int = FOLDS,
    examples: int = 100,
    components: int = 10,
    radii: Sequence[float] = (0.1, 0.2, 0.3),
    steps: int = 100,
) -> dict[str, Measurement]:
    """Standard and robust program on every fold, under PGD in L-inf balls and exactly in the L2 balls around them."""
    flags: dict[tuple[str, str, float], list[Tensor]] = {}
    lab.progress.begin("breast cancer: programs and attacks", 2 * count)
    for fold in folds(examples=examples, components=components, count=count):
        for name, radius in (("standard", 0.0), ("robust", RADIUS)):
            network = network_of(trained(fold, radius))
            for r in (0.0, *radii):
                exact = margins(network, fold.test, fold.test_labels, radius=r) > 0
                flags.setdefault((name, "l2", r), []).append(torch.from_numpy(exact))
            for r in radii:
                left = survives_linf(
                    network, fold.test, fold.test_labels, eps=r / components**0.5, seed=lab.seed, steps=steps
                )
                flags.setdefault((name, "linf", r), []).append(left)
            lab.progress.advance()
    found: dict[str, Measurement] = {}
    for (name, norm, r), parts in flags.items():
        what = "clean" if r == 0 else f"PGD, L-inf {r:g}/sqrt(d)" if norm == "linf" else f"exact, L2 {r:g}"
        found[f"{name} {norm} {r:g}"] = share(
            f"{what}, {name} program", pooled(parts), under="paper" if norm == "linf" or r == 0 else "protocol"
        )
    for norm in ("linf", "l2"):
        pair = [pooled(flags[name, norm, RADIUS]) for name in ("robust", "standard")]
        found[f"gain {norm}"] = paired_difference(
            f"gain of the robust program, {'PGD, L-inf' if norm == 'linf' else 'exact, L2'}",
            *pair,
            under="paper" if norm == "linf" else "protocol",
        )
    return found


def judge_breast_cancer(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on breast cancer."""
    gain = found["gain linf"]
    if gain.low <= 0 or gain.value < LARGE:
        return "not reproduced"
    return "reproduced" if found["gain l2"].low > 0 else "broken under the protocol"


def factored_optimum(fold: Fold, *, radius: float, width: int, seed: int, steps: int) -> float:
    """The least robust objective that `steps` full-batch steps of Adam reach from one start in the factored form."""
    x, labels = torch.from_numpy(fold.train), torch.from_numpy(fold.train_labels)
    plain = FeatureMap(torch.zeros(x.shape[1], dtype=x.dtype), 1.0)
    model = UnitNeurons(plain, width=width, classes=2, draws=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    comparisons, least = pairs_of(labels, 2, x), float("inf")
    for _ in range(steps):
        loss = hinge_loss(model, x, comparisons, radius=radius, worst_only=True) + BETA * model.size()
        least = min(least, float(loss.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return least


def global_optimum(
    lab: Laboratory, *, examples: int = 60, components: int = 5, starts: int = 5, steps: int = 16_000
) -> dict[str, Measurement]:
    """The program's value, that of its network, and what gradient training reaches from several starts."""
    (fold,) = folds(examples=examples, components=components, count=1)
    solution = trained(fold, RADIUS)
    network = network_of(solution)
    worst = np.maximum(0, 1 - margins(network, fold.train, fold.train_labels, radius=RADIUS)).mean()
    own = float(worst) + BETA * float(network.outputs.abs().sum())
    wide, narrow = 2 * (components + 1), 1
    lab.progress.begin("breast cancer: starts", 2 * starts)
    reached: dict[int, list[float]] = {wide: [], narrow: []}
    for width, values in reached.items():
        for seed in range(lab.seed, lab.seed + starts):
            values.append(
                factored_optimum(fold, radius=RADIUS, width=width, seed=seed, steps=steps) / solution.objective
            )
            lab.progress.advance()
    return {
        "optimum": number("optimal value of the program", solution.objective, examples),
        "neurons": number("neurons of its network", len(network.directions), 1, unit="count"),
        "network": number(
            "robust objective of its network over the optimum", own / solution.objective, 1, unit="ratio"
        ),
        "least": number("least start over the optimum", min(reached[wide]), starts, unit="ratio"),
        "largest": number("largest start over the optimum", max(reached[wide]), starts, unit="ratio"),
        "narrow": number(
            "least start over the optimum, one neuron", min(reached[narrow]), starts, unit="ratio", under="control"
        ),
    }


def judge_global_optimum(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on the global optimum."""
    same = abs(found["network"].value - 1) <= 1e-3 and found["least"].value >= 1 - 1e-3
    return "reproduced" if same and found["largest"].value <= 1.02 else "not reproduced"


def boundary(lab: Laboratory, *, points: int = 40, examples: int = 100, components: int = 10) -> dict[str, Measurement]:
    """The distance program against bisection on the exact worst margin, for both networks of a fold."""
    (fold,) = folds(examples=examples, components=components, count=1)
    gaps, found = [], {}
    lab.progress.begin("breast cancer: distances", 2 * points)
    for name, radius in (("standard", 0.0), ("robust", RADIUS)):
        network = network_of(trained(fold, radius))
        right = np.flatnonzero(margins(network, fold.test, fold.test_labels) > 0)[:points]
        distances = []
        for place in right:
            x, label = fold.test[[place]], fold.test_labels[[place]]
            distance = _distance(network, x, int(label[0]))
            low, high = 0.0, 4 * distance
            for _ in range(40):
                middle = (low + high) / 2
                inside = margins(network, x, label, radius=middle)[0] > 0
                low, high = (middle, high) if inside else (low, middle)
            gaps.append(abs(distance / high - 1))
            distances.append(distance)
            lab.progress.advance()
        found[name] = mean(f"mean distance to the boundary, {name} program", distances, under="control")
    found["gap"] = number("largest relative gap between program and bisection", max(gaps), len(gaps))
    return found


def _distance(network: QuadraticNetwork, x: Floats, label: int) -> float:
    forms, inputs = margin_forms(network, torch.tensor([[label, 1 - label]])), torch.from_numpy(x)
    axes = (forms.basis @ forms.axes[0]).numpy()
    curvature = axes * forms.curvatures[0].numpy() @ axes.T
    return boundary_distance(float(forms.values(inputs)), axes @ forms.slopes(inputs)[0, 0].numpy(), curvature)


def judge_boundary(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on the distance to the boundary."""
    return "reproduced" if found["gap"].value <= 1e-3 else "not reproduced"


def cost(lab: Laboratory, *, count: int = FOLDS, examples: int = 100, components: int = 10) -> dict[str, Measurement]:
    """Seconds of the program and of PGD adversarial training on the same small data, and what survives PGD."""
    seconds: dict[str, list[float]] = {"convex": [], "pgd-at": []}
    kept: dict[str, list[Tensor]] = {"convex": [], "pgd-at": []}
    lab.progress.begin("breast cancer: trainings", 2 * count)
    for fold in folds(examples=examples, components=components, count=count):
        unit = UnitBox(fold.train, fold.test, reach=RADIUS)
        train = Split(unit.images(fold.train), torch.from_numpy(fold.train_labels))
        test = Split(unit.images(fold.test), torch.from_numpy(fold.test_labels))
        data, threat = TrainingData("breast-cancer", train, train, 2), unit.threat("l2", RADIUS)
        for name in seconds:
            began = time.perf_counter()
            model = registry.create(name).fit(
                data,
                threat,
                seed=lab.seed,
                device=lab.device,
                progress=NoProgress(),
                checkpoints=CheckpointStore(),
            )
            seconds[name].append(time.perf_counter() - began)
            found = pgd(
                model.requires_grad_(requires_grad=False),
                test.images,
                test.labels,
                threat=threat,
                keys=[str(place) for place in range(len(test))],
                seed=lab.seed,
                steps=100,
                restarts=2,
                step_size=threat.radius / 10,
                losses=("ce", "margin"),
            )
            with torch.no_grad():
                kept[name].append(model(found).argmax(dim=1) == test.labels)
            lab.progress.advance()
    return {
        "program": mean("seconds of the program", seconds["convex"], unit="seconds"),
        "pgd-at": mean("seconds of PGD adversarial training", seconds["pgd-at"], unit="seconds"),
        "ratio": number(
            "program over PGD training", sum(seconds["convex"]) / sum(seconds["pgd-at"]), count, unit="ratio"
        ),
        "robust program": share(f"PGD, L2 {RADIUS:g}, program", pooled(kept["convex"])),
        "robust pgd-at": share(f"PGD, L2 {RADIUS:g}, PGD training", pooled(kept["pgd-at"])),
        "gain": paired_difference("gain of the program", pooled(kept["convex"]), pooled(kept["pgd-at"])),
    }
