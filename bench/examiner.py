"""The questions that an evaluation puts to a model, with their cost and their notes.

An attack draws by example, so no cut of the rows into parts and no option of a run can change an answer. A shard is a
canonical batch of the track's order. A break counts only when the very tensor that is stored lies in the ball and is
misclassified in the canonical pass: its whole shard, with the rows that the attack broke and the others clean, on one
thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from robustboard.attacks import own_certificates
from robustboard.attacks.complete import verify
from robustboard.attacks.engine_warnings import EngineWarning, read_warnings
from robustboard.attacks.kernels.apgd import TARGETS
from robustboard.bench.answers import CompleteAnswer, Floats, Proofs, StageCost
from robustboard.bench.asking import Budget, OneAtATime, Request, asked, attempted
from robustboard.bench.channel import Array
from robustboard.bench.operations import Reply
from robustboard.bench.parts import LEAST_ATTACKED, LEAST_BOUNDED, parts
from robustboard.bench.protocol import Examples, Track
from robustboard.bench.session import Session
from robustboard.bench.verdicts import Flags, Rows, flags
from robustboard.defenses.adapter import Progress
from robustboard.defenses.contract import GRADIENTS
from robustboard.errors import GateError, ModelError, WorkerError

# Example-forwards that the reference code spends on an example that survives, with ten classes: for progress bars only.
REFERENCE_FORWARDS = {"apgd_ce": 103, "apgd_t": 920, "fab_t": 1829, "square": 5004}

# Enough to see randomness, NaN or a wrong shape, cheap on any network.
_CHECKED_IMAGES = 16

# A record holds a hundred sentences.
_MOST_NOTES = 50


@dataclass
class Examiner:
    """Puts a track's questions to a session.

    Attributes:
        bound_methods: the track's bound methods, and after `check` those of the board's own that suit the model.
        costs: stage -> what it cost so far.
        bounding: for each bound method that was asked, whether it could bound any example.
        notes: what limits a result, such as bounds that cannot run on this network.
        warnings: what the reference engine's own checks said.
        behaviour: after `check`, how the model behaves where the contract could be broken: the values of
            `robustboard.defenses.contract.Behaviour`, and on how many images (`n`).
        verified: whether complete verification could be asked about an example so far.
    """

    session: Session
    track: Track
    examples: Examples
    progress: Progress
    costs: dict[str, StageCost] = field(default_factory=lambda: defaultdict(StageCost))
    bounding: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[EngineWarning] = field(default_factory=list)
    behaviour: dict[str, float | str] = field(default_factory=dict)
    verified: bool = False

    def __post_init__(self) -> None:
        self.progress = OneAtATime(self.progress)
        self.images = self.examples.floats()
        self.labels = self.examples.labels
        self.threat = self.track.threat
        self.bound_methods: tuple[str, ...] = self.track.bounds.methods

    def shards(self, wanted: Flags) -> Iterator[tuple[Rows, Rows]]:
        """Each canonical batch with the rows of it that are wanted, where there are any."""
        everything = np.arange(len(self.labels))
        for begin in range(0, len(everything), self.track.batch_size):
            shard = everything[begin : begin + self.track.batch_size]
            rows = shard[wanted[shard]]
            if len(rows):
                yield shard, rows

    def check(self) -> None:
        """Measure the model against its contract, and learn whether the board has certificates of its own for it.

        Raises:
            ModelError: if it breaks a rule without which no verdict can be formed.
        """
        sample = self.images[:_CHECKED_IMAGES]
        reply = self._call("check", "check", {"classes": self.examples.classes}, {"images": sample})
        behaviour, own = reply.part("behaviour"), reply.texts("own_bounds")
        self.behaviour = {
            **{name: behaviour.number(name, least=0) for name in ("repeat_change", "batch_change", "autograd_change")},
            "gradient": behaviour.choice("gradient", GRADIENTS),
            "n": len(sample),
        }
        self.bound_methods = (
            *self.track.bounds.methods,
            *(method for method in own_certificates.METHODS if method in own),
        )

    def reference_checks(self) -> None:
        """Ask the reference engine's own checks about the first shard; what they say goes to `warnings`."""
        first = slice(0, self.track.batch_size)
        settings = {"classes": self.examples.classes, "batch_size": self.track.batch_size}
        arrays: dict[str, Array] = {"images": self.images[first], "labels": self.labels[first]}
        reply = self._call("check", "reference_checks", settings, arrays)
        self.warnings += read_warnings("checks", reply.texts("warnings"))

    def predict(self, stage: str, images: Floats) -> npt.NDArray[np.int64]:
        """The classes of one canonical batch, (N, C, H, W) -> (N,).

        Raises:
            ModelError: if a logit is not finite: such an answer is neither right nor wrong.
        """
        (predicted,) = self.predict_each(stage, [images])
        return predicted

    def predict_each(self, stage: str, batches: Iterable[Floats]) -> Iterator[npt.NDArray[np.int64]]:
        """The classes of several canonical batches, in their order; see `predict`."""
        requests = (Request("predict", {}, {"images": images}) for images in batches)
        for request, reply in asked(self.session, requests):
            self.costs[stage].add(reply)
            yield self._classes(stage, reply, len(request.arrays["images"]))

    def _classes(self, stage: str, reply: Reply, count: int) -> npt.NDArray[np.int64]:
        logits = reply.array("logits", np.floating)
        if logits.shape != (count, self.examples.classes):
            raise ModelError(
                f"The model must return logits of shape (N, {self.examples.classes}); for {count} images it returned "
                f"{logits.shape}."
            )
        if not np.isfinite(logits).all():
            raise ModelError(f"The model returned NaN or infinite logits during {stage}, so the run stops.")
        predicted: npt.NDArray[np.int64] = logits.argmax(axis=1)
        return predicted

    def pgd(self, stage: str, rows: Rows, *, runs: Sequence[int] | None = None) -> Floats:
        """PGD's perturbed images for `rows`; `runs` chooses among its runs, None takes all."""
        pgd = self.track.attacks.pgd
        settings = {
            **self._threat_settings(),
            "seed": pgd.seed,
            "steps": pgd.steps,
            "restarts": pgd.restarts,
            "step_size": float(pgd.step) * self.threat.radius,
            "losses": list(pgd.losses_for(self.examples.classes)),
            "runs": None if runs is None else list(runs),
        }
        parts = self._parts(rows)
        requests = (self._attack_request("pgd", {**settings, "keys": self._keys(part)}, part) for part in parts)
        return self._found(stage, parts, requests)

    def attack(
        self, stage: str, attack: str, rows: Rows, *, targets: Flags | None = None, most: int = TARGETS
    ) -> tuple[Flags, Floats]:
        """One of the board's own attacks on `rows`, many at a time.

        Args:
            stage: where its cost is entered.
            attack: one of `robustboard.attacks.kernels.ensembles.STAGES`.
            rows: in rising order, of whichever shards.
            targets: (N, K), the classes worth a try; None for all.
            most: how many classes targeted attacks try.

        Returns:
            Which of the rows are broken, and their perturbed images.
        """
        parts = self._parts(rows)
        settings = {
            **self._threat_settings(),
            "stage": attack,
            "seed": self.track.attacks.autoattack.seed,
            "most": most,
        }
        if targets is None:
            targets = np.ones((len(self.labels), self.examples.classes), dtype=bool)
        requests = (
            self._attack_request("attack", {**settings, "keys": self._keys(part)}, part, targets=targets[part])
            for part in parts
        )
        found = self._found(stage, parts, requests)
        return self.confirm(stage, attack, rows, found), found

    def _found(self, stage: str, parts: Sequence[Rows], requests: Iterable[Request]) -> Floats:
        """The perturbed images that the answers hold, one after the other."""
        found = []
        # Not a comprehension: after an error its frame would hold the questions open.
        for part, (_, reply) in zip(parts, asked(self.session, requests), strict=True):
            self.costs[stage].add(reply)
            found.append(self.perturbed(reply, part))
        return np.concatenate([*found, self.images[:0]])

    def autoattack(self, stage: str, attack: str, wanted: Flags) -> tuple[Rows, Flags, Floats]:
        """One of the reference engine's attacks on the rows that are wanted.

        The reference code draws by batch, so it is given the track's full batches, less what is not wanted.

        Returns:
            The rows, which of them are broken, and their perturbed images.
        """
        found = self.images.copy()
        for begin in range(0, len(self.labels), self.track.batch_size):
            batch = self.examples.draws[begin : begin + self.track.batch_size]
            rows = batch[wanted[batch]]
            if len(rows):
                found[rows] = self._reference_batch(stage, attack, rows)
        every = np.flatnonzero(wanted)
        return every, self.confirm(stage, attack, every, found[every]), found[every]

    def _reference_batch(self, stage: str, attack: str, rows: Rows) -> Floats:
        settings = {
            **self._threat_settings(),
            "stage": attack,
            "seed": self.track.attacks.autoattack.seed,
            "batch_size": self.track.batch_size,
            "classes": self.examples.classes,
        }
        reply = self._call(stage, "autoattack", settings, self._rows(rows), bar=True)
        self.warnings += read_warnings(attack, reply.texts("warnings"))
        return self.perturbed(reply, rows)

    def certify(self, stage: str, methods: Sequence[str], rows: Rows) -> dict[str, Proofs]:
        """What each method proves of `rows`, at least one, whichever shards they are of; moves the bar by them."""
        settings = {
            **self._threat_settings(),
            "classes": self.examples.classes,
            "iterations": self.track.bounds.alpha_iterations,
            "memory_bytes": self.track.bounds.memory_mebibytes << 20,
        }
        parts = self._parts(rows, least=LEAST_BOUNDED)
        asking = [(method, part) for method in methods for part in parts]
        requests = (Request("certify", {**settings, "method": name}, self._rows(part)) for name, part in asking)
        found: dict[str, list[Proofs]] = {method: [] for method in methods}
        for (method, part), (_, reply) in zip(asking, asked(self.session, requests), strict=True):
            self.costs[stage].add(reply)
            self.progress.advance(len(part))
            found[method].append(self._proofs_of(reply, method, part))
        return {method: self._together(method, proofs) for method, proofs in found.items()}

    def _together(self, method: str, parts: Sequence[Proofs]) -> Proofs:
        """One answer from those on parts; a method that was wrong in one part proves nothing in any."""
        if any(part.wrong for part in parts):
            parts = [part.void() for part in parts]
        proofs = Proofs(
            np.concatenate([part.certified for part in parts]),
            np.concatenate([part.margins for part in parts]),
            np.concatenate([part.excluded for part in parts]),
            any(part.wrong for part in parts),
        )
        self.bounding[method] = self.bounding.get(method, False) or bool(np.isfinite(proofs.margins).any())
        return proofs

    def complete(self, stage: str, rows: Rows, nodes: int) -> CompleteAnswer | None:
        """Complete verification of `rows` of one shard, `nodes` sub-domains each; None where the network has none."""
        settings = {
            **self._threat_settings(),
            "classes": self.examples.classes,
            "nodes": nodes,
            "memory_bytes": self.track.bounds.memory_mebibytes << 20,
        }
        answer = CompleteAnswer(
            self.images[rows].copy(), [None] * len(rows), np.zeros((0, self.examples.classes), np.float32)
        )
        margins: list[Floats] = []
        singles = [np.array([row]) for row in rows]
        budgets = [Budget(nodes, self.progress) for _ in rows]
        requests = [
            Request("complete", settings, self._rows(one), budget.advance)
            for one, budget in zip(singles, budgets, strict=True)
        ]
        for place, (_, reply) in enumerate(asked(self.session, requests)):
            one = singles[place]
            self.costs[stage].add(reply)
            budgets[place].finish()
            proofs = self._proofs_of(reply, "complete", one)
            if reply.values.get("reason") is not None:
                if self.verified:
                    raise WorkerError(
                        "The model's process verified some examples and then said that of this network none can be "
                        "verified; the run stops."
                    )
                return None
            self.verified = True
            answer.found[place] = self.perturbed(reply, one)[0]
            names = [verify.known_method(name) for name in reply.listed("methods")]
            if len(names) != 1 or (proofs.certified[0] and names[0] is None):
                raise WorkerError("The model's process did not say how it verified an example; the run stops.")
            answer.methods[place] = names[0] if proofs.certified[0] else None
            margins.append(proofs.margins)
        return replace(answer, margins=np.concatenate(margins))

    def _proofs_of(self, reply: Reply, method: str, rows: Rows) -> Proofs:
        """What a reply proves about `rows`; its notes go to `notes`."""
        new = [note for note in reply.texts("notes") if note not in self.notes]
        self.notes += new[: max(0, _MOST_NOTES - len(self.notes))]
        certified = reply.array("certified", np.bool_, (len(rows),)).astype(bool)
        square = len(rows), self.examples.classes
        margins = reply.array("margins", np.floating, square).astype(np.float32)
        excluded = reply.array("excluded", np.bool_, square).astype(bool)
        if np.isnan(margins[certified]).any():
            raise WorkerError(f"The model's process returned {method} bounds that are no numbers; they are not used.")
        return Proofs(certified, margins, excluded, reply.values.get("wrong") is True)

    def measures(self, stage: str, questions: Sequence[tuple[str, Rows]]) -> Generator[Reply | ModelError, None, None]:
        """Measurements of `robustboard.bench.measures`, in order: by name, each on rows of whichever shards.

        What the model does not bear is given in place of an answer.
        """
        for found in attempted(self.session, [self._measurement(name, rows) for name, rows in questions]):
            if isinstance(found, Reply):
                self.costs[stage].add(found)
            yield found

    def _measurement(self, name: str, rows: Rows) -> Request:
        settings = {
            **self._threat_settings(),
            "measure": name,
            "classes": self.examples.classes,
            "keys": self._keys(rows),
        }
        return Request("measure", settings, self._rows(rows))

    def perturbed(self, reply: Reply, rows: Rows) -> Floats:
        """The perturbed images of `rows` that a reply holds, (len(rows), C, H, W)."""
        return reply.array("adversarial", np.float32, self.images[rows].shape).astype(np.float32, copy=False)

    def confirm(self, stage: str, attack: str, rows: Rows, found: Floats) -> Flags:
        """Which of the perturbed images of `rows` are misclassified, and again with only these in their shard.

        Args:
            stage: where the cost is entered.
            attack: whose images they are.
            rows: in rising order, of whichever shards.
            found: (len(rows), C, H, W).

        Raises:
            GateError: if one of them is not an allowed perturbation.
        """
        inside = self.threat.contains(torch.from_numpy(found), torch.from_numpy(self.images[rows])).numpy()
        if not inside.all():
            raise GateError(
                f"Gate: {attack} left the {self.threat.norm} ball of radius {self.threat.text} on "
                f"{self.names(rows[~inside])}; this is a bug of the attack, so nothing is published."
            )
        everywhere = self._misclassified(stage, rows, found)
        broken = everywhere.copy()
        broken[everywhere] = self._misclassified(stage, rows[everywhere], found[everywhere])
        return broken

    def _misclassified(self, stage: str, rows: Rows, found: Floats) -> Flags:
        """Which of `rows` are misclassified, each in one pass over its shard, whose other rows are clean."""
        wrong = np.zeros(len(rows), dtype=bool)
        shards = list(self.shards(flags(rows, len(self.labels))))
        batches = (self._mixed(shard, part, found[np.searchsorted(rows, part)]) for shard, part in shards)
        for (shard, part), predicted in zip(shards, self.predict_each(stage, batches), strict=True):
            wrong[np.searchsorted(rows, part)] = predicted[np.searchsorted(shard, part)] != self.labels[part]
        return wrong

    def _mixed(self, shard: Rows, rows: Rows, found: Floats) -> Floats:
        """A shard's images, perturbed in some rows."""
        batch: Floats = self.images[shard].copy()
        batch[np.searchsorted(shard, rows)] = found
        return batch

    def names(self, rows: Rows) -> str:
        """Examples by the beginning of their content hash, the first five spelled out."""
        names = [self.examples.hashes[row][:12] for row in rows[:5]]
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        return f"example{'s' if len(rows) > 1 else ''} {', '.join(names)}{more}"

    def _parts(self, rows: Rows, *, least: int = LEAST_ATTACKED) -> list[Rows]:
        return parts(rows, most=self.track.batch_size, jobs=self.session.jobs, least=least)

    def _keys(self, rows: Rows) -> list[str]:
        return [self.examples.hashes[row] for row in rows]

    def _attack_request(self, operation: str, params: Mapping[str, Any], rows: Rows, **arrays: Array) -> Request:
        return Request(operation, params, {**self._rows(rows), **arrays}, self.progress.advance)

    def _threat_settings(self) -> dict[str, Any]:
        return {"norm": self.threat.norm, "eps": str(self.threat.eps)}

    def _rows(self, rows: Rows) -> dict[str, Array]:
        return {"images": self.images[rows], "labels": self.labels[rows]}

    def _call(
        self, stage: str, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array], *, bar: bool = False
    ) -> Reply:
        reply = self.session.call(operation, params, arrays, on_forwards=self.progress.advance if bar else None)
        self.costs[stage].add(reply)
        return reply
