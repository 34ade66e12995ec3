"""Linear bounds: CROWN's by an independent code, optimal ones by a linear program, and sound for any multipliers."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from robustboard.attacks.bounds import certify
from robustboard.attacks.complete.network import ReluNetwork
from robustboard.attacks.complete.reduction import reduce_to_box
from robustboard.attacks.complete.relaxation import Multipliers, Ranges, bound, crown_slopes, optimise
from robustboard.attacks.threat import ThreatModel


def split(network, phase):
    """The sub-domains with these signs (B, n): +1 active, -1 inactive, 0 free."""
    low, high = (side.expand(phase.shape) for side in (network.low, network.high))
    return Ranges(low.masked_fill(phase > 0, 0.0), high.masked_fill(phase < 0, 0.0))


def random_split(problem, seed):
    """Random phases and multipliers, far from any optimum."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(problem.margins), len(problem.network)
    phase = torch.randint(-1, 2, shape, generator=generator).to(torch.int8)
    alpha = torch.rand(shape, generator=generator, dtype=torch.float64)
    return phase, Multipliers(alpha, 3 * torch.rand(shape, generator=generator, dtype=torch.float64))


@pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_without_optimisation_the_bounds_are_crowns(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {
            "dense": [nn.Flatten(), nn.Linear(64, 30)],
            "convolution": [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 30)],
        }[kind]
        model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
        images = torch.rand(4, 1, 8, 8)
    threat = ThreatModel.parse("linf", "1/10")
    labels = model(images).argmax(dim=1)
    expected = certify(model, images, labels, threat=threat, method="crown", classes=5).margins
    network = ReluNetwork(model, images[:1])
    lower, upper = (side.flatten(1).double() for side in threat.outer_box(images))
    for row, label in enumerate(labels.tolist()):
        targets = tuple(target for target in range(5) if target != label)
        problem = reduce_to_box(
            network,
            lower[row],
            upper[row],
            label=label,
            targets=targets,
            classes=5,
            iterations=0,
            memory_bytes=1 << 30,
        )
        assert len(problem.network) > 5, "the network must have unstable neurons for the comparison to mean anything"
        found = bound(
            problem.network, problem.margins, problem.network.ranges(4), crown_slopes(problem.network, 4)
        ).value
        torch.testing.assert_close(found.float(), expected[row, list(targets)], atol=2e-6, rtol=0)


@given(seed=st.integers(0, 10**6), signs=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_multipliers_give_a_sound_bound(tiny, seed, signs):
    problem = tiny(seed, iterations=0).problem
    network, (phase, multipliers) = problem.network, random_split(problem, signs)
    ranges = split(network, phase)
    values = bound(network, problem.margins, ranges, multipliers).value
    raised, _, _ = optimise(network, problem.margins, ranges, multipliers, iterations=5)
    assert (raised >= values).all()
    shares = torch.rand(400, len(network.lower), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = network.lower + (network.upper - network.lower) * shares
    margins, inputs = network.evaluate(problem.margins, points), network.evaluate(network.units, points)
    assert ((inputs >= network.low - 1e-9) & (inputs <= network.high + 1e-9)).all()
    for row in range(len(values)):
        inside = (inputs * phase[row] >= 0).all(dim=1)
        assert (margins[inside, row] >= raised[row] - 1e-9).all()


def _relaxed_minimum(problem, row, phase):
    """The triangle relaxation's optimum by linear programming; variables are pixels, then outputs."""
    network, objective = problem.network, problem.margins
    p, q, r = (part.numpy() for part in (network.units.inputs, network.units.hidden, network.units.offset))
    low, high, fixed = network.low.numpy(), network.high.numpy(), phase.numpy()
    d, n = p.shape[1], len(r)
    rows, limits, limit_y = [], [], []
    for j in range(n):
        z, y = np.concatenate([p[j], q[j]]), np.eye(d + n)[d + j]
        if fixed[j] > 0:
            rows += [y - z, z - y, -z]
            limits += [r[j], -r[j], r[j]]
        elif fixed[j] < 0:
            rows += [z]
            limits += [-r[j]]
        else:
            chord = high[j] / (high[j] - low[j])
            rows += [z - y, y - chord * z]
            limits += [-r[j], chord * (r[j] - low[j])]
        limit_y.append((0, 0) if fixed[j] < 0 else (0, None))
    box = list(zip(network.lower.tolist(), network.upper.tolist(), strict=True))
    costs = torch.cat([objective.inputs[row], objective.hidden[row]]).numpy()
    found = linprog(costs, A_ub=np.array(rows), b_ub=np.array(limits), bounds=box + limit_y)
    return np.inf if found.status == 2 else found.fun + float(objective.offset[row])


@pytest.mark.parametrize("seed", range(6))
def test_optimised_bounds_approach_the_linear_program(tiny, seed):
    """With lower lines and multipliers at their best the bound is the relaxation's own optimum, by duality."""
    problem = tiny(seed, iterations=0).problem
    network = problem.network
    phase = torch.zeros(len(problem.margins), len(network), dtype=torch.int8)
    # A split that holds somewhere: the signs at one point of the box.
    signs = network.evaluate(network.units, ((network.lower + network.upper) / 2)[None])[0].sign()
    phase[:, ::2] = signs[::2].to(torch.int8)
    start = crown_slopes(network, len(phase))
    values, _, _ = optimise(network, problem.margins, split(network, phase), start, iterations=300)
    plain = bound(network, problem.margins, network.ranges(len(phase)), start).value
    for row in range(len(values)):
        best = _relaxed_minimum(problem, row, phase[row])
        assert float(values[row]) <= best + 1e-7
        # Steps shrink geometrically, so the ascent stops short of the optimum; it must get most of the way.
        assert float(values[row]) >= best - 0.1 * abs(best - float(plain[row])) - 0.02
