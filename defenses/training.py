"""The loop that all gradient-trained baselines share: seeded mini-batches, a learning-rate schedule, resumable epochs.

A method hands over its loss of one mini-batch; everything random comes from generators keyed by (seed, epoch), so an
epoch is the same whether or not the training was interrupted before it.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from robustboard.attacks import global_draws
from robustboard.attacks.keyed import derive_seed
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, Defense, Progress, Split, TrainingData
from robustboard.defenses.architectures import build, channel_statistics, default_for
from robustboard.defenses.batches import Batch, epoch_batches
from robustboard.defenses.fingerprint import fingerprint
from robustboard.errors import DefenseError

Schedule = Literal["one-cycle", "piecewise", "half-way", "constant"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the weights move; each method adds its own hyper-parameters.

    Attributes:
        architecture: a name that `architectures.build` knows.
        epochs: passes over the training images.
        lr: the largest learning rate.
        batch_size: images in a mini-batch, at most.
        optimizer: `adam`, or `sgd` with momentum 0.9.
        schedule: the learning rate's way over the training, see `learning_rate`.
        weight_decay: the optimizer's L2 penalty.
        augment: random crops and horizontal flips, see `batches.augmented`.
    """

    architecture: str
    epochs: int
    lr: float = 5e-3
    batch_size: int = 128
    optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Schedule = "one-cycle"
    weight_decay: float = 0.0
    augment: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, not {self.epochs} and {self.batch_size}")
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr must be positive and weight_decay not negative, not {self.lr:g} and {self.weight_decay:g}"
            )


Objective = Callable[[Batch], Tensor]


class Controller(Protocol):
    """What steers a training from epoch to epoch, such as a weight that follows validation figures."""

    def epoch_end(self, epoch: int) -> Mapping[str, float]:
        """Called after each epoch (counted from 1), before its checkpoint; returns numbers to log beside the loss."""

    def state(self) -> Mapping[str, Any]:
        """What a resumed training needs, in the types that a `CheckpointStore` keeps."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""


Hyper = TypeVar("Hyper", bound=Recipe)


class GradientDefense(Defense[Hyper], Generic[Hyper]):
    """A defense that is a loss and a recipe: subclasses say what is minimised, and the loop here does the rest."""

    @abstractmethod
    def objective(self, model: nn.Module, hyper: Hyper, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch, a scalar, as a function that `train` minimises.

        Args:
            model: the network under training, on its device.
            hyper: the hyper-parameters in force.
            data: for its shapes and statistics.
            threat: what the network is to withstand.
        """

    def fit(
        self,
        data: TrainingData,
        threat: ThreatModel,
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
        checkpoints: CheckpointStore,
    ) -> nn.Module:
        """Initialise a network and minimise the method's objective; see `Defense.fit`."""
        hyper = self.hyper(data, threat)
        model = fresh_model(hyper.architecture, data, seed=seed).to(device)
        return train(
            model,
            self.objective(model, hyper, data, threat),
            data,
            hyper,
            threat=threat,
            name=self.card.name,
            seed=seed,
            device=device,
            progress=progress,
            checkpoints=checkpoints,
        )


def fresh_model(architecture: str, data: TrainingData, *, seed: int) -> nn.Sequential:
    """The initial network for a data set; colour images are normalised inside it by the training split's statistics."""
    normalize = channel_statistics(data.train.images) if data.image_shape[0] > 1 else None
    return build(
        architecture,
        image_shape=data.image_shape,
        classes=data.classes,
        seed=derive_seed(seed, "initial weights"),
        normalize=normalize,
    )


class Sized(TypedDict):
    """The part of a recipe that follows from the data set."""

    architecture: str
    epochs: int
    augment: bool


def sized(data: TrainingData, *, examples: int) -> Sized:
    """A recipe that two CPU cores can follow, for any data set.

    Args:
        data: its image shape chooses the network; colour images are augmented.
        examples: about how many images the network should see; the number of epochs stays between 2 and 100.
    """
    return Sized(
        architecture=default_for(data.image_shape),
        epochs=min(100, max(2, round(examples / max(1, len(data.train))))),
        augment=data.image_shape[0] == 3,
    )


