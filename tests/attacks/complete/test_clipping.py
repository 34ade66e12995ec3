"""Clipped ranges hold wherever the margin is still open, approach the linear program's, and save sub-domains."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from robustboard.attacks.complete import branching, clipping, reduction
from robustboard.attacks.complete.branching import Effort, branch_and_bound
from robustboard.attacks.complete.clipping import Clipper
from robustboard.attacks.complete.network import ReluNetwork
from robustboard.attacks.complete.relaxation import Multipliers, Ranges, bound, crown_slopes, optimise


@pytest.mark.parametrize(("kernel", "clipped"), [(2, False), (4, True)])
def test_neurons_that_see_few_pixels_are_not_clipped(kernel, clipped):
    """It was measured to cost and to gain nothing on convolutions."""
    model = nn.Sequential(nn.Conv2d(1, 30, kernel), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
    model(torch.zeros(1, 1, 4, 4))
    lower, upper = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    problem = reduction.reduce_to_box(
        ReluNetwork(model, torch.zeros(1, 1, 4, 4)),
        lower,
        upper,
        label=0,
        targets=(1, 2),
        classes=3,
        iterations=2,
        memory_bytes=1 << 30,
    )
    assert len(problem.network) > 0
    assert (problem.below is not None) == clipped


def clipper(problem):
    return Clipper(problem.network, problem.below, problem.above)


def drawn(network, seed, count=2000):
    """Points of the box, half of them corners."""
    shares = torch.rand(count, len(network.lower), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shares[::2] = shares[::2].round()
    return network.lower + (network.upper - network.lower) * shares


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_planes_enclose_the_neurons(tiny, seed):
    problem = tiny(seed, widths=(3, 5, 5, 4, 3)).problem
    points = drawn(problem.network, seed)
    inputs = problem.network.evaluate(problem.network.units, points)
    for planes, side in ((problem.below, 1), (problem.above, -1)):
        assert (side * (inputs - points @ planes.inputs.T - planes.offset) >= -1e-9).all()


@given(seed=st.integers(0, 10**6), share=st.floats(0.02, 1.0), splits=st.booleans())
@settings(max_examples=60, deadline=None)
def test_clipped_ranges_hold_where_the_margin_is_open(tiny, seed, share, splits):
    """At sampled points of random sub-domains whose margin is at most the cut-off, ranges of two clippings hold."""
    problem = tiny(seed, widths=(3, 5, 5, 3)).problem
    network, count = problem.network, len(problem.margins)
    generator = torch.Generator().manual_seed(seed)
    shape = count, len(network)
    phase = torch.randint(-1, 2, shape, generator=generator) * splits
    ranges = network.ranges(count)
    ranges = Ranges(ranges.low.masked_fill(phase > 0, 0.0), ranges.high.masked_fill(phase < 0, 0.0))
    multipliers = Multipliers(
        torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.rand(shape, generator=generator, dtype=torch.float64),
    )
    points = drawn(network, seed)
    margins, inputs = network.evaluate(problem.margins, points), network.evaluate(network.units, points)
    clip = clipper(problem)
    for row in range(count):
        one = torch.tensor([row])
        cutoff = float(margins[:, row].quantile(share))
        now = ranges[one]
        for _ in range(2):
            seen = bound(network, problem.margins[one], now, multipliers[one])
            tighter = clip(now, seen, cutoff)
            assert (tighter.low >= now.low).all()
            assert (tighter.high <= now.high).all()
            now = tighter
        inside = (inputs * phase[row] >= 0).all(dim=1) & (margins[:, row] <= cutoff)
        assert (inputs[inside] >= now.low - 1e-9).all()
        assert (inputs[inside] <= now.high + 1e-9).all()


def test_clipped_ranges_approach_the_linear_program(tiny):
    """The best rate gives the least input over the box and the half-space; a few rates come close to it."""
    won = wanted = 0.0
    for seed in range(12):
        problem = tiny(seed, widths=(6, 12, 3)).problem
        network = problem.network
        ranges = network.ranges(1)
        _, _, best = optimise(network, problem.margins[:1], ranges, crown_slopes(network, 1), iterations=30)
        seen = bound(network, problem.margins[:1], ranges, best)
        cutoff = float(seen.value[0]) + 0.05 * float((seen.pixels.abs() @ (network.upper - network.lower))[0])
        found = clipper(problem)(ranges, seen, cutoff)
        row, offset = seen.pixels[0].numpy(), float(seen.value[0] - seen.pixels[0] @ seen.corner[0])
        box = list(zip(network.lower.tolist(), network.upper.tolist(), strict=True))
        for neuron in range(len(network)):
            costs, shift = problem.below.inputs[neuron].numpy(), float(problem.below.offset[neuron])
            exact = linprog(costs, A_ub=row[None], b_ub=np.array([cutoff - offset]), bounds=box).fun + shift
            low, before = float(found.low[0, neuron]), float(network.low[neuron])
            assert low <= exact + 1e-9
            if float(seen.weight[0, neuron]) != 0:
                won, wanted = won + min(low, 0.0) - before, wanted + min(exact, 0.0) - before
    assert wanted > 1.0
    assert won >= 0.97 * wanted


def test_an_empty_half_space_leaves_no_range(tiny):
    """A sub-domain in which the margin is nowhere small enough is shown to be empty, not given some range."""
    empty = 0
    for seed in range(12):
        problem = tiny(seed, widths=(3, 6, 2)).problem
        network = problem.network
        for neuron, side in itertools.product(range(len(network)), (1, -1)):
            ranges = network.ranges(1).split(torch.tensor([neuron]), side)
            seen = bound(network, problem.margins, ranges, crown_slopes(network, 1))
            cutoff = float(seen.value[0]) + 0.01
            clipped = clipper(problem)(ranges, seen, cutoff)
            if not bool((clipped.low > clipped.high).any()):
                continue
            empty += 1
            points = drawn(network, seed)
            inside = network.evaluate(network.units, points)[:, neuron] * side >= 0
            assert (network.evaluate(problem.margins, points)[inside] > cutoff).all()
    assert empty >= 3


@pytest.mark.parametrize("numbers", [1, 8, 40])
def test_a_small_share_of_the_functions_is_sound_too(tiny, monkeypatch, numbers):
    problem = tiny(3, widths=(3, 6, 6, 3), radius=0.5).problem
    network, count = problem.network, len(problem.margins)
    ranges = network.ranges(count)
    seen = bound(network, problem.margins, ranges, crown_slopes(network, count))
    cutoff = float(seen.value.min()) + 0.2
    full = clipper(problem)(ranges, seen, cutoff)
    monkeypatch.setattr(clipping, "_WORK", numbers)
    monkeypatch.setattr(clipping, "_AT_ONCE", numbers)
    part = clipper(problem)(ranges, seen, cutoff)
    assert (part.low <= full.low).all()
    assert (part.high >= full.high).all()


def test_clipping_saves_sub_domains(tiny, monkeypatch):
    """The same proofs as without it, from fewer sub-domains."""
    nodes = {0: 0, 2: 0}
    for seed, clips in itertools.product((7, 8, 10), nodes):
        problem = tiny(seed, widths=(6, 24, 24, 2), radius=0.5).problem
        least = problem.network.evaluate(problem.margins, drawn(problem.network, seed, 20_000)).min()
        margins = replace(problem.margins, offset=problem.margins.offset - least + 0.1)
        monkeypatch.setattr(branching, "_CLIPS", clips)
        effort = Effort(nodes=4000)
        found = branch_and_bound(
            replace(problem, margins=margins), tolerance=1e-3, effort=effort, breaks=lambda points: None
        )
        assert (found.margins > 1e-3).all()
        nodes[clips] += found.nodes
    assert nodes[2] < nodes[0] / 2


def test_float32_ranges_are_no_narrower():
    values = torch.linspace(-3, 3, 1001, dtype=torch.float64) / 7
    assert (branching._outward(values, -1).double() <= values).all()
    assert (branching._outward(values, 1).double() >= values).all()
    assert branching._outward(torch.zeros(2, dtype=torch.float64), -1).tolist() == [0.0, 0.0]
