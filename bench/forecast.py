"""How long an evaluation will take, from what was measured on a few examples: arithmetic alone.

Nearly all of an evaluation's time goes into passes through the model and into bounds. Both cost something for each
call and something for each example, and the two are told apart by calls of two sizes (`Pace`). How many passes a stage
makes is declared by the protocol, and how many examples enter it follows from the shares of a sample (`Shares`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from robustboard.attacks.kernels import ensembles
from robustboard.attacks.kernels.apgd import TARGETS
from robustboard.bench.attack_seeds import SUBSET
from robustboard.bench.diagnostics import EXAMPLES
from robustboard.bench.examiner import REFERENCE_FORWARDS

# What a pass of an attack costs in gradient steps of PGD on as many examples. Measured on one core with the two CNN-A
# of the verification literature and a perceptron on digits, 6 to 170 examples at a time: 0.8 to 1.0 for APGD, 0.9 to
# 1.4 for FAB, and 0.19 to 0.26 for Square, which asks for no gradient.
_WEIGHTS: Final[Mapping[str, float]] = MappingProxyType(
    {"apgd_ce": 1.0, "apgd_t": 1.0, "fab_t": 1.3, "square": 0.23, "fast": 0.5}
)
_TARGETED: Final = ("apgd_t", "fab_t")
# Beside the bounds and the attacks by name.
_SHARED: Final = ("clean", "pgd", "complete verification", "audit", "attacked corruptions", "attack seeds")
# The longest question of the diagnostics takes more than a third of their time.
_DIAGNOSED_BY: Final = 2
# The same of AutoAttack's own code. On a perceptron, whose passes are mostly overhead, it is 2.1 for FAB and 0.5
# for Square; on larger networks their many passes without gradients weigh less.
_REFERENCE_WEIGHTS: Final[Mapping[str, float]] = MappingProxyType(
    {"apgd_ce": 1.2, "apgd_t": 1.2, "fab_t": 1.5, "square": 0.4}
)

# The diagnostics in gradient steps: four losses of 20, 40 without a radius, 5 x 40 towards random readouts, some checks
# of the gradients, and 1000 queries of Square Attack; and on what is undecided 3 x 100 steps of PGD with more work.
_DIAGNOSTIC_STEPS: Final = 4 * 20 + 40 + 5 * 40 + 10 + round(0.23 * 1000)
_MORE_WORK_STEPS: Final = 3 * 100

# Of the examples that a run of PGD breaks, most leave it in its first steps.
_SHARE_OF_A_RUN: Final = 0.25
_LEAST_BOUNDED, _SHARE_BOUNDED = 5, 0.005


@dataclass(frozen=True)
class Pace:
    """Seconds of a call on k examples: `call + k * example`.

    >>> Pace(call=1.0, example=0.5).seconds(4, calls=2)
    4.0
    """

    call: float
    example: float

    @classmethod
    def fitted(cls, small: tuple[int, float], large: tuple[int, float]) -> Pace:
        """The pace through two measurements (examples, seconds), with neither part below zero.

        >>> Pace.fitted((8, 1.5), (32, 3.0))
        Pace(call=1.0, example=0.0625)
        >>> Pace.fitted((8, 1.0), (32, 8.0))
        Pace(call=0.0, example=0.25)
        """
        (few, short), (many, long) = small, large
        if many <= few:
            return cls(0.0, long / max(1, many))
        example = min(max((long - short) / (many - few), 0.0), long / many)
        return cls(long - many * example, example)

    def seconds(self, examples: float, *, calls: float = 1) -> float:
        """Of so many examples in so many calls; without examples there is no call."""
        return calls * self.call + examples * self.example if examples > 0 else 0.0


def grown(small: tuple[int, float], large: tuple[int, float], size: int) -> float:
    """Seconds at `size` of work that took so long at two smaller sizes (size, seconds).

    The line through both where it does not start below zero, else the power law through both: some trainings grow
    faster than their data.

    >>> grown((100, 2.0), (200, 3.0), 1000), round(grown((100, 1.0), (200, 4.0), 400), 9)
    (11.0, 16.0)
    """
    (few, short), (many, long) = small, large
    if size <= many or many <= few or short <= 0 or long <= short:
        return long
    if long / short <= many / few:
        return long + (size - many) * (long - short) / (many - few)
    return float(long * (size / many) ** min(3.0, math.log(long / short) / math.log(many / few)))


@dataclass(frozen=True)
class Plan:
    """What an evaluation is asked to do.

    Attributes:
        n: how many examples are judged.
        batch_size: of the canonical batches.
        classes: K.
        steps: of one run of PGD.
        runs: how many runs PGD has.
        audited: how many certified examples are attacked at most.
        attacked_corruptions: around how many corruptions of an example PGD attacks.
        attacked_examples: on how many examples at most.
        reference: whether AutoAttack itself runs on what is not broken.
        complete: the budget of complete verification, in sub-domains.
        attack_seeds: how many other seeds.
        ensemble: the attacks that follow PGD.
        jobs: how many processes share out the attacks and the bounds, each on a core of its own.
    """

    n: int
    batch_size: int
    classes: int
    steps: int
    runs: int
    audited: int
    attacked_corruptions: int = 0
    attacked_examples: int = 0
    reference: bool = False
    complete: int = 0
    attack_seeds: int = 0
    ensemble: str = "standard"
    jobs: int = 1

    def calls(self, examples: float) -> float:
        """In how many canonical batches examples lie that are spread over all of them."""
        return min(examples, math.ceil(self.n / self.batch_size))

    def parts(self, examples: float) -> float:
        """In how many questions examples go whose batch is all the same."""
        return math.ceil(examples / self.batch_size)


@dataclass(frozen=True)
class Shares:
    """Which share of the examples enters what.

    Attributes:
        correct: of all, classified correctly.
        open: of these, still standing after a run of PGD.
        uncertified: of these, for each bound method the share that it and those before it leave open.
        targets: of the wrong classes of what is left open, the share that no bound excludes.
    """

    correct: float
    open: float
    uncertified: tuple[float, ...] = ()
    targets: float = 1.0

    @property
    def left(self) -> float:
        """The share of all examples that nothing settles before the attacks."""
        return self.correct * self.open * (self.uncertified[-1] if self.uncertified else 1.0)


@dataclass(frozen=True)
class Measured:
    """What things cost with this model on this machine.

    Attributes:
        predict: a forward pass, with what it takes to send the images and to read the answer.
        step: a gradient step.
        bounds: for each bound method in the order in which they run.
        corrupt: making and judging examples under all corruptions and severities.
        settle: seconds of complete verification for an example and for a sub-domain.
        settled: the share of examples that it settles within a few sub-domains.
    """

    predict: Pace
    step: Pace
    corrupt: Pace
    bounds: Mapping[str, Pace] = field(default_factory=dict)
    settle: Pace = Pace(0.0, 0.0)
    settled: float = 0.0


def share(successes: int, trials: int, n: int) -> float:
    """The share of n examples that is to be expected after so many successes in a sample of them.

    A sample without a single one does not say that there is none among many more; one that holds all examples does.

    >>> share(0, 31, 1000), share(0, 31, 31), share(31, 31, 1000)
    (0.015625, 0.0, 0.984375)
    """
    if trials >= n:
        return successes / trials if trials else 0.0
    return (successes + 0.5) / (trials + 1)


def forecast(plan: Plan, measured: Measured, shares: Shares) -> dict[str, float]:
    """Seconds by stage, in the order of an evaluation; stages that do not run are left out."""
    n, step = plan.n, measured.step
    correct = n * shares.correct
    survivors, left = correct * shares.open, n * shares.left
    first = survivors + _SHARE_OF_A_RUN * (correct - survivors)
    stages = {
        "clean": measured.predict.seconds(n, calls=plan.calls(n)),
        "pgd": plan.steps * step.seconds(first, calls=plan.parts(correct)),
    }
    entering = survivors
    for (method, pace), uncertified in zip(measured.bounds.items(), shares.uncertified, strict=True):
        stages[f"bounds: {method}"] = pace.seconds(entering, calls=plan.parts(entering))
        entering = survivors * uncertified
    stages["pgd"] += _other_runs(plan, step, left)
    stages |= _reference(plan, step, survivors) if plan.reference else _attacks(plan, step, left, shares.targets)
    if plan.complete:
        stages["complete verification"] = _complete(plan, measured, left)
    stages["audit"] = _audit(plan, measured, broken=correct - survivors, certified=survivors - left)
    looked_at = min(EXAMPLES, correct)
    stages["diagnostics"] = _DIAGNOSTIC_STEPS * step.seconds(looked_at)
    stages["diagnostics"] += _MORE_WORK_STEPS * step.seconds(looked_at * left / correct if correct else 0)
    stages["diagnostics"] /= min(plan.jobs, _DIAGNOSED_BY)
    stages["corruptions"] = measured.corrupt.seconds(n, calls=plan.calls(n))
    attacked = min(plan.attacked_examples, n) * shares.correct
    passes = plan.attacked_corruptions * plan.runs * plan.steps
    stages["attacked corruptions"] = passes * step.seconds(attacked, calls=plan.parts(attacked))
    subset = min(SUBSET, n) / n
    again = plan.steps * step.seconds((survivors + first) / 2 * subset) + _other_runs(plan, step, left * subset)
    again += sum(_attacks(plan, step, left * subset, 1.0).values())
    stages["attack seeds"] = plan.attack_seeds * again
    stages["second pass"] = measured.predict.seconds(n, calls=plan.calls(correct - survivors))
    shared = {stage for stage in stages if stage.startswith("bounds: ")} | {*_SHARED, *ensembles.FORWARDS}
    stages = {stage: seconds / plan.jobs if stage in shared else seconds for stage, seconds in stages.items()}
    return {stage: seconds for stage, seconds in stages.items() if seconds > 0}


def _other_runs(plan: Plan, step: Pace, left: float) -> float:
    """PGD's runs beside the first, on what that and the bounds left open."""
    return (plan.runs - 1) * plan.steps * step.seconds(left, calls=plan.parts(left))


