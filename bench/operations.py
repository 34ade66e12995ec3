"""What is asked of a model: each operation takes numbers and arrays, and gives numbers and arrays back.

The same operations serve a module of this process (a notebook) and a module of a worker process (everything else), so
both are judged by the same code. An operation never decides a verdict: it predicts, searches or bounds, and the caller,
which alone knows the labels' whole story, checks what comes back.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustboard.attacks import autoattack, bounds, own_certificates
from robustboard.attacks.complete import verify
from robustboard.attacks.counting import PassCounter
from robustboard.attacks.gradient_checks import FiniteGradients
from robustboard.attacks.kernels import ensembles
from robustboard.attacks.kernels.batches import examples_at_a_time
from robustboard.attacks.kernels.quick_gradients import quick_input_gradients
from robustboard.attacks.pgd import pgd
from robustboard.attacks.proofs import out_of_memory
from robustboard.attacks.threat import ThreatModel
from robustboard.bench import measures
from robustboard.bench.channel import Array
from robustboard.defenses.contract import examine_classifier
from robustboard.errors import ModelError, RobustBoardError, WorkerError, first_line

_LARGEST = sys.float_info.max
_LONGEST_TEXT, _MOST_TEXTS = 2000, 1000


@dataclass(frozen=True)
class Reply:
    """The answer to one operation: values, arrays, and what it cost.

    A stranger's code may have written it, so what is read of it is read by the methods below. They raise `WorkerError`
    where it is not there or not of its kind.

    Attributes:
        forwards: examples passed forward through the model.
        backwards: examples passed backward through it.
    """

    values: dict[str, Any]
    arrays: dict[str, Array]
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def array(self, name: str, kind: type[np.generic], shape: tuple[int, ...] | None = None) -> Array:
        """An array by its name, of a numpy type or one below it; None leaves its shape open."""
        found = self.arrays.get(name)
        if found is None or not np.issubdtype(found.dtype, kind):
            raise _unusable(name)
        if shape is not None and found.shape != shape:
            raise WorkerError(f"The model's process returned {name} of a wrong shape; the answer is not used.")
        return found

    def number(self, name: str, *, least: float = -_LARGEST, most: float = _LARGEST) -> float:
        """A finite number from `least` to `most`."""
        found = self.values.get(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not least <= found <= most:
            raise _unusable(name)
        return float(found)

    def count(self, name: str, most: int = 2**53) -> int:
        """A whole number from 0 to `most`."""
        found = self.number(name, least=0, most=most)
        if not found.is_integer():
            raise _unusable(name)
        return int(found)

    def choice(self, name: str, options: Sequence[str]) -> str:
        """One of some words."""
        found = self.values.get(name)
        if not isinstance(found, str) or found not in options:
            raise _unusable(name)
        return found

    def listed(self, name: str) -> list[object]:
        """A list of anything, of a length that can be kept."""
        found = self.values.get(name)
        if not isinstance(found, list) or len(found) > _MOST_TEXTS:
            raise _unusable(name)
        return found

    def texts(self, name: str) -> list[str]:
        """A list of sentences, of a length that can be kept."""
        found = [one for one in self.listed(name) if isinstance(one, str) and len(one) <= _LONGEST_TEXT]
        if len(found) != len(self.listed(name)):
            raise _unusable(name)
        return found

    def part(self, name: str) -> Reply:
        """Values by their names within the values."""
        found = self.values.get(name)
        if not isinstance(found, dict):
            raise _unusable(name)
        return Reply(found, {})


def _unusable(name: str) -> WorkerError:
    return WorkerError(f"The model's process sent no proper {name!r}; its answer is not used.")


class Operations:
    """A classifier and the operations on it.

    Args:
        model: the classifier, already in eval mode on `device`.
        device: where it runs.
        on_forwards: called with the number of examples of every forward pass, as a sign of life.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, on_forwards: Callable[[int], None] | None = None
    ) -> None:
        self._model = model
        # What attacks are shown: the model, or a stand-in with zeros for gradients that would stop them.
        self._target = model
        self._device = device
        self._on_forwards = on_forwards
        # Asked before any operation hooks the model to count its passes.
        self._own_bounds = own_certificates.applicable(model)
        self._views = bounds.Views(model)
        self._table: dict[str, Callable[[Mapping[str, Any], Mapping[str, Array]], Reply]] = {
            "check": self._check,
            "predict": self._predict,
            "pgd": self._pgd,
            "reference_checks": self._reference_checks,
            "attack": self._attack,
            "autoattack": self._autoattack,
            "certify": self._certify,
            "measure": self._measure,
            "complete": self._complete,
        }

    def run(self, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        """Run one operation by name and count its cost.

        Raises:
            RobustBoardError: whatever sentence the operation has for the user.
            ModelError: if the model's own code raises.
            WorkerError: if memory runs out.
        """
        began = time.perf_counter()
        with _full_precision(), PassCounter(self._model, on_forward=self._on_forwards) as counter:
            try:
                reply = self._table[operation](params, arrays)
            except RobustBoardError:
                raise
            except Exception as error:
                # What the machine lacks is no finding about the model.
                kind = WorkerError if out_of_memory(error) else ModelError
                raise kind(f"The model failed during {operation}: {first_line(error)}.") from error
        return Reply(reply.values, reply.arrays, time.perf_counter() - began, counter.forwards, counter.backwards)

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)

    def _images(self, arrays: Mapping[str, Array]) -> tuple[Tensor, Tensor]:
        return self._tensor(arrays["images"]), self._tensor(arrays["labels"])

    def _check(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        """The classifier contract, measured; the reply names the certificates of the board's own that suit the model.

        A model whose gradient is missing or not finite is attacked through a stand-in that gives zeros for it, so that
        what needs no gradient can still judge it.
        """
        behaviour = examine_classifier(self._model, self._tensor(arrays["images"]), classes=int(params["classes"]))
        if behaviour.gradient != "present":
            self._target = FiniteGradients(self._model)
        return Reply({"own_bounds": list(self._own_bounds), "behaviour": dataclasses.asdict(behaviour)}, {})

    def _predict(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        """Logits of one canonical batch, on one thread: the pass that verdicts rest on."""
        del params
        with _one_thread(), torch.inference_mode():
            logits = self._model(self._tensor(arrays["images"]))
        return Reply({}, {"logits": logits.float().cpu().numpy()})

    def _pgd(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        def attack(images: Tensor, labels: Tensor, rows: slice) -> Tensor:
            return pgd(
                self._target,
                images,
                labels,
                threat=_threat(params),
                keys=params["keys"][rows],
                seed=params["seed"],
                steps=params["steps"],
                restarts=params["restarts"],
                step_size=params["step_size"],
                losses=tuple(params["losses"]),
                runs=params["runs"],
            )

        return self._in_parts(attack, arrays)

    def _attack(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        """One of the board's own attacks."""
        targets = self._tensor(arrays["targets"])

        def attack(images: Tensor, labels: Tensor, rows: slice) -> Tensor:
            return ensembles.run(
                params["stage"],
                self._target,
                images,
                labels,
                threat=_threat(params),
                keys=params["keys"][rows],
                seed=params["seed"],
                targets=targets[rows],
                most=params["most"],
            )

        return self._in_parts(attack, arrays)

    def _in_parts(self, attack: Callable[[Tensor, Tensor, slice], Tensor], arrays: Mapping[str, Array]) -> Reply:
        """What an attack finds on images (N, C, H, W), as many at a time as suits the device."""
        images, labels = self._images(arrays)
        size = examples_at_a_time(self._model, images[:1]) if len(images) else 1
        parts = [slice(first, first + size) for first in range(0, len(images), size)]
        with quick_input_gradients(self._model):
            found = [attack(images[rows], labels[rows], rows) for rows in parts]
        return Reply({}, {"adversarial": torch.cat([*found, images[:0]]).cpu().numpy()})

    def _reference_checks(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        images, labels = self._images(arrays)
        warnings = autoattack.reference_checks(
            self._target, images, labels, classes=params["classes"], batch_size=params["batch_size"]
        )
        return Reply({"warnings": list(warnings)}, {})

    def _autoattack(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        images, labels = self._images(arrays)
        result = autoattack.run_stage(
            self._target,
            images,
            labels,
            threat=_threat(params),
            stage=params["stage"],
            seed=params["seed"],
            batch_size=params["batch_size"],
            classes=params["classes"],
        )
        return Reply({"warnings": list(result.warnings)}, {"adversarial": result.adversarial.cpu().numpy()})

    def _certify(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        images, labels = self._images(arrays)
        asked = {"threat": _threat(params), "method": params["method"], "classes": params["classes"]}
        if params["method"] in self._own_bounds:
            result = own_certificates.certify(self._model, images, labels, **asked, on_examples=self._on_forwards)
        else:
            result = bounds.certify(
                self._model,
                images,
                labels,
                **asked,
                iterations=params["iterations"],
                memory_bytes=params["memory_bytes"],
                on_examples=self._on_forwards,
                views=self._views,
            )
        return Reply(
            {"notes": [*([result.reason] if result.reason else []), *result.notes], "wrong": result.wrong},
            {
                "margins": result.margins.cpu().numpy(),
                "certified": result.certified.cpu().numpy(),
                "excluded": result.excluded.cpu().numpy(),
            },
        )

    def _measure(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        images, labels = self._images(arrays)
        subject = measures.Subject(
            self._target, images, labels, tuple(params["keys"]), _threat(params), int(params["classes"])
        )
        found = measures.measure(params["measure"], subject)
        return Reply(dict(found.values), dict(found.arrays))

    def _complete(self, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        """Proofs and counter-examples; a sign of life counts nodes, and the passes that confirm a counter-example."""
        images, labels = self._images(arrays)
        found = verify.settle(
            self._model,
            images,
            labels,
            threat=_threat(params),
            classes=params["classes"],
            nodes=params["nodes"],
            memory_bytes=params["memory_bytes"],
            on_nodes=self._on_forwards,
        )
        return Reply(
            {"notes": found.notes, "methods": found.methods, "reason": found.bounds.reason},
            {
                "adversarial": found.adversarial.cpu().numpy(),
                "margins": found.bounds.margins.cpu().numpy(),
                "certified": found.bounds.certified.cpu().numpy(),
                "excluded": found.bounds.excluded.cpu().numpy(),
            },
        )


def _threat(params: Mapping[str, Any]) -> ThreatModel:
    return ThreatModel.parse(params["norm"], params["eps"])


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TensorFloat-32 on a GPU: it keeps ten bits of a factor, which is nothing to rest a verdict on."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the machine's core count, so that equal tensors give equal verdicts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