def train(
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    recipe: Recipe,
    *,
    threat: ThreatModel,
    name: str,
    seed: int,
    device: torch.device,
    progress: Progress,
    checkpoints: CheckpointStore,
    controller: Controller | None = None,
    frozen_statistics: bool = False,
    stratified: bool = False,
) -> nn.Module:
    """Minimise `objective` and return `model`, trained, in eval mode on `device`.

    Only parameters that require a gradient move. After every epoch the state goes to `checkpoints` under `name`; a
    state of the very same training (method, recipe, seed, radius, data and initial weights) is continued, any other is
    ignored. The global random state is left as it was.

    Args:
        model: the initial network.
        objective: the loss of a mini-batch.
        data: what to train on.
        recipe: how the weights move.
        threat: what the network is to withstand.
        name: of the checkpoint, and of the progress bar.
        seed: of all that is drawn.
        device: where to train.
        progress: told about every step and epoch.
        checkpoints: where states are kept.
        controller: steers the training between epochs.
        frozen_statistics: train in eval mode, so that running statistics stay as they are and dropout is off.
        stratified: every mini-batch holds the classes in the proportions of the training split, see `epoch_batches`.

    Raises:
        DefenseError: if there are no training images, or the loss stops being a finite number.
    """
    if not len(data.train):
        raise DefenseError(f"{name} cannot be trained on {data.name}: its training split is empty.")
    model.to(device).train(not frozen_statistics)
    optimizer = _optimizer(model, recipe)
    identity = _identity(name, recipe, threat, seed, data, model)
    steps = math.ceil(len(data.train) / recipe.batch_size)
    first = _resume(checkpoints.load(name), identity, model, optimizer, controller)
    progress.begin(f"train {name}", recipe.epochs * steps)
    if first:
        progress.advance(first * steps)
    for epoch in range(first, recipe.epochs):
        total = torch.zeros((), device=device)
        with _seeded(derive_seed(seed, "epoch", epoch), device):
            for batch in epoch_batches(
                data.train,
                size=recipe.batch_size,
                augment=recipe.augment,
                epoch=epoch,
                epochs=recipe.epochs,
                seed=seed,
                device=device,
                stratified=stratified,
            ):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * learning_rate(recipe.schedule, batch.done)
                loss = objective(batch)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                total += loss.detach() * len(batch.labels)
                progress.advance()
        mean = float(total) / len(data.train)
        if not math.isfinite(mean):
            raise DefenseError(f"The training of {name} diverged in epoch {epoch + 1}; try a smaller lr.")
        told = {} if controller is None else dict(controller.epoch_end(epoch + 1))
        checkpoints.save(
            name,
            {
                "identity": identity,
                "epochs": epoch + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "controller": {} if controller is None else dict(controller.state()),
            },
        )
        progress.note(epoch=epoch + 1, loss=mean, validation=accuracy(model, data.validation), **told)
    return model.eval()


def learning_rate(schedule: Schedule, done: float) -> float:
    """The learning rate as a share of its largest value, after the share `done` of the training.

    `one-cycle` rises linearly over the first quarter and falls linearly to zero; `piecewise` falls tenfold after one
    half and again after three quarters, `half-way` only after one half.

    >>> [learning_rate("one-cycle", done) for done in (0.125, 0.25, 0.625)]
    [0.5, 1.0, 0.5]
    """
    if schedule == "one-cycle":
        return min(max(4 * done, 0.01), (1 - done) / 0.75)
    if schedule == "piecewise":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    if schedule == "half-way":
        return 1.0 if done < 0.5 else 0.1
    return 1.0


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block: an attack is made against the network as it will be used, and moves no statistics."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def accuracy(model: nn.Module, split: Split) -> float:
    """The share of a split that is classified correctly, NaN for an empty split."""
    if not len(split):
        return math.nan
    device, correct = device_of(model), 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(split), 500):
            logits = model(split.images[start : start + 500].to(device))
            correct += int((logits.argmax(dim=1).cpu() == split.labels[start : start + 500]).sum())
    return correct / len(split)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(moving, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(moving, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)


def _identity(name: str, recipe: Recipe, threat: ThreatModel, seed: int, data: TrainingData, initial: nn.Module) -> str:
    moving = [key for key, parameter in initial.named_parameters() if parameter.requires_grad]
    words = (name, recipe, threat, seed, data.classes, moving)
    return fingerprint(words, [data.train.images, data.train.labels, *initial.state_dict().values()])


def _resume(
    state: dict[str, Any] | None,
    identity: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    controller: Controller | None,
) -> int:
    """Put a kept state where it belongs; how many epochs it holds, 0 if it is of another training."""
    if state is None or state.get("identity") != identity:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if controller is not None:
        controller.restore(state["controller"])
    return int(state["epochs"])


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout takes no generator: inside the block the global ones are seeded, afterwards they are what they were."""
    cuda = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(global_draws.preserved([device] if cuda else []))
        if cuda:
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
        torch.manual_seed(seed)
        yield