def _attacks(plan: Plan, step: Pace, left: float, targets: float) -> dict[str, float]:
    """The board's own attacks; targeted ones spare the classes that bounds exclude."""
    calls = plan.parts(left)
    tried = min(TARGETS, plan.classes - 1)
    found = {}
    for attack in ensembles.STAGES[plan.ensemble]:
        passes, entering = _WEIGHTS[attack] * ensembles.FORWARDS[attack], left
        if attack in _TARGETED:
            passes *= tried / TARGETS
            entering *= min(1.0, targets * (plan.classes - 1) / tried)
        found[attack] = passes * step.seconds(entering, calls=calls)
    return found


def _reference(plan: Plan, step: Pace, alive: float) -> dict[str, float]:
    """AutoAttack itself, on all that PGD did not break."""
    calls = plan.calls(alive)
    return {
        attack: _REFERENCE_WEIGHTS[attack] * forwards * step.seconds(alive, calls=calls)
        for attack, forwards in REFERENCE_FORWARDS.items()
    }


def _complete(plan: Plan, measured: Measured, left: float) -> float:
    """An upper limit: whatever a few sub-domains do not settle is given the whole budget."""
    return left * (measured.settle.call + (1 - measured.settled) * plan.complete * measured.settle.example)


def _audit(plan: Plan, measured: Measured, *, broken: float, certified: float) -> float:
    sample = min(broken, max(_LEAST_BOUNDED, math.ceil(_SHARE_BOUNDED * broken)))
    bounds = sum(pace.seconds(sample) for pace in measured.bounds.values())
    verified = broken * measured.settle.call if plan.complete else 0.0
    attacked = 0.0 if plan.reference else min(certified, plan.audited)
    calls = plan.parts(attacked)
    passes = ensembles.FORWARDS["apgd_ce"] + ensembles.FORWARDS["apgd_t"] / TARGETS
    return bounds + verified + passes * measured.step.seconds(attacked, calls=calls)
