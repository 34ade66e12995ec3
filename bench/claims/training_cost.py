"""What a way of training costs: one step beside another in one run, and whole trainings to equal verified accuracy.

All times are processor seconds of this process, so that other programs on the machine matter less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from robustboard.attacks.keyed import generator
from robustboard.bench.claims.claim import Measurement, mean, number, share
from robustboard.bench.claims.laboratory import Laboratory, Setup
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Progress
from robustboard.defenses.adversarial import PgdTraining
from robustboard.defenses.batches import Batch
from robustboard.defenses.ibp import verified_cross_entropy
from robustboard.defenses.mixtrain import MixTrain
from robustboard.defenses.training import fresh_model
from robustboard.defenses.verifier import Verifier

MNIST, DIGITS = "mnist-linf-0.3@1", "digits-linf@1"


class StepClock(NoProgress):
    """Adds up what the steps of a training cost, without what is measured between its epochs.

    Args:
        shown: told the same.
    """

    def __init__(self, shown: Progress) -> None:
        self.seconds = 0.0
        self._shown, self._mark = shown, time.process_time()

    def begin(self, stage: str, total: int) -> None:
        """A new bar, and the clock starts."""
        self._shown.begin(stage, total)
        self._mark = time.process_time()

    def advance(self, steps: int = 1) -> None:
        """A step has ended."""
        now = time.process_time()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        self._shown.advance(steps)

    def note(self, **values: float) -> None:
        """An epoch was measured: that time is nobody's."""
        self._shown.note(**values)
        self._mark = time.process_time()


def step_costs(lab: Laboratory, *, rounds: int = 6, batch_size: int = 128, bounded: int = 10) -> dict[str, Measurement]:
    """Ratios of the costs of a training step on MNIST with the small network, as means over interleaved rounds.

    MixTrain's step is the expected one: of two kinds of step, the costlier with probability alpha.

    Args:
        lab: where data come from.
        rounds: how often every kind of step is timed.
        batch_size: images in a step.
        bounded: at how many points full symbolic training is timed; its bounds cost batch_size / bounded times that.
    """
    setup = lab.setup(MNIST)
    hyper = MixTrain().defaults(setup.data, setup.threat)
    steps = _steps(lab, setup, batch_size=batch_size, sampled=hyper.sampled, bounded=bounded)
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    lab.progress.begin("time steps", rounds * len(steps))
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
            lab.progress.advance()
    clean, sampled = (torch.tensor(times[name]) for name in ("clean", "sampled"))
    ours = (1 - hyper.alpha) * clean + hyper.alpha * sampled
    costs = {
        "symbolic": clean + (torch.tensor(times["symbolic"]) - clean) * batch_size / bounded,
        "crown-ibp": torch.tensor(times["crown-ibp"]),
        "pgd-40": torch.tensor(times["pgd-40"]),
        "pgd-7": torch.tensor(times["pgd-7"]),
    }
    words = {
        "symbolic": f"symbolic bounds at every point (timed at {bounded} points, times {batch_size / bounded:g})",
        "crown-ibp": "CROWN-IBP bounds at every point",
        "pgd-40": "PGD training with 40 steps",
        "pgd-7": "PGD training with 7 steps",
    }
    found = {
        name: mean(
            f"cost of a step, {words[name]}, over MixTrain's with {hyper.sampled} of {batch_size} points",
            (cost / ours).numpy(),
            unit="ratio",
            under="paper" if name in ("symbolic", "pgd-40") else "control",
        )
        for name, cost in costs.items()
    }
    found["step"] = mean("MixTrain's step", ours.numpy(), unit="seconds", under="control")
    return found


def _steps(
    lab: Laboratory, setup: Setup, *, batch_size: int, sampled: int, bounded: int
) -> Mapping[str, Callable[[], None]]:
    data, threat = setup.data, setup.threat
    model = fresh_model("cnn-small", data, seed=lab.seed).to(lab.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    images, labels = (part[:batch_size].to(lab.device) for part in (data.train.images, data.train.labels))
    verifiers = {"sym": Verifier(model, data, threat, bound="sym")}
    verifiers["crown-ibp"] = Verifier(model, data, threat, bound="crown-ibp")
    pgd_hyper = PgdTraining().defaults(data, threat)

    def moved(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss())
            optimizer.step()

        return step

    def verified(bound: str, points: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            margins = verifiers[bound].margins(images[:points], labels[:points])
            return functional.cross_entropy(model(images), labels) + verified_cross_entropy(margins)

        return loss

    def adversarial(steps: int, step_size: float) -> Callable[[], Tensor]:
        defense = PgdTraining({"steps": steps, "step_size": step_size, "epochs": pgd_hyper.epochs})
        objective = defense.objective(model, defense.hyper(data, threat), data, threat)
        return lambda: objective(Batch(images, labels, 0.9, generator("cost")))

    return {
        "clean": moved(lambda: functional.cross_entropy(model(images), labels)),
        "sampled": moved(verified("sym", sampled)),
        "symbolic": moved(verified("sym", bounded)),
        "crown-ibp": moved(verified("crown-ibp", batch_size)),
        "pgd-40": moved(adversarial(40, 0.01)),
        "pgd-7": moved(adversarial(7, threat.radius / 4)),
    }


def times_to_equal(lab: Laboratory, *, lengths: Sequence[int] = (3, 6, 12, 25, 60)) -> dict[str, Measurement]:
    """How long training with symbolic bounds at every point takes on digits until it proves as much as MixTrain.

    Args:
        lab: where data come from.
        lengths: epochs of such trainings, tried in turn, each with a whole ramp and schedule of its own; the first that
            proves at least as many test images is taken, or else the last.
    """
    setup = lab.setup(DIGITS)
    clock, ours = _train(lab, setup, "mixtrain", {})
    found = {
        "mixtrain verified": share("verified test images, MixTrain", ours),
        "mixtrain seconds": number("training, MixTrain", clock, 1, unit="seconds"),
    }
    points: dict[str, object] = {"sampled": 128, "alpha": 1.0}
    for epochs in lengths:
        seconds, flags = _train(lab, setup, "mixtrain", {**points, "epochs": epochs})
        reached = int(flags.sum()) >= int(ours.sum())
        if reached or epochs == lengths[-1]:
            words = f"{epochs} epochs with bounds at as many points as a mini-batch has"
            found["full verified"] = share(f"verified test images, {words}", flags)
            found["full seconds"] = number(f"training, {words}", seconds, 1, unit="seconds")
            how = "to equal verified accuracy" if reached else "without reaching MixTrain's verified accuracy"
            found["full over mixtrain"] = number(f"training {how}, over MixTrain's", seconds / clock, 1, unit="ratio")
            break
    seconds, flags = _train(lab, setup, "pgd-at", {})
    found["pgd-at verified"] = share("verified test images, PGD training", flags, under="control")
    found["pgd-at over mixtrain"] = number(
        "PGD training, over MixTrain's", seconds / clock, 1, unit="ratio", under="control"
    )
    return found


def _train(lab: Laboratory, setup: Setup, defense: str, overrides: Mapping[str, object]) -> tuple[float, Tensor]:
    """Train anew: the seconds of its steps, and which test images symbolic bounds prove."""
    clock = StepClock(lab.progress)
    model = registry.create(defense, overrides).fit(
        setup.data, setup.threat, seed=lab.seed, device=lab.device, progress=clock, checkpoints=CheckpointStore()
    )
    return clock.seconds, Verifier(model, setup.data, setup.threat, bound="sym").verified(setup.test)
